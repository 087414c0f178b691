"""The second anchor: a ledger that is deleted or rolled back is refused until the loss is accepted."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from client.ledger.anchor import Anchor, AnchorFile, LedgerLostError, anchor_file, newest_mark
from client.ledger.check import accept_loss, verify
from client.ledger.file import LedgerBusyError, LedgerError, Mark
from client.ledger.ledger import Ledger, Opening
from client.ledger.state import LedgerState
from client.site import JOURNAL_FILE
from common.errors import BudgetRefused, ConfigError
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian

DELTA = 1e-5
EVENT = PoissonGaussian(sample_rate=0.05, noise_multiplier=1.0, steps=10)
OTHER = PoissonGaussian(sample_rate=0.1, noise_multiplier=2.0, steps=3)
LOOK = DiscreteLaplace(scale=40.0)


@pytest.fixture(params=["beside", "kit"])
def anchor(request: pytest.FixtureRequest, tmp_path: Path) -> AnchorFile:
    """The anchor beside the ledger, and in a kit."""
    if request.param == "beside":
        return anchor_file(tmp_path / "ledger.sqlite")
    (tmp_path / "kit" / "state").mkdir(parents=True)
    return anchor_file(tmp_path / "ledger.sqlite", tmp_path / "kit")


@pytest.fixture
def reopen(tmp_path: Path, anchor: AnchorFile) -> Callable[..., Ledger]:
    """Opens the ledger as a new process would."""

    def make(**changes: Any) -> Ledger:
        settings: dict[str, Any] = {
            "path": tmp_path / "ledger.sqlite",
            "site": "site-1",
            "data_version": "v1",
            "cap_epsilon": 8.0,
            "cap_delta": DELTA,
            "anchor": anchor,
        }
        settings |= changes
        own = {field.name: settings.pop(field.name) for field in fields(Opening) if field.name in settings}
        return Ledger.open(opening=Opening(**own), **settings)

    return make


Reopen = Callable[..., Ledger]


def fill(ledger: Ledger, rounds: int = 2) -> float:
    """Some rounds and a look; what they cost."""
    for round in range(1, rounds + 1):
        ledger.confirm(ledger.reserve(EVENT, "run", round))
    ledger.reserve(LOOK, "run", rounds, copies=2)
    ledger.reserve(OTHER, "run", rounds + 1)
    return ledger.state.spent()


def delete(path: Path) -> None:
    path.unlink()


def roll_back(path: Path) -> None:
    shutil.copy(path.with_name("old"), path)


def replace_by_a_fresh_one(path: Path) -> None:
    path.unlink()
    Ledger.open(path, Opening("site-1", "v1", 8.0, DELTA), anchor=AnchorFile(path.with_name("elsewhere")))


LOSSES = pytest.mark.parametrize("lose", [delete, roll_back, replace_by_a_fresh_one])


@LOSSES
def test_a_lost_ledger_is_refused_and_nothing_is_charged(
    lose: Callable[[Path], None], reopen: Reopen, anchor: AnchorFile
) -> None:
    ledger = reopen()
    ledger.reserve(EVENT, "run", 1)
    shutil.copy(ledger.path, ledger.path.with_name("old"))
    fill(ledger)
    before = anchor.path.read_bytes()
    lose(ledger.path)
    content = ledger.path.read_bytes() if ledger.path.exists() else None
    for _ in range(2):  # it does not go away by trying again
        with pytest.raises(LedgerLostError, match="fedbags ledger accept-loss"):
            reopen()
    # A process that was running meanwhile grants nothing either.
    with pytest.raises((LedgerError, LedgerBusyError)):
        ledger.reserve(EVENT, "run", 9)
    assert anchor.path.read_bytes() == before
    assert (ledger.path.read_bytes() if ledger.path.exists() else None) == content
    if content is not None:
        assert "site once wrote row" in verify(ledger.path, anchor=anchor)[-1].reason


@LOSSES
def test_an_accepted_loss_is_charged_recorded_and_stated(
    lose: Callable[[Path], None], reopen: Reopen, anchor: AnchorFile
) -> None:
    ledger = reopen()
    ledger.reserve(EVENT, "run", 1)
    shutil.copy(ledger.path, ledger.path.with_name("old"))
    cost = fill(ledger)
    lost = anchor.read()
    assert lost is not None
    lose(ledger.path)
    assert accept_loss(Ledger(ledger.path, "v1", anchor), "site-1")
    assert not accept_loss(Ledger(ledger.path, "v1", anchor), "site-1")
    again = reopen()
    assert again.state.spent() == pytest.approx(cost, rel=1e-9)
    (row,) = [entry for entry in again.state.entries if entry.kind == "lost"]
    assert (row.body["heads"], row.body["rows"]) == ([lost.head], [lost.rows])
    statement = again.statement(1)
    assert statement.losses == 1
    assert statement.epsilon == pytest.approx(cost, rel=1e-9)
    assert again.export()["losses"] == 1
    assert verify(ledger.path, anchor=anchor) == []
    assert anchor.read() == Anchor.of(again.state)
    again.reserve(EVENT, "run", 2)
    assert LedgerState.read(ledger.path).losses == 1


def test_what_is_left_after_a_loss_is_what_was_left_before(reopen: Reopen, anchor: AnchorFile) -> None:
    cap = spent([EVENT] * 4, DELTA, Adjacency.REPLACE_ONE)
    ledger = reopen(cap_epsilon=cap)
    for round in range(1, 4):
        ledger.reserve(EVENT, "run", round)
    ledger.path.unlink()
    accept_loss(Ledger(ledger.path, "v1", anchor), "site-1")
    again = reopen(cap_epsilon=cap)
    again.reserve(EVENT, "run", 4)
    with pytest.raises(BudgetRefused):
        again.reserve(EVENT, "run", 5)


def test_a_ledger_beside_the_anchors_chain_is_charged_with_both(reopen: Reopen, anchor: AnchorFile) -> None:
    """A ledger with spending of its own is no older copy: nothing of either may be forgotten."""
    first = reopen()
    first.reserve(EVENT, "run", 1)
    first.path.unlink()
    other = Ledger.open(
        first.path, Opening("site-1", "v1", 8.0, DELTA), anchor=AnchorFile(first.path.with_name("x"))
    )
    other.reserve(OTHER, "run", 1)
    assert accept_loss(Ledger(first.path, "v1", anchor), "site-1")
    assert sorted(event.model_dump_json() for event in reopen().events()) == sorted(
        event.model_dump_json() for event in (EVENT, OTHER)
    )


def test_without_an_anchor_the_journal_tells_and_the_whole_budget_counts_as_spent(
    reopen: Reopen, anchor: AnchorFile
) -> None:
    ledger = reopen()
    fill(ledger)
    seen = (Mark(ledger.state.rows, ledger.state.head),)
    ledger.path.unlink()
    anchor.path.unlink()
    with pytest.raises(LedgerLostError, match="missing"):
        reopen(seen=seen)
    assert accept_loss(Ledger(ledger.path, "v1", anchor, seen), "site-1")
    with pytest.raises(ConfigError, match="has spent epsilon inf"):
        reopen(seen=seen)
    assert math.isinf(LedgerState.read(ledger.path).spent())


def keep(*files: Path) -> None:
    for file in files:
        shutil.copy(file, file.with_name(f"{file.name}.bak"))


def put_back(*files: Path) -> None:
    for file in files:
        shutil.copy(file.with_name(f"{file.name}.bak"), file)


def refuses_all(path: Path, anchor: AnchorFile, seen: tuple[Mark, ...] = ()) -> None:
    """No further round is granted, nor under another cap."""
    with pytest.raises(BudgetRefused):
        Ledger.open(path, Opening("site-1", "v1", 8.0, DELTA), anchor=anchor, seen=seen).reserve(
            EVENT, "run", 9
        )
    with pytest.raises(ConfigError, match="has spent epsilon inf"):
        Ledger.open(path, Opening("site-1", "v1", 9.0, DELTA), anchor=anchor, seen=seen)


@pytest.mark.parametrize("anchor_from", ["the ledger's backup", "a later backup"])
@pytest.mark.parametrize("ledger_from", [put_back, delete])
def test_rows_that_only_the_journal_names_use_up_the_whole_budget(
    ledger_from: Callable[[Path], None], anchor_from: str, reopen: Reopen, anchor: AnchorFile
) -> None:
    """Ledger and anchor come from old backups, and nobody knows what the newer rows spent."""
    ledger = reopen()
    ledger.reserve(EVENT, "run", 1)
    keep(ledger.path, anchor.path)
    if anchor_from == "a later backup":
        ledger.reserve(EVENT, "run", 2)
        keep(anchor.path)
    fill(ledger)
    seen = (Mark(ledger.state.rows, ledger.state.head),)
    ledger_from(ledger.path)
    put_back(anchor.path)
    with pytest.raises(LedgerLostError):
        reopen(seen=seen)
    assert accept_loss(Ledger(ledger.path, "v1", anchor, seen), "site-1")
    assert not accept_loss(Ledger(ledger.path, "v1", anchor, seen), "site-1")
    assert math.isinf(LedgerState.read(ledger.path).spent())
    assert LedgerState.read(ledger.path).losses == 1
    refuses_all(ledger.path, anchor, seen)


def test_a_chain_beside_the_one_that_ledger_and_anchor_agree_on_uses_up_the_whole_budget(
    reopen: Reopen, anchor: AnchorFile
) -> None:
    """The journal's mark is no longer than the anchor, and still of another chain."""
    ledger = reopen()
    keep(ledger.path, anchor.path)
    ledger.reserve(EVENT, "run", 1)
    seen = (Mark(ledger.state.rows, ledger.state.head),)
    put_back(ledger.path, anchor.path)
    fill(reopen())
    assert accept_loss(Ledger(ledger.path, "v1", anchor, seen), "site-1")
    assert math.isinf(LedgerState.read(ledger.path).spent())


def test_a_journal_behind_the_anchor_costs_nothing_on_top(reopen: Reopen, anchor: AnchorFile) -> None:
    """A crash after the anchor and before the journal's line: the anchor knows all that was spent."""
    ledger = reopen()
    seen = (Mark(ledger.state.rows, ledger.state.head),)
    cost = fill(ledger)
    ledger.path.unlink()
    assert accept_loss(Ledger(ledger.path, "v1", anchor, seen), "site-1")
    assert reopen(seen=seen).state.spent() == pytest.approx(cost, rel=1e-9)


def test_a_head_that_only_the_coordinator_holds_uses_up_the_whole_budget(
    reopen: Reopen, anchor: AnchorFile
) -> None:
    """The whole site comes from one old backup: ledger, anchor and journal agree."""
    ledger = reopen()
    ledger.reserve(EVENT, "run", 1)
    keep(ledger.path, anchor.path)
    fill(ledger)
    told = ledger.statement(1).ledger_head
    put_back(ledger.path, anchor.path)
    again = reopen()
    again.reserve(OTHER, "another run", 1)
    assert not accept_loss(Ledger(ledger.path, "v1", anchor), "site-1")
    assert not accept_loss(Ledger(ledger.path, "v1", anchor), "site-1", head=again.statement(1).ledger_head)
    assert accept_loss(Ledger(ledger.path, "v1", anchor), "site-1", head=told)
    assert not accept_loss(Ledger(ledger.path, "v1", anchor), "site-1", head=told)
    statement = LedgerState.read(ledger.path).statement(1)
    assert (statement.losses, statement.epsilon, statement.budget_left) == (1, None, 0.0)
    refuses_all(ledger.path, anchor)


def test_the_coordinators_head_costs_nothing_on_top_where_the_anchor_has_it(
    reopen: Reopen, anchor: AnchorFile
) -> None:
    ledger = reopen()
    cost = fill(ledger)
    ledger.path.unlink()
    assert accept_loss(Ledger(ledger.path, "v1", anchor), "site-1", head=ledger.state.head)
    assert reopen().state.spent() == pytest.approx(cost, rel=1e-9)


def test_a_site_of_which_only_the_coordinator_knows_starts_with_its_budget_used_up(
    tmp_path: Path, anchor: AnchorFile
) -> None:
    path = tmp_path / "ledger.sqlite"
    assert accept_loss(Ledger(path, "v1", anchor), "site-1", head="ab" * 32)
    assert math.isinf(LedgerState.read(path).spent())


@pytest.mark.parametrize("content", [b"", b"{", b'{"rows": 1}'])
def test_a_damaged_anchor_refuses_until_the_loss_is_accepted(
    content: bytes, reopen: Reopen, anchor: AnchorFile
) -> None:
    ledger = reopen()
    ledger.reserve(EVENT, "run", 1)
    anchor.path.write_bytes(content)
    with pytest.raises(LedgerLostError, match="cannot be read"):
        reopen()
    assert accept_loss(Ledger(ledger.path, "v1", anchor), "site-1")
    assert LedgerState.read(ledger.path).losses == 1
    found = anchor.read()
    assert found is not None
    assert found.head == LedgerState.read(ledger.path).head


def test_an_anchor_behind_the_ledger_is_no_loss_and_catches_up(reopen: Reopen, anchor: AnchorFile) -> None:
    """A crash between the row and the anchor; and a site that comes from a release without anchors."""
    ledger = reopen()
    ledger.reserve(EVENT, "run", 1)
    behind = anchor.path.read_bytes()
    ledger.reserve(EVENT, "run", 2)
    for left in (behind, None):
        anchor.path.unlink()
        if left is not None:
            anchor.path.write_bytes(left)
        assert len(reopen().events()) == 2
        found = anchor.read()
        assert found is not None
        assert (found.rows, found.head) == (ledger.state.rows, ledger.state.head)


def test_an_older_process_does_not_turn_the_anchor_back(reopen: Reopen, anchor: AnchorFile) -> None:
    first, second = reopen(), reopen()
    first.reserve(EVENT, "run", 1)
    old = LedgerState.read(first.path)
    second.reserve(EVENT, "run", 2)
    anchor.advance(old)
    assert anchor.read() == Anchor.of(LedgerState.read(first.path))


def test_a_full_disk_for_the_anchor_grants_nothing(
    reopen: Reopen, anchor: AnchorFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = reopen()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.ledger.anchor.write_text", full)
    with pytest.raises(LedgerBusyError, match="No space left"):
        ledger.reserve(EVENT, "run", 1)
    monkeypatch.undo()
    assert reopen().events() == (EVENT,)  # charged in vain, and never hidden


def test_another_sites_anchor_is_no_loss_that_can_be_accepted(reopen: Reopen, anchor: AnchorFile) -> None:
    ledger = reopen()
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="of site 'site-1', not of 'site-2'"):
        accept_loss(Ledger(ledger.path, "v1", anchor), "site-2")
    assert not ledger.path.exists()


def test_a_fresh_site_has_nothing_to_lose(tmp_path: Path, anchor: AnchorFile) -> None:
    assert not accept_loss(Ledger(tmp_path / "ledger.sqlite", "v1", anchor), "site-1")
    assert not (tmp_path / "ledger.sqlite").exists()


def question(site: Path, kit: Path | None) -> tuple[Message, Context]:
    from deploy.flower.internals import become_server

    become_server()
    node = {"data-path": str(site)} | ({"kit": str(kit)} if kit else {})
    return Message(RecordDict(), 7, "query.proportions"), Context(1, 7, node, RecordDict(), {})


@pytest.mark.parametrize("with_kit", [False, True])
def test_the_journal_keeps_the_mark(with_kit: bool, tmp_path: Path) -> None:
    from client import door

    site, kit = tmp_path / "site", tmp_path / "kit" if with_kit else None
    site.mkdir()
    if kit:
        (kit / "state").mkdir(parents=True)
    message, context = question(site, kit)

    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    door._record(message, context, answer)
    file = kit / "logs" / JOURNAL_FILE if kit else site / JOURNAL_FILE
    assert newest_mark(file) == ()
    place = anchor_file(site / "ledger.sqlite", kit)
    ledger = Ledger.open(site / "ledger.sqlite", Opening("site-1", "v1", 8.0, DELTA), anchor=place)
    door._record(message, context, answer)
    mark = (Mark(ledger.state.rows, ledger.state.head),)
    assert newest_mark(file) == mark
    with file.open("a") as stream:
        stream.write("{\n[]\n" + json.dumps({"ledger_rows": 0, "ledger_head": ""}) + '\n{"torn')
    assert newest_mark(file) == mark
    place.path.unlink()
    ledger.path.unlink()
    with pytest.raises(LedgerLostError):
        Ledger.open(
            site / "ledger.sqlite", Opening("site-1", "v1", 8.0, DELTA), anchor=place, seen=newest_mark(file)
        )
