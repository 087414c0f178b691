"""A site's executor: takes tasks from the SuperNode and runs each in a process of its own, behind the gate.

The supervisor starts it in place of ``flower-superexec``::

    python -P -m deploy.consortium.executor --kit KIT --runtime-api-address 127.0.0.1:9094 \
        --superexec-auth-secret-file KIT/superexec.secret

Exit status 2: a mistake to mend (no kit, no secret, another Flower), which a restart does not mend. SIGTERM ends
it and its tasks. ``-P`` is required: without it the folder it is started in could stand in for a library.

Flower's own SuperExec asks for tasks, and Flower's own ClientApp process answers them; this module puts itself
into three places of the two and touches nothing else (``GATED``):

- SuperExec's ``get_executor`` gives ``ForkingExecutor``. It forks each task from a process (the standard library's
  fork server) that has the large libraries loaded and none of our packages, so that a task starts in a tenth
  of a second and the code that runs is the approved app's.
- The ClientApp process's ``install_from_fab`` asks ``admission`` first and then unpacks into a fresh private
  folder, so that nothing that lies in an apps folder is ever run. A refusal goes back as an error reply.
- The ClientApp process's ``get_load_client_app_fn`` loads from that folder, whatever id and version the server
  states, and lets no text of an exception out.

All private parts of Flower that the gate relies on are here. ``check_flower`` compares their source with what the
gate was tested against, and the executor does not start with anything else.
"""

import hashlib
import importlib
import inspect
import ipaddress
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import connection, forkserver, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import RunError, UserError
from deploy.consortium import admission
from deploy.consortium.kit import SiteKit

if TYPE_CHECKING:
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

log = logging.getLogger("fedbags.executor")

GATED = {
    "flwr.supercore.superexec.run_superexec:run_superexec": ("d11f4e7fbc8f0b12", "91e7a33c5b898f33"),
    "flwr.supernode.runtime.run_clientapp:run_clientapp": ("6ce09559f3a2f5dc",),
    "flwr.clientapp.utils:get_load_client_app_fn": ("f7790dd641bafaff",),
    "flwr.supercore.object_ref:load_app": ("ef4c226d0c4f2c4a",),
    "flwr.cli.install:install_from_fab": ("481bd04cde582322",),
    "flwr.cli.install:validate_and_install": ("628b69fb852ae858",),
}
"""What the gate relies on, and the start of the SHA-256 of its source in Flower 1.41.0 and 1.42.0.

Before adding a hash: read the change, then run tests/deploy/consortium/test_executor.py with that Flower."""

OWN_PACKAGES = frozenset({"common", "client", "server", "deploy"})
"""Taken out of a task's process before the app is loaded: the app brings its own."""

PRELOADED = (
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
"""Loaded once; importing them starts no thread and touches no accelerator, so that forking is safe."""

MAX_TASKS = 4
"""Tasks at a time; more wait at the SuperNode."""

POLL_SECONDS = "0.1"
GRACE_SECONDS = 3.0
"""How long a task may take to end when the executor ends."""


class AppFailed(RunError):
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
