"""Keep the secret of one site, and derive the seeds of its training and other values from it.

The secret is random bytes that never leave the site. Losing the file costs nothing but continuity: what was
derived from it before cannot be derived again.

The seeds are of the bag order, augmentation and dropout; privacy noise never comes from here. A simulated
site's training is fixed by (run seed, site name, round), so that it can be repeated anywhere. A real site
mixes in its secret, derived for the run: whoever knows the model and all bags but one could else repeat the
training exactly, and two runs of one model would differ by nothing but their sites.
"""

import hmac
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import create_bytes

_SECRET_FILE = "site.secret"
"""The file's name in the folder of a site."""
_SECRET_BYTES = 32


def derive(folder: Path, purpose: str, content: bytes) -> bytes:
    """Derive 32 bytes from a site's secret, drawing the secret when it is first needed.

    HMAC-SHA256 (RFC 2104) under the secret: without it nobody can compute or check the result, however
    few contents are possible.

    Args:
        folder: the site folder.
        purpose: what the bytes are for; different purposes give unrelated bytes.
        content: what they are derived from.

    Raises:
        UserError: the secret cannot be read or made, or is damaged.
    """
    # The zero byte parts purpose and content: else one purpose could be continued into another by its
    # content.
    return hmac.digest(_read(folder), purpose.encode() + b"\0" + content, "sha256")


def _read(folder: Path) -> bytes:
    path = folder / _SECRET_FILE
    try:
        if not path.exists():
            create_bytes(path, os.urandom(_SECRET_BYTES))  # or a process that was faster has drawn it
        secret = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the site's secret {path} cannot be read or made: {error.strerror or error}\n"
            "Give whoever runs the site the right to read and write in the site folder."
        ) from error
    if len(secret) != _SECRET_BYTES:
        raise UserError(
            f"the site's secret {path} is damaged: {len(secret)} bytes, {_SECRET_BYTES} expected\n"
            "Put back the copy of your backup; without one, delete the file and a new one is drawn."
        )
    return secret


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
