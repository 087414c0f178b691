"""A real site's training cannot be repeated by whoever lacks its secret; a simulated one's can, anywhere."""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from client import app as client_app
from client.session import SiteSession
from client.site import _SECRET_FILE, SiteConfig, SitePolicy, TrainingSeeds, _PrivacyBudget
from client.training import TrainingResult, _passes_of_round, train_round
from common.config import RunConfig
from common.model.build import build_model
from common.model.classifier import HierarchicalClassifier
from common.model.model_file import all_arrays, trainable_arrays
from common.records import ModelUpdate


def node(folder: Path, config: RunConfig, run: int = 1, **simulated: Any) -> Context:
    """A real site's node, or a simulated one with its number."""
    flat = (
        config.with_changes({"run-dir": "", "sites-dir": ""}).to_flat() if not simulated else config.to_flat()
    )
    return Context(run, 7, simulated or {"data-path": str(folder)}, RecordDict(), flat)


@pytest.mark.parametrize(("seed", "site", "round"), [(0, "hospital-1", 1), (7, "x", 30)])
def test_simulated_seeds_are_what_they_have_always_been(seed: int, site: str, round: int) -> None:
    words = [seed, zlib.crc32(site.encode()), round]
    seeds = TrainingSeeds(seed, site)
    assert list(seeds.of_round(round)) == np.random.SeedSequence(words).generate_state(3).tolist()
    assert [seeds.of_bag(round, 2, 5)] == np.random.SeedSequence([*words, 2, 5]).generate_state(1).tolist()


def test_a_simulated_node_has_the_public_seeds_and_no_secret(
    sites_dir: Path, small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    own = shutil.copytree(sites_dir, tmp_path / "own", ignore=shutil.ignore_patterns(_SECRET_FILE))
    config = small_config({"sites-dir": str(own)})
    made = SiteSession.open(node(own, config, **{"partition-id": 0})).seeds
    assert made == TrainingSeeds(config.seed, "hospital-1")
    assert not list(own.rglob(_SECRET_FILE))


def test_a_real_sites_seeds_are_its_own_and_new_in_every_run_and_round(
    tmp_path: Path, site: Path, small_config: Callable[..., RunConfig]
) -> None:
    config = small_config()
    seeds = SiteSession.open(node(site, config)).seeds
    assert seeds == SiteSession.open(node(site, config)).seeds  # a round can be repeated
    other_run = SiteSession.open(node(site, config, run=2)).seeds
    (site / _SECRET_FILE).unlink()
    other_site = SiteSession.open(node(site, config)).seeds  # another secret, all else equal
    public = TrainingSeeds(config.seed, "site-1")
    drawn = [
        *(s.of_round(r) for s in (seeds, other_run, other_site, public) for r in (1, 2)),
        *((s.of_bag(r, 0, 0),) for s in (seeds, other_run, other_site, public) for r in (1, 2)),
    ]
    values = [value for some in drawn for value in some]
    assert len(set(values)) == len(values)
    assert max(seeds.of_round(1)) >= 2**32
    torch.Generator().manual_seed(2**64 - 1)  # what such a seed may be


def test_rounds_of_a_real_site_that_share_a_pass_see_every_bag_once() -> None:
    config = RunConfig().with_changes({"train.rounds-per-pass": 4})
    seeds = TrainingSeeds(0, "site-1", bytes(range(32)))
    bags = np.arange(11)
    seen = [
        b for r in range(1, 5) for part in _passes_of_round(bags, config, seeds, r) for b in part.tolist()
    ]
    assert sorted(seen) == bags.tolist()


def test_whoever_lacks_the_secret_cannot_repeat_a_real_sites_training(
    site: Path, small_config: Callable[..., RunConfig]
) -> None:
    """The server knows the model, the configuration and here even the data, and still gets other arrays."""
    context = node(site, small_config({"train.bags-per-step": 1, "train.held-back": 0.0}))
    session = SiteSession.open(context)
    config, store = session.config, session.store
    model = build_model(config.model, store.hierarchy, 0)
    request = ModelUpdate(sender="server", round=1, arrays=all_arrays(model))

    def arrays(trained: HierarchicalClassifier) -> dict[str, np.ndarray]:
        return {name: array.copy() for name, array in trainable_arrays(trained).items()}

    first = arrays(client_app._train_locally(session, request)[0])
    again = arrays(client_app._train_locally(session, request)[0])
    assert all(np.array_equal(first[name], again[name]) for name in first)
    train_round(model, store, config, 1)  # with what the server knows
    repeated = arrays(model)
    assert any(not np.array_equal(first[name], repeated[name]) for name in first)


def test_private_training_too_has_the_sites_own_seeds(
    site: Path, small_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = SitePolicy(budget=_PrivacyBudget(epsilon=8.0, delta=1e-3))
    SiteConfig.load(site).model_copy(update={"policy": policy}).save(site)
    context = node(site, small_config({"dp.epsilon": 8.0, "dp.delta": 1e-3, "train.held-back": 0.0}))
    session = SiteSession.open(context)
    config, store = session.config, session.store
    used: list[TrainingSeeds] = []

    def train(*arguments: Any) -> TrainingResult:
        used.append(arguments[-1])
        return TrainingResult(float("nan"), 1, 3, 0)

    monkeypatch.setattr("client.private_training.train_round_privately", train)
    model = build_model(config.model, store.hierarchy, 0)
    client_app._train_privately(session, model, 1)
    assert used == [session.seeds]
    assert used[0].secret
