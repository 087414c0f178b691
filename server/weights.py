"""Compute each site's weight in the mean, by its bags or by FedPALS.

FedPALS weighs sites so that their labels complement each other. The functions are pure and see the released
counts only.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from common.errors import RunError
from common.messages import ProportionRelease

_SUM_TO_ONE = 1e3


def label_marginal_weights(
    marginals: NDArray[np.float64],
    target: NDArray[np.float64],
    sizes: NDArray[np.float64],
    regularisation: float,
) -> NDArray[np.float64]:
    """Return weights on the simplex that bring the mixture of label marginals close to a target.

    Minimises ``||target - marginals^T w||^2 + regularisation * sum_i w_i^2 / n_i * n`` over the simplex
    (FedPALS, arXiv 2411.03799, eq. 4, with n_i relative to their sum n so that the regularisation has no
    unit): 0 aligns as well as the sites allow, large values give weights by size, as FedAvg does.

    Args:
        marginals: shape (sites, C), each row a distribution over the leaves.
        target: shape (C,), a distribution.
        sizes: shape (sites,), positive.
        regularisation: >= 0.

    Returns:
        Shape (sites,), non-negative, summing to 1.
    """
    share = sizes / sizes.sum()
    # The three blocks of the least squares are the alignment, the regularisation, and one heavy row that
    # makes the weights sum to 1.
    rows = [
        marginals.T,
        np.diag(np.sqrt(regularisation / share)),
        np.full((1, len(share)), _SUM_TO_ONE),
    ]
    right = np.concatenate([target, np.zeros(len(share)), [_SUM_TO_ONE]])
    weights, _ = nnls(np.concatenate(rows), right)
    return np.asarray(weights / weights.sum())


def training_bags(bags: int, held_back: float) -> int:
    """Return the bags that a site trains on when it holds a share of ``bags`` back.

    The rule is that of ``BagStore.split``.
    """
    if held_back <= 0 or bags < 2:
        return bags
    return bags - min(max(1, round(held_back * bags)), bags - 1)


def fedpals_weights(
    releases: Mapping[str, ProportionRelease], target: str, regularisation: float
) -> dict[str, float]:
    """Return label-marginal aware weights from the sites' releases.

    Args:
        releases: by site name.
        target: ``uniform`` over the leaves, or ``pooled``: the marginal over all sites.
        regularisation: see label_marginal_weights.

    Raises:
        RunError: a site's policy releases no counts.
    """
    totals = {}
    for site, release in releases.items():
        total = release.total()
        if total is None:
            raise RunError(
                f"strategy fedpals needs label counts, but site {site!r} releases none by policy; "
                "use another strategy or ask the site for 'release-proportions = \"total\"'"
            )
        totals[site] = np.clip(total, 0, None) + 1e-9  # noised counts can be negative
    counts = np.stack(list(totals.values()))
    marginals = counts / counts.sum(axis=1, keepdims=True)
    pooled = counts.sum(axis=0) / counts.sum()
    goal = np.full(counts.shape[1], 1 / counts.shape[1]) if target == "uniform" else pooled
    sizes = np.array([release.bags for release in releases.values()], dtype=np.float64)
    weights = label_marginal_weights(marginals, goal, sizes, regularisation)
    return dict(zip(totals, weights.tolist(), strict=True))
