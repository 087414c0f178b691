"""Let Flower's ClientApp process run the app that the site approved, and no other.

A site runs the one app whose SHA-256 stands in its kit.toml. Flower's own process answers a task, with two of
its functions replaced by ``_Gate``: how an app is installed and how it is loaded. Nothing of another app is
unpacked, and a refusal becomes an error reply. ``deploy.flower.internals`` replaces the functions, and
refuses a Flower that this was not tested with. Knows nothing of processes: ``executor`` starts and ends them.
"""

import hmac
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import RunError
from common.files import write_bytes
from deploy.consortium.kit import app_hash
from deploy.flower import internals

_REFUSED_APP = "refused.fab"
"""The app refused last, in the kit's state/, for `fedbags site approve` to show; it is never unpacked."""


class AppNotApproved(RunError):  # noqa: N818 (a refusal is an answer, not a fault)
    """Report that an app is not the one that this site approved.

    The text is fixed, because it is sent to the server.
    """

    def __init__(self) -> None:
        super().__init__("this site runs only the app that it approved, and this is another one")


def _admit(content: bytes, approved: str) -> None:
    """Refuse every app but the approved one.

    Args:
        content: the bytes that would be unpacked.
        approved: the kit's ``app-hash``; empty refuses everything.

    Raises:
        AppNotApproved: any other app.
    """
    # The hash of these very bytes: a server could state the approved hash and send another app with it.
    if not hmac.compare_digest(app_hash(content), approved):
        raise AppNotApproved


def _keep_refused(content: bytes, state: Path) -> Path:
    """Keep the bytes of a refused app for the site to inspect, in place of those refused before.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    state.mkdir(parents=True, exist_ok=True)
    write_bytes(state / _REFUSED_APP, content, 0o600)
    return state / _REFUSED_APP


if TYPE_CHECKING:
    from flwr.supercore.superexec.executor import ExecutionSpec

log = logging.getLogger("fedbags.executor")

_OWN_PACKAGES = frozenset({"common", "client", "server", "deploy", "added_parts"})
"""Taken out of a task's process before the app is loaded: the app brings its own."""


class AppFailed(RunError):  # noqa: N818 (an answer, not a fault)
    """Report that the approved app could not be loaded, or raised an exception.

    The text is fixed, because it is sent to the server.
    """

    def __init__(self) -> None:
        super().__init__("the approved app failed at this site; the site's log says why")


class _Gate:
    """Install and load an app in place of two functions of Flower's ClientApp process.

    Args:
        approved: the kit's app hash; empty refuses everything.
        folder: an empty private folder, for this task alone.
        state: the kit's state/, where a refused app is kept.
    """

    def __init__(self, approved: str, folder: Path, state: Path) -> None:
        self._approved, self._folder, self._state = approved, folder, state
        self._app: Path | None = None

    def install(self, content: bytes, skip_prompt: bool) -> None:
        """Unpack the approved app.

        Args:
            content: the app's bytes, as they came from the SuperNode.
            skip_prompt: Flower's; nobody is asked in any case.

        Raises:
            AppNotApproved: another app; nothing is unpacked.
            AppFailed: it cannot be unpacked (the disk is full, say).
        """
        try:
            _admit(content, self._approved)
        except AppNotApproved:
            log.error("refused an app that this site has not approved; it is kept in the kit's state folder")
            try:
                # Kept unread, for the site to compare and to approve, or not, with `fedbags site approve`.
                _keep_refused(content, self._state)
            except OSError as error:
                log.error("the refused app could not be kept: error %d", error.errno or 0)
            raise
        try:
            # Unpacked anew for each task: files of an app that were edited on the disk are never run.
            self._app = internals.install_app(content, self._folder)
        except Exception as error:
            raise AppFailed from error

    def loader(self, default_app_ref: str, app_path: str | None, multi_app: bool) -> Callable[..., Any]:
        """Return the function that loads the ClientApp that ``install`` unpacked.

        The arguments are Flower's and are ignored. Flower would look for the app under the id, version and
        hash that the server states, and these can be written to lead to any folder of the disk.
        """

        def load(*stated: str) -> Callable[..., Any]:
            # Nothing has passed the gate in this process, so nothing is loaded.
            if self._app is None:
                raise AppNotApproved
            # Importing this module has loaded the site's own packages. Left in place, they would be used
            # instead of those that the site approved with the app.
            for name in [name for name in sys.modules if name.partition(".")[0] in _OWN_PACKAGES]:
                del sys.modules[name]
            load_app = internals.app_loader(self._app)
            # Wrapped twice, because loading the app may raise, and so may the loaded app when it is called.
            return _without_words(_without_words(load_app)(*stated))

        return load


def _without_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the same function with whatever it raises turned into an AppFailed.

    Flower sends the text of an exception to the server, and that text could hold a path or a label.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise AppFailed from error

    return call


def run_task(spec: "ExecutionSpec", approved: str, folder: str, state: str) -> None:
    """Answer one task with Flower's own ClientApp process, behind the gate.

    It runs in a process of its own, which ends with it.

    Args:
        spec: what SuperExec was given.
        approved: the app hash that the kit pins; empty refuses everything.
        folder: an empty private folder: the home, the working directory and the app's place of this task.
        state: the kit's state/.

    Raises:
        SystemExit: always; the status is Flower's.
    """
    # Flower installs apps below its home and Python may import from the working directory. In an empty folder
    # neither holds anything that could be run in place of the approved app.
    os.environ["FLWR_HOME"] = folder
    os.chdir(folder)
    gate = _Gate(approved, Path(folder), Path(state))
    internals.run_clientapp(spec, gate.install, gate.loader)
