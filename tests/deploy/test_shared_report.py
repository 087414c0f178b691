"""The records of a run with shared noise, recomputed by another accountant, and what its report says."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import norm

from client.ledger.state import LedgerState
from common.config import RunConfig
from common.privacy.events import GRID_COST, DiscreteLaplace, PoissonGaussian, alone
from deploy.report.files import report
from tests.reference_accounting import opacus_prv
from tests.server.test_secure_aggregation import run

SHARED = {
    "rounds": 4, "train.held-back": 0.0, "model.features": "colour-histogram",
    "model.dictionary": False, "train.optimiser": "sgd", "train.momentum": 0.0, "train.learning-rate": 0.0,
    "train.augmentation": "none", "dp.epsilon": 8.0, "dp.delta": 1e-3, "dp.clip-norm": 1.0,
    "dp.steps-per-round": 1, "dp.noise": "shared", "secure-aggregation.enabled": True,
}  # fmt: skip


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism with sensitivity / sigma = mu (Balle & Wang 2018)."""

    def excess(epsilon: float) -> float:
        inside = norm.cdf(mu / 2 - epsilon / mu)
        return float(inside - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)) - delta

    low, high = 0.0, 500.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


@pytest.mark.usefixtures("fine_grid")
def test_every_record_is_what_an_independent_accountant_finds(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_config({**SHARED, "dp.sample-rate": 1.0, "dp.release-scale": 1e5})
    run(config)
    report([Path(config.run_dir)], tmp_path / "report")
    told: dict[str, Any] = json.loads((tmp_path / "report" / "report.json").read_text())
    summary = json.loads((Path(config.run_dir) / "summary.json").read_text())
    for path in Path(config.run_dir).glob("sites/*/ledger.sqlite"):
        state = LedgerState.read(path)
        (event,) = [event for event in state.merged if isinstance(event, PoissonGaussian)]
        # Every bag in every step: one Gaussian mechanism, of which the epsilon is known exactly.
        of_all, of_one = (
            gaussian_epsilon(2 * math.sqrt(4) / sigma, 1e-3) + 4 * GRID_COST + 2e-5
            for sigma in (event.noise_multiplier, event.noise_multiplier / math.sqrt(3))
        )
        site, stated = told["sites"][state.site], summary["statements"][state.site]
        for found in (state.spent(), site["epsilon"], stated["epsilon"]):
            assert found == pytest.approx(of_all, rel=0.01)
        for found in (state.spent_alone(), site["own_share"], stated["epsilon_alone"]):
            assert found == pytest.approx(of_one, rel=0.01)
        assert site["training"][0]["shares"] == 3
    assert not told["problems"]
    assert any(caution.startswith("Noise was shared at") for caution in told["cautions"])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "by its own share of the noise alone" in page
    assert "3 sites" in page


@pytest.mark.usefixtures("fine_grid")
def test_sampled_steps_agree_with_opacus(small_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from common.privacy.accounting import spent
    from common.privacy.events import Adjacency

    config = small_config({**SHARED, "dp.sample-rate": 0.5})
    run(config)
    path = next(Path(config.run_dir).glob("sites/*/ledger.sqlite"))
    steps = [event for event in LedgerState.read(path).merged if not isinstance(event, DiscreteLaplace)]
    for events in (steps, alone(steps)):
        ours = spent(events, 1e-3, Adjacency.ADD_REMOVE)
        assert ours == pytest.approx(opacus_prv(events, 1e-3), rel=0.01)


def test_a_statement_that_hides_the_second_figure_is_a_problem(
    small_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small_config({**SHARED, "dp.sample-rate": 1.0})
    run(config)
    file = Path(config.run_dir) / "summary.json"
    summary = json.loads(file.read_text())
    first = next(iter(summary["statements"]))
    summary["statements"][first]["epsilon_alone"] = None
    file.write_text(json.dumps(summary))
    report([Path(config.run_dir)], tmp_path / "report")
    told = json.loads((tmp_path / "report" / "report.json").read_text())
    assert any("whether noise was shared" in problem["reason"] for problem in told["problems"])
