"""The command as a user meets it: exit status, one clear error, JSON, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client.site import SiteConfig, _PrivacyBudget, _SecureAggregationPolicy
from deploy.consortium import programs
from deploy.consortium.foreground import COMMAND
from deploy.consortium.kit import SiteKit
from deploy.datasets import synthetic
from deploy.datasets.files import SourceTable
from deploy.datasets.options import SyntheticHospitals
from deploy.datasets.site_check import check_site, print_check
from tests.deploy import in_process

SMALL = ["--set", "model.image-size=16", "--set", "model.atoms-per-class=2", "--workers", "0", "--no-figures"]


def fedbags(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it, in a process of its own."""
    code = "from deploy.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def assert_user_mistake(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


@pytest.fixture(scope="module")
def finished(sites_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round, made by the command."""
    run = tmp_path_factory.mktemp("runs") / "first"
    result = fedbags(
        "simulate", "--sites-dir", sites_dir, "--rounds", 1, "--out", run, "--json", *SMALL, cwd=run.parent
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["rounds"] == 1
    return run


def test_simulate_leaves_a_run_that_the_other_commands_read(finished: Path) -> None:
    shown = fedbags("runs", "show", finished, "--json", cwd=finished.parent)
    summary = json.loads(shown.stdout)
    assert [level["classes"] for level in summary["levels"]] == [3, 9, 27]
    listed = json.loads(fedbags("runs", "list", finished.parent, "--json", cwd=finished.parent).stdout)
    assert [(row["run"], row["state"]) for row in listed] == [("first", "finished")]
    table = fedbags("runs", "show", finished, cwd=finished.parent).stdout
    for word in ("outline", "lesion", "hospital-1", "private"):
        assert word in table


def test_the_run_can_be_repeated_from_its_configuration(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    result = in_process.fedbags(
        "simulate", "--config", finished / "config.toml", "--out", again, "--json", "--workers", 0,
        "--no-figures", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (again / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_synthetic_hospitals_are_drawn_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = synthetic.synthetic_source

    def few(hospitals: SyntheticHospitals) -> SourceTable:
        return draw(replace(hospitals, images_per_site=64, test_images_per_site=24))

    monkeypatch.setattr(synthetic, "synthetic_source", few)
    assert_drawn_into_the_run(
        in_process.fedbags(
            "simulate", "--sites", 2, "--rounds", 1, "--out", "run", "--json", *SMALL, cwd=tmp_path
        ),
        tmp_path / "run",
    )


@pytest.mark.slow
def test_synthetic_hospitals_of_full_size_are_drawn_into_the_run(tmp_path: Path) -> None:
    assert_drawn_into_the_run(
        fedbags("simulate", "--sites", 2, "--rounds", 1, "--out", "run", "--json", *SMALL, cwd=tmp_path),
        tmp_path / "run",
    )


def assert_drawn_into_the_run(result: subprocess.CompletedProcess[str], run: Path) -> None:
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sites"] == 2
    assert len(list((run / "sites").glob("*/site.toml"))) == 2


def test_site_check_lists_what_would_leave(sites_dir: Path, tmp_path: Path) -> None:
    site = sites_dir / "hospital-1"
    result = in_process.fedbags("site", "check", site, "--image-size", 16, "--json", cwd=tmp_path)
    check = json.loads(result.stdout)
    assert check["site"] == "hospital-1"
    assert check["leaves"]["proportion_release"] == "total"
    assert not check["leaves"]["private"]
    assert sum(check["leaves"]["label_counts"].values()) == check["images"]["used"]
    table = in_process.fedbags("site", "check", site, "--image-size", 16, cwd=tmp_path).stdout
    for word in ("what would leave", "patient ids", "exact"):
        assert word in table


def test_site_check_of_a_site_with_a_budget_shows_private_runs(sites_dir: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(sites_dir / "hospital-1", site)
    config = SiteConfig.load(site)
    guarded = {
        "budget": _PrivacyBudget(epsilon=3.0, delta=1e-4),
        "secure_aggregation": _SecureAggregationPolicy(required=True),
    }
    config.model_copy(update={"policy": config.policy.model_copy(update=guarded)}).save(site)
    leaves = check_site(site, 16)["leaves"]
    assert leaves["mechanism"] == "discrete-laplace"
    assert leaves["label_counts"] is None
    assert "epsilon 3" in leaves["model_update"]
    assert "masked" in leaves["model_update"]
    assert leaves["metrics"] == ["num-bags"]


def test_metrics_beyond_the_default_are_named_by_check_and_up(
    sites_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert command[: len(COMMAND)] == [*COMMAND]
        return in_process.fedbags(*command[len(COMMAND) :], cwd=tmp_path)

    site = tmp_path / "site"
    shutil.copytree(sites_dir / "hospital-1", site)
    config = SiteConfig.load(site)
    for metrics, beyond in ((None, []), (("num-bags", "loss"), ["loss"])):
        own = config.policy.model_copy(update={"metrics": metrics})
        config.model_copy(update={"policy": own}).save(site)
        print_check(check_site(site, 16))
        assert ("tell more than its label counts do: loss." in capsys.readouterr().out) == bool(beyond)
        kit = SiteKit(
            consortium="c", site=config.name, server="h", port=9443, app_hash="0" * 64, data_path=str(site)
        ).at(tmp_path)
        with monkeypatch.context() as patched:
            if not beyond:  # the other one is checked as a site does, in a process of its own
                patched.setattr(programs.subprocess, "run", run)
            assert programs.check_data(kit) == beyond


def test_every_key_is_listed_with_its_bounds(tmp_path: Path) -> None:
    rows = json.loads(fedbags("config", "--json", cwd=tmp_path).stdout)
    by_key = {row["key"]: row for row in rows}
    assert by_key["train.learning-rate"]["bounds"] == ">= 0, <= 10"
    assert "fedprox" in by_key["federation.strategy"]["bounds"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "rounds=0"], ["rounds = 0", "greater than or equal to 1"]),
        (["--set", "train.lr=1"], ["unknown key 'train.lr'"]),
        (["--set", "rounds"], ["KEY=VALUE"]),
        (["--backbone", "resnet51"], ["resnet51", "resnet50"]),
        (["--method", "magic"], ["magic"]),
        (["--sites-dir", "nowhere"], ["no site folder", "nowhere"]),
        (["--resume"], ["--out"]),
        (["--resume", "--out", "nowhere"], ["nothing to resume"]),
        (["--config", "none.toml"], ["none.toml", "not found"]),
        (["--out", "/proc/run"], ["cannot be written"]),
    ],
)
def test_a_mistake_is_one_clear_error_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    # The name of a backbone is looked up in torchvision, which takes a process of its own long to load.
    command = in_process.fedbags if "--backbone" in arguments else fedbags
    assert_user_mistake(command("simulate", *SMALL, *arguments, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_folder_is_refused_untouched(finished: Path, sites_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    result = fedbags("simulate", "--sites-dir", sites_dir, "--out", finished, *SMALL, cwd=finished.parent)
    assert_user_mistake(result, "exists", "--resume")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_bad_rows_stop_a_run_before_it_starts_or_are_quarantined(sites_dir: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(sites_dir, bad)
    image = next((bad / "hospital-1" / "images").iterdir())
    image.write_bytes(image.read_bytes()[:60])
    run = ["simulate", "--sites-dir", bad, "--rounds", 1, "--out", tmp_path / "run", *SMALL]
    assert_user_mistake(in_process.fedbags(*run, cwd=tmp_path), "manifest.csv, row", image.name, "--skip-bad")
    assert not (tmp_path / "run").exists()
    result = in_process.fedbags(*run, "--skip-bad", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "quarantined" in result.stderr
    assert (bad / "hospital-1" / "quarantine.csv").exists()


def test_a_run_that_does_not_exist_or_has_not_finished(tmp_path: Path) -> None:
    assert_user_mistake(fedbags("runs", "show", "none", cwd=tmp_path), "no run folder")
    assert_user_mistake(fedbags("runs", "list", "none", cwd=tmp_path), "no such folder")
    assert_user_mistake(fedbags("predict", "none", "x.png", cwd=tmp_path), "none")
