"""Derive the seeds of the bag order, augmentation and dropout of a site's training.

Privacy noise never comes from here. A simulated site's training is fixed by (run seed, site name, round), so
that it can be repeated anywhere. A real site mixes in a secret of its own, drawn for the run: whoever knows
the model and all bags but one could else repeat the training exactly, and two runs of one model would differ
by nothing but their sites.
"""

import zlib
from dataclasses import dataclass

import numpy as np
from flwr.app import Context

from client.locate import find_site, is_simulated
from client.site_secret import derive
from common.config import RunConfig


@dataclass(frozen=True)
class TrainingSeeds:
    """Hold the seeds of one site in one run."""

    seed: int
    """Of the run."""
    site: str
    secret: bytes = b""
    """Of the site for the run; empty in a simulation."""

    def of_round(self, round: int) -> tuple[int, int, int]:
        """Return the seeds of a round for the order of the bags, for torch, and for the objective.

        The same round of the same run has the same seeds however often it is asked for: of all its trainings
        one sum at most is unmasked, and nothing else of them leaves the site.
        """
        first, second, third = self._draw(3, round)
        return first, second, third

    def of_bag(self, round: int, step: int, bag: int) -> int:
        """Return the seed of one bag in one step, whichever other bags are drawn."""
        return self._draw(1, round, step, bag)[0]

    def _draw(self, number: int, *place: int) -> list[int]:
        own = [int.from_bytes(self.secret)] if self.secret else []
        sequence = np.random.SeedSequence([self.seed, zlib.crc32(self.site.encode()), *place, *own])
        # 64 bits where they must not be guessed; 32 are what simulations have always had.
        state = sequence.generate_state(number, np.uint64 if self.secret else np.uint32)
        return [int(value) for value in state]


def training_seeds(context: Context, config: RunConfig, site: str) -> TrainingSeeds:
    """Return the seeds that a node trains with in its run.

    Raises:
        UserError: a real site's secret cannot be read or made.
    """
    if is_simulated(context):
        return TrainingSeeds(config.seed, site)
    secret = derive(find_site(context), "training-seed", f"run {context.run_id}".encode())
    return TrainingSeeds(config.seed, site, secret)
