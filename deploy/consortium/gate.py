"""Run Flower's own processes with the site's gate in them.

Every private part of Flower that the executor relies on is touched here. Four names are replaced, and nothing
else (``GATED`` lists what that rests on):

- In Flower's ClientApp process, ``install_from_fab`` asks ``admission`` first and then unpacks into a fresh
  private folder, so that nothing that already lies on the disk is ever run. A refusal becomes an error reply.
- There too, ``get_load_client_app_fn`` loads from that folder, whatever id, version and hash the server
  states, and lets no text of an exception out.
- There too, ``pull_and_inflate_object_from_tree`` is given a pause of its own between two tries.
- In Flower's SuperExec, ``get_executor`` gives our executor.

``check_flower`` compares the source of what is relied on with what the gate was tested with, and nothing
starts with anything else. Knows nothing of processes: ``executor`` starts and ends them.
"""

import functools
import hashlib
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import RunError, UserError
from deploy.consortium import admission

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor import ExecutionSpec, Executor

log = logging.getLogger("fedbags.executor")

GATED = {
    "flwr.supercore.superexec.run_superexec:run_superexec": ("d11f4e7fbc8f0b12", "91e7a33c5b898f33"),
    "flwr.supernode.runtime.run_clientapp:run_clientapp": ("6ce09559f3a2f5dc",),
    "flwr.clientapp.utils:get_load_client_app_fn": ("f7790dd641bafaff",),
    "flwr.supercore.object_ref:load_app": ("ef4c226d0c4f2c4a",),
    "flwr.cli.install:install_from_fab": ("481bd04cde582322",),
    "flwr.cli.install:validate_and_install": ("628b69fb852ae858",),
    "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree": ("139811483a15e4a6",),
}
"""What the gate relies on, and the start of the SHA-256 of its source in Flower 1.41.0 and 1.42.0.

Before adding a hash: read the change, then run tests/deploy/consortium/test_executor.py with that Flower."""

PULL_PAUSE = {"initial_backoff": 0.1, "backoff_cap": 0.5}
"""Seconds between two tries of a task to get its message. The SuperNode hands a task out before its message
has arrived, and a forked task is there at once: by Flower's own pauses (1, 2, 4, 8 s) it lost up to 15 s."""

OWN_PACKAGES = frozenset({"common", "client", "server", "deploy"})
"""Taken out of a task's process before the app is loaded: the app brings its own."""


class AppFailed(RunError):  # noqa: N818 (an answer, not a fault)
    """Report that the approved app could not be loaded, or raised an exception.

    The text is fixed, because it is sent to the server.
    """

    def __init__(self) -> None:
        super().__init__("the approved app failed at this site; the site's log says why")


def check_flower() -> None:
    """Refuse a Flower that the gate was not tested with.

    Raises:
        UserError: names the part that differs.
    """
    for reference, known in GATED.items():
        module, _, name = reference.partition(":")
        try:
            # The gate stands between the server and the site's data. A Flower that calls the replaced names
            # otherwise, or not at all, could pass it by unnoticed, so the text of the source is compared and
            # not a version number.
            source = inspect.getsource(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError, OSError, TypeError):
            # What cannot be read counts as different.
            source = ""
        if hashlib.sha256(source.encode()).hexdigest()[:16] not in known:
            raise UserError(
                f"the gate was not tested with this version of Flower: {reference} is not what it was.\n"
                "Nothing was started. Install the versions of constraints.txt (flwr 1.41.0)."
            )


class Gate:
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
        from flwr.cli.install import install_from_fab

        try:
            admission.admit(content, self._approved)
        except admission.AppNotApproved:
            log.error("refused an app that this site has not approved; it is kept in the kit's state folder")
            try:
                # Kept unread, for the site to compare and to approve, or not, with `fedbags site approve`.
                admission.keep_refused(content, self._state)
            except OSError as error:
                log.error("the refused app could not be kept: error %d", error.errno or 0)
            raise
        try:
            # Unpacked anew for each task: files of an app that were edited on the disk are never run.
            self._app = install_from_fab(content, install_dir=self._folder, skip_prompt=True)
        except Exception as error:
            raise AppFailed from error

    def loader(self, default_app_ref: str, app_path: str | None, multi_app: bool) -> Callable[..., Any]:
        """Return the function that loads the ClientApp that ``install`` unpacked.

        The arguments are Flower's and are ignored. Flower would look for the app under the id, version and
        hash that the server states, and these can be written to lead to any folder of the disk.
        """
        from flwr.clientapp.utils import get_load_client_app_fn

        def load(*stated: str) -> Callable[..., Any]:
            # Nothing has passed the gate in this process, so nothing is loaded.
            if self._app is None:
                raise admission.AppNotApproved
            # Importing this module has loaded the site's own packages. Left in place, they would be used
            # instead of those that the site approved with the app.
            for name in [name for name in sys.modules if name.partition(".")[0] in OWN_PACKAGES]:
                del sys.modules[name]
            load_app = get_load_client_app_fn(default_app_ref="", app_path=str(self._app), multi_app=True)
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


def often(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Return Flower's function that gets a message, with PULL_PAUSE between two tries."""
    return functools.partial(pull, **PULL_PAUSE)


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
    flower: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    # Flower installs apps below its home and Python may import from the working directory. In an empty folder
    # neither holds anything that could be run in place of the approved app.
    os.environ["FLWR_HOME"] = folder
    os.chdir(folder)
    gate = Gate(approved, Path(folder), Path(state))
    # Set in the module that calls them, where Flower looks the names up. The process ends with this task, so
    # that no other is affected.
    flower.install_from_fab = gate.install
    flower.get_load_client_app_fn = gate.loader
    flower.pull_and_inflate_object_from_tree = often(flower.pull_and_inflate_object_from_tree)
    flower.run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        parent_pid=spec.parent_pid,
        runtime_dependency_install=False,
    )


def run_superexec(make_executor: Callable[[], "Executor"], runtime_api_address: str, secret: bytes) -> None:
    """Run Flower's own SuperExec with an executor of ours, over a connection that stays on this machine.

    Raises:
        UserError: see check_flower.
        SystemExit: a signal came.
    """
    check_flower()
    flower: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    flower.get_executor = lambda *_, **__: make_executor()
    # No TLS, because the address is one of this machine's loopback (``run_executor`` refuses any other).
    flower.run_superexec(
        runtime_api_address, insecure=True, superexec_auth_secret=secret, runtime_dependency_install=False
    )
