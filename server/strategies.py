"""Offer the strategies by which updates become the next model: Flower's own, as parts.

``build`` of a strategy is given the table ``federation`` and its own settings, and makes a ``Rule``. A
strategy of means is given the weighted mean as its only reply; one that compares is given all updates.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flwr.serverapp import strategy as flower

from common.config_tables import FederationConfig
from common.parts import Kind, NoSettings, Part

WEIGHT = "weight"
"""The metric by which Flower's strategies weigh a reply."""


@dataclass(frozen=True)
class Rule:
    """Hold one of Flower's strategies, and what it has to be given."""

    strategy: flower.FedAvg
    compares: bool = False
    """It compares single updates, so it holds them all and cannot be used with secure aggregation."""


def _part(
    name: str, make: Callable[[FederationConfig], flower.FedAvg], source: str, *, compares: bool = False
) -> Part:
    def build(config: FederationConfig, settings: NoSettings) -> Rule:
        return Rule(make(config), compares)

    return Part(Kind.STRATEGY, name, build, f"{source}; Flower's own, Apache-2.0")


def _mean(config: FederationConfig) -> flower.FedAvg:
    return flower.FedAvg(weighted_by_key=WEIGHT)


FEDAVG = _part("fedavg", _mean, "McMahan et al. 2017")
# What tells them from the mean happens elsewhere: in the sites' loss, and in the sites' weights.
FEDPROX = _part("fedprox", _mean, "Li et al. 2020")
FEDPALS = _part("fedpals", _mean, "FedPALS, arXiv 2411.03799")
FEDAVGM = _part(
    "fedavgm",
    lambda config: flower.FedAvgM(
        weighted_by_key=WEIGHT,
        server_learning_rate=config.server_learning_rate,
        server_momentum=config.server_momentum,
    ),
    "Hsu et al. 2019",
)
FEDADAM = _part(
    "fedadam",
    lambda config: flower.FedAdam(
        weighted_by_key=WEIGHT, eta=config.server_learning_rate, beta_1=config.server_momentum
    ),
    "Reddi et al. 2021",
)
FEDYOGI = _part(
    "fedyogi",
    lambda config: flower.FedYogi(
        weighted_by_key=WEIGHT, eta=config.server_learning_rate, beta_1=config.server_momentum
    ),
    "Reddi et al. 2021",
)
MEDIAN = _part(
    "median", lambda config: flower.FedMedian(weighted_by_key=WEIGHT), "Yin et al. 2018", compares=True
)
TRIMMED_MEAN = _part(
    "trimmed-mean",
    lambda config: flower.FedTrimmedAvg(weighted_by_key=WEIGHT, beta=config.trim),
    "Yin et al. 2018",
    compares=True,
)
KRUM = _part(
    "krum",
    lambda config: flower.Krum(weighted_by_key=WEIGHT, num_malicious_nodes=config.byzantine),
    "Blanchard et al. 2017",
    compares=True,
)
