"""Masks are ChaCha20 keystreams of all 256 bits of a key; the library's 32-bit generator is out of reach."""

import ast
import hmac
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr.client.mod
import flwr.common.secure_aggregation.secaggplus_utils as library
import flwr.server.workflow  # noqa: F401
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st

from common.errors import SecureAggregationRefused
from common.secure_aggregation import keys
from common.secure_aggregation.keys import CHUNK, add_mask, subtract_mask
from common.secure_aggregation.records import SHARE_BYTES

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("size", [0, 1, 17, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
def test_a_mask_is_the_keystream_and_comes_off_again(size: int) -> None:
    key = bytes(range(32))
    vector = np.arange(size, dtype=np.uint32) * np.uint32(2**31 + 7)
    masked = vector.copy()
    add_mask(masked, key)
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(4 * size))
    assert np.array_equal(masked - vector, np.frombuffer(stream, "<u4"))
    subtract_mask(masked, key)
    assert np.array_equal(masked, vector)


def test_keys_are_hkdf_of_secret_purpose_and_context() -> None:
    """Written out by hand (RFC 5869): extract with a salt of zeros, one block of expand."""
    secret, context = bytes(range(32)), b"transcript and model"
    extracted = hmac.digest(bytes(32), secret, "sha256")
    expected = hmac.digest(extracted, b"fedbags/self-mask\0" + context + b"\x01", "sha256")
    assert keys.derive_key(secret, "self-mask", context) == expected


def test_a_key_is_of_one_purpose_one_pair_and_one_context() -> None:
    mine, peer, other = keys.new_secret(), keys.new_secret(), keys.new_secret()

    def pair(private: bytes, public: bytes, purpose: str = "a", context: bytes = b"1") -> bytes:
        return keys.pairwise_key(private, keys.public_key(public), purpose, context)

    same = pair(mine, peer)
    assert same == pair(peer, mine)
    changed = [pair(mine, other), pair(mine, peer, purpose="b"), pair(mine, peer, context=b"2")]
    assert len({same, *changed}) == 4
    sealed = keys.Channel(mine, keys.public_key(peer), "a", "b", b"1").seal(b"share")
    public = keys.public_key(mine)
    assert keys.Channel(peer, public, "a", "b", b"1").unseal(sealed) == b"share"
    for sender, receiver, context in (("b", "a", b"1"), ("a", "c", b"1"), ("a", "b", b"2")):
        with pytest.raises(SecureAggregationRefused, match="cannot be opened"):
            keys.Channel(peer, public, sender, receiver, context).unseal(sealed)


@given(st.integers(0, 255))
def test_every_bit_of_the_key_counts(bit: int) -> None:
    """Keys with equal low 32 bits, and with equal XOR of their 32-bit words, give unrelated masks."""
    key = bytes(32)
    other = bytearray(key)
    other[bit // 8] ^= 1 << bit % 8
    folded = bytearray(other)
    folded[(bit // 8 + 4) % 32] ^= 1 << bit % 8  # the library's 32-bit seed is the same again
    streams = []
    for one in (key, bytes(other), bytes(folded)):
        streams.append(np.zeros(64, np.uint32))
        add_mask(streams[-1], one)
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.count_nonzero(streams[first] == streams[second]) <= 1


def test_the_librarys_generator_folds_to_32_bits() -> None:
    """What upstream issue 7522 is about; if this fails, the pin has moved and the docs must follow."""
    folded = bytearray(32)
    folded[0] = folded[4] = 1
    same = [library.pseudo_rand_gen(bytes(seed), 2**31, [(50,)])[0] for seed in (bytes(32), folded)]
    assert np.array_equal(*same)


def test_a_whole_session_never_calls_the_librarys_generator(
    consortium: Callable[..., Any], vectors: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the 32-bit generator was called")

    users = [module for module in list(sys.modules.values()) if "pseudo_rand_gen" in vars(module)]
    assert len(users) >= 3  # the library's client, its server and where it is defined
    for module in users:
        monkeypatch.setattr(module, "pseudo_rand_gen", forbidden)
    group = consortium(5)
    sent = vectors(group, length=1000)
    result = group.run(sent, no_vector=["site-02"])
    expected = np.sum([sent[name] for name in result.survivors], axis=0, dtype=np.uint32)
    assert np.array_equal(result.total, expected)


def test_no_module_of_ours_imports_it() -> None:
    used = set()
    for package in ("common", "client", "server", "deploy"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    used |= {f"{node.module}.{alias.name}" for alias in node.names}
                elif isinstance(node, ast.Import):
                    used |= {alias.name for alias in node.names}
    library_parts = {name for name in used if "secure_aggregation" in name and name.startswith("flwr")}
    assert library_parts == {
        "flwr.common.secure_aggregation.crypto.shamir.combine_shares",
        "flwr.common.secure_aggregation.crypto.shamir.create_shares",
    }
    assert not any("secagg" in name for name in used)


@given(st.binary(min_size=32, max_size=32), st.integers(3, 9), st.data())
def test_enough_shares_give_the_secret_and_fewer_do_not(
    secret: bytes, sites: int, data: st.DataObject
) -> None:
    needed = sites // 2 + 1
    shares = keys.split(secret, needed, [f"s{index}" for index in range(sites)])
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    chosen = data.draw(st.permutations(sorted(shares)))
    assert keys.join({name: shares[name] for name in chosen[:needed]}, needed) == secret
    assert keys.join({name: shares[name] for name in chosen[: needed - 1]}, needed) is None
    if needed > 2:
        assert keys.join({name: shares[name] for name in chosen[: needed - 1]}, needed - 1) != secret


def test_what_is_sealed_for_one_is_not_opened_by_another() -> None:
    a, b, c = keys.new_secret(), keys.new_secret(), keys.new_secret()
    sealed = keys.Channel(a, keys.public_key(b), "a", "b", b"session").seal(b"shares")
    assert keys.Channel(b, keys.public_key(a), "a", "b", b"session").unseal(sealed) == b"shares"
    changed = bytes([sealed[0] ^ 1]) + sealed[1:]
    for *ends, words in (
        (c, keys.public_key(a), "a", "b", b"session", sealed),
        (b, keys.public_key(c), "a", "b", b"session", sealed),
        (b, keys.public_key(a), "b", "a", b"session", sealed),
        (b, keys.public_key(a), "a", "b", b"another", sealed),
        (b, keys.public_key(a), "a", "b", b"session", changed),
        (b, keys.public_key(a), "a", "b", b"session", b""),
    ):
        with pytest.raises(SecureAggregationRefused):
            keys.Channel(*ends).unseal(words)
    with pytest.raises(SecureAggregationRefused, match="not usable"):
        keys.pairwise_key(a, bytes(32), "seal", b"")
