"""Aggregate the sites' models into the next one, by a streaming mean and Flower's strategies.

Mean-type strategies (FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedPALS) see one update at a time: the
weighted mean is accumulated in float64 and Flower's strategy receives it as a single reply, so its server
optimiser is Flower's own and memory does not grow with the number of sites. Median, trimmed mean and Krum
compare updates with one another and hold them all.

A site's weight in the mean is its number of bags, or that of FedPALS, which weighs sites so that their labels
complement each other and sees the released counts only.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray
from scipy.optimize import nnls

from common import parts
from common.config import RunConfig
from common.config_tables import FederationConfig, cosine_decay, run_progress
from common.errors import ConfigError, RunError
from common.parts import Kind
from common.records import FloatArray, ModelUpdate, ProportionRelease
from common.settings_file import Section
from server.strategies import WEIGHT, Rule

# Flower's strategies have no way to save or restore their state, so these attributes are read and set by
# name.
_STATE = ("current_arrays", "momentum_vector", "m_t", "v_t")

Arrays = Mapping[str, FloatArray]


class Aggregator(Protocol):
    """Take the good updates of one round, one at a time, then give the strategy's input."""

    count: int

    def add(self, update: ModelUpdate, weight: float) -> None:
        """Take one update."""

    def replies(self) -> list[Message]:
        """Return the input of Flower's strategy."""


class _StreamingMean:
    """Accumulate a weighted mean in float64, with one model in memory however many sites report."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: dict[str, NDArray[np.float64]] = {}
        self._weight = 0.0

    def add(self, update: ModelUpdate, weight: float) -> None:
        """Add ``weight`` times the update to the sum."""
        for name, array in update.arrays.items():
            if name not in self._sum:
                self._sum[name] = np.zeros(array.shape, np.float64)
            # float64, so that the sum of many sites' float32 arrays is not rounded at each addition.
            self._sum[name] += np.multiply(array, weight, dtype=np.float64)
        self._weight += weight
        self.count += 1

    def replies(self) -> list[Message]:
        """Return the mean, as the only reply of the round."""
        mean = {name: (total / self._weight).astype(np.float32) for name, total in self._sum.items()}
        return [_reply(mean, self._weight)]


class _Collected:
    """Hold every update, for strategies that compare them."""

    def __init__(self) -> None:
        self.count = 0
        self._replies: list[Message] = []

    def add(self, update: ModelUpdate, weight: float) -> None:
        """Keep the update."""
        self._replies.append(_reply(update.arrays, weight))
        self.count += 1

    def replies(self) -> list[Message]:
        """Return all updates, in the order of the sites."""
        return self._replies


def build_optimiser(config: RunConfig) -> "ServerOptimiser":
    """Build the run's strategy.

    Raises:
        ConfigError: it compares single updates, which nobody sees with secure aggregation.
    """
    strategy = config.federation.strategy
    optimiser = ServerOptimiser(config.federation, config.parts.get(strategy))
    if optimiser.compares and config.secure_aggregation.enabled:
        raise ConfigError(
            f"federation.strategy = {strategy!r} compares the sites' updates, and with secure aggregation "
            "nobody sees them: use a strategy of means, or secure-aggregation.enabled = false"
        )
    return optimiser


class ServerOptimiser:
    """Wrap Flower's strategy object so that a checkpoint can hold its state."""

    def __init__(self, config: FederationConfig, settings: Section | None = None) -> None:
        part = parts.part(Kind.STRATEGY, config.strategy)
        rule: Rule = part.build(config, settings or part.settings())
        self._strategy: flower.Strategy = rule.strategy
        self._rate, self._decays = config.server_learning_rate, config.server_decay
        self.compares = rule.compares
        """It compares single updates, which nobody sees with secure aggregation."""

    def aggregator(self) -> Aggregator:
        """Return a fresh collector for one round."""
        return _Collected() if self.compares else _StreamingMean()

    def step(self, current: Arrays, collected: Aggregator, round: int, rounds: int) -> dict[str, FloatArray]:
        """Return the next model from the current one and the round's updates (at least one).

        Args:
            current: the model that the sites were given.
            collected: their updates.
            round: 1-based.
            rounds: of the run; with ``federation.server-decay`` the server's learning rate falls over them.

        Returns:
            float32 arrays under the names of ``current``.
        """
        rate = self._rate * (cosine_decay(run_progress(round, rounds)) if self._decays else 1.0)
        # Flower sets the arrays in configure_train, which also picks nodes: that is our job.
        match self._strategy:
            case flower.FedAvgM():
                self._strategy.current_arrays = _record(current)
                self._strategy.server_learning_rate = rate
            case flower.FedAdam() | flower.FedYogi():
                self._strategy.current_arrays = dict(current)
                self._strategy.eta = rate
        arrays, _ = self._strategy.aggregate_train(round, collected.replies())
        if arrays is None:
            raise ValueError("the strategy returned no model")
        # FedAdam and FedYogi compute in float64; the model stays float32.
        return {name: np.asarray(arrays[name].numpy(), dtype=np.float32) for name in current}

    def state(self) -> dict[str, NDArray[np.float64] | FloatArray]:
        """Return the optimiser's arrays as ``attribute/name``, for a checkpoint."""
        arrays = {}
        for attribute in _STATE[1:]:
            value = getattr(self._strategy, attribute, None)
            if value is None:
                continue
            items = value.items() if isinstance(value, dict) else enumerate(value)
            arrays.update({f"{attribute}/{name}": np.asarray(array) for name, array in items})
        return arrays

    def load_state(self, arrays: Mapping[str, NDArray[np.float64] | FloatArray]) -> None:
        """Put back the arrays that ``state`` returned."""
        for attribute in _STATE[1:]:
            prefix = f"{attribute}/"
            found = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
            if not found:
                continue
            # FedAvgM keeps its momentum as a list by position, FedAdam and FedYogi keep theirs by name.
            if attribute == "momentum_vector":
                value: object = [found[str(index)] for index in range(len(found))]
            else:
                value = found
            setattr(self._strategy, attribute, value)


def _record(arrays: Arrays) -> ArrayRecord:
    # FedAvgM pairs arrays by position: the order must not depend on the sender.
    return ArrayRecord({name: Array(arrays[name]) for name in sorted(arrays)})


def _reply(arrays: Arrays, weight: float) -> Message:
    content = RecordDict({"arrays": _record(arrays), "metrics": MetricRecord({WEIGHT: weight})})
    # Flower's strategies take replies as messages, so the mean is given to them as one with blank metadata.
    metadata = Metadata(
        run_id=0, message_id="", src_node_id=0, dst_node_id=0, reply_to_message_id="", group_id="",
        created_at=0.0, ttl=1.0, message_type="train",
    )  # fmt: skip
    return make_message(metadata, content)


_SUM_TO_ONE = 1e3


def _label_marginal_weights(
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
    rows = [marginals.T, np.diag(np.sqrt(regularisation / share)), np.full((1, len(share)), _SUM_TO_ONE)]
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
        regularisation: see ``_label_marginal_weights``.

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
    weights = _label_marginal_weights(marginals, goal, sizes, regularisation)
    return dict(zip(totals, weights.tolist(), strict=True))
