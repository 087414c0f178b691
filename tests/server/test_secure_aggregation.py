"""Whole runs with secure aggregation: the plain result, losses after each step, and hostile replies."""

import base64
import json
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message
from safetensors.numpy import load_file

from client import secure_aggregation as client_side
from client.data.bags import BagStore
from client.secure_aggregation import CERTIFICATE_FILE, EPHEMERAL, KEY_FILE
from client.session import SiteSession
from client.site import SiteConfig, _SecureAggregationPolicy
from common import pki
from common.config import RunConfig
from common.errors import ConfigError, RunError
from common.files import read_json_lines
from common.pki import read_node_key
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import KEYS_SIGNED, effective_number
from common.secure_aggregation.quantisation import Grid
from common.secure_aggregation.records import KeyAdvert, MaskedUpdate, UnmaskShares
from common.wire import from_records, to_records
from deploy.simulation.local_grid import LocalGrid
from deploy.simulation.simulate import _ephemeral_kit, make_ephemeral_pki
from server import collect, enrolment
from server.aggregation import training_bags
from server.app import app
from server.secure_aggregation import _evened_weights
from tests.cases import shortened

Config = Callable[..., RunConfig]
Bend = Callable[[str, int, Message], Message | None]
"""(kind, node number from 0, reply) -> what arrives; None for nothing."""


class BentGrid(LocalGrid):
    """Real sites, whose replies a test changes or loses."""

    def __init__(self, sites: int, flat: Any, bend: Bend) -> None:
        super().__init__(sites, flat)
        self.bend = bend
        self.asked: list[str] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        kept = []
        for reply in super().pull_messages(message_ids):
            kind = reply.metadata.message_type
            self.asked.append(kind)
            bent = self.bend(kind, reply.metadata.src_node_id - 1001, reply)
            kept += [bent] if bent is not None else []
        return kept


def run(config: RunConfig, bend: Bend | None = None, workers: int = 0) -> dict[str, Any]:
    if config.secure_aggregation.enabled:
        make_ephemeral_pki(config)
    flat = config.to_flat()
    grid = (
        BentGrid(config.federation.sites, flat, bend)
        if bend
        else LocalGrid(config.federation.sites, flat, workers)
    )
    with grid:
        app(grid, grid.server_context(flat))
    summary: dict[str, Any] = json.loads((Path(config.run_dir) / "summary.json").read_text())
    return summary


def weights(config: RunConfig) -> dict[str, np.ndarray]:
    return load_file(Path(config.run_dir) / "model.safetensors")


def largest_difference(one: RunConfig, other: RunConfig) -> float:
    first, second = weights(one), weights(other)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def _failed(reply: Message) -> Message:
    """The error that Flower makes of a process that died."""
    bad = Message(Error(8, "killed"), reply_to=reply)
    bad.metadata.__dict__["_message_type"] = reply.metadata.message_type
    return bad


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(enrolment, "_LONGEST_PAUSE", 0.02)


@pytest.fixture
def config(small_config: Config, tmp_path: Path) -> Config:
    """The small run, in a folder of its own for each name."""

    def make(name: str, changes: dict[str, Any] | None = None, secure: bool = True) -> RunConfig:
        return small_config(
            {
                "run-dir": str(tmp_path / name),
                "secure-aggregation.enabled": secure,
                "federation.patience": 2.0,
                **(changes or {}),
            }
        )

    return make


ONE_ROUND = {"rounds": 1, "train.held-back": 0.25}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"federation.transport": "float16"},
        {"federation.strategy": "fedprox"},
        {"federation.strategy": "fedavgm"},
    ],
)
def test_one_round_gives_the_plain_result_within_the_bound(config: Config, changes: dict[str, Any]) -> None:
    plain, secure = config("plain", ONE_ROUND | changes, secure=False), config("secure", ONE_ROUND | changes)
    run(plain)
    run(secure)
    biggest = max(float(np.abs(array).max()) for array in weights(plain).values())
    bound = 3 / Grid(16.0, 3).scale + np.spacing(np.float32(biggest))
    if changes.get("federation.transport") == "float16":
        bound += 2.0**-11 * biggest  # the plain updates were rounded to 16 bits, the masked ones were not
    difference = largest_difference(plain, secure)
    assert 0 < difference <= bound


@pytest.mark.parametrize("strategy", shortened(["fedadam", "fedyogi"], ["fedadam"]))
def test_the_adaptive_strategies_get_the_same_mean(config: Config, strategy: str) -> None:
    """They divide by the size of the step, which blows up rounding where the step is next to nothing."""
    changes = ONE_ROUND | {"federation.strategy": strategy, "federation.server-learning-rate": 0.01}
    plain, secure = config("plain", changes, secure=False), config("secure", changes)
    run(plain)
    run(secure)
    first, second = weights(plain), weights(secure)
    far = [np.abs(first[name] - second[name]).ravel() > 1e-5 for name in first]
    assert np.concatenate(far).mean() < 0.01


@pytest.mark.slow
def test_worker_processes_give_the_plain_result_too(config: Config) -> None:
    plain, secure = config("plain", ONE_ROUND, secure=False), config("secure", ONE_ROUND)
    run(plain)
    run(secure, workers=2)
    assert largest_difference(plain, secure) < 1e-6


def test_a_private_run_keeps_its_noise_and_its_statements(config: Config) -> None:
    private = {
        "dp.epsilon": 4.0, "dp.delta": 1e-3, "dp.expected-bags": 3.0, "dp.steps-per-round": 2,
        "rounds": 2, "train.held-back": 0.0,
    }  # fmt: skip
    plain, secure = config("plain", private, secure=False), config("secure", private)
    first, second = run(plain), run(secure)
    assert largest_difference(plain, secure) < 1e-4  # two rounds: training has magnified the rounding
    for site, statement in first["statements"].items():
        told = second["statements"][site]
        assert told["epsilon"] == statement["epsilon"] > 0
        assert len(told["events"]) == len(statement["events"])


@pytest.mark.parametrize("private", [True, False])
def test_only_an_update_without_noise_is_refused_for_what_the_clip_range_cuts(
    config: Config, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """Noise of a few rounds at a small epsilon is larger than the clip range at some numbers in a hundred."""
    monkeypatch.setattr(client_side, "_MOST_CLIPPED", -1.0)  # any update is cut too often
    dp = {"dp.epsilon": 4.0, "dp.delta": 1e-3, "dp.expected-bags": 3.0, "dp.steps-per-round": 2}
    settings = config("run", ONE_ROUND | {"train.held-back": 0.0} | (dp if private else {}))
    with nullcontext() if private else pytest.raises(RunError):
        run(settings)


def test_what_is_known_of_a_site_in_clear_is_what_its_policy_lets_out(config: Config, tmp_path: Path) -> None:
    secure = config("run", ONE_ROUND)
    run(secure)
    updates = [e for e in read_json_lines(tmp_path / "run" / "metrics.jsonl") if e["event"] == "update"]
    assert len(updates) == 3
    assert all(event["loss"] is None and event["bags"] > 0 for event in updates)
    round_event = next(
        e for e in read_json_lines(tmp_path / "run" / "metrics.jsonl") if e["event"] == "round"
    )
    assert (round_event["updates"], round_event["loss"]) == (3, None)


def test_a_masked_update_is_told_of_when_it_comes(config: Config, tmp_path: Path) -> None:
    run(config("run", ONE_ROUND))
    events = [
        event for event in read_json_lines(tmp_path / "run" / "metrics.jsonl") if event.get("round") == 1
    ]
    kinds = [event["event"] for event in events if event["event"] in ("statement", "update", "round")]
    assert kinds == ["statement"] * 3 + ["update"] * 3 + ["round"]


def test_the_weights_are_those_of_the_training_bags(sites_dir: Path) -> None:
    for site in sorted(sites_dir.iterdir()):
        store = BagStore.open(site, 16)
        for share in (0.0, 0.1, 0.25, 0.9):
            assert training_bags(len(store), share) == len(store.split(share, 0)[0])
    assert training_bags(1, 0.5) == 1


@pytest.fixture(scope="module")
def five_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deploy.datasets.build import write_synthetic_sites
    from deploy.datasets.options import SyntheticHospitals

    folder = tmp_path_factory.mktemp("five") / "sites"
    write_synthetic_sites(
        folder,
        SyntheticHospitals(
            sites=5, seed=2, images_per_site=32, image_size=16, session_size=8, test_images_per_site=9
        ),
    )
    return folder


@pytest.fixture
def five(config: Config, five_sites: Path) -> Config:
    """Runs of five sites: the threshold is four."""

    def make(name: str, changes: dict[str, Any] | None = None, secure: bool = True) -> RunConfig:
        base = {"rounds": 1, "federation.sites": 5, "sites-dir": str(five_sites)}
        return config(name, base | (changes or {}), secure)

    return make


def test_the_weights_of_the_label_marginals_hold_where_they_count_as_enough_sites(five: Config) -> None:
    changes = {"federation.strategy": "fedpals"}
    plain, secure = five("plain", changes, secure=False), five("secure", changes)
    run(plain)
    run(secure)
    assert 0 < largest_difference(plain, secure) < 1e-6


STEPS = ["query.keys", "query.shares", "train.masked", "query.survivors", "query.unmask"]


@pytest.mark.parametrize("kind", shortened(STEPS, ["train.masked", "query.unmask"]))
def test_a_site_lost_after_any_step_costs_that_site_at_most(five: Config, tmp_path: Path, kind: str) -> None:
    def lose_one(asked: str, node: int, reply: Message) -> Message:
        return _failed(reply) if (asked, node) == (kind, 1) else reply

    run(five("bent"), lose_one)
    in_the_sum = [
        event["site"]
        for event in read_json_lines(tmp_path / "bent" / "metrics.jsonl")
        if event["event"] == "update"
    ]
    names = [f"hospital-{number}" for number in range(1, 6)]
    counts = kind in ("query.survivors", "query.unmask")
    assert in_the_sum == (names if counts else [n for n in names if n != "hospital-2"])

    # The mean is the plain mean of those who are in it.
    def drop_in_clear(asked: str, node: int, reply: Message) -> Message:
        return _failed(reply) if (asked, node) == ("train", 1) and not counts else reply

    run(five("plain", secure=False), drop_in_clear)
    assert largest_difference(five("bent"), five("plain", secure=False)) < 1e-6


def test_below_the_threshold_the_round_is_given_up_and_nothing_is_unmasked(
    five: Config, tmp_path: Path
) -> None:
    grids = []

    def lose_two(asked: str, node: int, reply: Message) -> Message:
        grids.append(asked)
        return _failed(reply) if asked == "train.masked" and node in (1, 3) else reply

    with pytest.raises(RunError, match="hospital-2"):
        run(five("bent", {"federation.quorum": 4}), lose_two)
    assert "query.unmask" not in grids
    assert not (tmp_path / "bent" / "model.safetensors").exists()


def test_a_round_that_failed_is_tried_again_with_fresh_keys(five: Config, tmp_path: Path) -> None:
    sessions: list[str] = []

    def lose_two_once(asked: str, node: int, reply: Message) -> Message:
        if asked != "train.masked":
            return reply
        sessions.append(from_records(reply.content, MaskedUpdate).session)
        return _failed(reply) if len(sessions) <= 2 else reply

    summary = run(five("bent"), lose_two_once)
    assert summary["rounds"] == 1
    assert len(set(sessions)) == 2
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    assert sum(event["event"] == "update" for event in events) == 5
    assert sum(event["event"] == "left-out" for event in events) == 2


def test_a_lost_signature_or_share_is_asked_for_again(five: Config, tmp_path: Path) -> None:
    """Two of five are below the threshold; the second time they say the same."""
    lost: list[tuple[str, int]] = []

    def lose_two_once(asked: str, node: int, reply: Message) -> Message:
        if asked in ("query.survivors", "query.unmask") and node in (1, 3) and (asked, node) not in lost:
            lost.append((asked, node))
            return _failed(reply)
        return reply

    assert run(five("bent"), lose_two_once)["rounds"] == 1
    assert len(lost) == 4
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    assert sum(event["event"] == "update" for event in events) == 5


def test_a_run_whose_sum_was_lost_goes_on_with_the_next_round(config: Config, tmp_path: Path) -> None:
    """The sites gave their shares of round 2, and the server died before the checkpoint."""

    def die(asked: str, node: int, reply: Message) -> Message:
        if (asked, reply.metadata.group_id, node) == ("query.unmask", "2", 2):
            raise KeyboardInterrupt
        return reply

    stopped = config("run", {"rounds": 3})
    with pytest.raises(KeyboardInterrupt):
        run(stopped, die)
    summary = run(stopped.with_changes({"resume": True}))
    assert summary["rounds"] == 3
    events = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    skipped = [event for event in events if event["event"] == "round-skipped"]
    assert [(event["round"], len(event["sites"])) for event in skipped] == [(2, 3)]
    assert [event["round"] for event in events if event["event"] == "round"] == [1, 3]


@pytest.mark.parametrize(
    ("weights", "effective"),
    [
        ([1, 1, 1], 3), ([900, 50, 50], 3), ([900, 50, 50], 2), ([5, 4, 3, 2, 1], 4),
        ([1, 0, 0, 0], 2), ([40, 30, 20, 10], 3), ([7, 7], 3),
    ],
)  # fmt: skip
def test_weights_are_drawn_towards_equal_ones_as_far_as_sites_demand(
    weights: list[float], effective: int
) -> None:
    named = {f"site-{number}": float(weight) for number, weight in enumerate(weights)}
    given = _evened_weights(named, effective)
    assert sum(given.values()) == pytest.approx(1)
    before = effective_number(weights)
    if before >= effective or len(weights) < effective:
        assert given == {site: weight / sum(weights) for site, weight in named.items()}
    else:
        assert effective_number(list(given.values())) == pytest.approx(effective)
        order = sorted(named, key=lambda site: named[site])
        assert [given[site] for site in order] == sorted(given.values())


@pytest.mark.parametrize("change", [{"settings": b"x" * 32}, {"run": 12}])
def test_a_site_of_another_run_or_configuration_is_left_out_alone(
    five: Config, tmp_path: Path, change: dict[str, Any]
) -> None:
    """All others would refuse to share masks with it, and the session would end there."""

    def bend(asked: str, node: int, reply: Message) -> Message:
        if (asked, node) == ("query.keys", 2):
            advert = from_records(reply.content, KeyAdvert).model_copy(update=change)
            key = read_node_key(tmp_path / "bent" / EPHEMERAL / advert.site / KEY_FILE)
            signature = pki.sign(key, KEYS_SIGNED, advert.signed())
            told = to_records(advert.model_copy(update={"signature": signature}))
            reply.content["key-advert"] = told["key-advert"]
        return reply

    run(five("bent"), bend)
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    assert sum(event["event"] == "update" for event in events) == 4
    assert [(e["site"], e["phase"]) for e in events if e["event"] == "left-out"] == [
        ("hospital-3", "query.keys")
    ]


def one_key_for_both(advert: KeyAdvert, seen: list[KeyAdvert]) -> KeyAdvert:
    return advert.model_copy(update={"mask_key": advert.seal_key})


def a_key_of_another(advert: KeyAdvert, seen: list[KeyAdvert]) -> KeyAdvert:
    return advert.model_copy(update={"mask_key": seen[0].mask_key})


@pytest.mark.parametrize("change", [one_key_for_both, a_key_of_another])
def test_a_key_that_is_there_twice_costs_those_that_have_it_and_nobody_else(
    five: Config, tmp_path: Path, change: Callable[[KeyAdvert, list[KeyAdvert]], KeyAdvert]
) -> None:
    seen: list[KeyAdvert] = []

    def bend(asked: str, node: int, reply: Message) -> Message:
        if asked != "query.keys":
            return reply
        advert = from_records(reply.content, KeyAdvert)
        seen.append(advert)
        if node == 1:
            key = read_node_key(tmp_path / "bent" / EPHEMERAL / advert.site / KEY_FILE)
            advert = change(advert, seen)
            signed = advert.model_copy(update={"signature": pki.sign(key, KEYS_SIGNED, advert.signed())})
            reply.content["key-advert"] = to_records(signed)["key-advert"]
        return reply

    run(five("bent", {"secure-aggregation.threshold-share": 0.51}), bend)
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    culprits = ["hospital-2"] if change is one_key_for_both else ["hospital-1", "hospital-2"]
    assert sum(event["event"] == "update" for event in events) == 5 - len(culprits)
    assert [(e["site"], e["phase"]) for e in events if e["event"] == "left-out"] == [
        (site, "query.keys") for site in culprits
    ]


def test_wrong_shares_of_a_site_are_left_out_and_told(five: Config, tmp_path: Path) -> None:
    def bend(asked: str, node: int, reply: Message) -> Message:
        if (asked, node) == ("query.unmask", 1):
            told = from_records(reply.content, UnmaskShares)
            wrong = {site: share[:4] + os.urandom(48) for site, share in told.self_masks.items()}
            record = to_records(told.model_copy(update={"self_masks": wrong}))
            reply.content["unmask-shares"] = record["unmask-shares"]
        return reply

    run(five("bent"), bend)
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    assert sum(event["event"] == "update" for event in events) == 5
    left_out = [event for event in events if event["event"] == "left-out"]
    assert {(event["site"], event["phase"]) for event in left_out} == {("hospital-2", "query.unmask")}


def test_random_words_cost_their_round_and_not_the_run(five: Config, tmp_path: Path) -> None:
    def bend(asked: str, node: int, reply: Message) -> Message:
        if (asked, node, reply.metadata.group_id) == ("train.masked", 1, "1"):
            update = from_records(reply.content, MaskedUpdate)
            words = np.frombuffer(os.urandom(4 * len(update.vector)), np.uint32)
            reply.content["words"] = to_records(update.model_copy(update={"vector": words}))["words"]
        return reply

    run(five("bent", {"rounds": 2}), bend)
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    (skipped,) = [event for event in events if event["event"] == "round-skipped"]
    assert skipped["round"] == 1
    assert "looks like random words" in skipped["reason"]
    assert [event["round"] for event in events if event["event"] == "round"] == [2]


def test_weights_that_the_sites_would_refuse_in_the_end_are_found_before_they_train(
    five: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the second site the others' weights count as two equal ones, and three are demanded."""
    bags = {"hospital-1": 600.0, "hospital-2": 300.0} | dict.fromkeys(
        ["hospital-3", "hospital-4", "hospital-5"], 100.0
    )
    monkeypatch.setattr(collect.Collector, "_bags", lambda self: bags)
    asked: list[str] = []

    def lose_once(kind: str, node: int, reply: Message) -> Message:
        asked.append(kind)
        return _failed(reply) if (kind, node) == ("query.shares", 1) and asked.count(kind) <= 5 else reply

    run(five("bent"), lose_once)
    assert asked.count("query.shares") == 10
    assert asked.count("train.masked") == 5


def wrong_length(reply: Message) -> None:
    update = from_records(reply.content, MaskedUpdate)
    record = to_records(update.model_copy(update={"vector": update.vector[:-1]}))
    reply.content["words"] = record["words"]


def wrong_dtype(reply: Message) -> None:
    vector = from_records(reply.content, MaskedUpdate).vector.astype(np.float32)
    reply.content["words"] = ArrayRecord({"words": Array(vector)})


def two_dimensional(reply: Message) -> None:
    vector = from_records(reply.content, MaskedUpdate).vector.reshape(-1, 1)
    reply.content["words"] = ArrayRecord({"words": Array(vector)})


def another_session(reply: Message) -> None:
    update = from_records(reply.content, MaskedUpdate).model_copy(update={"session": "aa" * 16})
    reply.content["masked-update"] = to_records(update)["masked-update"]


def another_round(reply: Message) -> None:
    update = from_records(reply.content, MaskedUpdate).model_copy(update={"round": 2})
    reply.content["masked-update"] = to_records(update)["masked-update"]


def another_sender(reply: Message) -> None:
    update = from_records(reply.content, MaskedUpdate).model_copy(update={"sender": "hospital-4"})
    reply.content["masked-update"] = to_records(update)["masked-update"]


def not_an_array(reply: Message) -> None:
    array = reply.content["words"]["words"]
    reply.content["words"] = ArrayRecord({"words": Array("uint32", array.shape, array.stype, b"junk")})


MALFORMED = [
    wrong_length,
    wrong_dtype,
    two_dimensional,
    another_session,
    another_round,
    another_sender,
    not_an_array,
]


@pytest.mark.parametrize("tamper", shortened(MALFORMED, [wrong_length, another_session]))
def test_a_malformed_masked_update_is_left_out_and_the_others_count(
    five: Config, tmp_path: Path, tamper: Callable[[Message], None]
) -> None:
    def bend(asked: str, node: int, reply: Message) -> Message:
        if (asked, node) == ("train.masked", 2):
            tamper(reply)
        return reply

    run(five("bent"), bend)
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    assert [e["site"] for e in events if e["event"] == "update"] == [
        f"hospital-{number}" for number in (1, 2, 4, 5)
    ]
    assert [(e["site"], e["phase"]) for e in events if e["event"] == "left-out"] == [
        ("hospital-3", "train.masked")
    ]


def in_record(record: str, **fields: Any) -> Callable[[Message], None]:
    """A reply in whose record of JSON some fields are others, whatever our classes would let through."""

    def tamper(reply: Message) -> None:
        content = json.loads(str(reply.content.config_records[record]["json"]))
        reply.content[record] = ConfigRecord({"json": json.dumps(content | fields)})

    return tamper


def in_metrics(**fields: Any) -> Callable[[Message], None]:
    return in_record("masked-update", metrics={key.replace("_", "-"): value for key, value in fields.items()})


LONG, ZEROS = "x" * 5_900_000, base64.urlsafe_b64encode(bytes(32)).decode()
OTHER_KEY = base64.urlsafe_b64encode(keys.public_key(keys.new_secret())).decode()
OTHERS = {f"hospital-{number}": ZEROS for number in range(1, 6)}
WRONG: dict[str, tuple[str, Callable[[Message], None], bool]] = {
    "keys of small order": ("query.keys", in_record("key-advert", mask_key=ZEROS), True),
    "keys that it did not sign": (
        "query.keys",
        in_record("key-advert", seal_key=OTHER_KEY),
        True,
    ),
    "a signature that is none": ("query.keys", in_record("key-advert", signature=ZEROS), True),
    "a certificate of 5.9 MB": ("query.keys", in_record("key-advert", certificate=LONG), True),
    "a certificate that is none": ("query.keys", in_record("key-advert", certificate="certificate"), True),
    "another site's keys": ("query.keys", in_record("key-advert", site="hospital-1"), True),
    "shares for a site of 5.9 MB": ("query.shares", in_record("sealed-shares", shares={LONG: ZEROS}), True),
    "a session of 5.9 MB": ("query.shares", in_record("sealed-shares", session=LONG), True),
    "a statement of 5.9 MB": ("train.masked", in_record("privacy", generator=LONG), True),
    "a statement of a million events": (
        "train.masked", in_record("privacy", events=[{"kind": "discrete_laplace", "scale": 1.0}] * 10**6),
        True,
    ),
    "a metric of 5.9 MB": ("train.masked", in_record("masked-update", metrics={LONG: 1}), True),
    "negative bags": ("train.masked", in_metrics(num_bags=-5), False),
    "bags beyond a float": ("train.masked", in_metrics(num_bags=10**300), False),
    "a loss that overflows": ("train.masked", in_metrics(loss=1e308), False),
    "a signature of 5.9 MB": ("query.survivors", in_record("survivor-signature", signature=LONG), True),
    "shares that are none": ("query.unmask", in_record("unmask-shares", self_masks=OTHERS), True),
    "shares of 5.9 MB": ("query.unmask", in_record("unmask-shares", self_masks={LONG: ZEROS}), True),
}  # fmt: skip


ONE_A_STEP = (
    "keys that it did not sign",
    "shares for a site of 5.9 MB",
    "a statement of 5.9 MB",
    "negative bags",
    "a signature of 5.9 MB",
    "shares that are none",
)


@pytest.mark.parametrize("wrong", shortened(WRONG, ONE_A_STEP))
def test_a_wrong_reply_at_any_step_ends_no_run(five: Config, tmp_path: Path, wrong: str) -> None:
    kind, tamper, left_out = WRONG[wrong]

    def bend(asked: str, node: int, reply: Message) -> Message:
        if (asked, node) == (kind, 2):
            tamper(reply)
        return reply

    summary = run(five("bent"), bend)
    assert summary["rounds"] == 1
    assert {item["site"] for item in summary["left_out"]} == ({"hospital-3"} if left_out else set())
    assert all(len(item["reason"]) <= 300 for item in summary["left_out"])
    (update,) = [e for e in read_json_lines(tmp_path / "bent" / "metrics.jsonl") if e["event"] == "round"]
    assert update["updates"] >= 4
    for file in ("summary.json", "metrics.jsonl", "log.jsonl"):
        assert (tmp_path / "bent" / file).stat().st_size < 100_000, file


def test_swapped_keys_end_the_run_with_every_peers_refusal(
    five: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server itself is hostile here: it puts its own mask key in place of one site's."""
    from common.secure_aggregation import keys

    honest = collect.Session._agree

    def swap(self: collect.Session, sites: Any) -> Any:
        plan = honest(self, sites)
        mine = keys.public_key(keys.new_secret())
        swapped = plan.adverts[1].model_copy(update={"mask_key": mine})
        return plan.model_copy(update={"adverts": (plan.adverts[0], swapped, *plan.adverts[2:])})

    monkeypatch.setattr(collect.Session, "_agree", swap)
    with pytest.raises(RunError, match="the site refused to go on with the secure aggregation"):
        run(five("bent"))
    events = read_json_lines(tmp_path / "bent" / "metrics.jsonl")
    refused = {e["site"] for e in events if e["event"] == "left-out" and e["phase"] == "query.shares"}
    assert len(refused) == 5


def test_a_site_that_sends_other_words_spoils_the_sum_and_is_noticed(five: Config, tmp_path: Path) -> None:
    """Nobody can tell who it was; the model stays as it is."""

    def poison(asked: str, node: int, reply: Message) -> Message:
        if (asked, node) == ("train.masked", 2):
            update = from_records(reply.content, MaskedUpdate)
            words = update.vector + np.uint32(2**29)
            reply.content["words"] = to_records(update.model_copy(update={"vector": words}))["words"]
        return reply

    small = {"federation.max-change": 0.5}
    with pytest.raises(RunError, match=r"the model would change by(.|\n)*--resume goes on with the next"):
        run(five("bent", small), poison)
    assert not (tmp_path / "bent" / "model.safetensors").exists()
    # It was the only round: without one there is no model.
    with pytest.raises(RunError, match="done its part"):
        run(five("bent", small).with_changes({"resume": True}))


def test_a_resumed_run_goes_on_to_the_same_model(config: Config) -> None:
    def nobody_in_round_two(asked: str, node: int, reply: Message) -> Message:
        return _failed(reply) if (asked, reply.metadata.group_id) == ("train.masked", "2") else reply

    whole = config("whole", {"rounds": 2})
    run(whole)
    stopped = config("stopped", {"rounds": 2})
    with pytest.raises(RunError):
        run(stopped, nobody_in_round_two)
    assert run(stopped.with_changes({"resume": True}))["rounds"] == 2
    assert largest_difference(whole, stopped) < 1e-4  # the rounding is random, and training magnifies it


def test_the_server_adds_the_certificates_of_sites_that_send_none(five: Config, tmp_path: Path) -> None:
    run(five("first"))
    made = tmp_path / "first" / EPHEMERAL
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    for kit in sorted(path for path in made.iterdir() if path.is_dir()):
        (kit / CERTIFICATE_FILE).rename(nodes / f"{kit.name}.crt")
    from client import secure_aggregation

    def real_kit(session: SiteSession) -> Path:
        return made / session.site.name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secure_aggregation, "find_kit", real_kit)
        run(five("second", {"secure-aggregation.certificates": str(nodes)}))
        (nodes / "hospital-5.crt").unlink()  # never joined, or revoked
        run(five("third", {"secure-aggregation.certificates": str(nodes)}))
    events = read_json_lines(tmp_path / "third" / "metrics.jsonl")
    assert [e["site"] for e in events if e["event"] == "update"] == [
        f"hospital-{number}" for number in range(1, 5)
    ]
    assert any("no certificate" in e["reason"] for e in events if e["event"] == "left-out")


def test_a_certificate_of_another_authority_costs_its_site_and_not_the_run(
    five: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other site would refuse a list with it, and the coordinator's folder knows no such site."""
    from client import secure_aggregation

    nodes = tmp_path / "nodes"
    nodes.mkdir()

    def kit(session: SiteSession) -> Path:
        name = session.site.name
        outside = name == "hospital-2"
        made = _ephemeral_kit(tmp_path / ("outside" if outside else "inside"), name)
        if not outside:
            (nodes / f"{name}.crt").write_bytes((made / CERTIFICATE_FILE).read_bytes())
        return made

    monkeypatch.setattr(secure_aggregation, "find_kit", kit)
    summary = run(five("run", {"secure-aggregation.certificates": str(nodes)}))
    assert [(item["site"], item["phase"]) for item in summary["left_out"]] == [("hospital-2", "query.keys")]
    events = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [e["site"] for e in events if e["event"] == "update"] == [
        f"hospital-{number}" for number in (1, 3, 4, 5)
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"federation.strategy": "median"},
        {"federation.strategy": "trimmed-mean"},
        {"federation.strategy": "krum"},
        {"secure-aggregation.minimum-sites": 4},
        {"secure-aggregation.threshold-share": 0.5},
        {"secure-aggregation.neighbours": 3},
    ],
)
def test_what_makes_no_sense_with_a_sum_is_a_mistake_in_the_configuration(
    config: Config, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"secure|threshold|neighbours"):
        config("run", changes)


def test_a_policy_may_open_the_loss(config: Config, sites_dir: Path, tmp_path: Path) -> None:
    import shutil

    sites = tmp_path / "sites"
    shutil.copytree(sites_dir, sites)
    folder = sorted(sites.iterdir())[0]
    site = SiteConfig.load(folder)
    policy = site.policy.model_copy(
        update={"secure_aggregation": _SecureAggregationPolicy(metrics=("num-bags", "loss"))}
    )
    site.model_copy(update={"policy": policy}).save(folder)
    run(config("run", {"rounds": 1, "sites-dir": str(sites)}))
    updates = [e for e in read_json_lines(tmp_path / "run" / "metrics.jsonl") if e["event"] == "update"]
    assert [event["loss"] is not None for event in updates] == [True, False, False]
