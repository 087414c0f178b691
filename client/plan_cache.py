"""Keep the noise multiplier that a site found for its run on disk.

A deployed site answers each message in a process of its own, so that it would search once per message instead
of once per run. What is kept is only a number: the plan is made anew around it, and charges for exactly that
number, so a changed file can cost budget or be refused by the cap, and hides nothing.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from common.privacy.accounting import calibrate
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, merge

PLAN_FILE = "plan.json"


class SigmaCache:
    """Find noise multipliers as ``accounting.calibrate`` does, and remember the newest in a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / PLAN_FILE

    def __call__(
        self,
        target_epsilon: float,
        delta: float,
        sample_rate: float,
        steps: int,
        *,
        also: Iterable[PoissonGaussian | DiscreteLaplace] = (),
        adjacency: Adjacency = Adjacency.REPLACE_ONE,
    ) -> float:
        """Return the noise multiplier, from the file if it was found for exactly these arguments.

        Raises:
            UserError: as ``calibrate`` does; a refusal is not remembered.
        """
        beside = merge(also)
        asked = {
            "target": target_epsilon,
            "delta": delta,
            "rate": sample_rate,
            "steps": steps,
            "beside": [event.model_dump() for event in beside],
            "adjacency": adjacency.value,
            # Another release of the accountant may find another number for the same question.
            "accountant": version("dp-accounting"),
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        sigma = self._stored(key)
        if sigma is None:
            sigma = calibrate(target_epsilon, delta, sample_rate, steps, also=beside, adjacency=adjacency)
            self._store(key, sigma)
        return sigma

    def _stored(self, key: str) -> float | None:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            sigma = float(record["sigma"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none yet, or damaged: it is found again
        # A multiplier out of any sensible range can only come from a damaged file.
        return sigma if record.get("key") == key and 0 < sigma <= 1e6 and math.isfinite(sigma) else None

    def _store(self, key: str, sigma: float) -> None:
        # Only time is lost where the folder cannot be written.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix="tmp-plan-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    json.dump({"key": key, "sigma": sigma}, stream)
                Path(name).replace(self.path)
            finally:
                Path(name).unlink(missing_ok=True)
