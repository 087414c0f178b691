"""Flower's own processes with the gate in them: every private part of Flower that the executor relies on.

Four names are replaced, and nothing else (``GATED`` is what that rests on):

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
    """The approved app could not be loaded, or raised. The text is fixed: it is sent to the server."""

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
            source = inspect.getsource(getattr(importlib.import_module(module), name))
        except (ImportError, AttributeError, OSError, TypeError):
            source = ""
        if hashlib.sha256(source.encode()).hexdigest()[:16] not in known:
            raise UserError(
                f"the gate was not tested with this version of Flower: {reference} is not what it was.\n"
                "Nothing was started. Install the versions of constraints.txt (flwr 1.41.0)."
            )


class Gate:
    """Stands in for two functions of Flower's ClientApp process: installing an app, and loading it.

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
                admission.keep_refused(content, self._state)
            except OSError as error:
                log.error("the refused app could not be kept: error %d", error.errno or 0)
            raise
        try:
            self._app = install_from_fab(content, install_dir=self._folder, skip_prompt=True)
        except Exception as error:
            raise AppFailed from error

    def loader(self, default_app_ref: str, app_path: str | None, multi_app: bool) -> Callable[..., Any]:
        """What loads the ClientApp that ``install`` unpacked; the arguments are Flower's and do not count.

        Flower would look for the app under the id, version and hash that the server states, and these can
        be written to lead to any folder of the disk.
        """
        from flwr.clientapp.utils import get_load_client_app_fn

        def load(*stated: str) -> Callable[..., Any]:
            if self._app is None:
                raise admission.AppNotApproved
            for name in [name for name in sys.modules if name.partition(".")[0] in OWN_PACKAGES]:
                del sys.modules[name]
            load_app = get_load_client_app_fn(default_app_ref="", app_path=str(self._app), multi_app=True)
            return _without_words(_without_words(load_app)(*stated))

        return load


def _without_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; whatever it raises becomes an AppFailed, since Flower sends an exception's text."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise AppFailed from error

    return call


def often(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's function that gets a message, with PULL_PAUSE between two tries."""
    return functools.partial(pull, **PULL_PAUSE)


def run_task(spec: "ExecutionSpec", approved: str, folder: str, state: str) -> None:
    """Answer one task with Flower's own ClientApp process, behind the gate; runs in a process of its own.

    Args:
        spec: what SuperExec was given.
        approved: the app hash that the kit pins; empty refuses everything.
        folder: an empty private folder: the home, the working directory and the app's place of this task.
        state: the kit's state/.

    Raises:
        SystemExit: always; the status is Flower's.
    """
    flower: Any = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    os.environ["FLWR_HOME"] = folder
    os.chdir(folder)
    gate = Gate(approved, Path(folder), Path(state))
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
    flower.run_superexec(
        runtime_api_address, insecure=True, superexec_auth_secret=secret, runtime_dependency_install=False
    )
