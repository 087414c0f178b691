"""Take one optimiser step at the server from the sum of the sites' clipped and noised gradients.

With shared noise the sites send no models: under secure aggregation the server sees the sum of their clipped
gradients, in which the noise is. Everything here is public: bags, noise and rates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.config import RunConfig
from common.config_tables import cosine_decay, rate_by_noise, run_progress
from common.model.classifier import HierarchicalClassifier
from common.model.features.frozen import FrozenFeatures
from common.privacy.plan import shared_multiplier
from common.records import FloatArray
from common.secure_aggregation.quantisation import Grid, sum_of
from common.secure_aggregation.records import Words

_TAIL = 20.0
"""Standard deviations of the noise that a number of the sum has room for."""
_CENTRE = "backbone.centre"


@dataclass(frozen=True)
class SharedStep:
    """Know what a sum of gradients is of, and what follows from it."""

    config: RunConfig
    round: int
    bags: Mapping[str, float]
    """Training bags by site."""
    centring: FrozenFeatures | None
    """The backbone whose centre the round learns, or None."""

    @classmethod
    def of(
        cls, config: RunConfig, round: int, bags: Mapping[str, float], model: HierarchicalClassifier
    ) -> "SharedStep":
        """Return the step of a round."""
        backbone = model.backbone
        centring = isinstance(backbone, FrozenFeatures) and round <= config.train.centring_rounds
        return cls(config, round, bags, backbone if centring else None)  # type: ignore[arg-type]

    @property
    def noise_multiplier(self) -> float:
        """Return sigma of a sum with just as many shares of noise as are accounted for."""
        return shared_multiplier(self.config.dp, self.config.rounds)

    def clip_range(self, sites: list[str]) -> float:
        """Return what no number of the sum of these sites exceeds, bags and noise together."""
        noise = self.noise_multiplier * math.sqrt(max(1.0, len(sites) / self.config.shares))
        return self.config.dp.clip_norm * (sum(self.bags[site] for site in sites) + _TAIL * noise)

    def next_arrays(
        self, total: Words, sent: Mapping[str, FloatArray], grid: Grid, sites: list[str]
    ) -> dict[str, FloatArray]:
        """Return the next model.

        Args:
            total: sum of the sites' words, modulo 2**32.
            sent: what the sites started from, of all that is trained.
            grid: of the session.
            sites: whose words are in the sum.
        """
        learned = {
            name: array for name, array in sent.items() if (name == _CENTRE) == (self.centring is not None)
        }
        expected = self.config.dp.sample_rate * sum(self.bags[site] for site in sites)
        rate = self._rate(sum(array.size for array in learned.values()), expected, len(sites))
        sums = sum_of(total, sent, grid)
        return {
            name: (array - rate * sums[name] / expected).astype(np.float32) if name in learned else array
            for name, array in sent.items()
        }

    def _rate(self, numbers: int, expected: float, sites: int) -> float:
        dp, train = self.config.dp, self.config.train
        if self.centring is not None:
            return self.centring.centring_rate(dp.clip_norm, train.centring_rounds)
        noise = self.noise_multiplier * math.sqrt(sites / self.config.shares * numbers) / expected
        start = train.learning_rate or rate_by_noise(noise) / dp.clip_norm
        return start * cosine_decay(run_progress(self.round, self.config.rounds))
