"""What a site has spent stays spent: a statement that leaves out what came before leaves out its site."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunError
from common.privacy.events import DiscreteLaplace, PoissonGaussian, merge
from common.records import MessageError, PrivacyStatement
from common.text import _REASON_CHARACTERS
from common.wire import to_records
from server.statements import StatementStore

Events = list[PoissonGaussian | DiscreteLaplace]


def gaussian(steps: int, sigma: float = 1.0) -> PoissonGaussian:
    return PoissonGaussian(sample_rate=0.1, noise_multiplier=sigma, steps=steps)


LOOK = DiscreteLaplace(scale=8.0)
UNBOUNDED = PoissonGaussian(sample_rate=1.0, noise_multiplier=0.0, steps=1)


def statement(events: Events, head: str = "", losses: int = 0, **more: Any) -> PrivacyStatement:
    own = {
        "site": "north", "round": 1, "epsilon": 1.0, "delta": 1e-4, "losses": losses,
        "ledger_head": hashlib.sha256(head.encode()).hexdigest(),
        "events": tuple(event.model_dump() for event in merge(events)),
    }  # fmt: skip
    return PrivacyStatement.model_validate(own | more)


GROWS: dict[str, tuple[Events, Events]] = {
    "nothing, then steps": ([], [gaussian(4)]),
    "more steps": ([gaussian(4)], [gaussian(8)]),
    "the same steps": ([gaussian(4)], [gaussian(4)]),
    "other steps beside them": ([gaussian(4)], [gaussian(4), gaussian(2, 3.0)]),
    "one more look": ([gaussian(4), LOOK, LOOK], [gaussian(4), LOOK, LOOK, LOOK]),
}
SHRINKS: dict[str, tuple[Events, Events]] = {
    "fewer steps": ([gaussian(8)], [gaussian(4)]),
    "one step fewer": ([gaussian(8)], [gaussian(7), gaussian(100, 2.0)]),
    "other noise": ([gaussian(8)], [gaussian(8, 1.0000001)]),
    "one look fewer": ([LOOK, LOOK], [LOOK, gaussian(4)]),
    "a release of another scale": ([LOOK], [DiscreteLaplace(scale=9.0), DiscreteLaplace(scale=9.0)]),
    "nothing any more": ([gaussian(8)], []),
}


@pytest.fixture(params=["in a run", "over runs"])
def books(request: Any, tmp_path: Path) -> Any:
    """Gives the book for the next statement: the same one, or one that a later process opens."""
    if request.param == "in a run":
        same = StatementStore(None, {})
        return lambda: same
    return lambda: StatementStore(tmp_path / "statements", {})


@pytest.mark.parametrize("case", GROWS)
def test_events_may_grow(books: Any, case: str) -> None:
    first, then = GROWS[case]
    books().take(statement(first, "a"))
    assert books().take(statement(then, "b")) is None
    with pytest.raises(MessageError):
        books().take(statement([gaussian(1, 9.0)], "c"))


@pytest.mark.parametrize("case", SHRINKS)
def test_events_never_shrink(books: Any, case: str) -> None:
    first, then = SHRINKS[case]
    books().take(statement(first, "a"))
    with pytest.raises(MessageError, match="leaves out what it stated before"):
        books().take(statement(then, "b"))


def test_a_ledger_that_was_rolled_back_is_so_however_it_grows() -> None:
    """Until the end of the run, or until the site declares the loss."""
    book = StatementStore(None, {})
    book.take(statement([gaussian(8)], "a"))
    for steps in (4, 8, 12):
        with pytest.raises(MessageError):
            book.take(statement([gaussian(steps)], f"b{steps}"))
    assert book.take(statement([gaussian(16)], "c", losses=1)) is not None
    assert book.take(statement([gaussian(20)], "d", losses=1)) is None


@pytest.mark.parametrize("case", SHRINKS)
def test_a_loss_that_is_declared_excuses_no_event(books: Any, case: str) -> None:
    first, then = SHRINKS[case]
    books().take(statement(first, "a"))
    with pytest.raises(MessageError):
        books().take(statement(then, "b", losses=1))


def test_a_declared_loss_with_all_events_is_taken_and_told() -> None:
    book = StatementStore(None, {})
    before = statement([gaussian(4)], "a")
    book.take(before)
    assert book.take(statement([gaussian(4)], "b", losses=1)) == before
    assert book.take(statement([gaussian(8)], "c", losses=1)) is None
    with pytest.raises(MessageError):
        book.take(statement([gaussian(8)], "d"))  # and a declaration is not taken back


def test_who_does_not_know_what_was_lost_states_that_nothing_is_bounded() -> None:
    book = StatementStore(None, {})
    book.take(statement([gaussian(4)], "a"))
    with pytest.raises(MessageError):
        book.take(statement([UNBOUNDED], "b"))  # not without declaring it
    assert book.take(statement([UNBOUNDED], "b", losses=1)) is not None
    assert book.take(statement([UNBOUNDED, gaussian(2)], "c", losses=1)) is None
    with pytest.raises(MessageError):
        book.take(statement([gaussian(400)], "d", losses=1))


def test_an_answer_that_comes_again_is_no_roll_back(books: Any) -> None:
    old, new = statement([gaussian(4)], "a"), statement([gaussian(8)], "b")
    books().take(old)
    books().take(new)
    assert books().take(old) is None
    assert books().take(old.model_copy(update={"round": 2, "budget_left": 1.0})) is None
    with pytest.raises(MessageError):
        books().take(statement([gaussian(4)], "another head"))
    with pytest.raises(MessageError):
        books().take(statement([gaussian(7)], "c"))


def test_an_answer_of_another_run_does_not_come_again(tmp_path: Path) -> None:
    old, new = statement([gaussian(4)], "a"), statement([gaussian(8)], "b")
    book = StatementStore(tmp_path, {}, "first")
    book.take(old)
    book.take(new)
    assert StatementStore(tmp_path, {}, "first").take(old) is None
    with pytest.raises(MessageError):
        StatementStore(tmp_path, {}, "second").take(old)


@pytest.mark.parametrize("late", ["of the other run", "of a third run that has read nothing before"])
def test_a_site_in_two_runs_is_not_taken_for_rolled_back_by_the_order_of_reading(
    tmp_path: Path, late: str
) -> None:
    first, second = StatementStore(tmp_path, {}, "first"), StatementStore(tmp_path, {}, "second")
    both = {"north": ""}
    if late == "of the other run":
        first.asking(both)
        first.take(statement([gaussian(4)], "a"))
    first.asking(both)
    second.asking(both)
    # The site answers the first run and then the second; the second reads its answer first.
    second.take(statement([gaussian(4), gaussian(4, 2.0), gaussian(4, 3.0)], "c"))
    assert first.take(statement([gaussian(4), gaussian(4, 2.0)], "b")) is None
    assert first.last("north") == statement([gaussian(4), gaussian(4, 2.0)], "b")
    kept = json.loads((tmp_path / "north.json").read_text())["last"]
    assert len(kept["events"]) == 3  # the newest, whoever read it
    first.asking(both)
    assert first.take(statement([gaussian(8), gaussian(4, 2.0), gaussian(4, 3.0)], "d")) is None


@pytest.mark.parametrize(
    ("name", "events"),
    {
        "the other run's events are gone": [gaussian(4), gaussian(4, 2.0)],
        "this run's events are gone": [gaussian(4, 2.0), gaussian(4, 3.0)],
        "a ledger that went another way": [gaussian(4), gaussian(9, 5.0)],
    }.items(),
)
def test_what_was_read_before_a_site_was_asked_is_in_its_answer(
    tmp_path: Path, name: str, events: Events
) -> None:
    first, second = StatementStore(tmp_path, {}, "first"), StatementStore(tmp_path, {}, "second")
    first.asking({"north": ""})
    first.take(statement([gaussian(4)], "a"))
    second.asking({"north": ""})
    if name != "a ledger that went another way":
        second.take(statement([gaussian(4), gaussian(4, 3.0)], "b"))
    first.asking({"north": ""})
    second.take(statement([gaussian(4), gaussian(4, 3.0), gaussian(1, 7.0)], "c"))
    with pytest.raises(MessageError):
        first.take(statement(events, "d"))


def test_a_node_that_takes_a_name_does_not_shut_its_site_out_for_ever(tmp_path: Path) -> None:
    lie = statement([gaussian(4, 9.0)], "x", losses=1000)
    StatementStore(tmp_path, {}, "first").take(lie, "stranger")
    own = StatementStore(tmp_path, {}, "second")
    assert own.take(statement([gaussian(4)], "a"), "its own") is None
    assert own.take(statement([gaussian(8)], "b"), "its own") is None
    later = StatementStore(tmp_path, {}, "third")
    with pytest.raises(MessageError):
        later.take(statement([gaussian(4)], "c"), "its own")  # which still counts against the site itself
    with pytest.raises(MessageError):
        later.take(statement([gaussian(8)], "b"), "stranger")
    (tmp_path / "north@its own.json").unlink()  # how the coordinator begins anew with one site
    assert StatementStore(tmp_path, {}, "fourth").take(statement([gaussian(4)], "c"), "its own") is None


def test_a_checkpoint_counts_against_the_node_that_made_the_statement() -> None:
    book = StatementStore(None, {"north": statement([gaussian(8)], "b")}, keys={"north": "stranger"})
    assert book.last("north", "stranger") is not None
    assert book.take(statement([gaussian(4)], "x"), "its own") is None
    with pytest.raises(MessageError):
        book.take(statement([gaussian(4)], "x"), "stranger")


def test_the_reason_names_the_head_to_declare_the_loss_with_and_is_not_cut() -> None:
    book, newest = StatementStore(None, {}), statement([gaussian(8)], "a")
    book.take(newest)
    command = f"accept-loss DATA --kit KIT --head {newest.ledger_head}"
    with pytest.raises(MessageError, match=command) as caught:
        book.take(statement([gaussian(4)], "b"))
    assert len(str(caught.value)) <= _REASON_CHARACTERS


def test_a_run_that_goes_on_compares_with_its_checkpoint() -> None:
    book = StatementStore(None, {"north": statement([gaussian(8)], "b")})
    assert book.take(statement([gaussian(8)], "b")) is None
    with pytest.raises(MessageError):
        book.take(statement([gaussian(4)], "x"))


def test_without_privacy_nothing_is_compared(books: Any) -> None:
    books().take(statement([gaussian(8)], "a"))
    assert books().take(PrivacyStatement(site="north", round=1)) is None
    with pytest.raises(MessageError):
        books().take(statement([gaussian(4)], "b"))


@given(st.lists(st.tuples(st.integers(1, 50), st.sampled_from([0.5, 1.0, 2.0])), min_size=1), st.data())
def test_an_honest_ledger_is_never_refused_and_its_older_copy_always(
    charges: list[tuple[int, float]], data: st.DataObject
) -> None:
    book = StatementStore(None, {})
    events = [gaussian(*charge) for charge in charges]
    for number in range(1, len(events) + 1):
        book.take(statement(events[:number], f"head {number}"))
    kept = data.draw(st.integers(0, len(events) - 1))
    with pytest.raises(MessageError):
        book.take(statement(events[:kept], "another head"))


def test_a_damaged_memory_is_one_clear_error_before_anything_is_asked(
    federation: Any, three: dict[int, str], tmp_path: Path
) -> None:
    folder = tmp_path / "statements"
    folder.mkdir()
    (folder / "north.json").write_text("{")
    sites = federation.sites(three)
    with pytest.raises(RunError, match=r"north.*cannot be read.*\n.*backup"):
        federation.run(sites, statements=folder)
    assert sites.trained(1) == []


def test_a_site_whose_ledger_was_rolled_back_is_left_out_in_the_next_run(
    federation: Any, three: dict[int, str], tmp_path: Path
) -> None:
    steps = {"north": 0, "east": 0, "south": 0}

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if kind == "train":
            steps[site] += 4
            own = statement([gaussian(steps[site])], f"{site} {steps[site]}", site=site, round=round)
            reply.content["privacy"] = to_records(own)["privacy"]
        return reply

    folder = tmp_path / "statements"
    federation.run(federation.sites(dict(three), behave), statements=folder)
    assert sorted(file.name for file in folder.iterdir()) == ["east.json", "north.json", "south.json"]
    federation.folder = tmp_path / "second"
    steps["north"] = 0
    summary = federation.run(federation.sites(dict(three), behave), statements=folder)
    assert {(item["site"], item["round"]) for item in summary["left_out"]} == {
        ("north", 1), ("north", 2), ("north", 3),
    }  # fmt: skip
    assert all("leaves out what it stated before" in item["reason"] for item in summary["left_out"])
    assert [event["updates"] for event in federation.events("round")] == [2, 2, 2]
    assert "north" not in summary["statements"]
    assert json.loads((folder / "north.json").read_text())["last"]["events"][0]["steps"] == 12


def test_a_site_is_known_by_its_nodes_key_as_flower_tells_it(
    federation: Any, three: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, keys = {"north": 40}, {node: f"first key of {node}".encode() for node in three}

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind) == ("north", "train"):
            steps["north"] += 4
            own = statement([gaussian(steps[site])], f"{steps[site]}", round=round)
            reply.content["privacy"] = to_records(own)["privacy"]
        return reply

    def get_nodes(grid: Any) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=keys[node]) for node in grid.get_node_ids()]

    folder = tmp_path / "statements"
    sites = federation.sites(dict(three), behave)
    monkeypatch.setattr(type(sites), "get_nodes", get_nodes)
    federation.run(sites, statements=folder, rounds=1)
    assert [file.name.split("@")[0] for file in folder.glob("*@*.json")] == ["north"]
    steps["north"] = 0
    keys |= {node: b"another key" for node, site in three.items() if site == "north"}
    federation.folder = tmp_path / "second"
    summary = federation.run(federation.sites(dict(three), behave), statements=folder, rounds=1)
    assert summary["left_out"] == []
    assert len(list(folder.glob("north@*.json"))) == 2


def test_a_run_says_which_site_declared_a_loss(
    federation: Any, three: dict[int, str], tmp_path: Path
) -> None:

    losses = 0

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind) == ("north", "train"):
            own = statement([gaussian(4 * round)], f"{round}", round=round, losses=losses)
            reply.content["privacy"] = to_records(own)["privacy"]
        return reply

    federation.run(federation.sites(dict(three), behave), statements=tmp_path / "statements", rounds=1)
    federation.folder, losses = tmp_path / "second", 1
    summary = federation.run(federation.sites(dict(three), behave), statements=tmp_path / "statements")
    assert summary["losses"] == [{"round": 1, "site": "north", "epsilon": 1.0, "delta": 1e-4}]
    assert [event["site"] for event in federation.events("ledger-lost")] == ["north"]
    assert summary["left_out"] == []
