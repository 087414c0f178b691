"""What the commands around runs print: nothing cut at 80 columns, presets listed, two runs side by side."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args

from client.site import SiteConfig, site_folders
from common.config import RunConfig
from common.errors import UserError
from deploy.configuration import (
    RunRequest,
    compose,
    config_rows,
    preset_rows,
    preset_values,
    print_config,
    print_preset,
    say_presets,
)
from deploy.runs.reading import read_summary
from deploy.runs.show import (
    _trivial_accuracies,
    compare_runs,
    list_runs,
    print_comparison,
    print_runs,
    print_summary,
    share_text,
)
from deploy.simulation.simulate import run_engine

PRESETS = Path(__file__).parents[2] / "common" / "presets"


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def fedbags(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'fedbags'; from fedbags import main; main()"
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def make_run(folder: Path, accuracy: float, epsilon: float | None = None, **changes: Any) -> Path:
    """A finished run of two levels and one site, as the server leaves it."""
    folder.mkdir(parents=True)
    config = RunConfig().with_changes({"run-dir": str(folder), **changes})
    (folder / "config.toml").write_text(config.to_toml())
    level = {"classes": 2, "balanced_accuracy": 0.5, "macro_f1": 0.4, "consistent_accuracy": 0.5}
    summary = {
        "name": "fedbags", "method": "lhfglp", "rounds": 3, "selected_round": 3, "stopped_early": None,
        "sites": 1, "seconds": 12.5, "bags": [], "left_out": [],
        "levels": [{"name": name, "accuracy": accuracy, **level} for name in ("top", "leaf")],
        "per_site": {"a": {"bags": 4, "release": "total", "epsilon": epsilon, "levels": []}},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "confusion.json").write_text(
        json.dumps({"argmax": [[[6, 2], [1, 1]], [[3, 2], [4, 1]]], "path": []})
    )
    return folder


def test_two_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_run(tmp_path / "a", 0.5)
    second = make_run(tmp_path / "b", 0.75, 7.5, **{"rounds": 20, "dp.epsilon": 8.0})
    found = compare_runs(first, second)
    assert {row["key"]: row["values"] for row in found["differences"]} == {
        "rounds": [12, 20], "dp.epsilon": [0.0, 8.0]
    }  # fmt: skip
    assert [(level["level"], level["accuracy"]) for level in found["levels"]] == [
        ("top", [0.5, 0.75]), ("leaf", [0.5, 0.75])
    ]  # fmt: skip
    assert found["epsilon"] == [None, 7.5]
    assert found["seconds"] == [12.5, 12.5]
    print_comparison(found)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 or str(tmp_path) in line for line in printed.splitlines())
    for word in ("dp.epsilon", "not private", "7.500", "0.750", "leaf, accuracy"):
        assert word in printed
    assert compare_runs(first, first)["differences"] == []
    with pytest.raises(UserError, match="no run folder"):
        compare_runs(first, tmp_path / "none")
    told = fedbags("runs", "compare", str(first), str(second), "--json")
    assert json.loads(told.stdout) == found


def test_accuracies_stand_beside_what_the_most_frequent_class_gets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", 0.5)
    assert _trivial_accuracies(run) == [0.8, 0.5]
    print_summary(read_summary(run), run)
    printed = capsys.readouterr().out
    assert "most frequent class would get: top 0.800, leaf 0.500" in printed
    assert "drawn hospitals" not in printed
    demo = make_run(tmp_path / "demo", 0.42, **{"sites-dir": str(tmp_path / "demo" / "sites")})
    print_summary(read_summary(demo), demo)
    assert "drawn hospitals are small" in capsys.readouterr().out
    (run / "confusion.json").unlink()
    assert _trivial_accuracies(run) == []


SUPPRESSED = {"cells": 14, "below": 5, "accuracy": [0.612, 0.681], "consistent_accuracy": [0.3, 0.5]}


def suppress_leaves(run: Path) -> None:
    """Let the summary say that small counts of leaves were suppressed; of the top, none."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    summary["levels"][1]["suppressed"] = SUPPRESSED
    summary["per_site"]["a"]["levels"] = summary["levels"]
    (run / "summary.json").write_text(json.dumps(summary))


def test_an_accuracy_with_suppressed_counts_is_told_as_its_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = make_run(tmp_path / "a", 0.512), make_run(tmp_path / "b", 0.75)
    suppress_leaves(run)
    print_summary(read_summary(run), run)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = [line.split("│") for line in lines if line.count("│") == 8]
    top, leaf = (next(row for row in rows if name in row[1]) for name in ("top", "leaf"))
    assert [cell.strip() for cell in top[3:8]] == ["0.512", "0.500", "0.400", "0.500", "1.0"]
    assert [cell.strip() for cell in leaf[3:8]] == ["0.61-0.69", "-", "-", "0.30-0.50", "1.2-1.4"]
    assert "leaf: 14 cells below 5 suppressed" in printed
    assert "top: 14" not in printed
    assert "would get (of the cells shown):" in printed
    (site,) = [line for line in lines if "not private" in line]
    assert [cell.strip() for cell in site.split("│")[-3:-1]] == ["0.512", "0.61-0.69"]
    (row, _) = listed = list_runs(tmp_path)
    assert (row["leaf_accuracy"], row["leaf_accuracy_bounds"]) == (None, [0.612, 0.681])
    print_runs(listed, tmp_path)
    assert ["0.61-0.69" in line for line in capsys.readouterr().out.splitlines() if "lhfglp" in line] == [
        True, False
    ]  # fmt: skip
    found = compare_runs(run, other)
    assert found["levels"][1] == {
        "level": "leaf", "accuracy": [None, 0.75], "balanced_accuracy": [None, 0.5], "macro_f1": [None, 0.4],
        "accuracy_bounds": [[0.612, 0.681], None],
    }  # fmt: skip
    print_comparison(found)
    assert "0.61-0.69" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bounds", "text"),
    [([0.0, 1.0], "0.00-1.00"), ([0.6149, 0.6801], "0.61-0.69"), ([0.25, 0.25], "0.25-0.25")],
)
def test_bounds_are_rounded_outwards(bounds: list[float], text: str) -> None:
    assert share_text(0.5, bounds) == text


@pytest.mark.parametrize(
    ("level", "cells"),
    [
        ({"kl": 0.5, "l1": 0.25}, ["0.500", "0.250"]),
        ({"kl": 0.5}, ["0.500", "withheld"]),
        ({"l1": 0.25}, ["withheld (L1 is noised)", "0.250"]),
    ],
)
def test_what_sites_withhold_of_held_back_bags_is_said(
    level: dict[str, float], cells: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", 0.5)
    summary = json.loads((run / "summary.json").read_text()) | {"bags": [{"level": "only", **level}]}
    (run / "summary.json").write_text(json.dumps(summary))
    print_summary(read_summary(run))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "only" in line]
    assert [cell.strip() for cell in line.split("│")[2:4]] == cells


def test_a_run_of_sites_with_the_terms_of_a_real_one_is_told_whole(
    sites_dir: Path, small_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = tmp_path / "sites"
    shutil.copytree(sites_dir, sites)
    for site in site_folders(sites):
        own = SiteConfig.load(site)
        strict = own.policy.terms(simulated=False)
        policy = {"metrics": tuple(sorted(strict.metrics)), "minimum_cell_size": strict.minimum_cell_size}
        own.model_copy(update={"policy": own.policy.model_copy(update=policy)}).save(site)
    run_engine(small_config({"sites-dir": str(sites)}), "local", workers=0)
    summary = read_summary(tmp_path / "run")
    assert [sorted(level) for level in summary.to_dict()["bags"]] == [["kl", "level"]] * len(summary.levels)
    assert summary.levels[-1].suppressed.below == 5
    print_summary(summary, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "below 5 suppressed" in printed
    assert "withheld" in printed


@pytest.mark.parametrize("name", ["fedbags-20261130-112233", "a-name-that-somebody-made-too-long-" * 3])
def test_a_runs_name_is_not_cut(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {
        "run": name, "rounds": 100, "state": "stopped early", "method": "dllp-hierarchical", "sites": 12,
        "seconds": 43210.0, "leaf_accuracy": 0.4215,
    }  # fmt: skip
    print_runs([row], Path("runs"))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert all(len(line) <= 80 for line in lines)
    if len(name) < 30:
        assert any(name in line and "0.421" in line for line in lines)
    else:
        first = lines[3].split()[0]
        assert "".join(line.split()[0] for line in lines[3:] if line.strip()) == name, first


def test_keys_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    print_config(config_rows())
    for preset in ("dp", "sites-dir"):
        print_preset(preset_rows(preset), preset)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    starts = {line.split()[0] for line in lines if line.strip()}
    assert {row["key"] for row in config_rows()} <= starts


def test_every_key_says_what_it_means_and_which_words_it_takes() -> None:
    rows = {row["key"]: row for row in config_rows()}
    assert [key for key, row in rows.items() if not row["meaning"]] == []
    assert rows["train.optimiser"]["bounds"] == "sgd | adamw"
    assert rows["federation.transport"]["bounds"] == "float32 | float16"


def test_every_setting_of_a_preset_is_listed_with_its_reason() -> None:
    rows = {row["key"]: row for row in json.loads(fedbags("config", "--preset", "dp", "--json").stdout)}
    assert len(rows) == 13
    assert all(row["why"] and row["default"] != row["preset"] for row in rows.values())
    unknown = fedbags("config", "--preset", "magic")
    assert unknown.returncode == 2
    assert "there are dp, shared-noise, sites-dir" in unknown.stderr


def test_a_preset_counts_where_an_option_or_its_name_asks_for_it(tmp_path: Path) -> None:
    usual, private = RunConfig(), {**preset_values("dp"), "dp.epsilon": 8.0}
    assert compose(RunRequest()) == usual
    assert compose(RunRequest({"dp.epsilon": 8.0})) == usual.with_changes(private)
    assert compose(RunRequest({"dp.epsilon": 8.0}, ["rounds=7"])) == usual.with_changes(
        {**private, "rounds": 7}
    )
    assert compose(RunRequest({}, presets=["dp"])) == usual.with_changes(preset_values("dp"))
    file = tmp_path / "config.toml"
    file.write_text("seed = 3")
    from_file = usual.with_changes({"seed": 3, "dp.epsilon": 8.0})
    assert compose(RunRequest({"dp.epsilon": 8.0}, (), file)) == from_file
    assert compose(RunRequest({"dp.epsilon": 8.0}, (), file, ["dp"])) == from_file.with_changes(private)


def test_flower_reads_the_file_of_a_preset_itself() -> None:
    assert parse_config_args([str(PRESETS / "dp.toml")]) == preset_values("dp")


def test_what_a_preset_changes_is_said_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig().with_changes({**preset_values("dp"), "dp.epsilon": 8.0, "rounds": 7})
    say_presets(config, RunRequest({"dp.epsilon": 8.0, "rounds": 7}))
    told = capsys.readouterr().err.replace("\n", " ")
    assert "fedbags config --preset dp" in told
    assert "model.features=colour-histogram" in told
    assert "rounds=" not in told
    say_presets(RunConfig(), RunRequest())
    assert capsys.readouterr().err == ""


def test_the_version_is_told() -> None:
    result = fedbags("--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("fedbags 0.")
    assert "flwr" in result.stdout


def test_a_shell_can_complete_commands() -> None:
    shown = fedbags("--show-completion", "bash")
    assert "_FEDBAGS_COMPLETE" in shown.stdout, shown.stderr
    completed = fedbags(_FEDBAGS_COMPLETE="complete_bash", COMP_WORDS="fedbags simu", COMP_CWORD="1")
    assert completed.stdout.split() == ["simulate"]
    assert "--install-completion" in fedbags("--help").stdout
