"""Keep each site's last privacy statement, so that a ledger that was rolled back is noticed.

What was spent stays spent: the events of a site's statements may only grow. Statements are kept for the
run, and in a folder for all runs of a consortium where there is one. The site itself has an anchor for its
ledger (client/ledger/anchor.py); the statements kept here are a second record that does not lie at the
site.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import RunError
from common.files import locked, write_text
from common.privacy.events import PoissonGaussian, event_from_dict
from common.records import MessageError, PrivacyStatement

_REPEATS = 1000
"""Statements of a site that are known again when they come once more."""


_Site = tuple[str, str]
"""A site's name, and the fingerprint of its node's key (empty: nodes have no keys)."""


def _rolled_back(newest: PrivacyStatement) -> str:
    """Return the fault of a statement that leaves out what ``newest`` states, and the remedy."""
    head = f" --head {newest.ledger_head}" if newest.ledger_head else ""
    return (
        "its privacy statement leaves out what it stated before: its ledger was replaced or rolled back. At "
        f"the site, put the newest back, or declare the loss: fedbags ledger accept-loss DATA --kit KIT{head}"
    )


class _Memory(BaseModel):
    """Hold what is kept of one site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    last: PrivacyStatement
    taken: list[str] = []
    """Digests of the newest statements that were taken, in their order."""


# Any node can give any name. What is kept of a name counts only against the node that gave it, or one node
# could shut another site out by stating much in its name.
class StatementStore:
    """Keep the statements of all sites.

    A site is known by its name and its node's key together.

    Args:
        folder: where they outlive a run, one file a site; None keeps them for this run alone.
        known: statements from the checkpoint of a run that goes on, by site.
        run: the run's name; an answer may come again in the run that asked for it, and in no other.
        keys: fingerprints of the keys of the nodes that made the known statements, by site.

    Raises:
        RunError: the folder, or a file in it, cannot be read.
    """

    def __init__(
        self,
        folder: Path | None,
        known: Mapping[str, PrivacyStatement],
        run: str = "",
        keys: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._run = folder, run
        self._left_out: dict[_Site, PrivacyStatement] = {}
        """Of a site whose ledger was rolled back: a statement that its own leaves out."""
        self._own = {(site, (keys or {}).get(site, "")): _Memory(last=last) for site, last in known.items()}
        """Newest statement of each site in this run."""
        self._asked: dict[_Site, PrivacyStatement | None] = {}
        """What the folder held of sites when they were asked."""
        if folder is not None:
            with self._alone():
                for file in sorted(folder.glob("*.json")):
                    self._read(file)

    def asking(self, sites: Mapping[str, str]) -> None:
        """Remember the statements of sites before they are asked, because their answers must cover them.

        Without this call, sites are held to what they have stated when their answers are read, which is
        more where another run has read an answer since.

        Args:
            sites: the fingerprint of its node's key, by site.

        Raises:
            RunError: what is kept of a site cannot be read.
        """
        with self._alone():
            for site in sites.items():
                kept = self._kept(site)
                self._asked[site] = kept.last if kept else None

    def take(self, statement: PrivacyStatement, key: str = "") -> PrivacyStatement | None:
        """Accept a statement that leaves out nothing that its site stated before it was asked.

        A statement that claims no bound (of a run without privacy) hides nothing and is not kept. An answer
        that comes a second time, after a crash or a lost reply, is known by its events and its ledger's
        head.

        Args:
            statement: from a site.
            key: fingerprint of the key of the node that it came from, where nodes have keys.

        Returns:
            The statement before it, if the site declares by this one that its ledger lost rows.

        Raises:
            MessageError: it leaves out events; the text says what may be done at the site.
            RunError: it cannot be written down.
        """
        if statement.delta is None and not statement.events:
            return None
        site = (statement.site, key)
        with self._alone():
            # The folder may be new, or put back from a copy, and hold less than this run does, so both
            # count.
            own, kept = self._own.get(site), self._kept(site)
            before = [memory for memory in (kept, own) if memory is not None]
            asked = self._asked.get(site, kept.last if kept else None)
            digest = self._digest(statement)
            declares = [m.last for m in before if statement.losses > m.last.losses]
            # A site in two runs at once answers one after the other, and the answers may be read in another
            # order. The older one is then part of the newer; of two ledgers that went different ways each
            # has what the other lacks.
            newer = [m.last for m in before if not _covers(statement, m.last)]
            held = [last for last in (asked, own.last if own else None) if last is not None]
            missing = [last for last in held if not _covers(statement, last)]
            # Neither covers the other: these are two histories of one ledger.
            missing += [last for last in newer if not _covers(last, statement)]
            if missing:
                # The very same answer, sent again after a crash or a lost reply, is no roll-back.
                if any(digest in memory.taken for memory in before):
                    return None
                self._left_out[site] = missing[0]
            elif declares:
                self._left_out.pop(site, None)
            # Such a ledger goes on growing: what it left out stays left out, whatever comes on top of it.
            if site in self._left_out:
                raise MessageError(_rolled_back(self._left_out[site]))
            taken = [*dict.fromkeys(digest for memory in before for digest in memory.taken), digest][
                -_REPEATS:
            ]
            self._own[site] = _Memory(last=statement, taken=taken)
            self._keep(site, _Memory(last=newer[0] if newer else statement, taken=taken))
        return declares[0] if declares else None

    def last(self, site: str, key: str = "") -> PrivacyStatement | None:
        """Return the last statement of a site in this run, or in the checkpoint that it goes on from."""
        memory = self._own.get((site, key))
        return memory.last if memory else None

    def _digest(self, statement: PrivacyStatement) -> str:
        # The round is left out of the digest: the same answer may come again in another round of its run.
        stated = statement.model_dump_json(include={"site", "events", "ledger_head", "losses"})
        return hashlib.sha256(f"{self._run} {stated}".encode()).hexdigest()[:32]

    def _kept(self, site: _Site) -> _Memory | None:
        """Return what the folder holds of a site, or None."""
        file = self._file(site)
        return self._read(file) if file is not None and file.exists() else None

    def _keep(self, site: _Site, memory: _Memory) -> None:
        if (file := self._file(site)) is not None:
            try:
                write_text(file, memory.model_dump_json() + "\n")
            except OSError as error:
                raise RunError(
                    f"{file} could not be written: {error.strerror or error}\n"
                    "The last checkpoint is intact: free some space and go on with --resume."
                ) from error

    def _file(self, site: _Site) -> Path | None:
        name, key = site
        return None if self._folder is None else self._folder / f"{name}{'@' if key else ''}{key}.json"

    def _read(self, file: Path) -> _Memory:
        try:
            return _Memory.model_validate_json(file.read_bytes())
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
        with ExitStack() as stack:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self._folder))
            except OSError as error:
                raise RunError(
                    f"the folder {self._folder} cannot be used: {error.strerror or error}"
                ) from error
            yield


def _covers(new: PrivacyStatement, old: PrivacyStatement) -> bool:
    """Return True if the new statement admits at least what the old one did."""
    declares = new.losses - old.losses
    now = _counted(new)
    # A site that declares a loss and does not know what it lost states an event without noise. That bounds
    # nothing, so it admits everything.
    if declares > 0 and any(kind[0] == "poisson_gaussian" and kind[2] == 0 for kind in now):
        return True
    return declares >= 0 and _counted(old) <= now


def _counted(statement: PrivacyStatement) -> Counter[tuple[Any, ...]]:
    """Count each event of a statement.

    Steps of Gaussian events are counted by sampling rate, noise and its shares, releases by scale.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for data in statement.events:
        event = event_from_dict(data)
        if isinstance(event, PoissonGaussian):
            counts[event.kind, event.sample_rate, event.noise_multiplier, event.shares] += event.steps
        else:
            counts[event.kind, event.scale] += 1
    return counts
