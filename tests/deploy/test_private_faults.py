"""The ledgers stay right when replies of a private run are lost and rounds wait for the missing sites."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from client.ledger.check import verify
from client.ledger.state import LedgerState
from client.site import SiteConfig, _PrivacyBudget
from common.config import RunConfig
from common.files import read_json_lines
from deploy.simulation.local_grid import LocalGrid
from server import enrolment
from server.app import app


class LosesOneReply(LocalGrid):
    """The reply of the second site to its first training never arrives: it has been paid for, and is gone."""

    lost = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if (
                reply.metadata.message_type == "train"
                and reply.metadata.src_node_id == 1002
                and not self.lost
            ):
                self.lost = 1
                return [Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ""), reply_to=reply)]
        return replies


def test_a_lost_reply_is_paid_again_by_that_site_alone_and_every_statement_agrees_with_its_ledger(
    small_config: Callable[..., RunConfig], sites_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "_FIRST_PAUSE", 0.01)
    sites = tmp_path / "sites"
    shutil.copytree(sites_dir, sites)
    for site in sites.iterdir():
        config = SiteConfig.load(site)
        policy = config.policy.model_copy(update={"budget": _PrivacyBudget(epsilon=8.0, delta=1e-3)})
        config.model_copy(update={"policy": policy}).save(site)
    config = small_config(
        {
            "sites-dir": str(sites), "rounds": 2, "dp.epsilon": 4.0, "dp.delta": 1e-3,
            "dp.expected-bags": 3.0, "dp.steps-per-round": 2, "federation.quorum": 3,
            "federation.deadline": 20.0, "federation.patience": 30.0,
        }
    )  # fmt: skip
    flat = config.to_flat()
    with LosesOneReply(3, flat) as grid:
        app(grid, grid.server_context(flat))
    assert grid.lost
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    events = read_json_lines(Path(config.run_dir) / "metrics.jsonl")
    assert [event["updates"] for event in events if event["event"] == "round"] == [3, 3]
    assert [event["sites"] for event in events if event["event"] == "waiting"] == [["hospital-2"]]
    for name, trained in (("hospital-1", 2), ("hospital-2", 3), ("hospital-3", 2)):
        path = sites / name / "ledger.sqlite"
        verify(path)
        book = LedgerState.read(path)
        rounds = [e.body["round"] for e in book.entries if e.kind == "reserved"]
        assert len(rounds) == trained
        assert len([e for e in book.entries if e.kind == "confirmed"]) == trained
        statement = summary["statements"][name]
        assert statement["epsilon"] == pytest.approx(book.spent())
        assert statement["ledger_head"] == book.head
    assert summary["statements"]["hospital-2"]["epsilon"] > summary["statements"]["hospital-1"]["epsilon"]
