"""Run the apps through Flower's own simulation runtime.

It gets a private SuperLink for one run, and nothing is left of it afterwards. What ``flwr run`` needs is set
up for the user: a connection in a Flower home of its own (the user's is not touched), switches that keep it
from installing packages or calling home, a neutral working directory (Flower's workers import from theirs
before the app), and the true status of the run, which the exit status of ``flwr run`` does not tell.
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import tomli_w

from common.config import RunConfig
from common.errors import RunError
from deploy import OWN, PACKAGES
from deploy.flower.processes import end, environment, free_port, program, tail, with_variable

_CONNECTION = "fedbags"
_START_DEADLINE, _POLL = 60.0, 3.0
_APPS = {"serverapp": "server.app:app", "clientapp": "client.app:app"}


def run_flower(config: RunConfig, apps: Mapping[str, str] = _APPS) -> None:
    """Submit one run to a SuperLink of our own and wait for its end.

    Args:
        config: complete, with absolute ``run-dir`` and ``sites-dir``.
        apps: the components, importable in this environment.

    Raises:
        RunError: Flower could not start, or the run did not complete; carries the end of the log.
    """
    with tempfile.TemporaryDirectory(prefix="fedbags-flower-") as folder:
        work = Path(folder)
        port = free_port()
        variables = os.environ | environment(work / "home") | {"PYTHONPATH": _packages_first(work)}
        _write_app(work / "app" / "fedbags", apps, config)
        _write_connection(work / "home", port)
        (work / "run.toml").write_text(config.to_toml(), encoding="utf-8")
        with _superlink(work, port, variables) as log_file:
            run_id = _submit(work, config.federation.sites, variables)
            _wait_for_end(run_id, work, variables, log_file)


def _write_app(folder: Path, apps: Mapping[str, str], config: RunConfig) -> None:
    """Write a Flower app that names the installed packages, for ``flwr run`` to pack and send.

    Flower takes no key of ``config`` that the app does not have, those of the run's parts among them.
    """
    folder.mkdir(parents=True)
    project: dict[str, Any] = {"name": "fedbags", "version": version("fedbags"), "description": "fedbags"}
    project |= {"license": "Apache-2.0", "dependencies": []}
    table = config.model_dump(mode="json", by_alias=True)
    flower = {"publisher": "fedbags", "components": dict(apps), "config": table}
    app = {"project": project, "tool": {"flwr": {"app": flower}}}
    (folder / "pyproject.toml").write_text(tomli_w.dumps(app), encoding="utf-8")


def _packages_first(work: Path) -> str:
    """Return a PYTHONPATH on which our packages come before whatever else has their names."""
    folder = work / "packages"
    folder.mkdir()
    for name in OWN:
        # Links to our packages alone: others in the same folder (site-packages, say) must not come first.
        (folder / name).symlink_to(PACKAGES / name)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def _write_connection(home: Path, port: int) -> None:
    """Write Flower's config.toml with one connection, to our SuperLink."""
    home.mkdir(parents=True)
    connection = {"superlink": {_CONNECTION: {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(connection), encoding="utf-8")


@contextmanager
def _superlink(work: Path, port: int, environment: dict[str, str]) -> Iterator[Path]:
    """Run a SuperLink in simulation mode and yield its log file.

    It is ended with all its children on leaving.
    """
    log_file = work / "superlink.log"
    command = [
        program("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    process: subprocess.Popen[bytes] | None = None
    try:
        with log_file.open("wb") as log:
            # In a session of its own it does not get the terminal's Ctrl-C, and is ended in order below.
            process = subprocess.Popen(
                command, cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        _wait_for_health(process, port, log_file)
        yield log_file
    finally:
        _end_superlink(process, work)


def _wait_for_health(process: subprocess.Popen[bytes], port: int, log_file: Path) -> None:
    """Wait until the SuperLink answers.

    Raises:
        RunError: it ended or did not answer in time; carries its log.
    """
    end = time.monotonic() + _START_DEADLINE
    while time.monotonic() < end and process.poll() is None:
        try:
            # trust_env=False, because a proxy of the environment would be asked for 127.0.0.1.
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RunError(f"Flower's SuperLink did not start on port {port}:\n{tail(log_file)}")


def _end_superlink(process: subprocess.Popen[bytes] | None, work: Path) -> None:
    """End the SuperLink and everything that it started, which has a Flower home inside ``work``."""
    if process is not None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10.0)
    end(lambda: with_variable("FLWR_HOME", f"{work}/"), 5.0)
    if process is not None:
        process.wait()


def _submit(work: Path, sites: int, environment: dict[str, str]) -> str:
    """Submit the run with ``flwr run`` and return its id."""
    result = _flwr(
        "run", str(work / "app" / "fedbags"), _CONNECTION, "--format", "json",
        "--run-config", str(work / "run.toml"),
        "--federation-config", f"num-supernodes={sites} client-resources-num-cpus=1",
        cwd=work, environment=environment,
    )  # fmt: skip
    return str(result["run-id"])


def _wait_for_end(run_id: str, work: Path, environment: dict[str, str], log_file: Path) -> None:
    """Poll until the run has finished.

    Raises:
        RunError: it finished otherwise than as ``finished:completed``.
    """
    while True:
        listed = _flwr(
            "ls", _CONNECTION, "--run-id", run_id, "--format", "json", cwd=work, environment=environment
        )
        status = str(listed["runs"][0]["status"])
        if status.startswith("finished"):
            break
        time.sleep(_POLL)
    # The status is asked for, because `flwr run` exits with 0 even when the run failed.
    if status != "finished:completed":
        raise RunError(f"Flower reports the run as {status}; the end of its log:\n{tail(log_file)}")


def _flwr(*arguments: str, cwd: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run one ``flwr`` command that prints JSON, and return what it prints.

    Raises:
        RunError: the command failed; carries its output.
    """
    result = subprocess.run(
        [program("flwr"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    # Other lines may stand before the JSON.
    start = result.stdout.find("{")
    if result.returncode or start < 0:
        raise RunError(f"`flwr {arguments[0]}` failed:\n{result.stdout}{result.stderr}")
    answer: dict[str, Any] = json.loads(result.stdout[start:])
    if not answer.get("success"):
        raise RunError(f"`flwr {arguments[0]}` failed:\n{result.stdout}{result.stderr}")
    return answer
