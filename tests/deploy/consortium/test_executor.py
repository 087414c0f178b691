"""The executor starts, ends and clears up a process per task; the gate holds with Flower's real processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus

from deploy.consortium import executor, gate
from deploy.consortium.executor import _ENVIRONMENT, _ForkingExecutor
from deploy.consortium.kit import SiteKit

WriteApp = Callable[..., tuple[Path, bytes]]


@pytest.fixture
def kit(tmp_path: Path) -> SiteKit:
    folder = tmp_path / "kit"
    folder.mkdir()
    kit = SiteKit(consortium="test", app_hash="0" * 64, site="a", server="127.0.0.1", port=8443).at(folder)
    kit.save()
    return kit


@pytest.fixture
def forking(kit: SiteKit, monkeypatch: pytest.MonkeyPatch) -> Iterator[_ForkingExecutor]:
    monkeypatch.setattr(executor, "_PRELOADED", ("flwr.supernode.runtime.run_clientapp",))
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    forking = _ForkingExecutor(kit.folder)
    yield forking
    forking.close()


def task(port: int = 9, type_: TaskType = TaskType.CLIENT_APP, parent: int | None = None) -> ExecutionSpec:
    """A task whose SuperNode never answers: its process tries again until it is ended."""
    return ExecutionSpec(type_, f"127.0.0.1:{port}", "token", True, None, False, parent, False, task_id=1)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def test_only_client_apps_are_taken(forking: _ForkingExecutor) -> None:
    taken, _ = forking.get_eligible_capacity(set(TaskType))
    assert taken == {TaskType.CLIENT_APP, TaskType.AGENT_APP}
    for other in set(TaskType) - taken:
        assert forking.launch(task(type_=other)).status is LaunchResultStatus.FAILED


def test_what_is_approved_is_read_before_each_task_and_an_agent_never_is(
    kit: SiteKit, forking: _ForkingExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[str] = []

    class Context:
        """Notes what the process would be told."""

        def Process(self, target: object, args: tuple[ExecutionSpec, str, str, str]) -> SimpleNamespace:  # noqa: N802
            pinned.append(args[1])
            return SimpleNamespace(start=lambda: (_ for _ in ()).throw(EOFError))

    monkeypatch.setattr(forking, "_context", Context())
    assert forking.launch(task()).status is LaunchResultStatus.FAILED
    new = kit.approve(b"new")
    forking.launch(task())
    forking.launch(task(type_=TaskType.AGENT_APP))
    (kit.folder / "kit.toml").write_text("nonsense")
    forking.launch(task())
    assert pinned == ["0" * 64, new.app_hash, "", ""]


def test_preloading_starts_no_thread_and_touches_no_accelerator() -> None:
    """With the environment that the process has from its start, as the fork server does."""
    code = (
        "import os, importlib\nfrom deploy.consortium.executor import _PRELOADED\n"
        "for name in _PRELOADED: importlib.import_module(name)\n"
        "import torch\nprint(len(os.listdir('/proc/self/task')), torch.cuda.is_initialized())\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | _ENVIRONMENT,
    )  # fmt: skip
    assert result.stdout.split() == ["1", "False"]


def test_a_killed_task_leaves_nothing_and_the_end_ends_all(forking: _ForkingExecutor) -> None:
    folder = Path(forking._folder.name)
    for _ in range(2):
        assert forking.launch(task(free_port())).status is LaunchResultStatus.ACCEPTED
    first, second = forking._tasks
    assert len(list(folder.iterdir())) == 2
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: first.exitcode is not None)
    forking.reconcile()
    assert list(forking._tasks) == [second]
    assert len(list(folder.iterdir())) == 1
    pid = second.pid
    forking.close()
    assert not folder.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_no_more_tasks_run_than_allowed(forking: _ForkingExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_MAX_TASKS", 1)
    forking.launch(task(free_port()))
    (process,) = forking._tasks
    process.kill()
    forking.reconcile()
    assert not forking._tasks


@pytest.mark.slow
def test_tasks_end_with_their_executor(kit: SiteKit, tmp_path: Path) -> None:
    code = (
        "import sys, os, time\nfrom pathlib import Path\nfrom deploy.consortium import executor\n"
        "executor._PRELOADED = ()\n"
        "from flwr.supercore.constant import TaskType\n"
        "from flwr.supercore.superexec.executor import ExecutionSpec\n"
        "if __name__ == '__main__':\n"
        f"    forking = executor._ForkingExecutor(Path({str(kit.folder)!r}))\n"
        f"    address = '127.0.0.1:{free_port()}'\n"
        "    forking.launch(ExecutionSpec(TaskType.CLIENT_APP, address, 'token', True, None, False,\n"
        "        os.getpid(), False, task_id=1))\n"
        "    print(*[process.pid for process in forking._tasks], flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(code)
    environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-P", tmp_path / "main.py"], env=environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        time.sleep(3)
        parent.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def start(*arguments: object, options: tuple[str, ...] = ("-P",)) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, *options, "-m", "deploy.consortium.executor", *map(str, arguments)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


@pytest.mark.parametrize(
    ("address", "secret", "folder", "options", "complaint"),
    [
        ("127.0.0.1:9094", b"", "kit", ("-P",), "the SuperExec secret is empty"),
        ("127.0.0.1:9094", None, "kit", ("-P",), "the SuperExec secret not found"),
        ("127.0.0.1:9094", b"secret", "nowhere", ("-P",), "the kit not found"),
        ("10.0.0.5:9094", b"secret", "kit", ("-P",), "give 127.0.0.1:PORT"),
        ("fl.example.org:9094", b"secret", "kit", ("-P",), "give 127.0.0.1:PORT"),
        ("127.0.0.1:9094", b"secret", "kit", (), "start it with `python -P -m"),
    ],
)
def test_mistakes_end_it_with_status_two(
    kit: SiteKit, tmp_path: Path, address: str, secret: bytes | None, folder: str, options: tuple[str, ...],
    complaint: str,
) -> None:  # fmt: skip
    if secret is not None:
        (tmp_path / "secret").write_bytes(secret)
    status, said = start(
        "--kit", tmp_path / folder, "--runtime-api-address", address,
        "--superexec-auth-secret-file", tmp_path / "secret", options=options,
    )  # fmt: skip
    assert status == 2
    assert complaint in said


class Consortium:
    """A SuperLink, one SuperNode and its executor, all on loopback and without TLS."""

    def __init__(self, folder: Path, kit: SiteKit) -> None:
        self.folder, self.kit = folder, kit
        self._processes: list[subprocess.Popen[bytes]] = []
        self._programs = Path(sys.executable).parent
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
        }
        link, runtime = free_port(), free_port()
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink.local]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
        )
        secret = folder / "secret"
        secret.write_bytes(os.urandom(32))
        self._start("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", link)
        wait_until(lambda: self._answers(link))
        self._start(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--isolation", "process",
            "--superexec-auth-secret-file", secret, "--host", "127.0.0.1", "--port", runtime,
        )  # fmt: skip
        self._start(
            "python", "-P", "-m", "deploy.consortium.executor", "--kit", kit.folder,
            "--runtime-api-address", f"127.0.0.1:{runtime}", "--superexec-auth-secret-file", secret,
        )  # fmt: skip

    def run(self, app: Path, waves: int = 1) -> list[dict[str, object]]:
        """Start a run by hand and wait for what its ServerApp writes."""
        out = self.folder / f"{app.name}-{time.monotonic_ns()}.json"
        subprocess.run(
            [self._programs / "flwr", "run", app, "local", "--run-config", f'out="{out}" waves={waves}'],
            env=self.environment, cwd=self.folder, check=True, capture_output=True, timeout=60,
        )  # fmt: skip
        wait_until(out.exists, seconds=150)
        waves_: list[dict[str, object]] = json.loads(out.read_text())
        return waves_

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, program: str, *arguments: object) -> None:
        with (self.folder / f"{program}.log").open("wb") as log:
            command = [str(self._programs / program), *map(str, arguments)]
            self._processes.append(
                subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
            )

    def _answers(self, port: int) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_the_gate_holds_with_flowers_own_processes(write_app: WriteApp, kit: SiteKit, tmp_path: Path) -> None:
    app, content = write_app()
    kit.approve(content)
    client = (app / "bare" / "client.py").read_text()
    mark = f"import pathlib\npathlib.Path({str(tmp_path / 'mark')!r}).touch()\n"
    changed, other = write_app("changed", {"bare/client.py": mark + client.replace("approved", "changed")})
    consortium = Consortium(tmp_path, kit)
    try:
        for wave in consortium.run(app, waves=2):
            assert [reply["word"] for reply in wave["said"]] == ["approved"]  # type: ignore[attr-defined]
        (wave,) = consortium.run(changed)
        assert wave["said"] == [
            "<class 'deploy.consortium.gate.AppNotApproved'>:"
            "<'this site runs only the app that it approved, and this is another one'>"
        ]
        assert float(str(wave["seconds"])) < 20
        assert not (tmp_path / "mark").exists()
        assert (kit.state / gate._REFUSED_APP).read_bytes() == other

        installed = tmp_path / "home" / "apps"
        for folder in installed.glob("tests.bare.*"):  # by the ServerApp's process, which shares this home
            (folder / "bare" / "client.py").write_text(mark)
        (wave,) = consortium.run(app)
        assert [reply["word"] for reply in wave["said"]] == ["approved"]  # type: ignore[attr-defined]
        assert not (tmp_path / "mark").exists()

        approve = ["site", "approve", kit.folder, kit.state / gate._REFUSED_APP, "--yes"]
        fedbags = Path(sys.executable).parent / "fedbags"
        subprocess.run([fedbags, *approve], check=True, capture_output=True)
        (wave,) = consortium.run(changed)
        assert [reply["word"] for reply in wave["said"]] == ["changed"]  # type: ignore[attr-defined]
        assert (tmp_path / "mark").exists()
    finally:
        consortium.close()
