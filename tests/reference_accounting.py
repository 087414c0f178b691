"""Second accountants that only tests ask: those of Opacus, and readings of our own that no product needs."""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from common.privacy.accounting import _fine, _is_bounded, spent
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, merge


def delta_at(
    events: Iterable[PoissonGaussian | DiscreteLaplace], epsilon: float, adjacency: Adjacency
) -> float:
    """Return the smallest delta that holds at ``epsilon`` (upper bound, dp-accounting PLD)."""
    merged = merge(events)
    if not merged or not _is_bounded(merged):
        return 1.0 if merged else 0.0
    return float(_fine(merged, adjacency, False).get_delta_for_epsilon(epsilon))


def without_amplification(
    events: Iterable[PoissonGaussian | DiscreteLaplace], delta: float, adjacency: Adjacency
) -> float:
    """Return the epsilon as if every bag had been in every step.

    It is what is left of the guarantee if the sampling were known.
    """
    always = [
        event.model_copy(update={"sample_rate": 1.0}) if isinstance(event, PoissonGaussian) else event
        for event in events
    ]
    return spent(always, delta, adjacency)


def opacus_rdp(events: Iterable[PoissonGaussian | DiscreteLaplace], delta: float) -> float:
    """Return epsilon for ADD/REMOVE by Opacus's Renyi accountant, looser than the PLD.

    Raises:
        ValueError: a release is among the events; Opacus's accountants cannot hold it.
    """
    return _opacus(RDPAccountant(), events, delta)


def opacus_prv(events: Iterable[PoissonGaussian | DiscreteLaplace], delta: float) -> float:
    """Return epsilon for ADD/REMOVE by Opacus's numerical (PRV) accountant, within 0.01.

    Raises:
        ValueError: a release is among the events; Opacus's accountants cannot hold it.
    """
    return _opacus(PRVAccountant(), events, delta)


def _opacus(accountant: Any, events: Iterable[PoissonGaussian | DiscreteLaplace], delta: float) -> float:
    merged = merge(events)
    if any(isinstance(event, DiscreteLaplace) for event in merged):
        raise ValueError("Opacus's accountants cannot hold a discrete Laplace release")
    if not _is_bounded(merged):
        return math.inf
    accountant.history = [
        (event.noise_multiplier, event.sample_rate, event.steps)
        for event in merged
        if isinstance(event, PoissonGaussian)
    ]
    if not accountant.history:
        return 0.0
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Opacus's fixed Renyi orders are too few for some settings (its bound is loose then, not wrong),
        # and its PRV takes log(0) = -inf on purpose at q = 1.
        warnings.filterwarnings("ignore", message="Optimal order is the (largest|smallest) alpha")
        return float(accountant.get_epsilon(delta))
