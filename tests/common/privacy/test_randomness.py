"""The generators: keys of full length, every bit of a word used, no draw too many, no noise that is zero."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy import stats

from common.errors import UserError
from common.privacy import randomness
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import (
    _CHUNK,
    _NEAR_ONE,
    InsecureSeededRandomness,
    Purpose,
    SecureRandomness,
    Stream,
    _log_near_one,
)

MakePlan = Callable[..., PrivacyPlan]
TOP = 2**63 - 1
UNLIKELY = 1e-6


class Forced(Stream):
    """Gives the words asked for, and angles of an eighth turn (or those asked for)."""

    def __init__(self, words: list[int], turns: list[int] | None = None) -> None:
        self.bits = np.concatenate(
            [
                np.array(words, dtype=np.uint64).view(np.uint8),
                np.array(turns or [2**29] * len(words), dtype=np.int32).view(np.uint8),
            ]
        )

    def raw(self, size: int) -> NDArray[np.uint8]:
        assert size == len(self.bits)
        return self.bits.copy()


def radii(words: list[int], standard_deviation: float = 1.0) -> NDArray[np.float64]:
    """The radius that Box-Muller makes of each word, from both coordinates."""
    values = torch.zeros(2 * len(words))
    Forced(words).add_normals(values, standard_deviation)
    return np.hypot(*values.double().numpy().reshape(2, -1))


WORDS = sorted(
    {1 << k for k in range(63)}
    | {(1 << k) - 1 for k in range(64)}
    | {TOP - (1 << k) for k in range(62)}
    | {TOP, TOP - 1, TOP - 3}
)


@pytest.mark.parametrize("standard_deviation", [1e-6, 1.0, 40.0])
def test_every_radius_is_what_the_maths_says_next_to_nothing_and_next_to_one(
    standard_deviation: float,
) -> None:
    """Each of the 63 bits counts, at both ends: the smallest word has the longest tail."""
    exact = np.array(
        [
            math.sqrt(-2 * math.log(min(word + 1, 2**63 - 1) / 2**63))
            if word < TOP // 2
            else math.sqrt(-2 * math.log1p(-(TOP - word + 0.5) / 2**63))
            for word in WORDS
        ]
    )
    found = radii(WORDS, standard_deviation) / standard_deviation
    assert np.abs(found - exact).max() < 1e-5
    assert found == pytest.approx(exact, rel=2e-3)
    assert found.min() > 0
    assert found.max() == pytest.approx(math.sqrt(2 * 63 * math.log(2)), rel=1e-5)  # 9.35


def test_no_pair_of_noise_is_zero_and_no_number_either() -> None:
    """A float32 logarithm makes zeros of the 2**38 words next to the largest: a chance of 2**-25."""
    words = [TOP - (1 << k) + 1 for k in range(40)]
    turns = [0, 1, -1, 2**31 - 1, -(2**31), 2**30, -(2**30), 2]
    values = torch.zeros(2 * len(words) * len(turns))
    Forced(words * len(turns), [turn for turn in turns for _ in words]).add_normals(values, 1e-6)
    assert values.ne(0).all()


def test_the_logarithm_next_to_one_is_exact() -> None:
    beyond = np.array([2**k for k in range(47)], dtype=np.int64)
    found = _log_near_one(TOP - beyond)
    assert found == pytest.approx(np.log1p(-(beyond + 0.5) / 2.0**63), rel=1e-15)
    assert (_log_near_one(np.array([TOP])) < 0).all()
    assert _NEAR_ONE > 1 - 2**-15


def test_the_tails_of_real_noise_are_a_normal_distributions() -> None:
    """Of 2**22 numbers, how many lie beyond 1 to 5 and within 2**-4 to 2**-14 standard deviations."""
    values = torch.zeros(2**22 + _CHUNK // 3)
    SecureRandomness().stream(Purpose.NOISE, 1).add_normals(values, 1.0)
    sample = values.abs().double().numpy()
    for limit in (1.0, 2.0, 3.0, 4.0, 5.0):
        chance = 2 * stats.norm.sf(limit)
        assert stats.binomtest(int((sample > limit).sum()), len(sample), chance).pvalue > UNLIKELY
    for power in range(4, 15, 2):
        chance = 1 - 2 * stats.norm.sf(2.0**-power)
        found = int((sample < 2.0**-power).sum())
        assert stats.binomtest(found, len(sample), chance).pvalue > UNLIKELY


@pytest.mark.parametrize("purpose", list(Purpose))
def test_every_stream_has_a_key_of_32_bytes_of_its_own(
    purpose: Purpose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out is AES-256 in counter mode under exactly the bytes that the system gave."""
    drawn: list[bytes] = []

    def urandom(size: int) -> bytes:
        drawn.append(bytes((17 * len(drawn) + 3 * i + 1) % 256 for i in range(size)))
        return drawn[-1]

    monkeypatch.setattr("os.urandom", urandom)
    source = SecureRandomness()
    for round in (1, 2):
        found = source.stream(purpose, round).raw(70_000).tobytes()
        key, counter = drawn[-2:]
        assert (len(key), len(counter)) == (32, 16)
        expected = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(bytes(70_000))
        assert found == expected
    assert len(set(drawn)) == len(drawn) == 4


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 12 * _CHUNK // 2, 12 * _CHUNK // 2 + 1])
def test_a_stream_goes_on_where_it_was_whatever_is_asked_for(size: int) -> None:
    stream = randomness._AesStream()
    first, second = stream.raw(size), stream.raw(64)
    assert len(first) == size
    assert len(np.unique(second)) > 16
    assert size < 16 or first[-16:].tobytes() != second[:16].tobytes()


@pytest.mark.parametrize("chance", [2.0**-40, 1e-3, 0.02, 0.1, 0.5, 0.98, 1 - 2.0**-50])
def test_a_word_below_the_chance_is_drawn_and_the_next_one_is_not(
    chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = math.floor(chance * 2**64)
    words = np.array([0, limit - 1, limit, limit + 1, 2**64 - 1], dtype=np.uint64)
    stream = randomness._AesStream()
    monkeypatch.setattr(stream, "words", lambda number: words)
    assert stream.chosen(chance, 5).tolist() == [0, 1]


def test_all_are_drawn_at_chance_one() -> None:
    assert randomness._AesStream().chosen(1.0, 4).tolist() == [0, 1, 2, 3]


def check_drawn(plan: PrivacyPlan) -> None:
    """The number of draws is binomial with exactly the accounted chance; 1 % more would show."""
    draws = sum(len(draw) for draw in plan.sampler(1))
    number = plan.steps_per_round * plan.number_of_bags
    assert stats.binomtest(draws, number, plan.round_event().sample_rate).pvalue > UNLIKELY


@pytest.mark.parametrize("source", [InsecureSeededRandomness(3, "site-1"), SecureRandomness()])
@pytest.mark.parametrize("expected", [20.0, 1000.0])
def test_no_bag_is_drawn_more_often_than_accounted_for(
    source: InsecureSeededRandomness | SecureRandomness, expected: float, make_plan: MakePlan
) -> None:
    settings = {"number_of_bags": 2000, "delta": 1e-4, "sample_rate": expected / 2000}
    check_drawn(make_plan(**settings, randomness=source, steps_per_round=10_000))


def test_planted_bug_two_percent_too_many(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Stream.chosen
    monkeypatch.setattr(Stream, "chosen", lambda self, chance, number: right(self, 1.02 * chance, number))
    settings = {"number_of_bags": 2000, "delta": 1e-4, "sample_rate": 0.01}
    with pytest.raises(AssertionError):
        check_drawn(make_plan(**settings, steps_per_round=10_000))


def check_scale(plan: PrivacyPlan) -> None:
    """The noise on the sum is sigma times the clip norm, whatever the clip norm."""
    sample = plan.noise((200_000,), 1).double().numpy() / (
        plan.round_event().noise_multiplier * plan.clip_norm
    )
    assert abs(sample.std() - 1) < 5 / math.sqrt(2 * sample.size)
    assert stats.kstest(sample, "norm").pvalue > UNLIKELY


@pytest.mark.parametrize("clip_norm", [1e-6, 0.3, 1.0, 1.5, 40.0, 1e6])
@pytest.mark.parametrize("sigma", [0.4, 3.0])
def test_noise_grows_with_the_clip_norm_above_one_too(
    clip_norm: float, sigma: float, make_plan: MakePlan
) -> None:
    check_scale(make_plan(clip_norm=clip_norm, noise_multiplier=sigma, randomness=SecureRandomness()))


def test_planted_bug_noise_of_at_most_sigma(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    capped = property(lambda self: self.noise_multiplier * min(self.clip_norm, 1.0))
    monkeypatch.setattr(PrivacyPlan, "noise_std", capped)
    with pytest.raises(AssertionError):
        check_scale(make_plan(clip_norm=1.5))


@pytest.mark.parametrize("clip_norm", [1e-30, 9e-7, 1.1e6])
def test_a_clip_norm_whose_noise_float32_cannot_hold_is_refused(
    clip_norm: float, make_plan: MakePlan
) -> None:
    """At 1e-23 the variance is zero in float32: clipped gradients would leave without noise."""
    with pytest.raises(UserError, match="clip norm"):
        make_plan(clip_norm=clip_norm)
