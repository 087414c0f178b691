"""No site can end a run: whatever it sends, it is left out with a short reason, and the others go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord

from common.records import ModelUpdate, PrivacyStatement, ProportionRelease
from common.text import _REASON_CHARACTERS
from common.wire import from_records, to_records
from server.run_folder import newest_checkpoint

Change = Callable[[Message], None]
LONG = "x" * 5_900_000
ESCAPE = "a\x1b[2J\x1b]0;owned\x07"


def text(record: str, **fields: Any) -> Change:
    """A reply in whose record of JSON some fields are others, whatever our classes would let through."""

    def apply(reply: Message) -> None:
        content = json.loads(str(reply.content.config_records[record]["json"]))
        reply.content[record] = ConfigRecord({"json": json.dumps(content | fields)})

    return apply


def raw(record: str, content: str) -> Change:
    def apply(reply: Message) -> None:
        reply.content[record] = ConfigRecord({"json": content})

    return apply


def metrics(**changed: Any) -> Change:
    def apply(reply: Message) -> None:
        own = dict(reply.content.metric_records["metrics"])
        reply.content["metrics"] = MetricRecord(own | {k.replace("_", "-"): v for k, v in changed.items()})

    return apply


def also(name: str, content: Any) -> Change:
    def apply(reply: Message) -> None:
        reply.content[name] = ConfigRecord({name: content})

    return apply


def tree(*rows: list[str], levels: tuple[str, ...] = ("kind", "leaf"), **more: Any) -> dict[str, Any]:
    return {"levels": list(levels), "rows": list(rows), **more}


EVENT = {"kind": "poisson_gaussian", "sample_rate": 0.1, "noise_multiplier": 1.0, "steps": 1}
HONEST = [["a", "a1"], ["a", "a2"], ["b", "b1"], ["b", "b2"]]

AT_ENROLMENT: dict[str, Change] = {
    "a name of 5.9 MB": text("release", site=LONG),
    "a name that closes a tag": text("release", site="[/x]"),
    "a name with an escape sequence": text("release", site=ESCAPE),
    "a name that climbs out of a folder": text("release", site="../../north"),
    "an empty name": text("release", site=""),
    "a data version of 5.9 MB": text("release", data_version=LONG),
    "an event of 5.9 MB": text("release", event={"kind": LONG}),
    "a class of 5.9 MB": text("release", hierarchy=tree(["a", LONG])),
    "a class with an escape sequence": text("release", hierarchy=tree(["a", ESCAPE])),
    "a tree of 200,000 classes": text(
        "release",
        hierarchy=tree(*(["a", f"a{n}"] for n in range(200_000))),
        leaf_counts=[[1.0] * 200_000],
    ),
    "a tree with something beside it": text("release", hierarchy=tree(*HONEST, notes=LONG)),
    "a tree that is none": text("release", hierarchy={"levels": 5, "rows": {"a": 1}}),
    "a tree of 100 levels": text("release", hierarchy=tree(["a"] * 100, levels=tuple(map(str, range(100))))),
    "counts of other classes": text("release", leaf_counts=[[4.0, 4.0]]),
    "two totals": text("release", leaf_counts=[[4.0] * 4, [4.0] * 4]),
    "counts below zero": text("release", leaf_counts=[[-4.0] * 4]),
    "counts that overflow": text("release", leaf_counts=[[1e308] * 4]),
    "bags beyond a float": raw(
        "release",
        json.dumps(
            {
                "site": "north", "data_version": "v", "hierarchy": tree(*HONEST), "granularity": "total",
                "leaf_counts": [[4.0] * 4], "bags": 0, "bag_sizes": [], "mechanism": "exact", "event": {},
            }
        ).replace('"bags": 0', '"bags": ' + "9" * 400),
    ),
    "sizes of some bags": text("release", bag_sizes=[1, 2]),
    "deep JSON": raw("release", "[" * 100_000),
    "a record of 5.9 MB beside it": also("more", LONG),
    "a record with a name of 5.9 MB": also(LONG, "more"),
}  # fmt: skip

AT_TRAINING: dict[str, Change] = {
    "a generator of 100 MB": text("privacy", generator="y" * 100_000_000),
    "a generator of 5.9 MB": text("privacy", generator=LONG),
    "a generator with an escape sequence, of a megabyte": text("privacy", generator=ESCAPE * 60_000),
    "a ledger head of 5.9 MB": text("privacy", ledger_head=LONG),
    "a million events": text("privacy", events=[EVENT] * 1_000_000),
    "25,000 events": text("privacy", events=[{"kind": "discrete_laplace", "scale": 1.0}] * 25_000),
    "an event of another kind": text("privacy", events=[{"kind": ESCAPE}]),
    "an event with negative steps": text("privacy", events=[{**EVENT, "steps": -5}]),
    "an event with a text of 5.9 MB": text("privacy", events=[{**EVENT, "note": LONG}]),
    "a statement of a site of 5.9 MB": text("privacy", site=LONG),
    "a statement in deep JSON": raw("privacy", '{"events": ' + "[" * 100_000),
    "an epsilon of NaN": raw("privacy", '{"site": "north", "round": 2, "epsilon": NaN}'),
    "a sender of 5.9 MB": text("update", sender=LONG),
    "a sender with an escape sequence": text("update", sender=ESCAPE),
    "another site's name": text("update", sender="south"),
    "a shape for 5.9 MB of name": text("update", shapes={LONG: [1]}),
    "a million shapes of nothing": text("update", shapes={str(n): [0] for n in range(300_000)}),
    "bags beyond its own": metrics(num_bags=11),
    "bags beyond an integer's 32 bits": metrics(num_bags=2**62),
    "negative bags": metrics(num_bags=-10),
    "a loss that overflows": metrics(loss=1e308),
    "a loss that is a list": metrics(loss=[1.0, 2.0]),
    "a record with a name of 5.9 MB": also(LONG, "more"),
}


def after(
    federation: Any, three: dict[int, str], kind: str, round: int | None, change: Change, **changes: Any
) -> dict[str, Any]:
    """A run in which north sends a wrong reply; what every such run must be, whatever the reply."""

    def behave(site: str, asked: str, number: int, request: Message, reply: Message) -> Message:
        if (site, asked) == ("north", kind) and round in (None, number):
            change(reply)
        return reply

    summary: dict[str, Any] = federation.run(federation.sites(dict(three), behave), **changes)
    assert summary["rounds"] == 3
    reasons = [item["reason"] for item in summary["left_out"]]
    assert reasons
    assert all(0 < len(reason) <= _REASON_CHARACTERS and reason.isprintable() for reason in reasons)
    assert all(item["site"].isprintable() and len(item["site"]) <= 100 for item in summary["left_out"])
    folder: Path = federation.folder
    for file in ("summary.json", "metrics.jsonl", "log.jsonl"):
        assert (folder / file).stat().st_size < 100_000, file
    found = newest_checkpoint(folder / "checkpoints")
    assert found is not None
    assert len(found[0].model_dump_json()) < 100_000
    return summary


@pytest.mark.parametrize("wrong", AT_ENROLMENT)
def test_a_wrong_release_leaves_out_its_site(federation: Any, three: dict[int, str], wrong: str) -> None:
    summary = after(federation, three, "query.proportions", None, AT_ENROLMENT[wrong])
    assert summary["sites"] == 2
    assert sorted(summary["per_site"]) == ["east", "south"]
    assert [event["updates"] for event in federation.events("round")] == [2, 2, 2]
    assert len({item["round"] for item in summary["left_out"]}) == 1


@pytest.mark.parametrize("wrong", AT_TRAINING)
def test_a_wrong_update_or_statement_leaves_out_its_site(
    federation: Any, three: dict[int, str], wrong: str
) -> None:
    summary = after(federation, three, "train", 2, AT_TRAINING[wrong])
    assert [(item["site"], item["phase"]) for item in summary["left_out"]] == [("north", "train")]
    assert [event["updates"] for event in federation.events("round")] == [3, 2, 3]
    assert len(summary["statements"]["north"]["generator"]) < 1000


def test_another_site_s_name_leaves_out_who_comes_second_with_it(
    federation: Any, three: dict[int, str]
) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind) == ("south", "query.proportions"):  # of a higher node number than north
            text("release", site="north")(reply)
        return reply

    summary = federation.run(federation.sites(three, behave))
    (left_out,) = summary["left_out"]
    assert (left_out["site"], left_out["phase"]) == ("north", "enrol")
    assert "uses the name of another site" in left_out["reason"]
    assert [event["updates"] for event in federation.events("round")] == [2, 2, 2]


def figures(**changed: Any) -> dict[str, Any]:
    """Metrics of an evaluation as an honest site sends them, some of them changed."""
    cells = {0: 4, 1: 16}
    counts = {f"confusion.{way}.{lv}": [1] * n for way in ("argmax", "path") for lv, n in cells.items()}
    own = {"bags-kl": [0.1, 0.2], "bags-l1": [0.1, 0.2], "held-back-bags": 2, **counts}
    return own | {key.replace("_", "-"): value for key, value in changed.items()}


AT_EVALUATION: dict[str, dict[str, Any]] = {
    "figures of another number of levels": figures(bags_kl=[0.1, 0.2, 0.3]),
    "one figure": figures(bags_l1=0.1),
    "negative divergences": figures(bags_kl=[-1.0, 0.0]),
    "a distance above two": figures(bags_l1=[2.5, 0.0]),
    "no bag": figures(held_back_bags=0),
    "minus two bags": figures(held_back_bags=-2),
    "bags beyond its own": figures(held_back_bags=2**62),
    "a list of bags": figures(held_back_bags=[1, 2]),
    "figures that overflow": figures(bags_kl=[1e308, 1e308]),
    "negative counts": figures() | {"confusion.argmax.0": [-1, 1, 1, 1]},
    "counts for more than the memory": figures() | {"confusion.argmax.0": [2**62] * 4},
    "counts of other classes": figures() | {"confusion.path.1": [1] * 9},
    "counts that are none": figures() | {"confusion.path.0": [0.5] * 4},
    "one count": figures() | {"confusion.path.0": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["evaluate.bags", "evaluate.test"])
@pytest.mark.parametrize("wrong", AT_EVALUATION)
def test_wrong_figures_leave_out_their_site_alone(
    federation: Any, three: dict[int, str], kind: str, wrong: str
) -> None:
    def behave(site: str, asked: str, number: int, request: Message, reply: Message) -> Message:
        if asked in ("evaluate.bags", "evaluate.test"):
            wanted = AT_EVALUATION[wrong] if (site, asked) == ("north", kind) else figures()
            reply.content["metrics"] = MetricRecord(wanted)
        return reply

    summary = federation.run(federation.sites(dict(three), behave), held_back=0.2)
    assert {(item["site"], item["phase"]) for item in summary["left_out"]} == {("north", kind)}
    assert all(len(item["reason"]) <= _REASON_CHARACTERS for item in summary["left_out"])
    assert [event["updates"] for event in federation.events("round")] == [3, 3, 3]
    assert summary["levels"][0]["images"] == (8 if kind == "evaluate.test" else 12)
    assert [level["kl"] for level in summary["bags"]] == pytest.approx([0.1, 0.2])


def test_an_error_that_nobody_expected_is_that_site_s_and_is_logged(
    federation: Any, three: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import exchange

    def failing(content: Any, kind: Any) -> Any:
        found = from_records(content, kind)
        if isinstance(found, ModelUpdate) and found.arrays and (found.sender, found.round) == ("north", 2):
            raise ZeroDivisionError("/data/patient-7.png")
        return found

    monkeypatch.setattr(exchange, "from_records", failing)
    summary = federation.run(federation.sites(three))
    (left_out,) = summary["left_out"]
    assert left_out["reason"] == "unreadable reply: ZeroDivisionError while it was read"
    lines = [json.loads(line) for line in (federation.folder / "log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["level"] == "error"]
    assert line["error"] == "ZeroDivisionError"
    assert line["at"].startswith("server.exchange:")
    assert "patient-7" not in (federation.folder / "log.jsonl").read_text()


def test_bytes_that_flower_cannot_unpack_are_that_site_s(federation: Any, three: dict[int, str]) -> None:
    class Bent(federation.sites):  # type: ignore[misc, name-defined]
        def pull_messages(self, message_ids: Any) -> Any:
            for reply in super().pull_messages(message_ids):
                if reply.metadata.src_node_id == 12 and reply.metadata.group_id == "2":
                    raise ValueError("Invalid object content")
                yield reply

    summary = federation.run(Bent(three))
    assert {(item["site"], item["round"]) for item in summary["left_out"]} == {("north", 2)}
    assert all("ValueError" in item["reason"] for item in summary["left_out"])


def test_a_site_that_releases_no_counts_is_left_out_where_the_strategy_needs_them(
    federation: Any, three: dict[int, str]
) -> None:
    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if (site, kind) == ("north", "query.proportions"):
            none = from_records(reply.content, ProportionRelease).model_copy(
                update={"granularity": "none", "leaf_counts": (), "mechanism": "none"}
            )
            reply.content = to_records(none)
        return reply

    summary = federation.run(federation.sites(three, behave), strategy="fedpals")
    assert [(item["site"], item["phase"]) for item in summary["left_out"]] == [("north", "enrol")]
    assert "releases no label counts" in summary["left_out"][0]["reason"]
    assert [event["updates"] for event in federation.events("round")] == [2, 2, 2]


def test_an_honest_site_without_a_gradient_stays(federation: Any) -> None:
    """One class, method dllp or rot: the model comes back as it was sent, round after round."""

    def behave(site: str, kind: str, round: int, request: Message, reply: Message) -> Message:
        if kind == "train":
            asked = from_records(request.content, ModelUpdate)
            own = from_records(reply.content, ModelUpdate)
            same = {name: asked.arrays[name] for name in own.arrays}
            update = own.model_copy(update={"arrays": same})
            reply.content = to_records(update, PrivacyStatement(site=site, round=round))
        return reply

    for transport in ("float32", "float16"):
        federation.folder = federation.folder.with_name(transport)
        summary = federation.run(
            federation.sites({11: "east"}, behave), sites=1, quorum=1, transport=transport
        )
        assert summary["left_out"] == []
        assert [event["updates"] for event in federation.events("round")] == [1, 1, 1]


def test_a_state_larger_than_a_header_can_be_is_kept(tmp_path: Path) -> None:
    """The header of a safetensors file holds at most 100 MB; a state in it ended the run."""
    from server import run_folder
    from server.run_folder import ServerState

    big = ServerState(round=1, digests={"north": ["d" * 1_000_000] * 120})
    arrays = {"w": np.zeros(2, np.float32)}
    run_folder.save_checkpoint(tmp_path, big, arrays, arrays, {})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0] == big
    assert set(found[1]["model"]) == {"w"}
