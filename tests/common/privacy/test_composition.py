"""Compositions carried forward: the figures of composing everything, for the work of what is new."""

from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.privacy import accounting
from common.privacy.accounting import amounts_of, fits, spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, merge
from tests.cases import shortened

DELTA = 1e-5
AGREEMENT = 1e-6
"""The most that a carried figure may differ from the direct one, in epsilon."""
Event = PoissonGaussian | DiscreteLaplace


def step(sigma: float, q: float = 0.1, number: int = 5) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=q, noise_multiplier=sigma, steps=number)


MANY: tuple[Event, ...] = (
    *(step(4.0 + 0.1 * number) for number in range(8)),
    DiscreteLaplace(scale=8.0),
    DiscreteLaplace(scale=8.0),
    step(4.0, number=20),
    step(6.0, q=0.3),
    DiscreteLaplace(scale=3.0),
    step(2.0, q=0.05, number=40),
)


def afresh(events: tuple[Event, ...], adjacency: Adjacency = Adjacency.REPLACE_ONE) -> float:
    return accounting._epsilon.__wrapped__(merge(events), DELTA, adjacency, True)


def forget_all() -> None:
    """Leave what a new process has: nothing."""
    accounting._kept = ()
    for cache in (accounting._epsilon, accounting._coarse, accounting._fine):
        cache.cache_clear()


@pytest.fixture(autouse=True)
def carried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(accounting, "DIRECT", 3)
    forget_all()
    yield
    forget_all()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every step whose distribution was constructed, with its grid."""
    calls: list[tuple[Any, ...]] = []
    right = accounting._step.__wrapped__

    def note(*arguments: Any) -> Any:
        calls.append(arguments)
        return right(*arguments)

    monkeypatch.setattr(accounting, "_step", note)
    return calls


@pytest.mark.parametrize("adjacency", shortened(Adjacency, [Adjacency.REPLACE_ONE]))
def test_carried_figures_are_the_direct_ones(adjacency: Adjacency) -> None:
    for number in range(1, len(MANY) + 1):
        events = MANY[:number]
        assert spent(events, DELTA, adjacency) == pytest.approx(afresh(events, adjacency), abs=AGREEMENT)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(
            st.builds(
                PoissonGaussian,
                sample_rate=st.sampled_from([0.02, 0.1, 1.0]),
                noise_multiplier=st.floats(2, 50),
                steps=st.integers(1, 200),
            ),
            st.builds(DiscreteLaplace, scale=st.floats(2, 100)),
        ),
        min_size=4,
        max_size=8,
    )
)
def test_carried_figures_are_the_direct_ones_whatever_comes(events: list[Event]) -> None:
    forget_all()
    for number in range(4, len(events) + 1):
        figure = spent(events[:number], DELTA, Adjacency.REPLACE_ONE)
    assert figure == pytest.approx(afresh(tuple(events)), abs=AGREEMENT)


def test_one_new_event_is_constructed_once_on_each_grid(built: list[tuple[Any, ...]]) -> None:
    spent(MANY, DELTA, Adjacency.REPLACE_ONE)
    built.clear()
    spent((*MANY, step(7.0)), DELTA, Adjacency.REPLACE_ONE)
    assert [(q, sigma) for q, sigma, *_ in built] == [(0.1, 7.0)] * 2
    assert len({interval for *_, interval in built}) == 2


def test_more_of_an_event_that_is_known_is_composed_on(built: list[tuple[Any, ...]]) -> None:
    spent(MANY, DELTA, Adjacency.REPLACE_ONE)
    built.clear()
    more = (*MANY, step(4.0))
    assert spent(more, DELTA, Adjacency.REPLACE_ONE) == pytest.approx(afresh(more), abs=AGREEMENT)
    assert [sigma for _, sigma, *_ in built[:2]] == [4.0, 4.0]


@pytest.mark.parametrize("q", shortened([0.1, 0.004], [0.1]))
def test_what_was_refused_is_not_built_on(q: float, built: list[tuple[Any, ...]]) -> None:
    """On the grids of what is spent, and on finer ones."""
    spent(MANY, DELTA, Adjacency.REPLACE_ONE)
    for place, sigma in enumerate((1.1, 1.2, 1.3, 1.4, 1.5)):
        built.clear()
        refused = step(sigma, q, number=500)
        assert not fits((*MANY, refused), 0.5, DELTA, Adjacency.REPLACE_ONE)
        assert not place or {found for _, found, *_ in built} == {sigma}
    assert spent(MANY, DELTA, Adjacency.REPLACE_ONE) == pytest.approx(afresh(MANY), abs=AGREEMENT)


def test_another_grid_is_composed_on_its_own_and_once(built: list[tuple[Any, ...]]) -> None:
    spent(MANY, DELTA, Adjacency.REPLACE_ONE)
    constructed = []
    for sigma in (20.0, 21.0):  # so little loss that the grid must be finer
        built.clear()
        finer = (*MANY, step(sigma))
        figure = spent(finer, DELTA, Adjacency.REPLACE_ONE)
        constructed.append({found for _, found, *_ in built})
        assert figure == pytest.approx(afresh(finer), abs=AGREEMENT)
    assert constructed[0] > {4.0, 20.0}
    assert constructed[1] == {21.0}


def test_few_different_events_are_always_composed_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    few = tuple(step(4.0 + number / 100) for number in range(accounting.DIRECT))
    figures = [spent(few[:number], DELTA, Adjacency.REPLACE_ONE) for number in (15, 16)]
    assert accounting._kept == ()
    parts = accounting._parts(amounts_of(merge(few)), Adjacency.REPLACE_ONE, 2.0**-10)
    assert figures[1] == reduce(accounting._both, parts).get_epsilon_for_delta(DELTA)
    assert figures == [afresh(few[:15]), afresh(few)]


def test_memory_is_bounded() -> None:
    for number in range(4, len(MANY) + 1):
        spent(MANY[:number], DELTA, Adjacency.REPLACE_ONE)
    assert len(accounting._kept) == accounting._KEPT


def test_packed_compositions_come_back_as_they_were() -> None:
    spent(MANY, DELTA, Adjacency.REPLACE_ONE)
    kept = accounting.kept_for(amounts_of(MANY), Adjacency.REPLACE_ONE)
    about, again = accounting.unpack(accounting.pack(kept, {"rows": 3}))
    assert about == {"rows": 3}
    assert [dict(one.amounts) for one in again] == [dict(one.amounts) for one in kept]
    for before, after in zip(kept, again, strict=True):
        assert after.interval == before.interval
        assert after.pld.get_epsilon_for_delta(DELTA) == before.pld.get_epsilon_for_delta(DELTA)


def test_a_distribution_with_two_directions_is_not_packed() -> None:
    spent(MANY, DELTA, Adjacency.ADD_REMOVE)
    kept = accounting.kept_for(amounts_of(MANY), Adjacency.ADD_REMOVE)
    assert kept
    with pytest.raises(ValueError, match="both directions"):
        accounting.pack(kept, {})


def test_planted_bug_a_composition_used_for_fewer_events_than_it_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spent(MANY, DELTA, Adjacency.REPLACE_ONE)
    monkeypatch.setattr(accounting, "_within", lambda part, whole: True)
    with pytest.raises((AssertionError, ValueError)):
        assert spent(MANY[:6], DELTA, Adjacency.REPLACE_ONE) == pytest.approx(afresh(MANY[:6]), abs=AGREEMENT)
