"""What a private run costs a site before anything is trained: cheap refusals, and one search for a plan."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from client.budget import _PLAN_FILE, Budget, SigmaCache, open_budget
from client.data.bags import CACHE_FOLDER, BagStore
from client.ledger import ledger as ledger_module
from client.ledger.check import verify
from client.ledger.file import (
    Kind,
    append,
    create,
    read_entries,
    writing,
)
from client.ledger.ledger import Ledger, Opening
from client.ledger.state import LedgerState
from client.session import SiteSession
from client.site import SiteConfig, SitePolicy, _PrivacyBudget
from common.config import RunConfig
from common.errors import BudgetRefused, UserError
from common.privacy import accounting
from common.privacy.events import PoissonGaussian

SETTINGS: dict[str, Any] = {
    "model.image-size": 16,
    "train.held-back": 0.0,
    "dp.epsilon": 8.0,
    "dp.delta": 1e-3,
    "dp.expected-bags": 1.0,
    "rounds": 3,
}


@pytest.fixture
def open_site(site: Path) -> Callable[..., Budget]:
    """The budget of a real site with a cap of 10, as one message finds it; takes settings of the run."""
    policy = SitePolicy(budget=_PrivacyBudget(epsilon=10.0, delta=1e-3))
    SiteConfig(name="site-1", policy=policy).save(site)

    def make(**changes: Any) -> Budget:
        config = RunConfig().with_changes({**SETTINGS, **changes})
        context = Context(1, 7, {"data-path": str(site)}, RecordDict(), config.to_flat())
        return open_budget(SiteSession.open(context))

    return make


OpenSite = Callable[..., Budget]


def test_a_plan_is_searched_for_once_and_not_once_a_message(
    open_site: OpenSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []
    right = accounting.calibrate

    def counted(*args: Any, **more: Any) -> float:
        searched.append(args)
        return right(*args, **more)

    monkeypatch.setattr("client.budget.calibrate", counted)
    first = open_site().plan
    assert open_site().plan.noise_multiplier == first.noise_multiplier
    assert len(searched) == 1
    for changes in (
        {"rounds": 4},
        {"dp.steps-per-round": 5},
        {"dp.epsilon": 7.0},
        {"dp.expected-bags": 2.0},
        {"dp.release-scale": 9.0},
        {"dp.delta": 2e-3},
    ):
        assert open_site(**changes).plan.noise_multiplier != first.noise_multiplier
    assert len(searched) == 7


def take_rounds(budget: Budget, rounds: int) -> None:
    for round in range(1, rounds + 1):
        budget.reserve(round)


@pytest.mark.parametrize("sigma", [0.05, 0.7, 1e5])
def test_a_changed_plan_file_charges_for_the_noise_that_it_names(
    sigma: float, open_site: OpenSite, site: Path
) -> None:
    """It can overcharge, or be refused; the noise drawn and the event charged are of one number."""
    honest = open_site().plan.noise_multiplier
    file = site / CACHE_FOLDER / _PLAN_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "sigma": sigma}))
    budget = open_site()
    assert budget.plan.noise_std == sigma * budget.plan.clip_norm
    if sigma < honest:
        with pytest.raises(BudgetRefused):
            take_rounds(budget, 3)
    else:
        take_rounds(budget, 1)
    assert all(
        event.noise_multiplier == sigma
        for event in LedgerState.read(site / "ledger.sqlite").events
        if isinstance(event, PoissonGaussian)
    )


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": "x", "sigma": 1}', '{"sigma": "NaN"}'])
def test_a_damaged_plan_file_is_found_anew(content: str, open_site: OpenSite, site: Path) -> None:
    honest = open_site().plan.noise_multiplier
    file = site / CACHE_FOLDER / _PLAN_FILE
    file.write_text(content)
    assert open_site().plan.noise_multiplier == honest
    assert json.loads(file.read_text())["sigma"] == honest


@pytest.mark.parametrize("sigma", ["NaN", "Infinity", "0", "-1", "1e7", '"x"', "null"])
def test_no_number_that_is_no_sigma_is_taken_from_the_file(sigma: str, tmp_path: Path) -> None:
    cache = SigmaCache(tmp_path)
    honest = cache(4.0, 1e-3, 0.5, 10)
    key = json.loads(cache.path.read_text())["key"]
    cache.path.write_text(f'{{"key": "{key}", "sigma": {sigma}}}')
    assert cache(4.0, 1e-3, 0.5, 10) == honest


@pytest.mark.parametrize(
    "changes",
    [
        {"dp.expected-bags": 1e-6},
        {"dp.steps-per-round": 100_000, "rounds": 10},
        {"dp.steps-per-round": 100_000, "rounds": 100_000},
    ],
)
def test_settings_that_would_search_for_minutes_are_refused_at_once(
    changes: dict[str, Any], open_site: OpenSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.budget.calibrate", lambda *_, **__: pytest.fail("searched"))
    with pytest.raises(UserError, match="the privacy plan cannot be made"):
        open_site(**changes).reserve(1)


def test_a_used_up_cap_refuses_before_any_search(
    open_site: OpenSite, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.budget.calibrate", lambda *_, **__: pytest.fail("searched"))
    ledger = open_site().ledger
    bare = PoissonGaussian(sample_rate=1.0, noise_multiplier=0.45, steps=1)
    cap = accounting.spent([bare], 1e-3, accounting.Adjacency.REPLACE_ONE)
    policy = SitePolicy(budget=_PrivacyBudget(epsilon=cap, delta=1e-3))
    SiteConfig(name="site-1", policy=policy).save(site)
    if cap > 10:
        open_site()
    ledger.reserve(bare, "run", 1)
    for ask in (
        lambda budget: budget.reserve(2),
        lambda budget: budget.reserve_evaluation(2),
        lambda budget: budget.release(8.0),
    ):
        with pytest.raises(BudgetRefused):
            ask(open_site())
    assert len(ledger.events()) == 1


def test_a_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def later() -> float:
        now[0] += accounting._CALIBRATION_SECONDS / 2
        return now[0]

    accounting._search.cache_clear()  # another test may have asked the same
    monkeypatch.setattr(time, "monotonic", later)
    with pytest.raises(UserError, match="not found within"):
        accounting.calibrate(4.0, 1e-3, 0.5, 10)


def long_ledger(path: Path, rounds: int) -> None:
    """A ledger of many rounds, all rows in one transaction, without any that carries forward."""
    common = {"data_version": "v1", "time": "2026-01-01T00:00:00+00:00"}
    create(path, {**common, "site": "site-1", "unit": "bag", "cap_epsilon": 50.0, "cap_delta": 1e-5})
    event = PoissonGaussian(sample_rate=0.01, noise_multiplier=4.0, steps=1).model_dump()
    with writing(path) as db:
        last = read_entries(db, path)[-1]
        for number in range(1, rounds + 1):
            body = {**common, "event": event, "run_id": "run", "round": number}
            last = append(db, last, Kind.RESERVED, body)
            last = append(db, last, Kind.CONFIRMED, {**common, "reservation": last.seq})


def test_a_new_process_reads_few_rows_of_a_long_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path, 1000)
    Ledger.open(path, Opening("site-1", "v1", 50.0, 1e-5))
    read: list[int] = []
    right = ledger_module.read_entries

    def counted(*args: Any) -> Any:
        entries = right(*args)
        read.append(len(entries))
        return entries

    monkeypatch.setattr(ledger_module, "read_entries", counted)
    for round in range(ledger_module._CARRY_EVERY + 5):
        if round % 64 == 0:
            ledger = Ledger.open(path, Opening("site-1", "v1", 50.0, 1e-5))
            assert len(ledger.events()) == 1000 + round
            assert max(read) <= ledger_module._CARRY_EVERY + 2
        ledger.confirm(
            ledger.reserve(PoissonGaussian(sample_rate=0.01, noise_multiplier=4.0, steps=1), "r", 1)
        )
    monkeypatch.undo()
    whole, carried = LedgerState.read(path), Ledger.open(path, Opening("site-1", "v1", 50.0, 1e-5))
    assert carried.state.as_json() == whole.as_json()
    assert carried.state.head == whole.head
    assert [entry.kind for entry in whole.entries].count("carried") >= 3
    assert verify(path) == []


def test_a_row_that_carries_the_ledger_counts_no_event_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its length goes with the different events, and reading a ledger with its rows, not their square."""
    path = tmp_path / "ledger.sqlite"
    events = [PoissonGaussian(sample_rate=0.01, noise_multiplier=sigma, steps=1) for sigma in (4.0, 5.0)]
    ledger = Ledger.open(path, Opening("site-1", "v1", 50.0, 1e-5))
    for _ in range(8):
        with ledger.transaction() as db:
            for number in range(ledger_module._CARRY_EVERY):
                body = {"event": events[number % 2].model_dump(), "run_id": "r", "round": 1, "copies": 1}
                ledger.append(db, Kind.RESERVED, body)
    compared: list[object] = []
    right = PoissonGaussian.__eq__

    def counted(self: PoissonGaussian, other: object) -> bool:
        compared.append(other)
        return right(self, other)

    monkeypatch.setattr(PoissonGaussian, "__eq__", counted)
    book = LedgerState.read(path)
    assert [entry.kind for entry in book.entries].count("carried") == 8
    assert len(compared) <= 4 * book.rows
    assert len(book.as_json()["events"]) == 2
    begun = Ledger.open(path, Opening("site-1", "v1", 50.0, 1e-5)).state
    assert begun.as_json() == book.as_json()
    assert begun.spent() == book.spent()


def test_a_row_that_carries_less_than_was_spent_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    long_ledger(path, 200)
    book = LedgerState.read(path)
    state = book.as_json()
    state["events"] = state["events"][:1] and [[state["events"][0][0], 1]]
    with writing(path) as db:
        append(db, book.last, Kind.CARRIED, {"state": state, "data_version": "v1", "time": "t"})
    (problem,) = verify(path)
    assert problem.row == 402
    assert "carried" in problem.reason


def test_many_image_sizes_leave_three_caches_of_each_kind(site: Path) -> None:
    """A server that asks for one size after the other does not fill the disk."""
    for number, size in enumerate((8, 16, 24, 32, 40, 8), 1):
        BagStore.open(site, size)
        caches = [path.name for path in (site / CACHE_FOLDER).iterdir() if path.is_dir()]
        assert len(caches) == min(number, 3)
        assert any(name.startswith(f"bags-{size}-") for name in caches)
