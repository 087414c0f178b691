"""Touch what is private in Flower, for all of fedbags, in this one module.

A site's processes, the coordinator's and the simulation rest on names of Flower that are no part of its
public interface. Names are replaced in four modules of Flower, each in the process that needs it:

- in the ClientApp's process, how an app is installed and loaded (``run_clientapp``), and how long it waits
  between two tries to get its message;
- in SuperExec, the executor that starts tasks (``run_superexec``);
- in the SuperNode, the pause between two questions for messages (``run_supernode``).

A site's gate rests on the first two, so ``_check_flower`` compares the source of all that it relies on with
what it was tested with, and nothing starts with anything else. The pause decides nothing but speed: with a
Flower whose loop is another one, Flower's own stays.
"""

import functools
import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from flwr.app import Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as _MessageProto
from flwr.proto.recorddict_pb2 import RecordDict as _RecordDictProto
from flwr.supercore.run import Run as Run  # the simulation names it, too
from flwr.supercore.task_identity import TaskIdentity

from common.errors import UserError

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor import ExecutionSpec, Executor

log = logging.getLogger("fedbags.flower")

_CLIENT_APP = "flwr.supernode.runtime.run_clientapp"
_SUPEREXEC = "flwr.supercore.superexec.run_superexec"
_SUPERNODE = "flwr.supernode.start_client_internal"

_PINNED = {
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

_PULL_PAUSE = {"initial_backoff": 0.1, "backoff_cap": 0.5}
"""Seconds between two tries of a task to get its message. The SuperNode hands a task out before its message
has arrived, and a forked task is there at once: by Flower's own pauses (1, 2, 4, 8 s) it lost up to 15 s."""

_SHORTEST_PAUSE = 0.5
"""Seconds between two questions right after a message. Each question costs the SuperLink some 14 ms of a
core: too much for many sites to ask so often for long, so ``_PAUSE_SHARE`` lets the pause grow."""

_PAUSE_SHARE = 0.1
"""The pause as a share of the time that was waited since the last message: a site loses no more of it."""

_FLOWERS_PAUSE = 3
_FLOWERS_LOOP = """
            # No message has been pulled therefore we can skip the push stage.
            if run_id is None:
                # If no message was received, wait for a while
                time.sleep(3)
                continue
"""
"""The place, as it is in Flower 1.41.0 and 1.42.0; nothing else in its module sleeps as long."""


def _check_flower() -> None:
    """Refuse a Flower that the gate was not tested with.

    Raises:
        UserError: names the part that differs.
    """
    for reference, known in _PINNED.items():
        module, _, name = reference.partition(":")
        try:
            # The gate stands between the server and the site's data. A Flower that calls the replaced names
            # otherwise, or not at all, could pass it by unnoticed, so the text of the source is compared and
            # not a version number.
            source = inspect.getsource(getattr(import_module(module), name))
        except (ImportError, AttributeError, OSError, TypeError):
            # What cannot be read counts as different.
            source = ""
        if hashlib.sha256(source.encode()).hexdigest()[:16] not in known:
            raise UserError(
                f"the gate was not tested with this version of Flower: {reference} is not what it was.\n"
                "Nothing was started. Install the versions of constraints.txt (flwr 1.41.0)."
            )


def run_clientapp(
    spec: "ExecutionSpec",
    install: Callable[[bytes, bool], None],
    loader: Callable[[str, str | None, bool], Callable[..., Any]],
) -> None:
    """Answer one task as Flower's ClientApp process does, with our own way to install and load an app.

    Args:
        spec: what SuperExec was given.
        install: takes the app's bytes, in place of ``install_from_fab``.
        loader: returns the function that loads the app, in place of ``get_load_client_app_fn``.

    Raises:
        SystemExit: always; the status is Flower's.
    """
    flower = _module(_CLIENT_APP)
    # Set in the module that calls them, where Flower looks the names up. The process ends with this task, so
    # that no other is affected.
    flower.install_from_fab = install
    flower.get_load_client_app_fn = loader
    flower.pull_and_inflate_object_from_tree = _with_short_pauses(flower.pull_and_inflate_object_from_tree)
    flower.run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        parent_pid=spec.parent_pid,
        runtime_dependency_install=False,
    )


def build_app(files: Mapping[str, bytes | Path]) -> bytes:
    """Return the Flower App Bundle of these files.

    Args:
        files: path inside the app to its content or to the file that has it; pyproject.toml is one.

    Raises:
        ValueError: they are no app, or are too large.
    """
    content, _ = _module("flwr.cli.build").build_fab_from_files(dict(files))
    return bytes(content)


def build_app_of_folder(folder: Path) -> bytes:
    """Return the Flower App Bundle that ``flwr run`` would make of a folder.

    Raises:
        ValueError: it is not the folder of an app.
    """
    return bytes(_module("flwr.cli.build").build_fab_from_disk(folder))


def install_app(content: bytes, folder: Path) -> Path:
    """Unpack an app below an empty folder as Flower does, and return the app's own folder."""
    installed: Path = _module("flwr.cli.install").install_from_fab(
        content, install_dir=folder, skip_prompt=True
    )
    return installed


def app_loader(folder: Path) -> Callable[..., Any]:
    """Return Flower's function that loads the ClientApp in an app's folder."""
    load: Callable[..., Any] = _module("flwr.clientapp.utils").get_load_client_app_fn(
        default_app_ref="", app_path=str(folder), multi_app=True
    )
    return load


def run_superexec(make_executor: Callable[[], "Executor"], runtime_api_address: str, secret: bytes) -> None:
    """Run Flower's own SuperExec with an executor of ours, over a connection that stays on this machine.

    Args:
        make_executor: makes the executor that starts the tasks.
        runtime_api_address: HOST:PORT on this machine's loopback; the connection has no TLS.
        secret: SuperExec's, as the SuperNode has it.

    Raises:
        UserError: see check_flower.
        SystemExit: a signal came.
    """
    _check_flower()
    flower = _module(_SUPEREXEC)
    flower.get_executor = lambda *_, **__: make_executor()
    flower.run_superexec(
        runtime_api_address, insecure=True, superexec_auth_secret=secret, runtime_dependency_install=False
    )


def run_supernode() -> None:
    """Run Flower's SuperNode with the arguments of this process, and a pause that is short after a message.

    In its main loop an empty answer is followed by a fixed pause of 3 s, which each wave of messages to the
    sites has to wait out. Here the pause grows with the time without a message, up to Flower's own.

    Raises:
        SystemExit: it ended; the status is Flower's.
    """
    if not _shorten_pause(import_module(_SUPERNODE)):
        log.warning(
            "this version of Flower waits for messages in another way than fedbags knows: its own pause "
            "stays, and rounds take some seconds longer"
        )
    _module("flwr.supernode.cli").flower_supernode()


def _shorten_pause(flower: ModuleType) -> bool:
    """Shorten the pause in the module of Flower's main loop.

    Returns:
        False, with nothing done, if that is another loop than the one known here.
    """
    try:
        source = inspect.getsource(flower)
    except (OSError, TypeError):
        return False
    # The pause is recognised by its length alone, so nothing else in the module may sleep as long.
    known = _FLOWERS_LOOP in source and source.count(f"time.sleep({_FLOWERS_PAUSE})") == 1
    # Set in this one module: the library's own ``time`` stays as it is for everybody else.
    if known and getattr(flower, "time", None) is time:
        flower.time = _PausingTime()  # type: ignore[attr-defined]
        return True
    return False


def become_server(run_id: int = 1, node_id: int = 1) -> None:
    """Let this process create messages as the server of a run does."""
    # Flower's processes set these private fields at their start, and a message reads its sender from them.
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, node_id


def empty_run(run_id: int) -> Run:
    """Return Flower's record of a run that has no name and no app."""
    return Run.create_empty(run_id)


def name_message(message: Message, message_id: str) -> None:
    """Give a message its id, as Flower's own grids do when they take a message in."""
    message.metadata.__dict__["_message_id"] = message_id


def encode_message(message: Message) -> bytes:
    """Return a message as Flower sends it."""
    return bytes(message_to_proto(message).SerializeToString())


def decode_message(payload: bytes) -> Message:
    """Return the message that ``encode_message`` wrote."""
    return message_from_proto(_MessageProto.FromString(payload))


def encode_records(records: RecordDict) -> bytes:
    """Return records as Flower keeps them."""
    return bytes(recorddict_to_proto(records).SerializeToString())


def decode_records(payload: bytes) -> RecordDict:
    """Return the records that ``encode_records`` wrote."""
    return recorddict_from_proto(_RecordDictProto.FromString(payload))


class _PausingTime:
    """Replace the module ``time`` in Flower's main loop, with one pause changed and the rest as it was."""

    def __init__(self) -> None:
        self._waited = 0.0

    def sleep(self, seconds: float) -> None:
        """Sleep, for less long where the loop asks for its pause without a message."""
        if seconds == _FLOWERS_PAUSE:
            seconds = min(max(_SHORTEST_PAUSE, _PAUSE_SHARE * self._waited), _FLOWERS_PAUSE)
            self._waited += seconds
        # The module's other pauses wait for the app's reply, so a message has come.
        else:
            self._waited = 0.0
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def _with_short_pauses(pull: Callable[..., Any]) -> Callable[..., Any]:
    """Return Flower's function that gets a message, with _PULL_PAUSE between two tries."""
    return functools.partial(pull, **_PULL_PAUSE)


def _module(name: str) -> Any:
    # Loaded by name where it is needed: each process uses few of these modules, and some take a second.
    return import_module(name)
