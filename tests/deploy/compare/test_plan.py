"""Which cells are done, go on or run anew."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.compare.plan import (
    _ORDER,
    RESULT,
    Order,
    State,
    _differences,
    _identity,
    plan,
    told,
)
from deploy.compare.scenario import Cell, Context, Scenario, expand

Write = Callable[..., Path]


@pytest.fixture
def cell(scenario: Write) -> Cell:
    """One pooled cell."""
    return expand(Scenario.load(scenario()), Context())[0]


def order(cell: Cell, runs: Path, digest: str = "d") -> Path:
    flat = cell.config.to_flat()
    Order(row={}, identity=_identity(cell, digest), config=flat, test="").save(runs / cell.name)
    return runs / cell.name


def test_a_cell_is_done_with_a_result_of_the_same_identity(cell: Cell, tmp_path: Path) -> None:
    assert plan(cell, tmp_path, "d").state is State.NEW
    run = order(cell, tmp_path)
    assert plan(cell, tmp_path, "d").state is State.STOPPED
    (run / RESULT).write_text("{}")
    assert plan(cell, tmp_path, "d").state is State.DONE


def test_what_makes_it_another_cell_is_told(cell: Cell, tmp_path: Path) -> None:
    run = order(cell, tmp_path)
    (run / RESULT).write_text("{}")
    other = replace(cell, config=cell.config.with_changes({"loss.coarse-weight": 0.7}))
    planned = plan(other, tmp_path, "d")
    assert planned.state is State.CHANGED
    assert planned.differences == ("loss.coarse-weight: was 0.1, is 0.7",)
    assert plan(cell, tmp_path, "e").differences == ('data.digest: was "d", is "e"',)
    drawn = replace(cell, division=replace(cell.division, bags="similarity"))
    assert plan(drawn, tmp_path, "d").differences == ('data.bags: was "random", is "similarity"',)


def test_where_and_on_what_a_run_is_done_does_not_count(cell: Cell, tmp_path: Path) -> None:
    order(cell, tmp_path)
    places = {"run-dir": "/elsewhere", "sites-dir": "/x", "train.device": "cpu"}
    moved = replace(cell, config=cell.config.with_changes(places))
    assert plan(moved, tmp_path, "d").state is State.STOPPED


def test_of_the_weights_file_the_name_counts(cell: Cell, tmp_path: Path) -> None:
    def with_weights(path: str) -> Cell:
        return replace(cell, config=cell.config.with_changes({"model.weights": path}))

    run = order(with_weights("/a/net.pth"), tmp_path)
    assert plan(with_weights("/a/net.pth"), tmp_path, "d").state is State.STOPPED
    moved = plan(with_weights("/b/net.pth"), tmp_path, "d")
    assert moved.state is State.CHANGED, "a run cannot go on with another file"
    assert moved.differences == ('model.weights: was "/a/net.pth", is "/b/net.pth"',)
    (run / RESULT).write_text("{}")
    assert plan(with_weights("/b/net.pth"), tmp_path, "d").state is State.DONE
    assert plan(with_weights("/b/other.pth"), tmp_path, "d").state is State.CHANGED


def test_a_key_that_only_one_code_has_is_a_difference(cell: Cell) -> None:
    now = _identity(cell, "d")
    before = {key: value for key, value in now.items() if key != "loss.sparsity"}
    assert _differences(before, now) == ("loss.sparsity: was unknown, is 0.0001",)
    assert _differences(now | {"loss.gone": 1}, now) == ("loss.gone: was 1, is unknown",)
    assert _differences(now, now) == ()


def test_a_folder_without_a_readable_order(cell: Cell, tmp_path: Path) -> None:
    (tmp_path / cell.name).mkdir()
    assert plan(cell, tmp_path, "d").state is State.CHANGED
    (tmp_path / cell.name / _ORDER).write_text(json.dumps({"row": 3}))
    assert plan(cell, tmp_path, "d").differences == ("it holds no readable order.json",)


def test_long_lists_are_cut() -> None:
    assert told(("a", "b")) == "a; b"
    assert told(tuple("abcde")) == "a; b; c; and 2 more"
