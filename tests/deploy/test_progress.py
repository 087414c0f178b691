"""What the bars say of the sites of a round that is under way."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.run_records import read_event
from deploy.cli.terminal import Follower, _bars, _done, _without
from deploy.runs.reading import RunState, fold

SITES = ["a", "b", "c", "d", "e"]


ENROLLED = {"event": "enrolled", "round": 0, "sites": SITES}


def after(*events: dict[str, Any]) -> RunState:
    """A run of five sites whose second round is under way, after these events of it."""
    return fold(map(read_event, (ENROLLED, {"event": "round", "round": 1}, *events)))


def of(kind: str, *sites: str, round: int = 2) -> list[dict[str, Any]]:
    return [{"event": kind, "round": round, "site": site} for site in sites]


def test_before_the_first_answer_nobody_is_said_to_be_missing() -> None:
    answers = after()
    assert (_without(answers), len(answers.silent)) == ("", 5)


def test_those_who_have_not_answered_yet_are_named_if_they_are_few() -> None:
    assert _without(after(*of("update", "a"))) == " (waiting for b, c, d ...)"
    assert _without(after(*of("update", "a", "b", "d"))) == " (waiting for c, e)"
    assert _without(after(*of("update", *SITES))) == ""


def test_a_masked_update_counts_when_it_has_come_and_not_when_the_sum_is_unmasked() -> None:
    masked = of("statement", "a", "b", "c", "d")
    assert _without(after(*masked)) == " (waiting for e)"
    assert _without(after(*masked, *of("update", "a", "b", "c", "d"))) == " (waiting for e)"


def test_what_a_look_at_held_back_bags_spends_is_no_answer_to_the_next_round() -> None:
    assert after(*of("statement", "a", "b", round=1)).silent == SITES


def test_who_left_is_not_missing_and_who_joined_is() -> None:
    answers = after(*of("update", "a", "b"), *of("left", "c"), *of("joined", "f"))
    assert _without(answers) == " (waiting for d, e, f)"
    assert set(answers.connected) == {"a", "b", "d", "e", "f"}


def test_the_first_round_has_an_estimate_when_the_first_site_has_answered() -> None:
    """However long it takes: rich looks back half a minute only, and bars of whole rounds stood still."""
    answers = fold(map(read_event, (ENROLLED, *of("update", "a", "b", round=1))))
    assert _done(answers, 10) == pytest.approx(0.4)
    clock = [0.0]
    with _bars() as progress:
        progress.get_time = lambda: clock[0]
        task = progress.add_task("rounds", total=10)
        for seconds, done in ((0.0, 0.0), (100.0, 0.2), (200.0, _done(answers, 10))):
            clock[0] = seconds
            progress.update(task, completed=done)
        clock[0] = 260.0
        progress.update(task, completed=_done(answers, 10))
        assert progress.tasks[0].time_remaining is not None
    assert _done(after(*of("update", *SITES)), 10) == 2.0
    assert _done(RunState(), 10) == 0.0


def test_a_skipped_round_is_said_and_nobody_of_it_is_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = {"event": "round-skipped", "round": 2, "sites": ["a", "b"], "reason": "2 of 3 updates"}
    answers = after(*of("update", "a"), skipped)
    assert (answers.round, answers.silent, _without(answers)) == (2, SITES, "")
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(skipped) + "\n")
    with Follower(metrics, 3):
        pass
    told = " ".join(capsys.readouterr().err.split())
    assert "round 2 skipped" in told
    assert "a, b had done their part" in told
