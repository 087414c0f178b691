"""Draw random numbers for sampling and noise, unpredictable ones or, in simulations, seeded ones.

Whoever can predict the noise can subtract it, so a real run must use SecureRandomness. This module knows
nothing of privacy parameters: the plan gives the number of draws and their chance or scale.

Normals come out in float32, as in every DP-SGD library. Attacks on the lowest bits of floating-point noise
(Mironov 2012) are not defended against.
"""

import hashlib
import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

if TYPE_CHECKING:  # reading a ledger needs no torch
    from torch import Tensor

_CHUNK = 2**16
"""Normals made at once: the working arrays stay in the processor's cache."""
_NEAR_ONE = 1 - 2.0**-16
"""Above this a float32 is too coarse for 1 - u, and so for log(u): the logarithm is taken in float64."""
_ZEROS = bytes(12 * _CHUNK // 2)


class Purpose(StrEnum):
    """Name the use of random numbers, each of which has a stream of its own."""

    SAMPLING = "sampling"
    NOISE = "noise"
    PROPORTIONS = "proportions"
    METRICS = "metrics"


class Generator(StrEnum):
    """Name the generators behind sampling and noise as ledgers, statements and reports do."""

    AES = "AES-256-CTR, a fresh key from the operating system for every round and purpose"
    OPENDP = "OpenDP's exact sampler on its own cryptographic generator"
    SEEDED = "INSECURE: PCG64 seeded with the experiment's seed, for simulations only"
    UNKNOWN = "unknown: not in these records"
    """Nothing may be promised on it."""

    @classmethod
    def read(cls, text: str) -> "Generator":
        """Return the generator that a record names, or UNKNOWN for any other text."""
        return cls(text) if text in set(cls) else cls.UNKNOWN

    @property
    def secure(self) -> bool:
        """Return True if its numbers cannot be predicted."""
        return self in (Generator.AES, Generator.OPENDP)


class Stream(ABC):
    """Provide an endless sequence of random bits, from which nothing is drawn twice."""

    fine: ClassVar[bool] = True
    """Whether normals are made with full care near zero. Simulations repeat those of earlier releases."""

    @abstractmethod
    def raw(self, size: int) -> NDArray[np.uint8]:
        """Return the next ``size`` uniform bytes, in an array of their own."""

    def words(self, number: int) -> NDArray[np.uint64]:
        """Return the next ``number`` uniform 64-bit words."""
        return self.raw(8 * number).view(np.uint64)

    def chosen(self, chance: float, number: int) -> NDArray[np.int64]:
        """Return indices below ``number``, each included independently with ``chance``.

        This is Poisson sampling.
        """
        if chance >= 1:
            return np.arange(number, dtype=np.int64)
        # A word below chance * 2**64 includes its index. The product is exact for every float64 chance
        # above 2**-11 and else rounded down, so that no bag is sampled more often than accounted for.
        return np.flatnonzero(self.words(number) < np.uint64(math.floor(chance * 2**64))).astype(np.int64)

    def add_normals(self, values: "Tensor", standard_deviation: float) -> None:
        """Add normal numbers to a float32 tensor of shape (n,) on the CPU, in place, by Box-Muller.

        The radius comes from 63 bits, so the tail reaches 9.3 standard deviations (a float32 uniform would
        end it at 5.8); the angle from 31 bits, more than float32 resolves. With ``fine`` no number is exactly
        zero, and no radius is wrong by more than 1e-5 standard deviations or by more than 0.2 %.
        """
        import torch

        for start in range(0, len(values), _CHUNK):
            part = values[start : start + _CHUNK]
            half = (len(part) + 1) // 2
            bits = torch.from_numpy(self.raw(12 * half))
            # 63 bits for the radius: a float32 uniform would end the tail at 5.8 standard deviations, and a
            # shorter tail than accounted for weakens the guarantee.
            words = bits[: 8 * half].view(torch.int64).bitwise_and_(2**63 - 1)
            turns = bits[8 * half :].view(torch.int32)
            uniform = words.float().add_(1).mul_(2.0**-63)
            if self.fine:
                turns.bitwise_or_(1)  # an angle of 0 has the sine 0
            # Close to 1 a float32 cannot resolve 1 - u, so radii near zero would take few values only.
            near = (
                np.flatnonzero(uniform.numpy() > _NEAR_ONE) if self.fine and uniform.max() > _NEAR_ONE else ()
            )
            radius = uniform.log_()
            if len(near):
                radius.numpy()[near] = _log_near_one(words.numpy()[near])
            radius.mul_(-2 * standard_deviation**2).sqrt_()
            angle = turns.float().mul_(math.pi * 2.0**-31)
            rest = len(part) - half
            part[:half].addcmul_(angle.cos(), radius)
            part[half:].addcmul_(angle.sin_()[:rest], radius[:rest])


def _log_near_one(words: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return log(u), below 0, for the uniform number u = (word + 1/2) / 2**63.

    Args:
        words: any shape, in [0, 2**63); exact to float64 however near u is to 1.
    """
    beyond = (np.int64(2**63 - 1) - words).astype(np.float64) + 0.5
    return np.asarray(np.log1p(beyond * -(2.0**-63)))


class Randomness(ABC):
    """Give a stream for each purpose and round, the same one whenever it is asked for."""

    secure: ClassVar[bool]
    """Whether the numbers are unpredictable; a report must say so."""

    @property
    @abstractmethod
    def description(self) -> Generator:
        """Return the generator, in words for a report."""

    @abstractmethod
    def stream(self, purpose: Purpose, round: int) -> Stream:
        """Return the stream of a purpose in a round.

        Asked for again, the stream goes on after the last number drawn, so no number returns.
        """


class _AesStream(Stream):
    def __init__(self) -> None:
        # A key of its own for every stream: no key, no counter and no number is used twice.
        cipher = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._encryptor: CipherContext = cipher.encryptor()

    def raw(self, size: int) -> NDArray[np.uint8]:
        out = np.empty(size + 15, dtype=np.uint8)  # the cipher asks for room for one more block
        zeros = memoryview(_ZEROS)[:size] if size <= len(_ZEROS) else bytes(size)
        self._encryptor.update_into(zeros, out.data)
        return out[:size]


class _SeededStream(Stream):
    fine: ClassVar[bool] = False

    def __init__(self, *parts: str) -> None:
        # The separator cannot stand in a part, so different parts give different seeds.
        digest = hashlib.sha256("\0".join(parts).encode()).digest()
        self._generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big")))

    def raw(self, size: int) -> NDArray[np.uint8]:
        words = self._generator.integers(0, 2**64, -(-size // 8), dtype=np.uint64)
        return words.view(np.uint8)[:size]


@dataclass(frozen=True)
class SecureRandomness(Randomness):
    """Draw from AES-256 in counter mode under keys from the operating system.

    The numbers cannot be repeated.
    """

    secure: ClassVar[bool] = True
    _streams: dict[tuple[Purpose, int, int], Stream] = field(default_factory=dict, repr=False, compare=False)

    @property
    def description(self) -> Generator:
        """Return the generator, in words for a report."""
        return Generator.AES

    def stream(self, purpose: Purpose, round: int) -> Stream:
        """Return the stream of a purpose in a round."""
        # A forked process must not go on with the stream that its parent uses too.
        key = (purpose, round, os.getpid())
        if key not in self._streams:
            self._streams[key] = _AesStream()
        return self._streams[key]


@dataclass(frozen=True)
class InsecureSeededRandomness(Randomness):
    """Draw repeatable and therefore INSECURE numbers, for simulations only.

    Whoever knows the seed can remove all noise.
    """

    seed: int
    site: str
    secure: ClassVar[bool] = False
    _streams: dict[tuple[Purpose, int], Stream] = field(default_factory=dict, repr=False, compare=False)

    @property
    def description(self) -> Generator:
        """Return the generator, in words for a report."""
        return Generator.SEEDED

    def stream(self, purpose: Purpose, round: int) -> Stream:
        """Return the stream of a purpose in a round."""
        key = (purpose, round)
        if key not in self._streams:
            # Site, round and purpose are part of the seed: noise that repeats between sites or rounds
            # cancels in a difference.
            self._streams[key] = _SeededStream(str(self.seed), self.site, str(round), purpose.value)
        return self._streams[key]
