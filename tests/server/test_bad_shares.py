"""Whole runs in which a site seals shares that are of no use: it costs a round at most, and its own place."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.secure_aggregation import Member
from common.config import RunConfig
from common.errors import RunError
from common.files import read_json_lines
from common.secure_aggregation import keys, member
from common.secure_aggregation.records import (
    SEALED_BYTES,
    SHARE_BYTES,
    SealedShares,
    SessionPlan,
    UnmaskShares,
    Words,
)
from common.secure_aggregation.recovery import MaskedSum
from common.wire import from_records, to_records
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals
from deploy.simulation.local_grid import LocalGrid
from deploy.simulation.simulate import make_ephemeral_pki
from server import enrolment, rounds
from server.app import app

CULPRIT = "hospital-2"
OTHERS = ["hospital-1", "hospital-3", "hospital-4", "hospital-5"]
Attack = Callable[[Member, SessionPlan, SealedShares], dict[str, bytes]]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(enrolment, "_LONGEST_PAUSE", 0.02)


@pytest.fixture
def five(
    small_config: Callable[..., RunConfig], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """Runs of five sites, of whom three recover a secret."""
    folder = tmp_path_factory.mktemp("five") / "sites"
    write_synthetic_sites(
        folder,
        SyntheticHospitals(
            sites=5, seed=2, images_per_site=32, image_size=16, session_size=8, test_images_per_site=9
        ),
    )

    def make(changes: dict[str, Any] | None = None) -> RunConfig:
        told = {
            "run-dir": str(tmp_path / "run"),
            "sites-dir": str(folder),
            "rounds": 3,
            "train.held-back": 0.0,
            "federation.sites": 5,
            "federation.patience": 2.0,
            "secure-aggregation.enabled": True,
            "secure-aggregation.threshold-share": 0.51,
        }
        return small_config(told | (changes or {}))

    return make


@pytest.fixture(autouse=True)
def sums(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Checks every sum that comes off against the words before they were masked; tells who is in it."""
    plain: dict[tuple[str, str], Words] = {}
    found: list[list[str]] = []
    right_mask, right_unmask = member.mask, MaskedSum.unmask

    def mask(state: member.MemberState, words: Words) -> member.MemberState:
        plain[state.session, state.site] = words.copy()
        return right_mask(state, words)

    def unmask(self: MaskedSum, answers: Any) -> None:
        right_unmask(self, answers)
        parts = [plain[self.plan.session, site] for site in self.survivors]
        assert np.array_equal(self.total, np.sum(parts, axis=0, dtype=np.uint32))
        found.append(sorted(self.survivors))

    monkeypatch.setattr(member, "mask", mask)
    monkeypatch.setattr(MaskedSum, "unmask", unmask)
    return found


def hostile(
    patch: pytest.MonkeyPatch,
    attack: Attack,
    when: Callable[[str, int], bool] = lambda site, _: site == CULPRIT,
) -> None:
    """Have some sites seal what they like, in the rounds that they like."""
    right = Member.share

    def share(self: Member, plan: SessionPlan) -> SealedShares:
        reply = right(self, plan)
        if not when(self.node.site.name, plan.round):
            return reply
        return reply.model_copy(update={"shares": reply.shares | attack(self, plan, reply)})

    patch.setattr(Member, "share", share)


def random_for(number: int) -> Attack:
    """Random bytes of the right length for the first so many neighbours."""
    return lambda _, __, reply: {p: os.urandom(SEALED_BYTES) for p in sorted(reply.shares)[:number]}


def wrong_for_all(site: Member, plan: SessionPlan, reply: SealedShares) -> dict[str, bytes]:
    """Shares that open, are what their digests say, and give no secret."""
    private, owner, shares = site._state().seal_key, site.node.site.name, {}
    for peer in reply.shares:
        one, other = os.urandom(SHARE_BYTES), os.urandom(SHARE_BYTES)
        public = plan.advert(peer).seal_key
        shares[peer] = (
            keys.commit_share(one)
            + keys.commit_share(other)
            + keys.Channel(private, public, owner, peer, plan.transcript()).seal(one + other)
        )
    return shares


def run(config: RunConfig, bend: Callable[[Message], Message] | None = None) -> dict[str, Any]:
    class Bent(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return [bend(reply) if bend else reply for reply in super().pull_messages(message_ids)]

    make_ephemeral_pki(config)
    flat = config.to_flat()
    with Bent(config.federation.sites, flat) as grid:
        app(grid, grid.server_context(flat))
    summary: dict[str, Any] = json.loads((Path(config.run_dir) / "summary.json").read_text())
    return summary


def events(config: RunConfig, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_json_lines(Path(config.run_dir) / "metrics.jsonl") if e["event"] == kind]


def keeps_its_own_back(reply: Message) -> Message:
    if (reply.metadata.message_type, reply.metadata.src_node_id) == ("query.unmask", 1002) and (
        not reply.has_error()
    ):
        told = from_records(reply.content, UnmaskShares)
        less = {site: share for site, share in told.self_masks.items() if site != CULPRIT}
        record = to_records(told.model_copy(update={"self_masks": less}))
        reply.content["unmask-shares"] = record["unmask-shares"]
    return reply


@pytest.mark.parametrize(
    ("attack", "bend", "lost"),
    [
        pytest.param(random_for(4), None, 1, id="random for all"),
        pytest.param(random_for(1), None, 0, id="random for one", marks=pytest.mark.slow),
        pytest.param(random_for(2), None, 0, id="random for all but t - 1", marks=pytest.mark.slow),
        pytest.param(random_for(2), keeps_its_own_back, 1, id="random for all but t - 1, its own kept back"),
        pytest.param(wrong_for_all, None, 1, id="wrong, well sealed, for all"),
    ],
)
def test_a_site_that_seals_bad_shares_in_every_round_costs_one_round_and_its_own_place(
    five: Callable[..., RunConfig],
    sums: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    attack: Attack,
    bend: Callable[[Message], Message] | None,
    lost: int,
) -> None:
    hostile(monkeypatch, attack)
    config = five()
    summary = run(config, bend)
    assert summary["rounds"] == 3
    assert [event["round"] for event in events(config, "round-skipped")] == [1][:lost]
    assert [event["round"] for event in events(config, "round")] == [1, 2, 3][lost:]
    assert sums == [OTHERS if lost else sorted([*OTHERS, CULPRIT])] * (3 - lost)
    named = [item for item in summary["left_out"] if item["phase"] == "query.unmask"]
    assert {item["site"] for item in named} == {CULPRIT}
    assert len(named) == (1 if lost else 3)
    assert all(("rest of the run" in item["reason"]) == bool(lost) for item in named)
    log = (Path(config.run_dir) / "log.jsonl").read_text()
    assert f"the shares that {CULPRIT} sealed" in log or attack is wrong_for_all


def test_a_site_that_cost_a_sum_stays_out_of_the_resumed_run(
    five: Callable[..., RunConfig], sums: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(monkeypatch, random_for(4))

    def die(reply: Message) -> Message:
        if (reply.metadata.message_type, reply.metadata.group_id) == ("query.keys", "2"):
            raise KeyboardInterrupt
        return reply

    config = five()
    with pytest.raises(KeyboardInterrupt):
        run(config, die)
    summary = run(config.with_changes({"resume": True}))
    assert summary["rounds"] == 3
    assert [event["round"] for event in events(config, "round-skipped")] == [1]
    assert sums == [OTHERS] * 2
    (refused,) = [item for item in summary["left_out"] if item["phase"] == "enrol"]
    assert refused["site"] == CULPRIT
    assert "out for the rest of the run" in refused["reason"]


def in_turn(site: str, round: int) -> bool:
    """The second site in round 1, the third in round 2."""
    return site == f"hospital-{round + 1}" and round <= 2


def test_rounds_that_somebody_is_out_for_do_not_count_towards_the_end_of_the_run(
    five: Callable[..., RunConfig], sums: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "ATTEMPTS", 1)
    hostile(monkeypatch, random_for(4), in_turn)
    config = five()
    assert run(config)["rounds"] == 3
    assert [event["round"] for event in events(config, "round-skipped")] == [1, 2]
    assert sums == [["hospital-1", "hospital-4", "hospital-5"]]


def test_a_run_of_skipped_rounds_alone_has_no_model(
    five: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile(monkeypatch, random_for(4), in_turn)
    with pytest.raises(RunError, match=r"hospital-3: .*do not give its secret"):
        run(five({"rounds": 2}))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_ends_where_no_quorum_is_left_without_who_cost_it_a_sum(
    five: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: nobody waits for a site that may not come back."""
    hostile(monkeypatch, random_for(4))
    with pytest.raises(RunError, match=r"hospital-2: .*(.|\n)*Waiting would not help"):
        run(five({"federation.quorum": 5, "federation.patience": 600.0}))
