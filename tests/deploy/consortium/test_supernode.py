"""The SuperNode of a site is Flower's own but for one pause; with another Flower that is left alone too."""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from flwr.supercore.exit import ExitCode
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import start_client_internal as flower
from flwr.supernode.nodestate import NodeStateFactory

from deploy.consortium import supernode
from deploy.flower.processes import exit_code, program

OURS = (sys.executable, "-P", "-m", "deploy.consortium.supernode")
LOOP = f"import time\n\ndef loop():\n    while True:\n        if True:\n{supernode.FLOWERS_LOOP}"


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
    assert slept == [supernode.FLOWERS_PAUSE] * 2
    slept.clear()
    assert supernode.shorten_pause(flower)
    ask_in_vain(monkeypatch, 3)
    assert slept == [supernode.SHORTEST] * 2


def test_the_longer_nothing_comes_the_longer_the_pause_up_to_flowers_own(slept: list[float]) -> None:
    assert supernode.shorten_pause(flower)
    for _ in range(60):
        flower.time.sleep(supernode.FLOWERS_PAUSE)
    assert slept == sorted(slept)
    assert slept[0] == supernode.SHORTEST
    assert slept[-1] == supernode.FLOWERS_PAUSE
    assert all(
        pause <= max(supernode.SHORTEST, supernode.SHARE * sum(slept[:before]))
        for before, pause in enumerate(slept)
    )
    assert (
        len([pause for pause in slept if pause < supernode.FLOWERS_PAUSE]) < 35
    )  # questions of a first minute


def test_a_message_makes_the_pause_short_again(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    """Flower's own function waits for a reply between two looks, which come from this list."""
    assert supernode.shorten_pause(flower)
    flower.time._waited = 100.0
    looks: list[list[object]] = [[], []]

    class State:
        def get_messages_legacy(self, **_: object) -> list[object]:
            if not looks:
                raise Enough
            return looks.pop()

    with pytest.raises(Enough):
        flower._push_messages(state=State(), object_store=None, send=None, push_object=None)
    flower.time.sleep(supernode.FLOWERS_PAUSE)
    assert slept == [0.5, 0.5, supernode.SHORTEST]


def test_no_other_pause_and_no_other_module_is_touched(slept: list[float]) -> None:
    assert supernode.shorten_pause(flower)
    flower.time.sleep(0.5)
    flower.time.sleep(30)
    time.sleep(supernode.FLOWERS_PAUSE)
    assert slept == [0.5, 30, supernode.FLOWERS_PAUSE]
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
    assert supernode.shorten_pause(module(LOOP))


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
    assert not supernode.shorten_pause(other)
    assert other.time is before


def run(command: tuple[str, ...], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)


def test_arguments_exit_codes_and_words_are_flowers(tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.write_text("no key")
    arguments = ("--superlink", "127.0.0.1:1", "--insecure", "--auth-supernode-private-key", str(key))
    ours, theirs = run(OURS, *arguments), run((program("flower-supernode"),), *arguments)
    assert ours.returncode == theirs.returncode == 1
    for done in (ours, theirs):
        assert exit_code(done.stdout + done.stderr) == ExitCode.SUPERNODE_NODE_AUTH_KEY_INVALID
    assert "its own pause stays" not in ours.stdout + ours.stderr


def test_another_flower_is_started_all_the_same_and_the_log_says_so() -> None:
    start = (
        "from flwr.supernode import start_client_internal\n"
        "from deploy.consortium import supernode\n"
        "start_client_internal.time = None\n"
        "supernode.main()\n"
    )
    done = run((sys.executable, "-P", "-c", start), "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("Flower version")
    assert "its own pause stays" in done.stderr
