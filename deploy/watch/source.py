"""Find the run or the site to watch at a path.

A path is a run folder, a folder of run folders (its newest run, determined anew at every call), a
coordinator's kit (the newest of its runs), a site's kit, or a site's data folder.
"""

from dataclasses import replace
from pathlib import Path

from client.journal import JOURNAL_FILE
from client.ledger_file import LEDGER_FILE
from client.site import SITE_FILE, SiteConfig
from common.errors import UserError
from deploy.consortium.kit import KIT_FILE, SiteKit, read_kit
from deploy.watch.lines import JsonLinesFile
from deploy.watch.site_state import LedgerReader, SiteState, fold_journal
from deploy.watch.state import RunState, fold
from server.run_folder import RunFolder


class RunSource:
    """Keep the state of a run, brought up to date at every call of look."""

    def __init__(self, path: Path, *, newest: bool = False) -> None:
        """Watch the run in ``path``, or the newest of the run folders below it."""
        self._path, self._newest = path, newest
        self.folder: Path | None = None
        self._events: JsonLinesFile | None = None
        self._state = RunState()

    @property
    def name(self) -> str:
        """Return the run folder's name, which is empty while there is no run."""
        return self.folder.name if self.folder else ""

    def look(self) -> RunState:
        """Return the state now."""
        folder = newest_run(self._path) if self._newest else self._path
        # A newer run has begun, so the state of the previous one no longer applies.
        if folder != self.folder or self._events is None:
            self.folder = folder
            self._events = JsonLinesFile(RunFolder(folder).metrics) if folder else None
            self._state = RunState()
        if self._events is not None:
            news = self._events.poll()
            self._state = fold(news.lines, None if news.restarted else self._state)
        return self._state


class SiteSource:
    """Keep the state of a site, at the site, brought up to date at every call of look."""

    def __init__(self, site: str, journal: Path, ledger: Path) -> None:
        self._journal, self._ledger = JsonLinesFile(journal), LedgerReader(ledger)
        self._empty = SiteState(site=site)
        self._state = self._empty

    def look(self) -> SiteState:
        """Return the state now."""
        news = self._journal.poll()
        self._state = fold_journal(news.lines, self._empty if news.restarted else self._state)
        spending, fault = self._ledger.read()
        return replace(self._state, spending=spending, ledger_fault=fault)


def source(path: Path) -> RunSource | SiteSource:
    """Return the run or the site to watch at ``path``.

    Raises:
        UserError: nothing that can be watched is there; or a kit that cannot be read.
    """
    if (path / KIT_FILE).is_file():
        kit = read_kit(path)
        if isinstance(kit, SiteKit):
            return SiteSource(kit.site, kit.logs / JOURNAL_FILE, kit.data / LEDGER_FILE)
        return RunSource(kit.runs, newest=True)
    if RunFolder(path).config.is_file():
        return RunSource(path)
    if (path / SITE_FILE).is_file():
        return SiteSource(SiteConfig.load(path).name, path / JOURNAL_FILE, path / LEDGER_FILE)
    if newest_run(path) is not None:
        return RunSource(path, newest=True)
    raise UserError(
        f"nothing to watch in {path}\nGive a run folder (such as runs/demo), a folder of them, a kit that "
        "`fedbags provision` wrote, or a site's data folder."
    )


def newest_run(runs: Path) -> Path | None:
    """Return the run folder below ``runs`` that was started or resumed last, or None where there is none."""
    # The configuration is written at the start and at each resumption of a run.
    started = [(path.stat().st_mtime, path.parent) for path in runs.glob("*/config.toml")]
    return max(started)[1] if started else None
