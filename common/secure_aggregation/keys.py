"""Agree on keys, seal and split secrets, and draw masks, by the cryptographic parts of libraries.

X25519, HKDF-SHA256, ChaCha20 and ChaCha20-Poly1305 are `cryptography`'s; Shamir's scheme over GF(2^128) is
Flower's wrapper of pycryptodome. This module knows sites by name only, and nothing of sessions and rounds:
their transcript comes in as ``context``. A mask is the keystream of a 256-bit key that was derived for it and
is used for nothing else, added to words modulo 2**32.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from numpy.typing import NDArray

from common.errors import SecureAggregationRefused
from common.secure_aggregation.records import SHARE_BYTES, Words

_SECRET_BYTES = 32
_ONCE = bytes(12)
"""The nonce. Every sealing key is derived for one message: session, sender and receiver are in it."""

CHUNK = 2**16
"""Words at once: keystream and vector stay in the processor's cache."""
_ZEROS = bytes(4 * CHUNK)
_FROM_ZERO = bytes(16)
"""Block counter and nonce; a key makes one stream."""


def new_secret() -> bytes:
    """Return 32 bytes from the operating system.

    They serve as an X25519 private key or as the seed of a self-mask.
    """
    return os.urandom(_SECRET_BYTES)


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def commit(seed: bytes) -> bytes:
    """Return the SHA-256 of a seed of 256 random bits as a commitment to it.

    It hides the seed, and shows later whether the right one was recovered.
    """
    # The prefix keeps this hash apart from every other use of SHA-256 on the same bytes.
    return hashlib.sha256(b"fedbags self-mask seed" + seed).digest()


def commit_share(share: bytes) -> bytes:
    """Return the SHA-256 of a share: 256 unknown bits are left in it for whoever holds too few others.

    Shown by the owner in clear, it tells later whether a holder gave the share that it was sealed.
    """
    return hashlib.sha256(b"fedbags share" + share).digest()


def pairwise_key(private: bytes, peer: bytes, purpose: str, context: bytes) -> bytes:
    """Return the 32-byte key that two sites share for one purpose in one context.

    Raises:
        SecureAggregationRefused: the peer's key is a point of small order.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(peer)
        )
    # A point of small order would give a shared secret that everybody knows.
    except ValueError as error:
        raise SecureAggregationRefused("a public key is not usable") from error
    return derive_key(shared, purpose, context)


def derive_key(secret: bytes, purpose: str, context: bytes) -> bytes:
    """Derive 32 bytes from a secret by HKDF-SHA256."""
    info = b"fedbags/" + purpose.encode() + b"\0" + context
    return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(secret)


@dataclass(frozen=True)
class Channel:
    """Encrypt one message from one site to another, in one session.

    Both ends make the same channel, each with its own private key and the other's public one.
    """

    private: bytes = field(repr=False)
    """The private key of this end."""
    peer: bytes
    """The public key of the other end."""
    sender: str
    receiver: str
    context: bytes
    """The session's transcript."""

    def seal(self, content: bytes) -> bytes:
        """Encrypt content for the receiver only, bound to its sender and its session."""
        return ChaCha20Poly1305(self._key()).encrypt(_ONCE, content, self.context)

    def unseal(self, sealed: bytes) -> bytes:
        """Decrypt a ciphertext that ``seal`` made.

        Raises:
            SecureAggregationRefused: changed on the way, from another sender, or made in another session.
        """
        key = self._key()
        try:
            return ChaCha20Poly1305(key).decrypt(_ONCE, sealed, self.context)
        except (InvalidTag, ValueError) as error:
            raise SecureAggregationRefused(
                f"the shares of {self.sender!r} cannot be opened: it saw another list of sites, or they were "
                "changed"
            ) from error

    def _key(self) -> bytes:
        return pairwise_key(self.private, self.peer, f"seal/{self.sender}/{self.receiver}", self.context)


def split(secret: bytes, threshold: int, holders: Sequence[str]) -> dict[str, bytes]:
    """Return Shamir's shares of a 32-byte secret, one per holder.

    Any ``threshold`` of them give the secret back.

    Raises:
        ValueError: the threshold is 1.
    """
    if threshold == 1:  # Shamir of degree 0 is the secret itself
        raise ValueError("a threshold of 1 shares nothing")
    return dict(zip(holders, create_shares(secret, threshold, len(holders)), strict=True))


def join(shares: Mapping[str, bytes], threshold: int) -> bytes | None:
    """Return the secret from at least ``threshold`` shares, or None when they are too few or do not fit.

    A wrong share among right ones gives a wrong secret, which the caller finds by its commitment.
    """
    # The first four bytes are the share's index; two shares of one index count once.
    usable = {share[:4]: share for share in shares.values() if len(share) == SHARE_BYTES}
    if len(usable) < threshold:
        return None
    try:
        secret = combine_shares(list(usable.values())[:threshold])
    except ValueError:
        return None
    return secret if len(secret) == _SECRET_BYTES else None


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
