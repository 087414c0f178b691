"""Scripted sites: a federation whose every reply, silence and departure a test decides."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.config import RunConfig
from common.files import read_json_lines
from common.hierarchy import Hierarchy
from common.records import ModelUpdate, PrivacyStatement, ProportionRelease
from common.wire import from_records, to_records
from deploy.simulation.local_grid import LocalGrid
from server import enrolment, exchange
from server.app import app

TREE = Hierarchy.from_rows(["kind", "leaf"], [["a", "a1"], ["a", "a2"], ["b", "b1"], ["b", "b2"]])

Behaviour = Callable[[str, str, int, Message, Message], Message | None]
"""(site, kind, round, request, honest reply) -> what arrives, None for nothing."""


def honest(site: str, request: Message) -> Message:
    """What a site without faults answers: it moves the model by an amount that its name and round fix."""
    if request.metadata.message_type == "query.proportions":
        release = ProportionRelease(
            site=site, data_version="v", hierarchy=TREE.to_dict(), granularity="total",
            leaf_counts=((4.0,) * 4,), bags=10, bag_sizes=(), mechanism="exact", event={},
        )  # fmt: skip
        return Message(to_records(release), reply_to=request)
    asked = from_records(request.content, ModelUpdate)
    if request.metadata.message_type != "train":
        return Message(to_records(ModelUpdate(sender=site, round=asked.round)), reply_to=request)
    step = np.float32(1e-3 * (1 + sum(map(ord, site)) % 7))
    update = ModelUpdate(
        sender=site,
        round=asked.round,
        arrays={name: array * np.float32(0.99) + step for name, array in asked.arrays.items()},
        metrics={"num-bags": 10, "loss": 0.5},
    )
    return Message(to_records(update, PrivacyStatement(site=site, round=asked.round)), reply_to=request)


class Sites(LocalGrid):
    """Named sites behind Flower's Grid.

    Args:
        names: site by node id; change it during a run to let nodes come and go.
        behave: what becomes of each honest reply.
        look: called whenever the server looks who is connected.
    """

    def __init__(
        self, names: dict[int, str], behave: Behaviour | None = None, look: Callable[[], None] | None = None
    ) -> None:
        super().__init__(0, {})
        self.names, self.behave, self.look = names, behave, look
        self.asked: list[tuple[str, str, int]] = []
        """(site, kind, round) of every message, in order."""
        self._messages: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        if self.look:
            self.look()
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self.names:
                ids.append("")  # as Flower does for a node that was removed
                continue
            ids.append(f"message-{len(self._messages)}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            self._messages[ids[-1]] = message
            kind, round = message.metadata.message_type, int(message.metadata.group_id)
            self.asked.append((self.names[message.metadata.dst_node_id], kind, round))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in message_ids:
            request = self._messages[message_id]
            site = self.names.get(request.metadata.dst_node_id)
            if site is None:
                continue
            kind, round = request.metadata.message_type, int(request.metadata.group_id)
            reply: Message | None = honest(site, request)
            if self.behave and reply is not None:
                reply = self.behave(site, kind, round, request, reply)
            if reply is not None:
                replies.append(reply)
        return replies

    def trained(self, round: int) -> list[str]:
        """The sites that were asked to train in a round, in order."""
        return [site for site, kind, number in self.asked if (kind, number) == ("train", round)]


class Federation:
    """Runs the real ServerApp over scripted sites, and reads what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sites = Sites

    def config(self, **changes: Any) -> RunConfig:
        """Three rounds of three sites; keyword ``enrol_deadline`` is ``federation.enrol-deadline``."""
        federation = {
            "sites": 3, "quorum": 2, "deadline": 0.2, "enrol_deadline": 0.2, "patience": 20.0, **changes,
        }  # fmt: skip
        flat = {
            "run-dir": str(self.folder),
            "rounds": federation.pop("rounds", 3),
            "resume": federation.pop("resume", False),
            "model.image-size": 16,
            "model.backbone": "colour-histogram",
            "model.atoms-per-class": 1,
            "federation.statements": str(federation.pop("statements", "")),
            "train.held-back": federation.pop("held_back", 0.1),
        }
        keys = {f"federation.{key.replace('_', '-')}": value for key, value in federation.items()}
        return RunConfig().with_changes({**flat, **keys})

    def run(self, grid: Sites, **changes: Any) -> dict[str, Any]:
        """One run to its end; returns the summary."""
        config = self.config(**changes)
        app(grid, grid.server_context(config.to_flat()))
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_json_lines(self.folder / "metrics.jsonl") if event["event"] == kind]

    def weights(self) -> bytes:
        return (self.folder / "model.safetensors").read_bytes()


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """A federation that looks for missing sites every few milliseconds."""
    monkeypatch.setattr(enrolment, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(enrolment, "_LONGEST_PAUSE", 0.02)
    monkeypatch.setattr(exchange, "_LONGEST_PAUSE", 0.05)
    return Federation(tmp_path / "run")


@pytest.fixture
def three() -> dict[int, str]:
    """Three sites by node id."""
    return {11: "east", 12: "north", 13: "south"}
