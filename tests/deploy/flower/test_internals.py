"""The private parts of the pinned Flower: what the gate relies on is known by its text, and the SuperNode
is Flower's own but for one pause; with another Flower that pause is left alone, and the gate stays shut."""

import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from flwr.app import ConfigRecord
from flwr.supercore.exit import ExitCode
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectUnavailableError,
    pull_and_inflate_object_from_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory

from common.errors import UserError
from deploy.consortium.programs import _SUPERNODE_COMMAND
from deploy.flower import internals
from deploy.flower.processes import exit_code, program

LOOP = f"import time\n\ndef loop():\n    while True:\n        if True:\n{internals._FLOWERS_LOOP}"


class Enough(Exception):  # noqa: N818 (it ends a loop that has no end)
    """The loop has asked often enough."""


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, in place of sleeping; Flower has its own ``time`` back afterwards."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    monkeypatch.setattr(flower, "time", time)
    return found


def ask_in_vain(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Run Flower's own main loop at a coordinator that has no message."""
    asked = 0

    def receive() -> None:
        nonlocal asked
        asked += 1
        if asked == times:
            raise Enough

    @contextmanager
    def connection(**_: object) -> Iterator[tuple[object, ...]]:
        yield (7, receive, None, None, None, None, None, None)

    monkeypatch.setattr(flower, "_init_connection", connection)
    monkeypatch.setattr(flower, "register_signal_handlers", lambda **_: None)
    with pytest.raises(Enough):
        flower.start_client_internal(
            state_factory=NodeStateFactory(objectstore_factory=ObjectStoreFactory()),
            server_address="127.0.0.1:1",
            node_config={},
            insecure=True,
            isolation="process",
        )


def test_flowers_loop_pauses_as_we_say(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    ask_in_vain(monkeypatch, 3)
    assert slept == [internals._FLOWERS_PAUSE] * 2
    slept.clear()
    assert internals._shorten_pause(flower)
    ask_in_vain(monkeypatch, 3)
    assert slept == [internals._SHORTEST_PAUSE] * 2


def test_the_longer_nothing_comes_the_longer_the_pause_up_to_flowers_own(slept: list[float]) -> None:
    assert internals._shorten_pause(flower)
    for _ in range(60):
        flower.time.sleep(internals._FLOWERS_PAUSE)
    assert slept == sorted(slept)
    assert slept[0] == internals._SHORTEST_PAUSE
    assert slept[-1] == internals._FLOWERS_PAUSE
    assert all(
        pause <= max(internals._SHORTEST_PAUSE, internals._PAUSE_SHARE * sum(slept[:before]))
        for before, pause in enumerate(slept)
    )
    assert (
        len([pause for pause in slept if pause < internals._FLOWERS_PAUSE]) < 35
    )  # questions of a first minute


def test_a_message_makes_the_pause_short_again(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    """Flower's own function waits for a reply between two looks, which come from this list."""
    assert internals._shorten_pause(flower)
    flower.time._waited = 100.0
    looks: list[list[object]] = [[], []]

    class State:
        def get_messages_legacy(self, **_: object) -> list[object]:
            if not looks:
                raise Enough
            return looks.pop()

    with pytest.raises(Enough):
        flower._push_messages(state=State(), object_store=None, send=None, push_object=None)
    flower.time.sleep(internals._FLOWERS_PAUSE)
    assert slept == [0.5, 0.5, internals._SHORTEST_PAUSE]


def test_no_other_pause_and_no_other_module_is_touched(slept: list[float]) -> None:
    assert internals._shorten_pause(flower)
    flower.time.sleep(0.5)
    flower.time.sleep(30)
    time.sleep(internals._FLOWERS_PAUSE)
    assert slept == [0.5, 30, internals._FLOWERS_PAUSE]
    assert flower.time.monotonic is time.monotonic


@pytest.fixture
def module(tmp_path: Path) -> Callable[[str], ModuleType]:
    """A module with the given source."""

    def load(source: str) -> ModuleType:
        path = tmp_path / "loop.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("loop", path)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    return load


def test_the_loop_is_known_by_its_text(module: Callable[[str], ModuleType]) -> None:
    assert internals._shorten_pause(module(LOOP))


@pytest.mark.parametrize(
    "source",
    [
        LOOP.replace("time.sleep(3)", "time.sleep(2)"),
        LOOP.replace("if run_id is None", "if run_id is not None"),
        LOOP + "\ndef wait():\n    time.sleep(3)\n",
        LOOP.replace("import time", "from time import monotonic as time"),
        "import time\n",
    ],
    ids=["another pause", "another reason", "two such pauses", "another time", "no loop"],
)
def test_another_loop_keeps_its_pause(module: Callable[[str], ModuleType], source: str) -> None:
    other = module(source)
    before = other.time
    assert not internals._shorten_pause(other)
    assert other.time is before


def run(command: tuple[str, ...], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_arguments_exit_codes_and_words_are_flowers(tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.write_text("no key")
    arguments = ("--superlink", "127.0.0.1:1", "--insecure", "--auth-supernode-private-key", str(key))
    ours, theirs = run(_SUPERNODE_COMMAND, *arguments), run((program("flower-supernode"),), *arguments)
    assert ours.returncode == theirs.returncode == 1
    for done in (ours, theirs):
        assert exit_code(done.stdout + done.stderr) == ExitCode.SUPERNODE_NODE_AUTH_KEY_INVALID
    assert "its own pause stays" not in ours.stdout + ours.stderr


def test_another_flower_is_started_all_the_same_and_the_log_says_so() -> None:
    start = (
        "from flwr.supernode import start_client_internal\n"
        "from deploy.flower.internals import run_supernode\n"
        "start_client_internal.time = None\n"
        "run_supernode()\n"
    )
    done = run((sys.executable, "-P", "-c", start), "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("Flower version")
    assert "its own pause stays" in done.stderr


def test_a_task_that_is_there_before_its_message_has_it_soon_after() -> None:
    record = ConfigRecord({"n": 1})
    tries = 0

    def pull(object_id: str) -> bytes:
        nonlocal tries
        tries += 1
        if tries <= 3:
            raise ObjectUnavailableError(object_id)
        return record.deflate()

    started = time.monotonic()
    found = internals._with_short_pauses(pull_and_inflate_object_from_tree)(
        get_object_tree(record), pull, lambda _: None, return_type=ConfigRecord
    )
    assert found == record
    assert tries == 4
    assert time.monotonic() - started < 2.0  # 5.6 s at the least with Flower's own pauses


def test_this_flower_is_one_that_the_gate_was_tested_with() -> None:
    internals._check_flower()


@pytest.mark.parametrize("reference", sorted(internals._PINNED))
def test_a_flower_that_differs_anywhere_in_what_is_relied_on_is_refused(
    reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = reference.partition(":")

    def moved() -> None:
        """Not what it was."""

    monkeypatch.setattr(importlib.import_module(module), name, moved)
    with pytest.raises(UserError, match=name):
        internals.run_superexec(lambda: pytest.fail("started"), "127.0.0.1:1", b"secret")
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(UserError, match=name):
        internals._check_flower()
