"""What each site stated last of its privacy budget, so that a ledger that was rolled back is noticed.

What was spent stays spent: the events of a site's statements may only grow. Statements are kept for the run,
and in a folder for all runs of a consortium where there is one. The site itself has a second anchor for its
ledger (client/ledger_anchor.py); this is the witness that does not lie at the site.
"""

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import RunError
from common.messages import MessageError, PrivacyStatement
from common.privacy.events import PoissonGaussian, event_from_dict
from server.run_folder import write_text

_REPEATS = 1000
"""Statements of a site that are known again when they come once more."""


ROLLED_BACK = (
    "its privacy statement leaves out what it stated before: its ledger was replaced or rolled back. At the "
    "site, put the newest ledger back, or declare the loss with `fedbags ledger accept-loss`"
)


class Memory(BaseModel):
    """What is kept of one site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: PrivacyStatement
    taken: list[str] = []
    """Digests of the newest statements that were taken, in their order."""


class StatementBook:
    """The statements of all sites.

    Args:
        folder: where they outlive a run, one file a site; None keeps them for this run alone.
        known: statements from the checkpoint of a run that goes on, by site.
        run: the run's name; an answer may come again in the run that asked for it, and in no other.

    Raises:
        RunError: the folder, or a file in it, cannot be read.
    """

    def __init__(self, folder: Path | None, known: Mapping[str, PrivacyStatement], run: str = "") -> None:
        self._folder, self._run = folder, run
        self._rolled_back: set[str] = set()
        self._known = {site: Memory(last=statement) for site, statement in known.items()}
        if folder is not None:
            with self._alone():
                for file in sorted(folder.glob("*.json")):
                    self._read(file)

    def take(self, statement: PrivacyStatement) -> PrivacyStatement | None:
        """Take a statement in, if it leaves out nothing that its site stated before.

        A statement that claims no bound (of a run without privacy) hides nothing and is not kept. An answer
        that comes a second time, after a crash or a lost reply, is known by its events and its ledger's head.

        Returns:
            The statement before it, if the site declares by this one that its ledger lost rows.

        Raises:
            MessageError: it leaves out events; the text says what may be done at the site.
            RunError: it cannot be written down.
        """
        if statement.delta is None and not statement.events:
            return None
        with self._alone():
            before = self._memories(statement.site)
            digest = self._digest(statement)
            declares = [m.last for m in before if statement.losses > m.last.losses]
            if not all(_covers(statement, memory.last) for memory in before):
                if any(digest in memory.taken for memory in before):
                    return None
                self._rolled_back.add(statement.site)
            elif declares:
                self._rolled_back.discard(statement.site)
            # Such a ledger goes on growing: what it left out stays left out, whatever comes on top of it.
            if statement.site in self._rolled_back:
                raise MessageError(ROLLED_BACK)
            taken = [digest for memory in before for digest in memory.taken][-_REPEATS:]
            self._keep(Memory(last=statement, taken=[*taken, digest]))
        return declares[0] if declares else None

    def last(self, site: str) -> PrivacyStatement | None:
        """Return what a site stated last in this run, or in the checkpoint that it goes on from."""
        memory = self._known.get(site)
        return memory.last if memory else None

    def _digest(self, statement: PrivacyStatement) -> str:
        told = statement.model_dump_json(include={"site", "events", "ledger_head", "losses"})
        return hashlib.sha256(f"{self._run} {told}".encode()).hexdigest()[:32]

    def _memories(self, site: str) -> list[Memory]:
        """What the folder holds of a site, and what this run does: a folder may be new, or put back."""
        file = self._file(site)
        kept = [self._read(file)] if file is not None and file.exists() else []
        known = self._known.get(site)
        return [*kept, *([known] if known is not None and known not in kept else [])]

    def _keep(self, memory: Memory) -> None:
        self._known[memory.last.site] = memory
        if (file := self._file(memory.last.site)) is not None:
            try:
                write_text(file, memory.model_dump_json() + "\n")
            except OSError as error:
                raise RunError(
                    f"{file} could not be written: {error.strerror or error}\n"
                    "The last checkpoint is intact: free some space and go on with --resume."
                ) from error

    def _file(self, site: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{site}.json"

    def _read(self, file: Path) -> Memory:
        try:
            return Memory.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise RunError(
                f"the statements kept of site {file.stem} cannot be read ({type(error).__name__}): {file}\n"
                "Put the file back from a backup. Delete it only if the site's ledger is known to be whole: "
                "without it, spending that the site leaves out is not noticed any more."
            ) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other runs of the consortium from the folder meanwhile."""
        if self._folder is None:
            yield
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder, os.O_RDONLY)
        except OSError as error:
            raise RunError(f"the folder {self._folder} cannot be used: {error.strerror or error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _covers(new: PrivacyStatement, old: PrivacyStatement) -> bool:
    """Whether the new statement admits at least what the old one did.

    A site that declares a loss and does not know what it lost states an event without noise: that bounds
    nothing, so it admits everything.
    """
    declares = new.losses - old.losses
    now = _counted(new)
    if declares > 0 and any(kind[0] == "poisson_gaussian" and kind[2] == 0 for kind in now):
        return True
    return declares >= 0 and _counted(old) <= now


def _counted(statement: PrivacyStatement) -> Counter[tuple[Any, ...]]:
    """How much of each event: steps of a Gaussian of one sampling rate and noise, releases of one scale."""
    counts: Counter[tuple[Any, ...]] = Counter()
    for data in statement.events:
        event = event_from_dict(data)
        if isinstance(event, PoissonGaussian):
            counts[event.kind, event.sample_rate, event.noise_multiplier] += event.steps
        else:
            counts[event.kind, event.scale] += 1
    return counts
