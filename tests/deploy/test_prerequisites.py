"""What a run needs and does not have is told at once, with the remedy, before anything is started."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.config import RunConfig
from common.errors import UserError
from deploy.simulation import prerequisites
from deploy.simulation.prerequisites import _LOCK, locked
from tests.cases import shortened

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
from deploy.cli.main import main
main()
"""


def fedbags(
    *arguments: str | Path, cwd: Path, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """The command in an installation that lacks some modules."""
    return subprocess.run(
        [sys.executable, "-P", "-c", BLOCK.format(blocked=without), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) < 6
    for part in parts:
        assert part in result.stderr


NOT_LOADED = ("torch", "flwr", "torchvision")
"""Blocked too: a refusal that needs one of them comes late."""


@pytest.mark.parametrize("module", ["opacus", "dp_accounting", "opendp"])
@pytest.mark.parametrize("engine", shortened(["local", "flower"], ["local"]))
def test_private_training_without_its_extra_is_refused_before_anything_is_loaded(
    tmp_path: Path, module: str, engine: str
) -> None:
    result = fedbags(
        "simulate", "--dp", "epsilon=8", "--engine", engine, "--out", "run",
        cwd=tmp_path, without=(module, *NOT_LOADED),
    )  # fmt: skip
    assert_refused(result, module, "pip install 'fedbags[dp]'")
    assert list(tmp_path.iterdir()) == []


def test_an_audit_without_the_extra_is_refused(sites_dir: Path, tmp_path: Path) -> None:
    result = fedbags("audit", "--sites-dir", sites_dir, cwd=tmp_path, without=("opacus", "torchvision"))
    assert_refused(result, "opacus", "pip install 'fedbags[dp]'")


def test_a_module_of_an_extra_that_is_missed_later_is_named_too() -> None:
    code = "import opacus.accountants"
    blocked = BLOCK.format(blocked=("opacus",)).replace(
        "main()\n", f"import deploy.cli.main\ndef app():\n    {code}\ndeploy.cli.main.app = app\nmain()\n"
    )
    late = subprocess.run([sys.executable, "-P", "-c", blocked], capture_output=True, text=True, check=False)
    assert_refused(late, "opacus", "pip install 'fedbags[dp]'")


@pytest.mark.parametrize(
    "command",
    [
        ["simulate", "--set", "train.device=cuda"],
        ["simulate", "--set", "train.device=cuda", "--engine", "flower"],
        ["simulate", "--sites-dir", "SITES", "--set", "train.device=cuda"],
    ],
)
@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(
    sites_dir: Path, tmp_path: Path, command: list[str]
) -> None:
    given = [str(sites_dir) if word == "SITES" else word for word in command]
    result = fedbags(*given, cwd=tmp_path, without=NOT_LOADED)
    assert_refused(result, "train.device = 'cuda'", "no CUDA device", "train.device=cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_pytorch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(prerequisites, "_ACCELERATORS", ("null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"PyTorch .* finds no CUDA device"):
        prerequisites.check(RunConfig().with_changes({"train.device": "cuda"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    prerequisites.check(RunConfig().with_changes({"train.device": "cuda"}))


@pytest.mark.parametrize("engine", ["local", "flower"])
def test_a_wrong_key_is_told_before_anything_is_loaded(tmp_path: Path, engine: str) -> None:
    result = fedbags(
        "simulate", "--set", "train.lr=1", "--sites-dir", tmp_path, "--engine", engine,
        cwd=tmp_path, without=NOT_LOADED,
    )  # fmt: skip
    assert_refused(result, "unknown key 'train.lr'")


def test_a_second_run_in_a_folder_is_told_who_holds_it(tmp_path: Path) -> None:
    with locked(tmp_path / "run", "a run"):
        began = time.monotonic()
        for resume in ([], ["--resume"]):
            result = fedbags("simulate", "--out", "run", *resume, cwd=tmp_path, without=NOT_LOADED)
            assert_refused(result, "a run is at work", f"process {os.getpid()}", socket.gethostname())
        assert time.monotonic() - began < 60
    assert not (tmp_path / "run").exists()


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from deploy.simulation.prerequisites import locked\n"
        "with locked(Path(sys.argv[1]), 'a run'):\n    print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid}"), locked(tmp_path / "run", "a run"):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / "run" / _LOCK).exists()
    with locked(tmp_path / "run", "a run"):
        assert f"process {os.getpid()}" in (tmp_path / "run" / _LOCK).read_text()
    assert not (tmp_path / "run" / _LOCK).exists()


def test_a_lock_leaves_no_empty_folder_and_keeps_a_full_one(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", "a run"):
        pass
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b", "a run"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_a_pretrained_feature_without_its_extra_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    result = fedbags(
        "simulate", "--set", "model.features=efficientnet-lite0", "--out", "run", cwd=tmp_path,
        without=("timm", *NOT_LOADED),
    )  # fmt: skip
    assert_refused(result, "needs timm", "pip install 'fedbags[pretrained]'")
    assert not (tmp_path / "run").exists()


def test_the_coordinator_of_shared_noise_needs_the_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig().with_changes(
        {
            "dp.epsilon": 1.0, "dp.noise": "shared", "dp.sample-rate": 0.5, "dp.steps-per-round": 1,
            "secure-aggregation.enabled": True,
        }
    )  # fmt: skip
    monkeypatch.setattr(prerequisites, "_is_there", lambda module: module != "dp_accounting")
    with pytest.raises(UserError, match=r"fedbags\[dp\]"):
        prerequisites.check_coordinator(config)
    prerequisites.check_coordinator(RunConfig().with_changes({"dp.epsilon": 1.0}))
