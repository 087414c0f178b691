"""The ledger: caps that hold, spending that is never understated, tampering that shows by row."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.ledger import file
from client.ledger import ledger as ledger_module
from client.ledger.anchor import anchor_file
from client.ledger.check import verify
from client.ledger.file import Kind, LedgerBusyError, LedgerError, _canonical, _chain_hash
from client.ledger.ledger import DataVersionError, Ledger, Opening
from client.ledger.state import LedgerState
from common.errors import BudgetRefused, ConfigError, RunError, UserError
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, event_from_dict
from common.privacy.proportions import CountRelease, release_counts
from common.privacy.randomness import InsecureSeededRandomness
from common.records import PrivacyStatement
from common.wire import from_records, to_records

DELTA = 1e-5
EVENT = PoissonGaussian(sample_rate=0.05, noise_multiplier=1.0, steps=10)
QUIET = PoissonGaussian(sample_rate=0.05, noise_multiplier=4.0, steps=1)
ROOT = Path(__file__).parents[2]
REDUCE = """UPDATE entries SET body = replace(body, '"steps":10', '"steps":1') WHERE seq = 4"""
Opener = Callable[..., Ledger]


@pytest.fixture
def open_ledger(tmp_path: Path) -> Opener:
    """Opens ledger.sqlite of site-1; takes changes by name."""

    def make(**changes: Any) -> Ledger:
        settings: dict[str, Any] = {
            "path": tmp_path / "ledger.sqlite",
            "site": "site-1",
            "data_version": "v1",
            "cap_epsilon": 8.0,
            "cap_delta": DELTA,
        }
        settings |= changes
        own = {field.name: settings.pop(field.name) for field in fields(Opening) if field.name in settings}
        return Ledger.open(opening=Opening(**own), **settings)

    return make


def draw_release(**changes: Any) -> CountRelease:
    settings = {"scale": 4.0, "randomness": InsecureSeededRandomness(0, "site-1")}
    return release_counts(np.array([[3, 5], [4, 2]]), **(settings | changes))


def tamper(path: Path, *statements: str) -> None:
    """Change the file as somebody with a SQLite shell would, triggers out of the way."""
    db = sqlite3.connect(path, isolation_level=None)
    triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    for _, text in triggers:
        db.execute(text)
    db.close()


def fill(ledger: Ledger, rounds: int = 3) -> Path:
    for round in range(1, rounds + 1):
        ledger.confirm(ledger.reserve(EVENT, "run", round))
    return ledger.path


def use_up(ledger: Ledger, until: type[Exception] = BudgetRefused) -> int:
    """Take rounds until the ledger says no; how many it gave."""
    granted = 0
    with suppress(until):
        while granted < 200:
            ledger.reserve(QUIET if until is LedgerBusyError else EVENT, "run", granted + 1)
            granted += 1
    return granted


def test_rounds_are_granted_up_to_the_cap_and_not_beyond(open_ledger: Opener) -> None:
    """Budget 3, sigma 1, q 0.05, 10 steps: how many rounds fit is the accountant's to say."""
    ledger = open_ledger(cap_epsilon=3.0)
    granted = use_up(ledger)
    with pytest.raises(BudgetRefused) as caught:
        ledger.reserve(EVENT, "run", granted + 1)
    assert spent([EVENT] * granted, DELTA, Adjacency.REPLACE_ONE) <= 3.0
    assert spent([EVENT] * (granted + 1), DELTA, Adjacency.REPLACE_ONE) > 3.0
    refusal = caught.value
    assert (refusal.site, refusal.cap) == ("site-1", 3.0)
    assert refusal.left == pytest.approx(3.0 - ledger.state.spent())
    assert refusal.asked > refusal.left
    assert ledger.state.refusals == 2
    assert len(ledger.events()) == granted
    assert verify(ledger.path) == []


def test_a_target_calibrated_for_all_rounds_is_granted_for_all_rounds(open_ledger: Opener) -> None:
    cap = spent([EVENT] * 6, DELTA, Adjacency.REPLACE_ONE)
    ledger = open_ledger(cap_epsilon=cap)
    fill(ledger, 6)
    assert ledger.statement(6).budget_left == pytest.approx(0)
    with pytest.raises(BudgetRefused):
        ledger.reserve(EVENT, "run", 7)


def test_planted_bug_epsilon_per_round(open_ledger: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ledger_module.fits
    monkeypatch.setattr(ledger_module, "fits", lambda events, *rest: right(events[-1:], *rest))
    ledger = open_ledger(cap_epsilon=3.0)
    fill(ledger, 12)
    assert verify(ledger.path)[-1].reason.startswith("more than the cap")


def test_a_ledger_of_an_earlier_release_is_read_and_goes_on_salted(
    open_ledger: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without salt, versions without a name, no anchor: all is there after the next opening."""

    def unsalted(db: Any, last: Any, kind: Kind, body: Any) -> Any:
        seq, previous = (last.seq + 1, last.hash) if last else (1, "0" * 64)
        plain = {name: value for name, value in body.items() if name != "identifier"}
        text = _canonical(plain)
        own = _chain_hash(previous, seq, kind.value, text)
        db.execute("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", (seq, kind.value, text, previous, own))
        return file.Entry(seq, kind.value, json.loads(text), previous, own)

    with monkeypatch.context() as earlier:
        earlier.setattr(file, "append", unsalted)
        earlier.setattr(ledger_module, "append_row", unsalted)
        # An earlier release opens a version without naming it; here that opening would repeat for ever.
        path = fill(open_ledger(), 2)
    anchor_file(path).path.unlink()
    old = LedgerState.read(path)
    assert not old.identifiers
    assert all("salt" not in entry.body for entry in old.entries)
    assert verify(path) == []
    ledger = open_ledger()
    assert ledger.events() == (EVENT,) * 2
    assert len(ledger.identifier) == 64
    newest = LedgerState.read(path).entries[-1]
    assert len(newest.body["salt"]) == 32
    assert ledger.statement(2).ledger_head == newest.hash != old.head
    assert anchor_file(path).path.exists()
    assert verify(path, head=old.head, anchor=anchor_file(path)) == []
    salts = [
        entry.body["salt"] for entry in LedgerState.read(fill(ledger, 2)).entries if "salt" in entry.body
    ]
    assert len(set(salts)) == len(salts) == 5


def test_another_data_version_is_refused_until_the_owner_accepts_it(open_ledger: Opener) -> None:
    path = fill(open_ledger(), 1)
    head = LedgerState.read(path).head
    with pytest.raises(DataVersionError) as caught:
        open_ledger(data_version="v2")
    since = LedgerState.read(path).versions["v1"]
    for part in ("v2", f"v1 since {since}", "fedbags ledger accept-version", "keeps counting"):
        assert part in str(caught.value)
    assert LedgerState.read(path).head == head
    assert Ledger.accept_version(path, "site-1", "v2")
    assert not Ledger.accept_version(path, "site-1", "v2")
    assert not Ledger.accept_version(path, "site-1", "v1")
    assert [entry.kind for entry in LedgerState.read(path).entries].count("accepted") == 1
    assert verify(path) == []
    for version in ("v2", "v1"):
        open_ledger(data_version=version)
    with pytest.raises(DataVersionError):
        open_ledger(data_version="v3")
    with pytest.raises(LedgerError, match="not of 'site-2'"):
        Ledger.accept_version(path, "site-2", "v3")
    with pytest.raises(UserError, match="not found"):
        Ledger.accept_version(path.with_name("none"), "site-1", "v2")


def test_planted_bug_an_acceptance_outside_the_chain(open_ledger: Opener) -> None:
    """An acceptance written by hand, without its hash, is found."""
    path = fill(open_ledger(), 1)
    Ledger.accept_version(path, "site-1", "v2")
    tamper(path, "UPDATE entries SET body = replace(body, 'v2', 'v3') WHERE kind = 'accepted'")
    assert "edited" in verify(path)[0].reason


def test_runs_and_data_versions_compose(open_ledger: Opener) -> None:
    Ledger.accept_version(fill(open_ledger(cap_epsilon=4.0), 3), "site-1", "v2")
    second = open_ledger(cap_epsilon=4.0, data_version="v2")
    assert len(second.events()) == 3
    assert use_up(second) > 0
    assert second.export()["data_version"] == second.identifier != open_ledger(cap_epsilon=4.0).identifier
    assert 3.5 < second.state.spent() <= 4.0
    third = open_ledger(cap_epsilon=4.0, data_version="v2")
    with pytest.raises(BudgetRefused):
        third.reserve(EVENT, "third", 1)
    assert [entry.body["run_id"] for entry in third.state.entries if entry.kind == "refused"] == [
        "run",
        "third",
    ]


def test_copies_are_charged_together_or_not_at_all(open_ledger: Opener) -> None:
    figure = DiscreteLaplace(scale=10.0)
    ledger = open_ledger(cap_epsilon=spent([figure] * 4, DELTA, Adjacency.REPLACE_ONE))
    ledger.confirm(ledger.reserve(figure, "run", 1, copies=3))
    assert ledger.events() == (figure,) * 3
    with pytest.raises(BudgetRefused):
        ledger.reserve(figure, "run", 2, copies=2)
    assert LedgerState.read(ledger.path).events == [figure] * 3
    ledger.reserve(figure, "run", 2)
    assert ledger.statement(2).budget_left == pytest.approx(0, abs=1e-9)
    assert ledger.export()["events"] == [figure.model_dump()] * 4
    assert verify(ledger.path) == []


def test_an_unconfirmed_reservation_is_spent(open_ledger: Opener) -> None:
    reservation = open_ledger().reserve(EVENT, "run", 1)
    again = open_ledger()
    assert again.events() == (EVENT,)
    assert again.state.open_reservations == {reservation.row}
    again.confirm(reservation)
    assert not again.state.open_reservations
    with pytest.raises(RunError, match="no open reservation"):
        again.confirm(reservation)


def test_a_refusal_is_no_spending_and_says_no_data(open_ledger: Opener) -> None:
    ledger = open_ledger(cap_epsilon=0.1)
    before = ledger.state.spent()
    with pytest.raises(BudgetRefused, match=r"site 'site-1' refuses: .* budget of 0\.1"):
        ledger.reserve(EVENT, "run", 1)
    assert ledger.state.spent() == before
    assert [entry.kind for entry in ledger.state.entries] == ["opened", "refused"]


def test_a_release_is_made_once_and_reused(open_ledger: Opener) -> None:
    ledger = open_ledger()
    assert ledger.release_for("v1") is None
    first, second = draw_release(), draw_release(randomness=InsecureSeededRandomness(1, "site-1"))
    assert ledger.store_release(first, "run") == first
    assert ledger.store_release(second, "run") == first
    assert open_ledger().release_for("v1") == first
    Ledger.accept_version(ledger.path, "site-1", "v2")
    assert open_ledger(data_version="v2").release_for("v2") is None
    assert ledger.events() == (DiscreteLaplace(scale=4.0),)


def test_a_release_beyond_the_cap_is_not_stored(open_ledger: Opener) -> None:
    ledger = open_ledger(cap_epsilon=0.4)
    with pytest.raises(BudgetRefused):
        ledger.store_release(draw_release(), "run")
    assert ledger.release_for("v1") is None


def test_a_ledger_of_another_unit_than_the_bag_is_refused(tmp_path: Path) -> None:
    """Its figures would be for one image, and the cap is one for bags."""
    path = tmp_path / "ledger.sqlite"
    body = {**Opening("site-1", "v1", 8.0, DELTA).body(), "unit": "image", "time": ledger_module.now()}
    file.create(path, {**body, "identifier": ledger_module.new_identifier()})
    with pytest.raises(LedgerError, match="row 1 of the ledger: 'opened' with unusable content"):
        LedgerState.read(path)


def test_statements_carry_the_figures_and_cross_the_network(open_ledger: Opener) -> None:
    ledger = open_ledger()
    ledger.store_release(draw_release(), "run")
    fill(ledger)
    statement = ledger.statement(3)
    assert from_records(to_records(statement), PrivacyStatement) == statement
    events = [event_from_dict(event) for event in statement.events]
    assert statement.epsilon == spent(events, DELTA, Adjacency.REPLACE_ONE)
    assert statement.budget_left == pytest.approx(8.0 - statement.epsilon)
    assert statement.ledger_head == ledger.export()["head"] == LedgerState.read(ledger.path).head


def test_the_export_is_enough_to_recompute_what_is_spent(open_ledger: Opener) -> None:
    ledger = open_ledger()
    ledger.store_release(draw_release(), "run")
    fill(ledger)
    exported = json.loads(json.dumps(ledger.export()))
    assert set(exported) == {"site", "data_version", "unit", "cap", "events", "spent", "losses", "head"}
    assert exported["cap"] == {"epsilon": 8.0, "delta": DELTA}
    assert exported["events"] == [
        {"kind": "discrete_laplace", "scale": 4.0},
        {"kind": "poisson_gaussian", "sample_rate": 0.05, "noise_multiplier": 1.0, "steps": 30},
    ]
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    step = pld.from_gaussian_mechanism(
        1.0, sampling_prob=0.05, neighboring_relation=NeighboringRelation.REPLACE_ONE
    )
    laplace = pld.from_discrete_laplace_mechanism(1 / 4, sensitivity=1)
    independent = step.self_compose(30).compose(laplace).compose(laplace).get_epsilon_for_delta(DELTA)
    assert exported["spent"]["replace_one"] == pytest.approx(independent, rel=0.002)
    assert exported["spent"]["replace_one"] >= independent * (1 - 1e-4)
    assert exported["spent"]["add_remove"] < exported["spent"]["replace_one"]


def test_rows_can_only_be_appended(open_ledger: Opener) -> None:
    path = fill(open_ledger())
    db = sqlite3.connect(path)
    for statement in (
        "UPDATE entries SET body = '{}' WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 2",
        "DELETE FROM entries",
        "INSERT OR REPLACE INTO entries SELECT seq, kind, '{}', previous, hash FROM entries WHERE seq = 2",
        "INSERT INTO entries SELECT 99, kind, body, previous, hash FROM entries WHERE seq = 2",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(statement)
    db.close()
    assert verify(path) == []


@pytest.mark.parametrize(
    ("statements", "row", "reason"),
    [
        (
            ["UPDATE entries SET body = replace(body, '\"steps\":10', '\"steps\":1') WHERE seq = 4"],
            4,
            "edited",
        ),
        (["UPDATE entries SET body = 'x' WHERE seq = 4"], 4, "edited"),
        (["UPDATE entries SET kind = 'refused' WHERE seq = 4"], 4, "edited"),
        (["DELETE FROM entries WHERE seq = 4"], 5, "row 4 is missing"),
        (["DELETE FROM entries WHERE seq = 7"], 7, "deleted"),
        (["DELETE FROM entries WHERE seq = 1"], 2, "row 1 is missing"),
        (
            [
                "UPDATE entries SET seq = -1 WHERE seq = 4",
                "UPDATE entries SET seq = 4 WHERE seq = 6",
                "UPDATE entries SET seq = 6 WHERE seq = -1",
            ],
            4,
            "edited",
        ),
        (["DROP TABLE entries"], None, "table is missing"),
        (["PRAGMA user_version = 7"], None, "schema 7"),
        (["PRAGMA application_id = 0"], None, "not a privacy ledger"),
    ],
)
def test_tampering_is_found_by_row(
    statements: list[str], row: int | None, reason: str, open_ledger: Opener
) -> None:
    path = fill(open_ledger())
    assert verify(path) == []
    if statements == ["DROP TABLE entries"]:
        db = sqlite3.connect(path)
        db.execute(statements[0])
        db.close()
    else:
        tamper(path, *statements)
    problems = verify(path)
    assert any(problem.row == row and reason in problem.reason for problem in problems), problems
    with pytest.raises(LedgerError):
        open_ledger()


def test_removed_triggers_are_found(open_ledger: Opener) -> None:
    path = fill(open_ledger())
    db = sqlite3.connect(path)
    db.execute("DROP TRIGGER no_delete")
    db.close()
    assert "triggers" in verify(path)[0].reason


def test_a_rolled_back_copy_is_found_against_the_servers_head(open_ledger: Opener, tmp_path: Path) -> None:
    ledger = open_ledger()
    fill(ledger, 2)
    shutil.copy(ledger.path, tmp_path / "old")
    early = ledger.statement(2).ledger_head
    fill(ledger, 2)
    head = ledger.statement(4).ledger_head
    assert verify(ledger.path, head=head) == verify(ledger.path, head=early) == []
    shutil.copy(tmp_path / "old", ledger.path)
    assert verify(ledger.path) == []
    (problem,) = verify(ledger.path, head=head)
    assert problem.row == 5
    assert "older copy" in problem.reason
    with pytest.raises(LedgerError, match="older copy"):
        ledger.reserve(EVENT, "run", 5)


def test_a_wholly_rewritten_ledger_is_found_against_the_servers_head(open_ledger: Opener) -> None:
    ledger = open_ledger()
    head = ledger.statement(fill(ledger).stat().st_size and 3).ledger_head
    ledger.path.unlink()
    anchor_file(ledger.path).path.unlink()
    fill(open_ledger(), 1)
    assert verify(ledger.path) == []
    assert verify(ledger.path, head=head)


def test_planted_bug_a_chain_that_does_not_cover_the_content(
    open_ledger: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        file, "_chain_hash", lambda previous, seq, kind, body: _chain_hash(previous, seq, kind, "")
    )
    path = fill(open_ledger())
    tamper(path, REDUCE)
    assert verify(path) == []  # so it is the hash over the content that finds the edit above


@pytest.mark.parametrize("keep", [0, 10, 1000, 5000, -3000])
def test_a_torn_file_is_found(keep: int, open_ledger: Opener) -> None:
    path = fill(open_ledger(cap_epsilon=20.0), 30)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    assert verify(path)
    with pytest.raises(LedgerError):
        open_ledger()


def test_overwritten_bytes_are_found(open_ledger: Opener) -> None:
    path = fill(open_ledger(cap_epsilon=20.0), 30)
    data = bytearray(path.read_bytes())
    middle = data.index(b'"round":15')
    data[middle : middle + 10] = b'"round":16'
    path.write_bytes(bytes(data))
    assert any("edited" in problem.reason and problem.row for problem in verify(path))


def test_rows_that_no_ledger_writes_are_found(open_ledger: Opener) -> None:
    path = fill(open_ledger(), 1)
    db = sqlite3.connect(path)
    (previous,) = db.execute("SELECT hash FROM entries WHERE seq = 3").fetchone()
    body = _canonical({"reservation": 99})
    own = _chain_hash(previous, 4, Kind.CONFIRMED, body)
    db.execute("INSERT INTO entries VALUES (4, 'confirmed', ?, ?, ?)", (body, previous, own))
    db.commit()
    db.close()
    (problem,) = verify(path)
    assert problem.row == 4
    assert "unusable content" in problem.reason


def test_a_full_disk_grants_nothing_and_breaks_nothing(
    open_ledger: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger(cap_epsilon=100.0)
    pages = ledger.path.stat().st_size // 4096
    monkeypatch.setattr(file, "_PRAGMAS", (*file._PRAGMAS, f"PRAGMA max_page_count = {pages + 1}"))
    granted = use_up(ledger, LedgerBusyError)
    with pytest.raises(LedgerBusyError, match="full"):
        ledger.reserve(QUIET, "run", granted)
    assert 0 < granted < 100
    assert len(ledger.events()) == granted
    monkeypatch.undo()
    assert verify(ledger.path) == []
    ledger.reserve(QUIET, "run", granted)
    assert len(open_ledger(cap_epsilon=100.0).events()) == granted + 1


def test_a_refusal_stands_on_a_full_disk(open_ledger: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = open_ledger(cap_epsilon=0.1)
    monkeypatch.setattr(ledger_module, "append_row", _full)
    with pytest.raises(BudgetRefused):
        ledger.reserve(EVENT, "run", 1)
    assert ledger.state.refusals == 0


def test_a_reservation_that_fails_late_is_not_remembered(
    open_ledger: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_ledger()
    right = LedgerState.add

    def late(self: LedgerState, entry: Any) -> None:
        right(self, entry)
        if entry.seq == 2:
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(LedgerState, "add", late)
    with pytest.raises(LedgerBusyError):
        ledger.reserve(EVENT, "run", 1)
    monkeypatch.undo()
    assert ledger.events() == ()
    assert ledger.reserve(EVENT, "run", 1).row == 2


def _full(*_: Any) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_what_is_committed_is_on_the_disk(open_ledger: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite syncs file and folder at every commit (EXTRA), and a new ledger's folder is synced by us."""
    synced: list[str] = []
    right = os.fsync

    def fsync(handle: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        right(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    path = open_ledger().path
    assert str(path.parent) in synced
    for connection in (file.open_file, file.writing):
        with connection(path) as db:
            settings = {
                name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")
            }
            assert settings == {"synchronous": 3, "journal_mode": "delete"}


def test_two_openers_share_one_budget(open_ledger: Opener) -> None:
    cap = spent([EVENT] * 6, DELTA, Adjacency.REPLACE_ONE)
    ledgers = [open_ledger(cap_epsilon=cap) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(use_up, ledgers)) == 6
    assert verify(ledgers[0].path) == []
    assert len(ledgers[0].events()) == 6


def test_processes_that_make_the_ledger_at_once_make_one(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from client.ledger.ledger import Ledger, Opening\n"
        "from common.privacy.events import PoissonGaussian\n"
        "event = PoissonGaussian(sample_rate=0.05, noise_multiplier=2.0, steps=1)\n"
        "ledger = Ledger.open(Path(sys.argv[1]), Opening('site-1', 'v1', 8.0, 1e-5))\n"
        "for round in range(5): ledger.confirm(ledger.reserve(event, sys.argv[2], round))\n"
    )
    path = tmp_path / "ledger.sqlite"
    children = [
        subprocess.Popen([sys.executable, "-c", script, str(path), f"run-{number}"], cwd=ROOT)
        for number in range(2)
    ]
    assert [child.wait(120) for child in children] == [0, 0]
    assert verify(path) == []
    assert len(LedgerState.read(path).events) == 10
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["ledger.anchor.json", "ledger.sqlite"]


def sweep(path: Path, kind: str, stride: int, *options: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("crash_sweep.py")),
            str(path),
            kind,
            str(stride),
            *options,
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize(
    ("kind", "stride"),
    [
        ("round", 83),
        pytest.param("release", 59, marks=pytest.mark.slow),
        pytest.param("round", 23, marks=pytest.mark.slow),
        pytest.param("release", 23, marks=pytest.mark.slow),
    ],
)
def test_killed_anywhere_the_spending_is_never_understated(
    kind: str, stride: int, open_ledger: Opener
) -> None:
    found = sweep(fill(open_ledger(), 1), kind, stride)
    assert found["killed"] == found["points"] > 50
    assert 0 < found["charged"] < found["points"]  # both sides of the commit were met
    assert found["understated"] == []
    assert found["forgotten"] == []
    assert found["refused"] == []
    assert found["problems"] == []


@pytest.mark.slow
def test_killed_at_every_instruction(open_ledger: Opener) -> None:
    found = sweep(fill(open_ledger(), 1), "round", 1)
    assert found["killed"] == found["instructions"]
    assert found["understated"] == found["forgotten"] == found["refused"] == found["problems"] == []


def test_planted_bug_counting_confirmed_rounds_only(open_ledger: Opener) -> None:
    assert sweep(fill(open_ledger(), 1), "round", 83, "--count-confirmed-only")["understated"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"site": "site-2"}, LedgerError, "every site keeps its own"),
        ({"cap_epsilon": 0.5}, ConfigError, "has spent epsilon"),
        ({"cap_delta": 1e-9, "cap_epsilon": 1.2}, ConfigError, "has spent epsilon"),
        ({"cap_epsilon": 0.0}, ConfigError, "above 0"),
        ({"cap_epsilon": float("inf")}, ConfigError, "finite"),
        ({"cap_delta": 1.0}, ConfigError, "between 0 and 1"),
    ],
)
def test_one_clear_error_for_a_wrong_ledger_or_cap(
    changes: dict[str, Any], error: type[UserError], message: str, open_ledger: Opener
) -> None:
    fill(open_ledger(), 3)
    with pytest.raises(error, match=message):
        open_ledger(**changes)


def test_the_site_of_a_ledger_can_be_asked_for(open_ledger: Opener) -> None:
    path = fill(open_ledger(), 1)
    assert verify(path, site="site-1") == []
    assert verify(path, site="site-2")[0].row == 1


def test_a_raised_or_lowered_cap_is_recorded_and_the_newest_holds(open_ledger: Opener) -> None:
    old = open_ledger(cap_epsilon=100.0)
    fill(old, 2)
    open_ledger(cap_epsilon=old.state.spent() * 1.01)
    with pytest.raises(BudgetRefused):
        old.reserve(EVENT, "run", 3)
    fill(open_ledger(cap_epsilon=20.0), 1)


def test_a_missing_folder_or_file_is_a_users_mistake(open_ledger: Opener, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be made"):
        open_ledger(path=tmp_path / "none" / "ledger.sqlite")
    with pytest.raises(UserError, match="not found"):
        verify(tmp_path / "none.sqlite")
    with pytest.raises(UserError, match="not found"):
        LedgerState.read(tmp_path / "none.sqlite")
