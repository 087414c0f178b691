"""Sites that are missing, late, lost, back under another node, added or revoked while a run goes on."""

import time
from typing import Any

import pytest
from flwr.app import Error, Message, Metadata
from flwr.app.message.message import make_message

from common.errors import ConfigError, RunError
from common.records import SITE_ERRORS, SiteError


def error(request: Message, code: int) -> Message:
    return Message(Error(code, "a text with /data/patient-7.png"), reply_to=request)


def test_too_few_at_the_start_are_waited_for_by_name(federation: Any, three: dict[int, str]) -> None:
    late = {13: three.pop(13)}
    looks = 0

    def look() -> None:
        nonlocal looks
        looks += 1
        if federation.events("waiting") and looks > 20:
            three.update(late)

    summary = federation.run(
        federation.sites(three, look=look), quorum=3, allow="east,north,south", enrol_deadline=0.02
    )
    assert summary["sites"] == 3
    waiting = federation.events("waiting")[-1]
    assert waiting["round"] == 1
    assert (waiting["present"], waiting["missing"], waiting["quorum"]) == (2, 1, 3)
    assert waiting["sites"] == ["south"]


def test_the_server_gives_up_after_the_limit_and_says_who_is_missing(
    federation: Any, three: dict[int, str]
) -> None:
    del three[13]
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        federation.run(federation.sites(three), quorum=3, allow="east,north,south", patience=0.3)
    assert 0.3 <= time.monotonic() - started < 10
    assert "2 site(s) enrolled, the quorum is 3. Missing: south" in str(caught.value)
    assert "south: not connected" in str(caught.value)
    assert "0.3 s (federation.patience)" in str(caught.value)
    assert "--resume" in str(caught.value)
    assert federation.events("failed")[0]["reason"] == str(caught.value)


def test_a_round_below_the_quorum_keeps_what_it_has_and_asks_the_missing_again(
    federation: Any, three: dict[int, str]
) -> None:
    silent = 2

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        nonlocal silent
        if (site, kind, round) == ("north", "train", 2) and sites.trained(2).count("north") <= silent:
            return None
        return reply

    sites = federation.sites(three, behave)
    summary = federation.run(sites, quorum=3)
    # East and south, whose budget for the round is spent, were asked once.
    assert sites.trained(2) == ["east", "north", "south", "north", "north"]
    assert [event["updates"] for event in federation.events("round")] == [3, 3, 3]
    waiting = federation.events("waiting")
    assert [(event["round"], event["sites"], event["present"]) for event in waiting] == [(2, ["north"], 2)]
    assert [item["reason"] for item in summary["left_out"]] == ["no reply within 0.2 s"] * 2


def test_a_silent_site_is_asked_three_times_a_round_at_most(federation: Any, three: dict[int, str]) -> None:
    # Each time may cost it privacy budget.
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        return error(request, 2) if (site, kind, round) == ("north", "train", 2) else reply

    sites = federation.sites(three, behave)
    with pytest.raises(RunError, match="asked 3 times: the app failed at the site"):
        federation.run(sites, quorum=3, patience=1e6)
    assert sites.trained(2).count("north") == 3
    assert sites.trained(2).count("east") == 1


@pytest.mark.parametrize("code", [SiteError.DATA, SiteError.CONFIGURATION, SiteError.BUDGET])
@pytest.mark.parametrize("phase", ["query.proportions", "train"])
def test_refusals_are_not_waited_for(
    federation: Any, three: dict[int, str], code: SiteError, phase: str
) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        return error(request, code) if kind == phase and site != "east" else reply

    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        federation.run(federation.sites(three, behave), patience=1e6)
    assert time.monotonic() - started < 30
    assert "Waiting would not help" in str(caught.value)
    assert SITE_ERRORS[code] in str(caught.value)
    assert "patient-7" not in str(caught.value)


def test_a_quorum_above_the_number_of_sites_is_a_mistake(federation: Any) -> None:
    with pytest.raises(ConfigError, match=r"quorum = 4 is above federation\.sites = 3"):
        federation.config(quorum=4)


def test_after_giving_up_a_run_goes_on_with_resume_to_the_same_model(
    federation: Any, three: dict[int, str]
) -> None:
    federation.run(federation.sites(dict(three)), quorum=3)
    unbroken = federation.weights()
    federation.folder = federation.folder.with_name("broken")

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        return None if (kind, round) == ("train", 2) and site == "north" else reply

    with pytest.raises(RunError, match=r"2 good update\(s\), the quorum is 3"):
        federation.run(federation.sites(dict(three), behave), quorum=3, patience=0.0)
    # How patiently to wait may change; what is computed may not.
    federation.run(federation.sites(dict(three)), quorum=3, resume=True, patience=5.0)
    assert federation.weights() == unbroken


def test_past_the_deadline_the_round_is_made_of_what_is_there(federation: Any, three: dict[int, str]) -> None:
    late: dict[str, Message] = {}

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        if site != "north" or kind != "train":
            return reply
        if round == 1:
            late["update"] = reply
            return None
        return late["update"] if round == 2 else reply

    sites = federation.sites(three, behave)
    summary = federation.run(sites)
    # The late update of round 1, given out in round 2, is used in neither; in round 3 the site is back.
    assert [event["updates"] for event in federation.events("round")] == [2, 2, 3]
    assert [(item["site"], item["round"], item["reason"]) for item in summary["left_out"]] == [
        ("north", 1, "no reply within 0.2 s"),
        ("north", 2, "reply of 'north' for round 1"),
    ]


def test_the_error_for_a_lost_node_is_that_site_s(federation: Any, three: dict[int, str]) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        if (site, kind, round) != ("north", "train", 1):
            return reply
        # What Flower's SuperLink makes of a node that is gone: it names itself as the sender.
        metadata = Metadata(
            run_id=1, message_id="", src_node_id=1, dst_node_id=1, group_id="1", ttl=10.0, created_at=0.0,
            message_type="train", reply_to_message_id=request.metadata.message_id,
        )  # fmt: skip
        return make_message(metadata, error=Error(5, "node unavailable"))

    summary = federation.run(federation.sites(three, behave))
    assert [(item["site"], item["reason"]) for item in summary["left_out"]] == [
        ("north", "the site is not connected")
    ]
    assert [event["updates"] for event in federation.events("round")] == [2, 3, 3]


def test_a_site_that_is_back_under_another_node_is_the_same_site(
    federation: Any, three: dict[int, str]
) -> None:
    def look() -> None:
        if len(federation.events("round")) == 1 and 12 in three:
            three[99] = three.pop(12)

    sites = federation.sites(three, look=look)
    summary = federation.run(sites)
    assert sites.trained(2) == sites.trained(3) == ["east", "north", "south"]
    assert [(event["site"], event["round"]) for event in federation.events("left")] == [("north", 2)]
    joined = [(e["site"], e["round"], e["again"]) for e in federation.events("joined")]
    assert joined[3:] == [("north", 2, True)]
    assert not [item for item in summary["left_out"] if "another site" in item["reason"]]


def test_of_two_live_nodes_with_one_name_the_second_is_refused_until_the_first_is_gone(
    federation: Any, three: dict[int, str]
) -> None:
    three[14] = "north"

    def look() -> None:
        if len(federation.events("round")) == 2:
            three.pop(12, None)

    sites = federation.sites(three, look=look)
    summary = federation.run(sites)
    refusals = [item for item in summary["left_out"] if item["phase"] == "enrol"]
    assert [(item["site"], item["reason"]) for item in refusals] == [
        ("north", "node 14 uses the name of another site")
    ]
    assert sites.trained(3) == ["east", "north", "south"]


def test_a_site_that_joins_late_takes_part_from_the_next_round(
    federation: Any, three: dict[int, str]
) -> None:
    south = three.pop(13)

    def look() -> None:
        if len(federation.events("round")) == 1:
            three[13] = south

    sites = federation.sites(three, look=look)
    summary = federation.run(sites, sites=2)
    assert [sites.trained(round) for round in (1, 2, 3)] == [
        ["east", "north"],
        ["east", "north", "south"],
        ["east", "north", "south"],
    ]
    assert summary["sites"] == 3
    assert set(summary["per_site"]) == {"east", "north", "south"}
    assert [event["site"] for event in federation.events("joined")][-1] == "south"


def test_a_site_revoked_between_rounds_leaves_and_the_run_goes_on(
    federation: Any, three: dict[int, str]
) -> None:
    def look() -> None:
        if len(federation.events("round")) == 1:
            three.pop(12, None)

    sites = federation.sites(three, look=look)
    summary = federation.run(sites)
    assert [event["updates"] for event in federation.events("round")] == [3, 2, 2]
    assert [(event["site"], event["round"]) for event in federation.events("left")] == [("north", 2)]
    assert summary["sites"] == 2
    assert "north" in summary["per_site"]  # what it released and spent is still accounted for


def test_a_site_revoked_before_its_message_is_sent_is_left_out(
    federation: Any, three: dict[int, str]
) -> None:
    class Racing(federation.sites):  # type: ignore[name-defined,misc]
        def push_messages(self, messages: Any) -> Any:
            if any(m.metadata.message_type == "train" and m.metadata.group_id == "2" for m in messages):
                self.names.pop(12, None)
            return super().push_messages(messages)

    summary = federation.run(Racing(three))
    assert summary["left_out"][0]["reason"] == "the message could not be sent to the site"
    assert [event["updates"] for event in federation.events("round")] == [3, 2, 2]


def test_a_silent_node_is_asked_for_its_name_again(federation: Any, three: dict[int, str]) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message | None:
        first = sites.asked.count(("north", "query.proportions", 1)) == 1
        return None if kind == "query.proportions" and site == "north" and first else reply

    sites = federation.sites(three, behave)
    summary = federation.run(sites)
    assert summary["sites"] == 3
    assert [item["site"] for item in summary["left_out"]] == ["node 12"]
