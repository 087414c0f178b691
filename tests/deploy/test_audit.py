"""The audit: a correct run is not refuted, planted bugs are; label attacks; the command and its file."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from client.data.bags import BagStore
from client.private_training import BagDPOptimizer
from common.config import RunConfig
from common.errors import RunError, UserError
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness
from deploy.audit.canaries import _CANARY_SIZE, CanaryStore, count_right
from deploy.audit.claim import audit_site
from deploy.audit.label_inference import _hit_rate, _most_frequent, attack_proportions
from deploy.cli.runs import audit as audit_command

SIZE = 16


@pytest.fixture(scope="module")
def store(sites_dir: Path) -> BagStore:
    return BagStore.open(sites_dir / "hospital-1", SIZE)


def config(changes: dict[str, Any] | None = None) -> RunConfig:
    """Four rounds of four steps on eight bags: seconds."""
    base = {
        "rounds": 4, "model.image-size": SIZE, "model.atoms-per-class": 2, "train.held-back": 0.0,
        "model.backbone": "colour-histogram", "dp.epsilon": 2.0, "dp.delta": 1e-3, "dp.expected-bags": 1.0,
    }  # fmt: skip
    return RunConfig().with_changes(base | (changes or {}))


def audit(store: BagStore, seed: int = 0, canaries: int = 150, **changes: Any) -> dict[str, Any]:
    renamed = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return audit_site(config(renamed), store, canaries=canaries, seed=seed)


@pytest.fixture(scope="module")
def correct(store: BagStore) -> dict[str, Any]:
    return audit(store)


def test_a_correct_run_is_not_refuted(correct: dict[str, Any]) -> None:
    assert correct["holds"]
    assert correct["lower_bound"] <= correct["reported_epsilon"]["add_remove"]
    assert correct["reported_epsilon"]["add_remove"] < correct["reported_epsilon"]["replace_one"] <= 2.0
    assert correct["largest_possible_bound"] > correct["reported_epsilon"]["add_remove"]
    assert (correct["adjacency"], correct["unit"], correct["canaries"]) == ("add-remove", "bag", 150)
    assert correct["guesses"] in (38, 120)
    assert 0 <= correct["correct"] <= correct["guesses"]


@pytest.mark.slow
@pytest.mark.usefixtures("only_canaries")
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_correct_runs_are_not_refuted(store: BagStore, seed: int, optimiser: str) -> None:
    assert audit(store, seed, train__optimiser=optimiser)["holds"]


def clip_to(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = BagDPOptimizer.clip_and_accumulate

    def wrong(self: BagDPOptimizer) -> None:
        norm = self.max_grad_norm
        self.max_grad_norm = norm * factor
        right(self)
        self.max_grad_norm = norm

    monkeypatch.setattr(BagDPOptimizer, "clip_and_accumulate", wrong)


@pytest.fixture
def only_canaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the attacks on labels out, for time."""
    monkeypatch.setattr("deploy.audit.claim._attack_models", lambda *_: {})


@pytest.mark.usefixtures("only_canaries")
def test_planted_bug_no_clipping(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clip_to(monkeypatch, math.inf)
    result = audit(store, model__backbone="resnet-small")
    assert not result["holds"]
    assert result["lower_bound"] > result["reported_epsilon"]["add_remove"]


@pytest.mark.usefixtures("only_canaries")
def test_planted_bug_clipping_per_image(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # A canary's images are alike: clipped one by one, their sum is as many norms long as there are images.
    clip_to(monkeypatch, _CANARY_SIZE)
    assert not audit(store, rounds=2, dp__expected_bags=4.0, model__method="dllp")["holds"]


@pytest.mark.usefixtures("only_canaries")
def test_planted_bug_no_sampling(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def everyone(self: PrivacyPlan, round: int) -> Iterator[NDArray[np.int64]]:
        return iter([np.arange(self.number_of_bags)] * self.steps_per_round)

    monkeypatch.setattr(PrivacyPlan, "sampler", everyone)
    changes = {"dp__epsilon": 1.0, "train__optimiser": "sgd", "model__method": "dllp"}
    assert not audit(store, canaries=100, rounds=1, **changes)["holds"]


@pytest.mark.usefixtures("only_canaries")
def test_planted_bug_no_noise(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrivacyPlan, "add_noise", lambda self, total, round: None)
    assert not audit(store)["holds"]


def test_a_model_that_is_not_finite_is_no_result(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = math.nan
    monkeypatch.setattr(PrivacyPlan, "add_noise", lambda self, total, round: total.fill_(nan))
    with pytest.raises(RunError, match="not finite"):
        audit(store, canaries=4, rounds=1, dp__steps_per_round=1)


def test_slots_do_not_tell_the_coins(store: BagStore) -> None:
    slots = CanaryStore.insert(store, 50, np.random.default_rng(0))
    own = len(store)
    assert 10 < slots.included.sum() < 40
    assert len(slots) == own + 50
    assert slots[3].images is not None
    assert slots[3].bag_id == store[3].bag_id
    training, held_back = slots.split(0.25, 7)
    expected, rest = store.split(0.25, 7)
    assert training.tolist() == [*expected.tolist(), *range(own, own + 50)]
    assert held_back.tolist() == rest.tolist()
    for slot, there in enumerate(slots.included):
        bag = slots[own + slot]
        assert len(bag.images) == bag.counts.sum() == (_CANARY_SIZE if there else 1)
        assert (bag.images[0] == slots.images[slot if there else -1]).all()
    with pytest.raises(IndexError):
        slots[len(slots)]


def test_guesses_are_counted() -> None:
    included = np.array([False, True, False, True, True])
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    assert count_right(scores, included, 2) == 2
    assert count_right(scores, included, 5) == 3  # one of the lowest two is wrong, and one of the highest
    assert count_right(-scores, included, 4) == 1


def test_what_is_audited_is_the_plan_of_the_site(store: BagStore, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    right = PrivacyPlan.sampler

    def spy(self: PrivacyPlan, round: int) -> Iterator[NDArray[np.int64]]:
        plans.append(self)
        return right(self, round)

    monkeypatch.setattr(PrivacyPlan, "sampler", spy)
    result = audit(store, canaries=4, rounds=1)
    events = {plan.number_of_bags: plan.all_events() for plan in plans}
    assert set(events) == {len(store) + 4, len(store) // 2}
    (first,), (second,) = events.values()
    assert first.noise_multiplier == second.noise_multiplier
    assert first.sample_rate == pytest.approx(1 / len(store))
    assert result["reported_epsilon"]["replace_one"] == pytest.approx(plans[0].planned_epsilon, rel=1e-9)


def test_label_inference_from_proportions(store: BagStore) -> None:
    counts = store.leaf_counts
    result = attack_proportions(store, 1e-3, InsecureSeededRandomness(0, "x"))
    assert result["prior"] == _most_frequent(counts) == result["site_exact"]["accuracy"]
    assert result["bags_exact"]["accuracy"] == pytest.approx(counts.max(axis=1).sum() / counts.sum())
    for level in ("site", "bags"):  # next to no noise changes nothing, much of it takes the attack's edge
        assert result[f"{level}_noised"] == result[f"{level}_exact"]
    noised = attack_proportions(store, 100.0, InsecureSeededRandomness(0, "x"))
    assert noised["bags_noised"]["accuracy"] < 0.5 * noised["bags_exact"]["accuracy"]
    assert _hit_rate(np.array([1, 0]), np.array([[1, 3], [2, 2]])) == 5 / 8


def test_label_inference_from_models(correct: dict[str, Any], store: BagStore) -> None:
    models = correct["label_inference"]["model"]
    assert models["bags"] == {"trained": 4, "not_trained": 4}
    for name in ("without_dp", "with_dp"):
        figures = models[name]
        assert 0 <= figures["trained"] <= 1
        assert figures["memorised"] == pytest.approx(figures["trained"] - figures["not_trained"])


def test_training_without_privacy_tells_labels_and_training_with_it_does_not(store: BagStore) -> None:
    result = audit(store, canaries=4, rounds=30, model__method="dllp")["label_inference"]["model"]
    assert result["without_dp"]["advantage"] > 0.1
    assert result["with_dp"]["advantage"] < result["without_dp"]["advantage"] - 0.1


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    app.command()(audit_command)
    return app


QUICK = ["--rounds", "1", "--canaries", "10", "--seed", "1"]


def test_the_command_writes_what_it_prints(
    command: typer.Typer, sites_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(config({"sites-dir": str(sites_dir)}).to_toml())
    result = CliRunner().invoke(command, [str(run), "--site", "hospital-2", "--json", *QUICK])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((run / "audit.json").read_text())
    assert printed["site"] == "hospital-2"
    assert printed["delta"] == 1e-3
    assert sorted(path.name for path in run.iterdir()) == ["audit.json", "config.toml"]
    assert not list(sites_dir.rglob("ledger.sqlite*"))
    monkeypatch.setenv("COLUMNS", "200")
    again = CliRunner().invoke(command, [str(run), *QUICK])
    assert again.exit_code == 0
    assert "could not have failed" in again.stdout
    assert "add/remove one bag" in again.stdout


@pytest.mark.usefixtures("only_canaries")
def test_a_refuted_claim_fails_the_command(
    command: typer.Typer, sites_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deploy.audit.claim

    monkeypatch.setattr(deploy.audit.claim, "count_right", lambda scores, included, guesses: guesses)
    arguments = ["--sites-dir", str(sites_dir), "--epsilon", "0.5", "--out", str(tmp_path / "out"), *QUICK]
    result = CliRunner().invoke(command, [*arguments, "--canaries", "20"])
    assert result.exit_code == 1
    assert "REFUTED" in result.stdout
    assert not json.loads((tmp_path / "out" / "audit.json").read_text())["holds"]


def test_mistakes_are_told(command: typer.Typer, sites_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config({"dp.epsilon": 0.0}).to_toml())
    private = tmp_path / "private"
    private.mkdir()
    (private / "config.toml").write_text(config().to_toml())
    sites = ["--sites-dir", str(sites_dir)]
    for arguments, told in (
        ([], "nothing to audit"),
        ([str(tmp_path)], "was not private"),
        ([str(private)], "give --sites-dir"),
        ([str(private), "--epsilon", "3"], "leave --epsilon out"),
        ([*sites, "--site", "nowhere"], "hospital-1, hospital-2"),
        ([*sites, "--epsilon", "0"], "nothing to audit"),
    ):
        error = CliRunner().invoke(command, arguments).exception
        assert isinstance(error, UserError), arguments
        assert told in str(error)


def test_fresh_audits_use_the_generator_of_real_sites(store: BagStore) -> None:
    result = audit_site(config({"rounds": 1}), store, canaries=4)
    assert "AES-256" in result["randomness"]
    assert "INSECURE" in audit(store, canaries=4, rounds=1)["randomness"]
