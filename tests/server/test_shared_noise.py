"""Runs whose sites share their noise: the step of the sum, what is charged, and what is never unmasked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import server.enrolment as enrolment
from client.data.bags import BagStore
from client.ghost_clipping import clipped_sum, pieces
from client.ledger.state import LedgerState
from client.terms.base import Objective
from client.training import make_setting
from common.config import RunConfig
from common.config_tables import cosine_decay, rate_by_noise
from common.errors import ConfigError, RunError
from common.model.build import build_model, trainable_parameters
from common.model.features.frozen import FrozenFeatures
from common.privacy import shared_noise
from common.privacy.accounting import spent
from common.privacy.events import Adjacency, PoissonGaussian, alone
from common.privacy.plan import shared_multiplier
from deploy.datasets.build import write_synthetic_sites
from deploy.datasets.options import SyntheticHospitals

from .test_secure_aggregation import _failed, run, weights

Config = Callable[..., RunConfig]
SHARED = {
    "rounds": 3, "train.held-back": 0.0, "model.features": "colour-histogram", "model.dictionary": False,
    "train.optimiser": "sgd", "train.momentum": 0.0, "train.weight-decay": 0.0, "train.learning-rate": 0.0,
    "train.augmentation": "none", "dp.epsilon": 8.0, "dp.delta": 1e-3, "dp.clip-norm": 1.0,
    "dp.sample-rate": 1.0, "dp.steps-per-round": 1, "dp.noise": "shared", "secure-aggregation.enabled": True,
    "secure-aggregation.minimum-sites": 3, "federation.patience": 2.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(enrolment, "_LONGEST_PAUSE", 0.02)


@pytest.fixture(scope="module")
def four_sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four") / "sites"
    hospitals = SyntheticHospitals(
        sites=4, seed=2, images_per_site=40, image_size=16, session_size=8, test_images_per_site=9
    )
    write_synthetic_sites(folder, hospitals)
    return folder


@pytest.fixture
def four(small_config: Config, four_sites: Path, tmp_path: Path) -> Config:
    def make(name: str, **changes: Any) -> RunConfig:
        given = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
        base = {"run-dir": str(tmp_path / name), "sites-dir": str(four_sites), "federation.sites": 4}
        return small_config({**SHARED, **base, **given})

    return make


def ledgers(config: RunConfig) -> dict[str, LedgerState]:
    files = sorted(Path(config.run_dir).glob("sites/*/ledger.sqlite"))
    return {path.parent.name: LedgerState.read(path) for path in files}


def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_noise, "share", lambda shape, *_: np.zeros(shape, np.int64))


def test_a_run_is_clipped_gradient_descent_on_the_bags_of_all_sites(
    four: Config, four_sites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, and with every bag in every step, against the definition on the pooled bags."""
    silence(monkeypatch)
    config = four("run", rounds=4)
    run(config)
    stores = [
        BagStore.open(site, 16, features=("colour-histogram",))
        for site in sorted(four_sites.glob("hospital-*"))
    ]
    bags = sum(len(store) for store in stores)
    model = build_model(config.model, stores[0].hierarchy, config.seed, config.parts).train()
    trainable_parameters(model, config.trained_part)
    backbone = model.backbone
    assert isinstance(backbone, FrozenFeatures)
    means = [
        torch.from_numpy(np.array(store[bag].features)).double().mean(dim=0)
        for store in stores
        for bag in range(len(store))
    ]
    shorter = [mean * min(1.0, backbone.longest / float(mean.norm())) for mean in means]
    with torch.no_grad():
        backbone.centre.copy_(torch.stack(shorter).mean(dim=0))
    heads = list(model.heads.parameters())
    sigma = shared_multiplier(config.dp, config.rounds)
    noise = sigma * np.sqrt(4 / 3 * sum(p.numel() for p in heads)) / bags
    for number in (2, 3, 4):
        rate = rate_by_noise(noise) * cosine_decay((number - 1) / 3)
        total = dict.fromkeys(heads, torch.zeros(()))
        for store in stores:
            objective = Objective(make_setting(store, config, number, bags=None))
            found = clipped_sum(model, objective, pieces(store, np.arange(len(store))), 1.0)
            total = {head: total[head] + found.gradients[head] for head in heads}
        with torch.no_grad():
            for head in heads:
                head -= rate * total[head].float() / bags
    made = weights(config)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(made[name], parameter.detach().numpy(), atol=2e-5)


def test_every_site_charges_the_sum_and_what_its_share_gives_alone(four: Config) -> None:
    config = four("run")
    summary = run(config)
    sigma = shared_multiplier(config.dp, config.rounds)
    for site, state in ledgers(config).items():
        (event,) = [event for event in state.merged if isinstance(event, PoissonGaussian)]
        assert (event.noise_multiplier, event.steps, event.shares, event.discrete) == (sigma, 3, 3, True)
        assert state.spent() <= 8.0
        own = state.spent_alone()
        assert own is not None
        assert own == spent(alone(state.merged), 1e-3, Adjacency.REPLACE_ONE) > state.spent()
        stated = summary["statements"][state.site]
        assert stated["epsilon"] == pytest.approx(state.spent())
        assert stated["epsilon_alone"] == pytest.approx(own)
        assert state.export()["spent_by_own_noise_alone"]["replace_one"] == own
        assert not state.open_reservations, site


@pytest.mark.parametrize("lost", [1, 2])
def test_a_site_lost_in_mid_round_is_charged_and_below_the_shares_nothing_is_unmasked(
    four: Config, lost: int
) -> None:
    asked_for: list[tuple[str, str]] = []

    def lose(asked: str, node: int, reply: Any) -> Any:
        asked_for.append((asked, reply.metadata.group_id))
        dropped = asked == "train.masked" and reply.metadata.group_id == "2" and node < lost
        return _failed(reply) if dropped else reply

    config = four("run", federation__patience=0.1)
    if lost == 1:
        assert run(config, lose)["rounds"] == 3
        assert ("query.unmask", "2") in asked_for
    else:
        with pytest.raises(RunError, match="round 2"):
            run(config, lose)
        assert ("query.unmask", "2") not in asked_for
        assert ("query.unmask", "1") in asked_for
    for state in ledgers(config).values():
        (event,) = [event for event in state.merged if isinstance(event, PoissonGaussian)]
        # Whoever computed a step has paid for it, whether its answer came or not.
        assert event.steps == 3 if lost == 1 else event.steps >= 2
        assert not state.open_reservations


def test_a_resumed_run_goes_on_to_the_same_model_and_pays_once(
    four: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(four("whole"))

    def die(asked: str, node: int, reply: Any) -> Any:
        if (asked, reply.metadata.group_id) == ("query.keys", "3"):
            raise KeyboardInterrupt
        return reply

    config = four("broken")
    with pytest.raises(KeyboardInterrupt):
        run(config, die)
    run(config.with_changes({"resume": True}))
    whole, broken = weights(four("whole")), weights(config)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, broken[name])
    for state in ledgers(config).values():
        assert [event.steps for event in state.merged if isinstance(event, PoissonGaussian)] == [3]


def test_a_cap_for_the_share_alone_ends_a_sites_part(four: Config, four_sites: Path, tmp_path: Path) -> None:
    import shutil

    from client.site import SiteConfig

    folder = tmp_path / "sites"
    shutil.copytree(four_sites, folder)
    site = next(iter(sorted(folder.glob("hospital-*"))))
    own = SiteConfig.load(site)
    budget = own.policy.budget.model_copy(update={"epsilon": 8.0, "delta": 1e-3, "alone_epsilon": 8.2})
    own.model_copy(update={"policy": own.policy.model_copy(update={"budget": budget})}).save(site)
    config = four("run", sites_dir=str(folder), secure_aggregation__minimum_sites=3, federation__patience=0.1)
    run(config)
    state = LedgerState.read(site / "ledger.sqlite")
    assert state.refusals > 0
    alone_spent = state.spent_alone()
    assert alone_spent is None or alone_spent <= 8.2
    assert state.spent() < 8.0


@pytest.mark.parametrize(
    "change",
    [
        {"secure_aggregation__enabled": False}, {"dp__sample_rate": 0.0}, {"dp__steps_per_round": 2},
        {"dp__epsilon": 0.0}, {"dp__metrics_scale": 20.0}, {"federation__strategy": "fedavgm"},
        {"dp__colluders": 2},
        {"dp__colluders": 2, "secure_aggregation__minimum_sites": 4},
    ],
)  # fmt: skip
def test_shared_noise_that_could_not_hold_is_a_mistake_in_the_configuration(
    four: Config, change: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="'shared' needs"):
        four("run", **change)


def test_sites_that_may_work_with_the_server_are_not_counted_on(four: Config) -> None:
    config = four("run", secure_aggregation__minimum_sites=4, dp__colluders=1)
    assert config.shares == 3
    run(config)
    for state in ledgers(config).values():
        (event,) = [event for event in state.merged if isinstance(event, PoissonGaussian)]
        assert event.shares == 3


def test_the_sum_has_room_for_all_bags_and_the_noise(four: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of a sum wraps: the largest that clipped gradients and the noise can make still fits."""
    from common.secure_aggregation.quantisation import Grid, sum_of, to_words
    from server.shared_step import SharedStep

    config = four("run")
    step = SharedStep(config, 2, {"a": 5.0, "b": 7.0, "c": 4.0}, None)
    grid = Grid(step.clip_range(["a", "b", "c"]), 3)
    largest = 16.0 + 10 * step.noise_multiplier
    words = to_words(np.rint(np.array([largest, -largest, 1.5]) * grid.scale).astype(np.int64))
    like = {"x": np.zeros(3, np.float32)}
    np.testing.assert_allclose(sum_of(words, like, grid)["x"], [largest, -largest, 1.5], rtol=1e-6)
    # Modulo 2**32 the order of adding does not matter.
    parts = [to_words(np.array([-(2**31), 2**31 - 5, 7])), to_words(np.array([2**31 - 3, -(2**31), -9]))]
    total = sum_of(parts[0] + parts[1], like, grid)["x"] * grid.scale
    assert np.rint(total).tolist() == [-3, -5, -2]


def test_metrics_tell_nothing_of_a_step(four: Config) -> None:
    config = four("run", rounds=2)
    run(config)
    events = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    assert all(event["loss"] is None for event in events if event["event"] == "update")
