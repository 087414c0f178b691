"""Label-marginal aware weights: aligned where sites complement one another, by size where told so."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RunError
from common.records import ProportionRelease
from server.aggregation import _label_marginal_weights, fedpals_weights


def release(
    site: str, counts: tuple[float, ...], bags: int = 10, *, noised: bool = False
) -> ProportionRelease:
    mechanism = "discrete-laplace" if noised else "exact"
    return ProportionRelease(
        site=site,
        data_version="v",
        hierarchy={"levels": ["kind"], "rows": [[str(i)] for i in range(2)]},
        granularity="total" if counts else "none",
        leaf_counts=(counts,) if counts else (),
        bags=bags,
        bag_sizes=(),
        mechanism=mechanism if counts else "none",  # type: ignore[arg-type]
        event={"kind": "discrete_laplace", "scale": 8.0} if noised else {},
    )


def test_two_sites_with_one_class_each_balance_whatever_their_size() -> None:
    weights = _label_marginal_weights(np.eye(2), np.array([0.5, 0.5]), np.array([90.0, 10.0]), 0.0)
    np.testing.assert_allclose(weights, [0.5, 0.5], atol=1e-3)


def test_a_large_regularisation_weighs_by_size() -> None:
    weights = _label_marginal_weights(np.eye(2), np.array([0.5, 0.5]), np.array([90.0, 10.0]), 1e4)
    np.testing.assert_allclose(weights, [0.9, 0.1], atol=0.02)


@given(st.integers(1, 6), st.integers(2, 5), st.floats(0, 10), st.integers(0, 1000))
def test_weights_lie_on_the_simplex(sites: int, classes: int, regularisation: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    marginals = rng.dirichlet(np.ones(classes), size=sites)
    weights = _label_marginal_weights(
        marginals, rng.dirichlet(np.ones(classes)), rng.integers(1, 50, sites).astype(float), regularisation
    )
    assert weights.shape == (sites,)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0)


def test_negative_noised_counts_do_no_harm() -> None:
    weights = fedpals_weights(
        {"a": release("a", (-1.0, 5.0), noised=True), "b": release("b", (5.0, 0.0))}, "uniform", 0.0
    )
    assert weights["a"] == pytest.approx(0.5, abs=1e-3)


def test_a_site_that_releases_nothing_is_named() -> None:
    with pytest.raises(RunError, match="'b' releases none"):
        fedpals_weights({"a": release("a", (1.0, 1.0)), "b": release("b", ())}, "uniform", 0.1)
