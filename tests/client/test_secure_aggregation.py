"""A site in a secure aggregation: what it demands, what it does once, and what its guard lets out."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from client import app as client_app
from client.door import QUESTIONS
from client.egress import _rebuild_masked
from client.secure_aggregation import _STATE, Member, _do_once
from client.session import SiteSession
from client.site import SiteConfig, SitePolicy, _SecureAggregationPolicy
from common.config import RunConfig
from common.errors import EgressError, RunError, SecureAggregationRefused
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.model_file import all_arrays
from common.records import ModelUpdate, PrivacyStatement, Record, SiteError
from common.secure_aggregation import keys
from common.secure_aggregation.member import MemberState
from common.secure_aggregation.records import (
    SEALED_BYTES,
    SHARE_BYTES,
    KeyAdvert,
    MaskedUpdate,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from common.wire import combine, from_records, remember, remembered, to_records
from deploy.flower.internals import become_server
from deploy.simulation.simulate import _ephemeral_kit, make_ephemeral_pki
from server.app import _run_path

from .asking import Node, with_policy

SESSION, ROUND = "0f" * 16, 1
OTHER = "1e" * 16
NOW = {"session": SESSION, "round": ROUND}


class Nodes:
    """Simulated nodes of one run, each with a Context that lasts; the server's steps are the tests'."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        sites = sorted(path.parent for path in Path(config.sites_dir).glob("*/site.toml"))
        self.folders = {SiteConfig.load(path).name: path for path in sites}
        self.names = list(self.folders)
        self.contexts = {
            name: Context(1, 100 + number, {"partition-id": number}, RecordDict(), config.to_flat())
            for number, name in enumerate(self.names)
        }
        become_server()
        if config.secure_aggregation.enabled:
            make_ephemeral_pki(config)

    def ask(self, name: str, kind: str, *records: Record | RecordDict) -> Message:
        content = combine(*(to_records(r) if isinstance(r, Record) else r for r in records))
        message = Message(content, self.contexts[name].node_id, kind, group_id=str(ROUND))
        message.metadata.__dict__["_message_id"] = "m"
        return client_app.app(message, self.contexts[name])

    def keys(self, **now: Any) -> dict[str, KeyAdvert]:
        offers = {name: self.ask(name, "query.keys", SessionOffer(**NOW | now)) for name in self.names}
        return {name: from_records(reply.content, KeyAdvert) for name, reply in offers.items()}

    def plan(self, adverts: dict[str, KeyAdvert], **changes: Any) -> SessionPlan:
        told = {
            **NOW,
            "threshold_share": 0.66,
            "neighbours": 0,
            "clip_range": 16.0,
            "weights": dict.fromkeys(adverts, 1 / max(1, len(adverts))),
            "adverts": tuple(adverts.values()),
        }
        return SessionPlan(**told | changes)

    def until_masks(self, weights: dict[str, float] | None = None, **now: Any) -> dict[str, MaskRequest]:
        changes = {"weights": weights} if weights else {}
        plan = self.plan(self.keys(**now), **now, **changes)
        sealed = {
            name: from_records(self.ask(name, "query.shares", plan).content, SealedShares)
            for name in self.names
        }
        return {
            name: MaskRequest(
                **NOW | now,
                sharing=tuple(sorted(sealed)),
                shares={p: s.shares[name] for p, s in sealed.items() if p != name},
            )
            for name in self.names
        }

    def train(self, requests: dict[str, MaskRequest], model: RecordDict, *names: str) -> dict[str, Message]:
        return {name: self.ask(name, "train.masked", model, requests[name]) for name in names or self.names}

    def agreed(self, *names: str, **now: Any) -> UnmaskRequest:
        """The list of survivors, with the signature of each of them."""
        told = SurvivorList(**NOW | now, survivors=names)
        replies = {name: self.ask(name, "query.survivors", told) for name in names}
        signed = {name: from_records(reply.content, SurvivorSignature) for name, reply in replies.items()}
        signatures = {name: reply.signature for name, reply in signed.items()}
        return UnmaskRequest(**told.model_dump(), signatures=signatures)

    def model(self, seed: int = 0, round: int = ROUND) -> RecordDict:
        tree = Hierarchy.from_csv(next(iter(self.folders.values())) / "hierarchy.csv")
        arrays = all_arrays(build_model(self.config.model, tree, seed))
        return to_records(ModelUpdate(sender="server", round=round, arrays=arrays))


@pytest.fixture
def nodes(small_config: Callable[..., RunConfig]) -> Nodes:
    return Nodes(small_config({"secure-aggregation.enabled": True}))


def code(reply: Message) -> int:
    assert reply.has_error(), "a reply where a refusal was expected"
    return reply.error.code


def test_a_whole_session_masks_what_leaves(nodes: Nodes) -> None:
    requests, model = nodes.until_masks(), nodes.model()
    reply = nodes.train(requests, model)["hospital-1"]
    update = from_records(reply.content, MaskedUpdate)
    assert from_records(reply.content, PrivacyStatement).site == "hospital-1"
    assert update.metrics.keys() == {"num-bags"}  # the loss stays, as long as the policy does not say else
    # The high bytes of a quantised small step are all 0 or 255; of a masked one, anything.
    high = np.bincount(update.vector.view(np.uint8)[3::4], minlength=256)
    assert (high > 0).all()
    request = nodes.agreed(*nodes.names)
    shares = from_records(nodes.ask("hospital-1", "query.unmask", request).content, UnmaskShares)
    assert shares.self_masks.keys() == set(nodes.names)
    assert not shares.mask_keys


def test_the_server_swaps_keys_and_every_peer_refuses(nodes: Nodes) -> None:
    adverts = nodes.keys()
    mine = keys.public_key(keys.new_secret())
    adverts["hospital-2"] = adverts["hospital-2"].model_copy(update={"mask_key": mine})
    for name in nodes.names:
        assert code(nodes.ask(name, "query.shares", nodes.plan(adverts))) == SiteError.SECURE_AGGREGATION
    # It was claimed: the site does not seal shares for a second list either, be it the right one.
    assert code(nodes.ask("hospital-1", "query.shares", nodes.plan(adverts))) == SiteError.SECURE_AGGREGATION


def test_nothing_is_done_twice_even_by_two_processes_at_once(nodes: Nodes) -> None:
    """The second message finds the state as it was before the first: Flower may well hand it out so."""
    requests, model = nodes.until_masks(), nodes.model()
    context = nodes.contexts["hospital-1"]
    before = RecordDict(dict(context.state))
    first = nodes.ask("hospital-1", "train.masked", model, requests["hospital-1"])
    assert not first.has_error()
    context.state = RecordDict(dict(before))
    again = nodes.ask("hospital-1", "train.masked", model, requests["hospital-1"])
    assert code(again) == SiteError.SECURE_AGGREGATION
    plan = nodes.plan({}, weights={})
    for kind, record in (("query.keys", SessionOffer(**NOW)), ("query.shares", plan)):
        assert code(nodes.ask("hospital-1", kind, record)) == SiteError.SECURE_AGGREGATION


def test_a_site_signs_one_list_of_survivors_and_gives_shares_for_no_other(nodes: Nodes) -> None:
    """Asked by two processes at once it signs the first list; a lost reply costs nothing."""
    site = SiteConfig.load(nodes.folders["hospital-1"])
    policy = SitePolicy(secure_aggregation=_SecureAggregationPolicy(minimum_sites=2))
    loose = nodes.config.with_changes({"secure-aggregation.minimum-sites": 2})
    for context in nodes.contexts.values():
        context.run_config = loose.to_flat()
    site.model_copy(update={"policy": policy}).save(nodes.folders["hospital-1"])
    try:
        nodes.train(nodes.until_masks(), nodes.model())
        context = nodes.contexts["hospital-1"]
        before = RecordDict(dict(context.state))
        everybody = nodes.agreed(*nodes.names)
        context.state = RecordDict(dict(before))
        two = ("hospital-1", "hospital-2")
        for _ in range(2):  # refused, and not taken for the list by being asked again
            reply = nodes.ask("hospital-1", "query.survivors", SurvivorList(**NOW, survivors=two))
            assert code(reply) == SiteError.SECURE_AGGREGATION
        first = nodes.ask("hospital-1", "query.unmask", everybody)
        assert "hospital-3" in from_records(first.content, UnmaskShares).self_masks
        context.state = RecordDict(dict(before))
        shorter = everybody.model_copy(update={"survivors": two})
        assert code(nodes.ask("hospital-1", "query.unmask", shorter)) == SiteError.SECURE_AGGREGATION
        repeated = nodes.ask("hospital-1", "query.unmask", everybody)
        assert from_records(repeated.content, UnmaskShares) == from_records(first.content, UnmaskShares)
    finally:
        site.save(nodes.folders["hospital-1"])


def test_a_site_refuses_a_list_without_itself_once_it_sent_its_vector(nodes: Nodes) -> None:
    nodes.train(nodes.until_masks(), nodes.model())
    without = SurvivorList(**NOW, survivors=("hospital-2", "hospital-3"))
    assert code(nodes.ask("hospital-1", "query.survivors", without)) == SiteError.SECURE_AGGREGATION


def weighted(*weights: float) -> dict[str, float]:
    return {f"hospital-{number}": weight for number, weight in enumerate(weights, 1)}


def test_there_is_one_sum_of_a_round_and_no_other(nodes: Nodes) -> None:
    """Three sessions of one round with other weights would give every single update."""
    for folder in nodes.folders.values():
        site = SiteConfig.load(folder)
        policy = SitePolicy(secure_aggregation=_SecureAggregationPolicy(minimum_sites=2))
        site.model_copy(update={"policy": policy}).save(folder)
    nodes.config = nodes.config.with_changes({"secure-aggregation.minimum-sites": 2})
    for context in nodes.contexts.values():
        context.run_config = nodes.config.to_flat()
    try:
        sums = 0
        for number, weights in enumerate([(0.4, 0.3, 0.3), (0.3, 0.4, 0.3), (0.3, 0.3, 0.4)]):
            now = {"session": f"{number:032x}"}
            offer = SessionOffer(**NOW | now)
            if sums:
                for name in nodes.names:
                    assert code(nodes.ask(name, "query.keys", offer)) == SiteError.ROUND_TAKEN
                continue
            nodes.train(nodes.until_masks(weighted(*weights), **now), nodes.model())
            request = nodes.agreed(*nodes.names, **now)
            answers = [nodes.ask(name, "query.unmask", request) for name in nodes.names]
            sums += not any(answer.has_error() for answer in answers)
        assert sums == 1
        # The next round is another matter.
        later = {"session": OTHER, "round": 2}
        assert len(nodes.keys(**later)) == 3
    finally:
        for folder in nodes.folders.values():
            SiteConfig.load(folder).model_copy(update={"policy": SitePolicy()}).save(folder)


def test_of_two_sessions_that_run_side_by_side_one_is_unmasked(nodes: Nodes) -> None:
    """The server holds the first back, has the second made ready, and gives each site the state it likes."""
    states = []
    requests = []
    for session in (SESSION, OTHER):
        now = {"session": session}
        nodes.train(nodes.until_masks(**now), nodes.model())
        requests.append(nodes.agreed(*nodes.names, **now))
        states.append({name: RecordDict(dict(nodes.contexts[name].state)) for name in nodes.names})
    for name in nodes.names:
        nodes.contexts[name].state = states[0][name]
        assert not nodes.ask(name, "query.unmask", requests[0]).has_error()
        nodes.contexts[name].state = states[1][name]
        assert code(nodes.ask(name, "query.unmask", requests[1])) == SiteError.ROUND_TAKEN
        nodes.contexts[name].state = states[0][name]
        assert not nodes.ask(name, "query.unmask", requests[0]).has_error()  # the same answer again


def test_a_round_is_trained_for_one_model_only(nodes: Nodes) -> None:
    nodes.train(nodes.until_masks(), nodes.model(seed=0))
    later = nodes.until_masks(session=OTHER)
    assert code(nodes.train(later, nodes.model(seed=1))["hospital-1"]) == SiteError.ROUND_TAKEN
    third = nodes.until_masks(session="2d" * 16)
    assert not nodes.train(third, nodes.model(seed=0))["hospital-1"].has_error()  # a failed session, again


def test_a_model_of_another_round_is_not_trained(nodes: Nodes) -> None:
    requests = nodes.until_masks()
    reply = nodes.ask("hospital-1", "train.masked", nodes.model(round=2), requests["hospital-1"])
    assert code(reply) == SiteError.SECURE_AGGREGATION


@pytest.mark.parametrize(
    "change", [{"threshold_share": 0.51}, {"neighbours": 2}, {"neighbours": 4}, {"clip_range": 8.0}]
)
def test_a_plan_is_the_one_of_the_runs_configuration(nodes: Nodes, change: dict[str, Any]) -> None:
    plan = nodes.plan(nodes.keys(), **change)
    assert code(nodes.ask("hospital-1", "query.shares", plan)) == SiteError.SECURE_AGGREGATION


def test_sites_that_were_told_another_configuration_do_not_mask_for_each_other(nodes: Nodes) -> None:
    """Told a learning rate of next to nothing, all others would make the sum the victim's update."""
    for name in nodes.names[1:]:
        changed = nodes.config.with_changes({"train.learning-rate": 1e-9})
        nodes.contexts[name].run_config = changed.to_flat()
    plan = nodes.plan(nodes.keys())
    for name in nodes.names:
        assert code(nodes.ask(name, "query.shares", plan)) == SiteError.SECURE_AGGREGATION


def test_the_site_demands_its_own_minimum(nodes: Nodes) -> None:
    nodes.config = nodes.config.with_changes({"secure-aggregation.minimum-sites": 2})
    for context in nodes.contexts.values():
        context.run_config = nodes.config.to_flat()
    adverts = nodes.keys()
    two = {name: adverts[name] for name in ("hospital-1", "hospital-2")}
    assert code(nodes.ask("hospital-1", "query.shares", nodes.plan(two))) == SiteError.SECURE_AGGREGATION


def test_simulated_sites_of_runs_without_a_folder_share_nothing_with_another_run(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one run of a simulation did must not be refused to the next one, whose run folder is its own."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    config = nodes.config.with_changes({"run-dir": ""})
    runs = tmp_path / "home" / ".fedbags" / "runs"
    for number in (1, 2):
        for context in nodes.contexts.values():
            context.run_config = config.to_flat()
            context.run_id, context.state = number, RecordDict()
        for name in nodes.names:
            _ephemeral_kit(runs / f"fedbags-{number}", name)
        nodes.keys()
        assert code(nodes.ask("hospital-1", "query.keys", SessionOffer(**NOW))) == (
            SiteError.SECURE_AGGREGATION
        )
        assert _run_path(config, number) == runs / f"fedbags-{number}"
    shutil.rmtree(runs / "fedbags-1" / "sites")  # with the run, its claims are gone
    for context in nodes.contexts.values():
        context.run_id = 1
    nodes.keys()


def test_an_update_in_clear_is_refused(nodes: Nodes, small_config: Callable[..., RunConfig]) -> None:
    assert code(nodes.ask("hospital-1", "train", nodes.model())) == SiteError.SECURE_AGGREGATION
    plain = Nodes(small_config())
    folder = plain.folders["hospital-1"]
    site = SiteConfig.load(folder)
    policy = SitePolicy(secure_aggregation=_SecureAggregationPolicy(required=True))
    site.model_copy(update={"policy": policy}).save(folder)
    try:
        assert code(plain.ask("hospital-1", "train", plain.model())) == SiteError.SECURE_AGGREGATION
        assert not plain.ask("hospital-2", "train", plain.model()).has_error()
    finally:
        site.save(folder)


def test_a_real_node_without_a_kit_does_not_take_part(nodes: Nodes, tmp_path: Path) -> None:
    context = nodes.contexts["hospital-1"]
    folder = nodes.folders["hospital-1"]
    context.node_config = {"data-path": str(folder)}
    context.run_config = nodes.config.with_changes({"run-dir": "", "sites-dir": ""}).to_flat()
    assert code(nodes.ask("hospital-1", "query.keys", SessionOffer(**NOW))) == SiteError.CONFIGURATION
    # With a kit it does; without a certificate in it, which the server then adds.
    kit = _ephemeral_kit(tmp_path, "hospital-1")
    (kit / "node.crt").unlink()
    context.node_config = {"data-path": str(folder), "kit": str(kit)}
    try:
        reply = nodes.ask("hospital-1", "query.keys", SessionOffer(**NOW))
        assert from_records(reply.content, KeyAdvert).certificate == ""
    finally:
        (folder / "secure-aggregation.sqlite").unlink()
    (kit / "node.key").unlink()
    assert code(nodes.ask("hospital-1", "query.keys", SessionOffer(**NOW))) == SiteError.CONFIGURATION


def test_a_node_that_lost_its_state_refuses(nodes: Nodes) -> None:
    requests = nodes.until_masks()
    nodes.contexts["hospital-1"].state = RecordDict()
    reply = nodes.ask("hospital-1", "train.masked", nodes.model(), requests["hospital-1"])
    assert code(reply) == SiteError.SECURE_AGGREGATION


def test_an_update_that_is_not_finite_stays(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(model: Any, *_: Any) -> Any:
        next(model.parameters()).data[0] = float("nan")
        return client_app.TrainingResult(1.0, 1, 4, 32)

    monkeypatch.setattr(client_app, "train_round", diverge)
    requests = nodes.until_masks()
    reply = nodes.ask("hospital-1", "train.masked", nodes.model(), requests["hospital-1"])
    assert code(reply) == SiteError.TRAINING


def test_secrets_are_in_the_nodes_state_and_leave_it_as_soon_as_they_can(nodes: Nodes) -> None:
    def state() -> MemberState:
        kept = remembered(nodes.contexts["hospital-1"].state, _STATE, MemberState)
        assert kept is not None
        return kept

    requests = nodes.until_masks()
    assert state().seed
    assert state().seal_key
    assert not any(advert.certificate for advert in state().agreed().adverts)
    nodes.ask("hospital-1", "train.masked", nodes.model(), requests["hospital-1"])
    assert (state().seed, state().mask_key, state().seal_key) == (b"", b"", b"")
    for secret in (state().held["hospital-1"][0], state().held["hospital-2"][1]):
        assert repr(secret)[2:-1] not in repr(state())


def with_junk(request: MaskRequest, *peers: str) -> MaskRequest:
    junk = {peer: os.urandom(SEALED_BYTES) for peer in peers}
    return request.model_copy(update={"shares": request.shares | junk})


def test_shares_that_do_not_open_are_logged_by_name_and_the_site_goes_on(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    requests, model = nodes.until_masks(), nodes.model()
    requests["hospital-1"] = with_junk(requests["hospital-1"], "hospital-2")
    with caplog.at_level("WARNING", "fedbags.client"):
        assert not any(reply.has_error() for reply in nodes.train(requests, model).values())
    logged = [record.getMessage() for record in caplog.records if "do not open" in record.getMessage()]
    assert logged == ["round 1: the shares that hospital-2 sealed for this site do not open"]
    request = nodes.agreed(*nodes.names)
    given = {
        name: from_records(nodes.ask(name, "query.unmask", request).content, UnmaskShares).self_masks.keys()
        for name in nodes.names
    }
    assert given == {name: set(nodes.names) for name in nodes.names} | {
        "hospital-1": {"hospital-1", "hospital-3"}
    }


def test_a_site_that_can_open_no_share_does_not_train(nodes: Nodes) -> None:
    requests, model = nodes.until_masks(), nodes.model()
    junk = with_junk(requests["hospital-1"], "hospital-2", "hospital-3")
    assert code(nodes.ask("hospital-1", "train.masked", model, junk)) == SiteError.SECURE_AGGREGATION


SITE = SiteSession(RunConfig(), SiteConfig(name="north"), Path(), {}, 1, RecordDict())
GOOD_SHARES = {"a": b"x" * SHARE_BYTES}


def masked(**changes: Any) -> MaskedUpdate:
    told = {**NOW, "sender": "north", "vector": np.zeros(6, np.uint32), "metrics": {"num-bags": 3}}
    return MaskedUpdate(**{**told, **changes})


@pytest.mark.parametrize(
    ("kind", "asked", "reply"),
    [
        ("train.masked", MaskRequest(**NOW, sharing=(), shares={}), masked(sender="south")),
        ("train.masked", MaskRequest(**NOW, sharing=(), shares={}), masked(round=2)),
        ("train.masked", MaskRequest(**NOW, sharing=(), shares={}), masked(session="1e" * 16)),
        ("train.masked", MaskRequest(**NOW, sharing=(), shares={}), masked(vector=np.zeros(5, np.uint32))),
        ("train.masked", MaskRequest(**NOW, sharing=(), shares={}), masked(vector=np.zeros(7, np.uint32))),
        (
            "query.unmask",
            UnmaskRequest(**NOW, survivors=("a", "b"), signatures={}),
            UnmaskShares(**NOW, site="north", self_masks=GOOD_SHARES, mask_keys=GOOD_SHARES),
        ),
        (
            "query.unmask",
            UnmaskRequest(**NOW, survivors=("b", "c"), signatures={}),
            UnmaskShares(**NOW, site="north", self_masks=GOOD_SHARES, mask_keys={}),
        ),
        (
            "query.unmask",
            UnmaskRequest(**NOW, survivors=("a",), signatures={}),
            UnmaskShares(**NOW, site="north", self_masks={"a": b"x" * 120}, mask_keys={}),
        ),
        (
            "query.survivors",
            SurvivorList(**NOW, survivors=("a",)),
            SurvivorSignature(session=OTHER, round=ROUND, site="north", signature=b"x" * 100),
        ),
        (
            "query.survivors",
            SurvivorList(**NOW, survivors=("a",)),
            SurvivorSignature(**NOW, site="south", signature=b"x" * 100),
        ),
        (
            "query.shares",
            SessionPlan(**NOW, threshold_share=0.66, neighbours=0, clip_range=1.0, weights={}, adverts=()),
            SealedShares(**NOW, site="north", shares={"north": b"x" * SEALED_BYTES}),
        ),
        (
            "query.shares",
            SessionPlan(**NOW, threshold_share=0.66, neighbours=0, clip_range=1.0, weights={}, adverts=()),
            SealedShares(**NOW, site="north", shares={"south": b"x" * 120}),
        ),
    ],
)  # fmt: skip
def test_the_guard_stops_what_a_handler_must_not_send(kind: str, asked: Record, reply: Any) -> None:
    assert kind in QUESTIONS
    with pytest.raises(EgressError):
        _rebuild_masked(to_records(asked), reply, SITE, words=6)


def test_the_guard_lets_the_right_replies_out() -> None:
    request = to_records(MaskRequest(**NOW, sharing=(), shares={}))
    sent = _rebuild_masked(request, masked(), SITE, words=6)
    assert sent.model_dump() == masked().model_dump()
    shares = UnmaskShares(**NOW, site="north", self_masks=GOOD_SHARES, mask_keys={"b": b"y" * SHARE_BYTES})
    asked = to_records(UnmaskRequest(**NOW, survivors=("a",), signatures={}))
    assert _rebuild_masked(asked, shares, SITE) == shares


@pytest.mark.parametrize(
    "change", [{"certificate": "cGF0aWVudCA0NzEx"}, {"settings": b"patient 4711".ljust(32)}]
)
def test_keys_with_another_certificate_or_configuration_stay(
    nodes: Nodes, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Member.advertise

    def bent(self: Member, offer: SessionOffer) -> KeyAdvert:
        return right(self, offer).model_copy(update=change)

    monkeypatch.setattr(Member, "advertise", bent)
    assert code(nodes.ask(nodes.names[0], "query.keys", SessionOffer(**NOW))) == SiteError.EGRESS


@pytest.mark.parametrize("metric", ["loss", "num-images", "confusion", "patient-4711"])
def test_a_metric_that_the_policy_does_not_allow_beside_a_masked_update_stays(
    nodes: Nodes, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, model = nodes.until_masks(), nodes.model()
    right = client_app._answer

    def tell_more(*arguments: Any, **named: Any) -> ModelUpdate:
        told = right(*arguments, **named)
        return told.model_copy(update={"metrics": {**told.metrics, metric: 1}})

    monkeypatch.setattr(client_app, "_answer", tell_more)
    reply = nodes.ask("hospital-1", "train.masked", model, requests["hospital-1"])
    assert code(reply) == SiteError.EGRESS


def test_an_update_in_clear_of_a_site_that_sends_masked_ones_stays(sites_dir: Path, tmp_path: Path) -> None:
    """Even where the handler forgot that the site wants it so."""
    site = with_policy(
        sites_dir / "hospital-1", tmp_path / "site", **{"secure-aggregation": {"required": True}}
    )
    node = Node(site)
    with pytest.MonkeyPatch.context() as forgetful:
        forgetful.setattr(client_app, "_refuse_in_clear", lambda *_: None)
        assert code(node.ask("train", node.model())) == SiteError.EGRESS


def test_a_claim_is_made_by_one_of_many_at_once(tmp_path: Path) -> None:
    path, made, refused = tmp_path / "claims.sqlite", [], []

    def attempt(number: int) -> None:
        try:
            _do_once(path, "mask")
            made.append(number)
        except SecureAggregationRefused:
            refused.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 7)
    _do_once(path, "unmask", "all")
    _do_once(path, "unmask", "all")
    with pytest.raises(SecureAggregationRefused):
        _do_once(path, "unmask", "fewer")
    with pytest.raises(RunError, match="finished steps cannot be written"):
        _do_once(tmp_path / "no-folder" / "claims.sqlite", "mask")


def test_a_state_survives_what_flower_does_to_it() -> None:
    from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

    state = RecordDict()
    assert remembered(state, _STATE, MemberState) is None
    half = bytes(32)
    advert = KeyAdvert(
        **NOW, site="a", run=2**63 + 5, settings=half, seal_key=half, mask_key=half, commitment=half
    )
    made = MemberState(advert=advert, seed=bytes(range(32)))
    remember(state, _STATE, made)
    assert remembered(recorddict_from_proto(recorddict_to_proto(state)), _STATE, MemberState) == made


def test_a_supernode_keeps_the_state_in_memory_only() -> None:
    """The secrets rely on it: should Flower keep a state elsewhere one day, this must be looked at."""
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate import InMemoryNodeState, NodeStateFactory

    assert type(NodeStateFactory(ObjectStoreFactory()).state()) is InMemoryNodeState
