"""The state of a run is a pure fold over its events, and its figures are those of the events."""

import io
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from common.files import JsonLinesFile, read_json_lines
from common.records import SITE_ERRORS, SiteError
from common.run_records import FLOWER_ERRORS, Cause, RoundDone, SiteLeftOut, cause_of_code, read_event
from deploy.runs import reading as run_state
from deploy.runs.prometheus import _run_metrics
from deploy.runs.reading import RunSource, RunState, Stage, run_events
from deploy.runs.show import run_table
from server.run_folder import RunFolder, newest_checkpoint

NAMES = st.sampled_from(["a", "b", "c", "node 7"])
ROUNDS = st.integers(0, 5)
REASONS = st.sampled_from(["no reply within 3 s", "boom", *SITE_ERRORS.values(), *FLOWER_ERRORS.values()])
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "enrolled": {"round": ROUNDS, "rounds": st.just(5), "sites": st.lists(NAMES, max_size=3)},
    "resumed": {"round": ROUNDS, "rounds": st.just(5), "sites": st.lists(NAMES, max_size=3)},
    "joined": {"round": ROUNDS, "site": NAMES},
    "left": {"round": ROUNDS, "site": NAMES, "reason": REASONS},
    "waiting": {"sites": st.lists(NAMES, max_size=3), "missing": st.integers(0, 3)},
    "phase": {
        "phase": st.sampled_from(["train", "query.proportions"]),
        "seconds": st.integers(0, 100),
        "bytes_sent": st.integers(0, 100),
        "bytes_received": st.integers(0, 100),
    },
    "update": {
        "round": ROUNDS,
        "site": NAMES,
        "bags": st.integers(1, 9),
        "loss": st.none() | st.floats(0, 9),
    },
    "statement": {"round": ROUNDS, "site": NAMES, "epsilon": st.floats(0, 9), "delta": st.just(1e-3)},
    "left-out": {
        "site": NAMES,
        "phase": st.sampled_from(["enrol", "train", "evaluate.bags"]),
        "cause": st.sampled_from(Cause),
        "reason": REASONS,
    },
    "round-skipped": {"round": ROUNDS, "sites": st.lists(NAMES, max_size=3), "reason": REASONS},
    "round": {"round": ROUNDS, "updates": st.integers(0, 3), "loss": st.none()},
    "finished": {"round": ROUNDS},
    "failed": {"reason": REASONS},
    "something-new": {"round": ROUNDS},
}
EVENTS = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(
        lambda kind: st.fixed_dictionaries(
            {"event": st.just(kind), "time": st.integers(1, 9), **FIELDS[kind]}
        )
    ),
    max_size=30,
)


def fold(events: list[dict], start: RunState | None = None) -> RunState:
    return run_state.fold(map(read_event, events), start)


@given(EVENTS, st.integers(0, 30))
def test_a_fold_can_be_taken_up_anywhere_and_leaves_the_start_alone(events: list[dict], cut: int) -> None:
    half = fold(events[:cut])
    before = repr(half)
    assert fold(events[cut:], half) == fold(events)
    assert repr(half) == before


@given(EVENTS)
def test_nothing_is_lost_and_nothing_is_counted_twice(events: list[dict]) -> None:
    state = fold(events)
    of = {kind: [e for e in events if e["event"] == kind] for kind in FIELDS}
    assert sum(state.refusals.values()) == len(of["left-out"])
    assert set(state.refusals) <= set(Cause)
    assert state.bytes_sent == sum(e["bytes_sent"] for e in of["phase"])
    assert sum(phase.count for phase in state.phases.values()) == len(of["phase"])
    assert sum(phase.seconds for phase in state.phases.values()) == sum(e["seconds"] for e in of["phase"])
    assert sum(site.updates for site in state.sites.values()) == len(of["update"])
    assert state.count(taking_part=True) + state.count(taking_part=False) == len(state.sites)
    assert all(bool(site.why_not) is not site.taking_part for site in state.sites.values())
    assert (state.missing > 0) <= (state.stage is Stage.WAITING)
    assert (state.stage is Stage.FAILED) >= bool(events and events[-1]["event"] == "failed")
    json.dumps(state.refusals)


def test_an_impostor_takes_nobody_out() -> None:
    joined = {"event": "joined", "round": 1, "site": "a"}
    claim = {
        "event": "left-out",
        "site": "a",
        "phase": "enrol",
        "cause": "not-admitted",
        "reason": "node 7 uses the name of another site",
    }
    state = fold([joined, claim])
    assert state.sites["a"].taking_part
    assert state.turned_away == {"a": claim["reason"]}
    assert fold([joined], state).turned_away == {}


def test_a_site_that_was_left_out_is_in_again_with_its_next_update() -> None:
    update = {"event": "update", "round": 1, "site": "a", "bags": 3, "loss": 0.5}
    late = {
        "event": "left-out", "round": 2, "site": "a", "phase": "train", "cause": "deadline",
        "reason": "no reply within 3 s",
    }  # fmt: skip
    state = fold([update, late])
    assert (state.sites["a"].taking_part, state.sites["a"].why_not) == (False, "no reply within 3 s")
    assert state.refusals == {"deadline": 1}
    assert fold([update | {"round": 3}], state).sites["a"].taking_part


def test_waiting_ends_when_as_many_joined_as_were_missing() -> None:
    waiting = {"event": "waiting", "sites": ["a", "b", "c"], "missing": 2}
    state = fold([waiting, {"event": "joined", "site": "a"}])
    assert (state.stage, state.missing, state.waiting_for) == (Stage.WAITING, 1, ("b", "c"))
    assert fold([{"event": "joined", "site": "c"}], state).stage is Stage.RUNNING


def test_every_error_code_has_its_cause() -> None:
    assert {cause_of_code(code) for code in SiteError} == {Cause[code.name] for code in SiteError}
    assert {cause_of_code(code) for code in FLOWER_ERRORS} == {Cause.LOST}
    assert cause_of_code(4711) is Cause.OTHER


def causes(run: Path, *reasons: tuple[str, str]) -> list[str]:
    """The causes that are read of these phases and reasons, in a run of 0.1."""
    run.mkdir()
    lines = [{"event": "left-out", "time": 1.0, "round": 1, "site": "a", "phase": phase, "reason": reason}
             for phase, reason in reasons]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [event.cause or "" for event in run_events(run) if isinstance(event, SiteLeftOut)]


def test_a_run_of_0_1_held_reasons_alone_and_its_causes_are_known(tmp_path: Path) -> None:
    sent = causes(tmp_path / "sent", *(("train", text) for text in SITE_ERRORS.values()))
    assert sent == [code.name.lower().replace("_", "-") for code in SITE_ERRORS]
    lost = causes(tmp_path / "lost", *(("train", text) for text in FLOWER_ERRORS.values()))
    assert set(lost) == {"lost"}
    seen = {
        ("train", "array 'w' holds NaN or infinity"): "unusable",
        ("train", "no reply within 3 s"): "deadline",
        ("train", "the message could not be sent to the site"): "unsent",
        ("train", "unreadable reply: record 'update' is missing"): "unreadable",
        ("enrol", "its label tree differs from the federation's"): "not-admitted",
        ("evaluate.test", "something new"): "other",
    }
    assert causes(tmp_path / "seen", *seen) == list(seen.values())


def test_the_state_of_a_real_run(watched_run: Path) -> None:
    state = RunSource(watched_run).refresh()
    events = read_json_lines(watched_run / "metrics.jsonl")
    assert (state.stage, state.round, state.rounds, state.updates) == (Stage.FINISHED, 2, 2, 2)
    assert {name: site.updates for name, site in state.sites.items()} == {
        "hospital-1": 2, "hospital-2": 2, "hospital-3": 1,
    }  # fmt: skip
    assert not state.sites["hospital-3"].taking_part
    assert state.refusals == {"data": 1}
    summary = json.loads((watched_run / "summary.json").read_text())
    for name, statement in summary["statements"].items():
        assert state.sites[name].epsilon == statement["epsilon"]
        assert state.sites[name].epsilon_left == statement["budget_left"]
    assert state.phases["train"].count == 2
    assert state.first == events[0]["time"]
    # Five updates of all trained arrays as float32, and little besides.
    found = newest_checkpoint(watched_run / "checkpoints")
    assert found is not None
    raw = sum(array.nbytes for array in found[1]["model"].values())
    train = [e for e in events if e["event"] == "phase" and e["phase"] == "train"]
    assert [(e["asked"], e["replies"]) for e in train] == [(3, 3), (3, 2)]
    assert 5 * raw < sum(e["bytes_received"] for e in train) < 5 * (raw + 8192)
    assert state.bytes_received == sum(e["bytes_received"] for e in events if e["event"] == "phase")


def test_no_planted_identifier_is_in_the_run_folder(watched_run: Path) -> None:
    for path in ("metrics.jsonl", "log.jsonl", "summary.json"):
        text = (watched_run / path).read_text()
        for canary in ("patient-4711", "/secret", "melanoma"):
            assert canary not in text
    lines = [json.loads(line) for line in (watched_run / "log.jsonl").read_text().splitlines()]
    assert any(line.get("site") == "hospital-3" and line.get("phase") == "train" for line in lines)


def test_only_new_lines_are_read_and_a_replaced_file_anew(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    file = JsonLinesFile(run.metrics)
    assert (file.poll().lines, file.poll().restarted) == ((), False)
    run.record(RoundDone(round=1))
    run.record(RoundDone(round=2))
    assert [e["round"] for e in file.poll().lines] == [1, 2]
    assert file.poll().lines == ()
    with run.metrics.open("a") as stream:
        stream.write('{"event": "round", "rou')
    assert file.poll().lines == ()
    with run.metrics.open("a") as stream:
        stream.write('nd": 3}\n[1]\nnot json\n')
    assert [e["round"] for e in file.poll().lines] == [3]
    run.metrics.write_text("".join(f"{json.dumps({'event': 'round', 'round': n})}\n" for n in (1,)))
    news = file.poll()
    assert (news.restarted, [e["round"] for e in news.lines]) == (True, [1])


def test_a_resumed_run_is_folded_anew(own_run: Path) -> None:
    source = RunSource(own_run)
    assert source.refresh().round == 2
    RunFolder(own_run).forget_events_after(1)
    assert source.refresh() == RunSource(own_run).refresh()
    assert source.refresh().round == 1


def test_the_newest_run_is_watched(own_run: Path) -> None:
    source = RunSource(own_run.parent, newest=True)
    assert (source.refresh().round, source.name) == (2, "first")
    second = RunFolder(own_run.parent / "second")
    second.path.mkdir()
    second.config.write_text("")
    assert (source.refresh(), source.name) == (RunState(), "second")


def test_a_run_that_stopped_early_says_why_until_it_goes_on() -> None:
    state = fold(
        [
            {"event": "enrolled", "time": 1.0, "round": 0, "rounds": 5, "sites": ["north"]},
            {"event": "round", "time": 2.0, "round": 1, "updates": 1, "loss": None},
            {"event": "stopped-early", "time": 3.0, "round": 1, "reason": "the privacy budget of north"},
            {"event": "finished", "time": 4.0, "round": 1},
        ]
    )
    assert (state.stage, state.stopped_early) == (Stage.FINISHED, "the privacy budget of north")
    assert (
        fold([{"event": "resumed", "round": 1, "rounds": 5, "sites": ["north"]}], state).stopped_early == ""
    )


def test_a_skipped_round_is_one_of_the_run_and_is_named() -> None:
    events = [
        {"event": "enrolled", "time": 1.0, "round": 0, "rounds": 5, "sites": ["north"]},
        {"event": "round", "time": 2.0, "round": 1, "updates": 1, "loss": 0.5},
        {"event": "round-skipped", "time": 3.0, "round": 2, "sites": ["north"], "reason": "1 of 3"},
    ]
    state = fold(events)
    assert (state.stage, state.round, state.updates, state.loss) == (Stage.RUNNING, 2, 0, 0.5)
    assert state.skipped == (2,)
    shown = {
        sample.name: sample.value for metric in _run_metrics(state, "first") for sample in metric.samples
    }
    assert shown["fedbags_rounds_skipped"] == 1
    text = io.StringIO()
    Console(file=text, width=80).print(run_table(state, "first", now=4.0))
    assert "rounds skipped" in text.getvalue()
    assert fold(events[:2]).skipped == ()
