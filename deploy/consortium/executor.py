"""Take tasks from a site's SuperNode and run each in a process of its own, behind the gate.

``fedbags site up`` starts it in place of ``flower-superexec``::

    python -P -m deploy.consortium.executor --kit KIT --runtime-api-address 127.0.0.1:9094 \
        --superexec-auth-secret-file KIT/superexec.secret

Exit status 2 is a mistake to mend (no kit, no secret, another Flower), which a restart does not mend. SIGTERM
ends it and its tasks. ``-P`` is required: without it a file in the folder that it is started in could stand
in for a library.

Each task is forked from a process (the standard library's fork server) that has loaded the large libraries
and none of our packages. So a task starts at once, and the code that runs is the approved app's. ``gate``
decides whether an app is run, and runs it.
"""

import ipaddress
import logging
import os
import shutil
import sys
import tempfile
from multiprocessing import connection, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated

import typer
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

from common.errors import UserError, require_file
from deploy.cli import say
from deploy.consortium import gate
from deploy.consortium.kit import SiteKit
from deploy.flower.internals import run_superexec

log = logging.getLogger("fedbags.executor")

_PRELOADED = (
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supercore.superexec.executor",
    "numpy",
    "torch",
    "torchvision",
    "opacus",
    "dp_accounting.pld.privacy_loss_distribution",
    "PIL.Image",
    "pydantic",
    "safetensors.numpy",
)
"""Loaded once. In ``_ENVIRONMENT``, importing them starts no thread and touches no accelerator, which a
process must not have done before it forks."""

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "OMP_NUM_THREADS": "1",  # an app sets torch's threads itself, from the run's configuration
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment variables of the executor and its tasks."""

_MAX_TASKS = 4
"""Tasks at a time; more wait at the SuperNode."""

_POLL_SECONDS = "0.1"
_GRACE_SECONDS = 3.0
"""How long a task may take to end when the executor ends."""


class _ForkingExecutor:
    """Implement Flower's Executor protocol with tasks forked from a process that has the libraries loaded.

    Args:
        kit: the site's kit folder. Its kit.toml is read before each task, so an approval needs no restart.
    """

    def __init__(self, kit: Path) -> None:
        self._kit = kit
        self._tasks: dict[BaseProcess, Path] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="fedbags-site-", ignore_cleanup_errors=True)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(list(_PRELOADED))
        forkserver.ensure_running()

    def get_eligible_capacity(
        self,
        supported_task_types: set[TaskType],
        *,
        insecure: bool = False,
        root_certificates_path: str | None = None,
    ) -> tuple[set[TaskType], set[str]]:
        """Accept tasks of ClientApps, and of AgentApps in order to refuse them at once, and no others."""
        return supported_task_types & {TaskType.CLIENT_APP, TaskType.AGENT_APP}, set()

    def wait_for_capacity(
        self,
        task_type: TaskType | None = None,
        *,
        fab_hash: str | None = None,
        insecure: bool = False,
        root_certificates_path: str | None = None,
    ) -> None:
        """Wait until fewer than ``_MAX_TASKS`` run."""
        while len(self._tasks) >= _MAX_TASKS:
            connection.wait([process.sentinel for process in self._tasks])
            self._reap()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a task in a process of its own.

        A task that cannot be started is answered by the SuperNode when its token expires.
        """
        if spec.task_type not in (TaskType.CLIENT_APP, TaskType.AGENT_APP):
            return LaunchResult.failed("a site runs ClientApps only")
        # No app has the empty hash, so an AgentApp is refused like an app that was not approved.
        approved = self._approved() if spec.task_type is TaskType.CLIENT_APP else ""
        try:
            folder = Path(tempfile.mkdtemp(dir=self._folder.name))
            process = self._context.Process(
                target=gate.run_task, args=(spec, approved, str(folder), str(self._kit / "state"))
            )
            process.start()
        except (OSError, EOFError) as error:
            return LaunchResult.failed(f"no process could be started ({type(error).__name__})")
        self._tasks[process] = folder
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Clear up after finished tasks between two polls, and wait while too many run."""
        self._reap()
        self.wait_for_capacity()

    def close(self) -> None:
        """End all tasks and leave nothing behind."""
        for process in self._tasks:
            process.terminate()
        for process in self._tasks:
            process.join(_GRACE_SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()
        self._reap()
        self._folder.cleanup()

    def _approved(self) -> str:
        try:
            return SiteKit.load(self._kit).app_hash
        except UserError:
            # An unreadable kit approves nothing: the gate fails closed.
            log.error("every app is refused, because the kit cannot be read", exc_info=True)
            return ""

    def _reap(self) -> None:
        for process in [process for process in self._tasks if process.exitcode is not None]:
            if process.exitcode:
                log.warning("a task ended with status %d", process.exitcode)
            # What cannot be removed now goes with the executor's own folder.
            shutil.rmtree(self._tasks.pop(process), ignore_errors=True)
            process.close()


def _run_executor(kit: Path, runtime_api_address: str, secret: bytes) -> None:
    """Take tasks until a signal comes.

    Args:
        kit: the site's kit folder.
        runtime_api_address: HOST:PORT of the SuperNode's Runtime API, on this machine.
        secret: SuperExec's, as the SuperNode has it.

    Raises:
        UserError: another Flower, or an address that is not on this machine.
        SystemExit: a signal came.
    """
    host = runtime_api_address.rpartition(":")[0].strip("[]")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        raise UserError(
            f"--runtime-api-address {runtime_api_address}: give 127.0.0.1:PORT. The SuperNode and its "
            "executor run on one machine, and what they say to each other is not encrypted."
        )
    run_superexec(lambda: _ForkingExecutor(kit), runtime_api_address, secret)


def _main(
    kit: Annotated[Path, typer.Option(help="The site's kit folder.")],
    runtime_api_address: Annotated[str, typer.Option(help="127.0.0.1:PORT of the SuperNode's Runtime API.")],
    superexec_auth_secret_file: Annotated[Path, typer.Option(help="The secret that the SuperNode has too.")],
) -> None:
    """Run the apps that this site has approved, each task in a process of its own."""
    if not sys.flags.safe_path:
        raise UserError("start it with `python -P -m deploy.consortium.executor`: -P keeps this folder out")
    advice = "`fedbags site up` makes it."
    secret = require_file(superexec_auth_secret_file, "the SuperExec secret", advice).read_bytes()
    if not secret:
        raise UserError(f"the SuperExec secret is empty: {superexec_auth_secret_file}\n{advice}")
    SiteKit.load(kit)
    # Before the fork server starts and imports the libraries: with more threads allowed, importing would
    # start some, and a process with threads must not be forked.
    os.environ |= _ENVIRONMENT
    os.environ.setdefault("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", _POLL_SECONDS)
    _run_executor(kit.absolute(), runtime_api_address, secret)


if __name__ == "__main__":
    try:
        typer.run(_main)
    except UserError as error:
        say(f"error: {error}", err=True)
        sys.exit(2)
