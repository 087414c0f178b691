"""Scores of a hand-made confusion, and the table of hand-made rows, down to their texts."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.hierarchy import Hierarchy
from deploy.compare.plots import _at_usual_size, draw_plots
from deploy.compare.scoring import _best_readings
from deploy.compare.table import Row, Statistic, _to_csv, _to_markdown, summarise, write_table

TREE = Hierarchy.from_rows(["kind", "leaf"], [("a", "a1"), ("a", "a2"), ("b", "b1")])


def counts(*levels: list[list[int]]) -> list[np.ndarray]:
    return [np.array(level, dtype=np.int64) for level in levels]


def test_every_level_is_scored_by_its_best_reading() -> None:
    """Ten images: six of a1, one of a2, three of b1."""
    leaf = [[5, 0, 1], [1, 0, 0], [1, 0, 2]]
    worse = [[6, 0, 0], [1, 0, 0], [3, 0, 0]]
    kind, weak = [[6, 1], [1, 2]], [[7, 0], [3, 0]]
    rows = _best_readings(
        TREE, {"argmax": counts(weak, leaf), "path": counts(weak, worse), "rolled-up": counts(kind, worse)}
    )
    assert [(row["name"], row["reading"]) for row in rows] == [("kind", "rolled-up"), ("leaf", "argmax")]
    assert rows[0]["accuracies"] == {"argmax": 0.7, "path": 0.7, "rolled-up": 0.8}
    assert rows[0]["accuracy"] == 0.8
    assert rows[0]["balanced_accuracy"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert rows[0]["macro_f1"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert rows[1]["accuracy"] == 0.7
    assert rows[1]["balanced_accuracy"] == pytest.approx((5 / 6 + 0 + 2 / 3) / 3)
    assert rows[1]["macro_f1"] == pytest.approx((10 / 13 + 0 + 4 / 6) / 3)


def test_of_equal_readings_the_first_is_taken() -> None:
    leaf, kind = [[6, 0, 0], [0, 1, 0], [0, 0, 3]], [[7, 0], [0, 3]]
    rows = _best_readings(TREE, {"argmax": counts(kind, leaf), "path": counts(kind, leaf)})
    assert {row["reading"] for row in rows} == {"argmax"}


def row(method: str = "m", bag_size: int = 8, seed: int = 0, setting: str = "pooled", **more: Any) -> Row:
    """A row whose leaf accuracy is ``leaf`` and whose kind is 0.1 better."""
    leaf = more.pop("leaf", 0.5)
    figures = [{"accuracy": a, "balanced_accuracy": a - 0.1, "macro_f1": a - 0.2} for a in (leaf + 0.1, leaf)]
    levels = [
        {"name": name, **level, "reading": "path"} for name, level in zip(TREE.levels, figures, strict=True)
    ]
    usual = {"passes": 4, "seconds": 100.0, "memory_mb": 900.0, "proportion_l1": 0.3, "commit": "c1"}
    return {
        "method": method, "bag_size": bag_size, "seed": seed, "setting": setting, "levels": levels, **usual,
        **more,
    }  # fmt: skip


def test_means_and_deviations_are_over_seeds() -> None:
    (line,) = summarise([row(seed=0, leaf=0.4), row(seed=1, leaf=0.5), row(seed=2, leaf=0.6, seconds=160.0)])
    assert line.seeds == 3
    leaf = line.levels["leaf"]["accuracy"]
    assert leaf.mean == pytest.approx(0.5)
    assert leaf.deviation == pytest.approx(0.1)
    assert leaf.text(3) == "0.500 ±0.100"
    assert line.costs["seconds"].mean == pytest.approx(120)
    assert Statistic.of([0.25]).text(2) == "0.25", "one value has no deviation"


def test_local_only_is_told_by_its_mean_and_its_best_site() -> None:
    sites = {0: {"site-1": 0.2, "site-2": 0.4}, 1: {"site-1": 0.7, "site-2": 0.1}}
    rows = [
        row(setting="local-only", seed=seed, site=site, leaf=leaf)
        for seed, of_seed in sites.items()
        for site, leaf in of_seed.items()
    ]
    mean, best = summarise(rows)
    assert (mean.setting, best.setting) == ("local-only, mean of 2 sites", "local-only, best site")
    assert (mean.seeds, best.seeds) == (2, 2)
    assert mean.levels["leaf"]["accuracy"].mean == pytest.approx((0.3 + 0.4) / 2)
    assert best.levels["leaf"]["accuracy"].mean == pytest.approx((0.4 + 0.7) / 2)


def test_a_seed_that_lacks_a_site_is_no_mean_over_sites() -> None:
    sites = [(0, "site-1", 0.2), (0, "site-2", 0.4), (1, "site-1", 0.9)]
    rows = [row(setting="local-only", seed=seed, site=site, leaf=leaf) for seed, site, leaf in sites]
    mean, best = summarise(rows)
    assert (mean.seeds, best.seeds) == (1, 1)
    assert mean.levels["leaf"]["accuracy"].mean == pytest.approx(0.3)


def test_figures_that_a_row_lacks_are_left_out() -> None:
    (line,) = summarise([row(proportion_l1=None)])
    assert "proportion_l1" not in line.costs
    assert "| m | 8 | 1 | 0.600 | 0.500 | - | 100 | 900 | 4 |" in _to_markdown(
        "", [row(proportion_l1=None)], [], []
    )


def test_the_csv_has_every_row_and_figure() -> None:
    text = _to_csv([row(), row(setting="local-only", site="site-1")])
    first, second = csv.DictReader(io.StringIO(text))
    assert first["leaf.macro_f1"] == "0.3"
    assert first["kind.reading"] == "path"
    assert first["site"] == ""
    assert second["site"] == "site-1"


def test_the_files(tmp_path: Path) -> None:
    rows = [row(), row(method="n", commit="c2")]
    content = write_table(tmp_path, "Title", rows, ["gone"])
    assert json.loads((tmp_path / "table.json").read_text()) == content
    assert content["commit"] == "c1, c2"
    assert content["rows"] == rows
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("# Title\n")
    assert "1 cell(s) are not in it: gone" in text
    assert "## Pooled" in text
    assert "Code: c1, c2." in text


# --- plots ---------------------------------------------------------------------------------------------


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    rows = [row(method, 16, seed, leaf=0.4 + 0.1 * seed) for method in ("m", "n") for seed in (0, 1)]
    drawn = draw_plots(summarise(rows), "T", tmp_path)
    assert {path.name for path in drawn} == {
        "accuracy.png",
        "balanced_accuracy.png",
        "macro_f1.png",
        "cost.png",
    }
    rows += [row("m", size) for size in (4, 8)] + [row("bound", 1)]
    rows += [row("m", 16, setting="federated")]
    rows += [row("m", 16, setting="local-only", site=f"site-{number}") for number in (1, 2)]
    drawn = draw_plots(summarise(rows), "T", tmp_path)
    extra = {
        "bag_sizes.png", "settings.png", "accuracy_federated.png", "accuracy_local_only_best_site.png",
        "accuracy_local_only_mean_of_2_sites.png",
    }  # fmt: skip
    assert extra <= {path.name for path in drawn}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_bars_are_of_the_usual_bag_size_and_of_single_images() -> None:
    lines = summarise([row("m", 16), row("n", 16), row("m", 8), row("bound", 1)])
    assert [(line.method, line.bag_size) for line in _at_usual_size(lines)] == [
        ("m", 16),
        ("n", 16),
        ("bound", 1),
    ]
