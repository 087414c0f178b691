"""A comparison as a user meets it: made, stopped, gone on with, changed; and its table."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.site import site_folders
from common.errors import ConfigError
from deploy.cli.main import app
from deploy.compare import run as comparison
from deploy.compare.cell import _work
from deploy.compare.plan import LOG, RESULT
from deploy.compare.run import Request, compare, list_cells
from deploy.simulation.prerequisites import _LOCK
from tests.deploy.datasets.layouts import write_aircraft, write_cars, write_cub, write_ham10000

Write = Callable[..., Path]
ROOT = Path(__file__).parents[3]
PATIENCE = 1800.0
"""Seconds for a few short runs on a machine with other work."""

EVERYTHING = """
[settings.pooled]
[settings.local-only]
methods = ["dllp"]
[settings.federated]
methods = ["dllp"]
[[methods]]
name = "dllp"
method = "dllp"
[[methods]]
name = "bound"
method = "supervised"
set = { train.learning-rate = 0.01 }
"""
TWO = """
[[methods]]
name = "first"
method = "dllp"
[[methods]]
name = "second"
method = "dllp"
set = { train.learning-rate = 0.001 }
"""


def results(out: Path) -> dict[str, int]:
    """When each cell's result was written, by cell."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob(f"runs/*/{RESULT}")}


@pytest.mark.usefixtures("in_this_process")
def test_pooled_local_only_and_federated_in_one_table(scenario: Write, tmp_path: Path) -> None:
    outcome = compare(scenario(EVERYTHING, passes="6"), tmp_path / "out", jobs=1)
    assert outcome.failed == {}
    assert not outcome.stopped
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert table == outcome.table
    assert table["missing"] == []
    rows = {(row["method"], row["setting"], row.get("site")): row for row in table["rows"]}
    assert list(rows) == [
        ("dllp", "pooled", None),
        ("bound", "pooled", None),
        ("dllp", "local-only", "site-1"),
        ("dllp", "local-only", "site-2"),
        ("dllp", "federated", None),
    ]
    for (method, _, _), row in rows.items():
        assert row["bag_size"] == (1 if method == "bound" else 8)
        assert (row["seed"], row["passes"], row["rounds"]) == (0, 6, 6)
        assert 1 <= row["selected_round"] <= 6
        assert row["bag_size"] / 2 < row["images_per_bag"] <= row["bag_size"]
        assert row["seconds"] > 0
        assert row["memory_mb"] > 10
        assert 0 <= row["proportion_l1"] <= 2
        assert [level["name"] for level in row["levels"]] == ["level_1", "level_2"]
        for level in row["levels"]:
            assert level["accuracy"] == max(level["accuracies"].values())
            assert 0 <= level["macro_f1"] <= 1
    # Four classes that differ plainly: labels teach them within six passes, which chance does not.
    assert rows["bound", "pooled", None]["levels"][-1]["accuracy"] > 0.6
    for name in ("table.csv", "table.md", "plots/accuracy.png", "plots/settings.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100


@pytest.mark.usefixtures("in_this_process", "no_pictures")
def test_only_what_changed_runs_again(
    scenario: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"'frist\*' is the name of no cell.* 'first_bag8_seed0_pooled'"):
        compare(scenario(TWO), out, Request(only="frist*"))
    assert not out.exists()
    assert [cell["state"] for cell in list_cells(scenario(TWO), out, Request(only="first*"))] == ["new"]
    outcome = compare(scenario(TWO), out, Request(only="first*"))
    assert list(results(out)) == ["first_bag8_seed0_pooled"]
    assert outcome.table["missing"] == ["second_bag8_seed0_pooled"]
    compare(scenario(TWO), out)
    before = results(out)
    assert len(before) == 2
    assert "2 cells: 1 done, 1 new; 1 to run" in capsys.readouterr().err

    faster = TWO.replace("0.001", "0.004")
    compare(scenario(faster), out)
    said = capsys.readouterr().err
    assert "second_bag8_seed0_pooled: train.learning-rate: was 0.001, is 0.004" in said
    after = results(out)
    assert after["first_bag8_seed0_pooled"] == before["first_bag8_seed0_pooled"]
    assert after["second_bag8_seed0_pooled"] != before["second_bag8_seed0_pooled"]
    (kept,) = (out / "replaced").iterdir()
    assert (kept / RESULT).stat().st_mtime_ns == before["second_bag8_seed0_pooled"]

    shutil.rmtree(out / "data")  # can be deleted at any time
    third = faster + '\n[[methods]]\nname = "third"\nmethod = "dllp"\nset = { train.momentum = 0.5 }\n'
    assert len(compare(scenario(third), out).table["rows"]) == 3
    assert "3 cells: 2 done, 1 new; 1 to run" in capsys.readouterr().err
    assert results(out)["second_bag8_seed0_pooled"] == after["second_bag8_seed0_pooled"]


@pytest.mark.usefixtures("in_this_process", "no_pictures")
def test_a_stopped_comparison_keeps_what_is_done(
    scenario: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the second cell trains: it goes on from its checkpoint, to the same figures."""
    path, out = scenario(TWO, passes="4"), tmp_path / "out"
    unbroken = compare(path, tmp_path / "unbroken").table["rows"]
    with monkeypatch.context() as patch:

        def stop(
            folders: Sequence[Path],
            jobs: int,
            look: Callable[[Sequence[Path]], None],
            ended: Callable[[Path, int], None],
        ) -> None:
            first, second = folders
            (first / LOG).touch()
            _work(first)
            ended(first, 0)
            evaluations = 0
            from server.rounds import Rounds

            honest = Rounds._evaluate_bags

            def interrupted(rounds: Rounds, number: int) -> None:
                nonlocal evaluations
                evaluations += 1
                if evaluations == 3:
                    raise KeyboardInterrupt
                honest(rounds, number)

            patch.setattr(Rounds, "_evaluate_bags", interrupted)
            _work(second)

        patch.setattr(comparison, "run_all", stop)
        outcome = compare(path, out)
    assert outcome.stopped
    assert outcome.table["missing"] == ["second_bag8_seed0_pooled"]
    assert [row["method"] for row in outcome.table["rows"]] == ["first"]
    assert (out / "runs/second_bag8_seed0_pooled/checkpoints/round-00002.safetensors").exists()
    before = results(out)
    finished = compare(path, out).table["rows"]
    assert results(out)["first_bag8_seed0_pooled"] == before["first_bag8_seed0_pooled"]
    same = ("levels", "proportion_l1", "selected_round")
    assert [[row[key] for key in same] for row in finished] == [
        [row[key] for key in same] for row in unbroken
    ]


@pytest.mark.usefixtures("no_pictures")
def test_a_failing_cell_is_told_and_the_table_has_the_others(
    scenario: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all(
        folders: Sequence[Path],
        jobs: int,
        look: Callable[[Sequence[Path]], None],
        ended: Callable[[Path, int], None],
    ) -> None:
        first, second = folders
        (first / LOG).write_text("some line\nRunError: the loss is not finite\n")
        ended(first, 1)
        (second / LOG).touch()
        _work(second)
        ended(second, 0)

    monkeypatch.setattr(comparison, "run_all", run_all)
    result = CliRunner().invoke(
        app, ["compare", str(scenario(TWO)), "--out", str(tmp_path / "out"), "--json", "--jobs", "1"]
    )
    assert result.exit_code == 1
    assert [row["method"] for row in json.loads(result.stdout)["rows"]] == ["second"]
    assert "failed: first_bag8_seed0_pooled" in result.stderr
    assert "RunError: the loss is not finite" in result.stderr
    assert "1 cell(s) failed; the same command tries them again" in result.stderr


def test_a_dry_run_lists_and_writes_nothing(scenario: Write, tmp_path: Path) -> None:
    arguments = ["compare", str(scenario(EVERYTHING)), "--out", str(tmp_path / "out"), "--dry-run"]
    listed = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--passes", "9"]).stdout)
    assert [(cell["cell"], cell["state"], cell["rounds"], cell["images_per_step"]) for cell in listed][
        :2
    ] == [
        ("dllp_bag8_seed0_pooled", "new", 9, 32),
        ("bound_bag1_seed0_pooled", "new", 9, 32),
    ]
    some = json.loads(CliRunner().invoke(app, [*arguments, "--json", "--only", "bound*"]).stdout)
    assert [cell["cell"] for cell in some] == ["bound_bag1_seed0_pooled"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "dllp_bag8_seed0_federated" in shown.stdout
    assert not (tmp_path / "out").exists()


def test_two_comparisons_do_not_share_a_folder(
    scenario: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_LOCK_SECONDS", 0.1)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / _LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(Exception, match="another comparison is at work"):
            compare(scenario(TWO), tmp_path / "out")


@pytest.mark.usefixtures("in_this_process", "no_pictures")
@pytest.mark.parametrize(
    ("name", "leaves", "train"),
    [("cub200", 200, 24), ("aircraft", 100, 24), ("cars", 196, 24), ("isic", 7, 39)],
)
def test_the_scenarios_of_public_data_run_on_their_layouts(
    tmp_path: Path, name: str, leaves: int, train: int
) -> None:
    """The files as they are, on small folders in the official layouts; only sizes are overridden."""
    root = tmp_path / "data"
    data = {
        "cub200": lambda: write_cub(root, 24, 6),
        "aircraft": lambda: write_aircraft(root, 24, 6),
        "cars": lambda: write_cars(root, 24, 6),
        "isic": lambda: write_ham10000(root) / "images",
    }[name]()
    small = [
        "model.backbone=colour-histogram", "model.weights=", "model.norm=group", "model.image-size=16",
        "train.device=cpu",
    ]  # fmt: skip
    outcome = compare(
        ROOT / "benchmarks/scenarios" / f"{name}.toml",
        tmp_path / "out",
        Request(data, small, 1, "dllp_bag4_seed0_pooled"),
    )
    (row,) = outcome.table["rows"]
    assert (row["method"], row["bag_size"]) == ("dllp", 4)
    assert len(outcome.table["missing"]) > 40
    (site,) = site_folders(next((tmp_path / "out/data").glob("*/iid_1-sites_*_bag4_seed0")))
    assert len((site / "hierarchy.csv").read_text().splitlines()) == leaves + 1
    assert len((site / "manifest.csv").read_text().splitlines()) in (train + 1, train)


@pytest.mark.slow
def test_killed_after_the_first_cell_the_same_command_finishes(scenario: Write, tmp_path: Path) -> None:
    """Real processes: SIGKILL when the first result is there, then the command again."""
    out = tmp_path / "out"
    command = [
        sys.executable, "-P", "-c", "from deploy.cli.main import main; main()",
        "compare", str(scenario(TWO, passes="8")), "--out", str(out), "--jobs", "1", "--json",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        until = time.monotonic() + PATIENCE
        while not results(out):
            assert time.monotonic() < until
            assert killed.poll() is None
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
    before = results(out)
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert [row["method"] for row in table["rows"]] == ["first", "second"]
    assert results(out)["first_bag8_seed0_pooled"] == before["first_bag8_seed0_pooled"]
    for row in table["rows"]:
        assert row["memory_mb"] > 100, "torch's own process"
        assert row["overhead_seconds"] > 0
