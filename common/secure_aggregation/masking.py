"""Add ChaCha20 keystreams as masks to words modulo 2**32.

The key of a stream is 256 bits that were derived for it and are used for nothing else. This module knows
nothing of the parties that share the key.
"""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from numpy.typing import NDArray

from common.secure_aggregation.records import Words

CHUNK = 2**16
"""Words at once: keystream and vector stay in the processor's cache."""
_ZEROS = bytes(4 * CHUNK)
_FROM_ZERO = bytes(16)
"""Block counter and nonce; a key makes one stream."""


class Keystream:
    """Provide the ChaCha20 keystream of a 32-byte key, as 32-bit words."""

    def __init__(self, key: bytes) -> None:
        cipher = Cipher(algorithms.ChaCha20(key, _FROM_ZERO), mode=None)
        self._encryptor: CipherContext = cipher.encryptor()
        # Little-endian on every machine: two sites must read the same words from the same stream.
        self._buffer = np.empty(CHUNK, np.dtype("<u4"))

    def next(self, number: int) -> NDArray[np.uint32]:
        """Return the next ``number`` <= CHUNK words, in a buffer that the following call overwrites."""
        zeros = _ZEROS if number == CHUNK else _ZEROS[: 4 * number]
        self._encryptor.update_into(zeros, self._buffer.data.cast("B"))
        return self._buffer[:number]


def add_mask(vector: Words, key: bytes) -> None:
    """Add the keystream of ``key`` to the words in place, modulo 2**32."""
    stream = Keystream(key)
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK]
        np.add(part, stream.next(len(part)), out=part)


def subtract_mask(vector: Words, key: bytes) -> None:
    """Subtract the mask that ``add_mask`` adds with the same key."""
    stream = Keystream(key)
    for start in range(0, len(vector), CHUNK):
        part = vector[start : start + CHUNK]
        np.subtract(part, stream.next(len(part)), out=part)
