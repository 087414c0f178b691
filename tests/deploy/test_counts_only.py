"""Hospitals with counts only are trained end to end, to the model that labelled tables give, bit for bit."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "counts_only.py"
SMALL = ["rounds=1", "model.image-size=16", "model.atoms-per-class=2"]


@pytest.fixture
def counts_only() -> ModuleType:
    spec = importlib.util.spec_from_file_location("counts_only", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts_only_gives_the_model_of_labelled_tables_bit_for_bit(
    counts_only: ModuleType, sites_dir: Path, tmp_path: Path
) -> None:
    result = counts_only.compare(sites_dir, tmp_path / "work", SMALL, workers=0)
    assert result["same_bags"]
    assert result["same_model"]
    assert result["test_tables_of_counts"] == 0
    assert result["accuracy"]["counts"] == result["accuracy"]["labels"] != {}
    leaves = (sites_dir / "hospital-1/hierarchy.csv").read_text().splitlines()[1].split(",")[-1]
    for path in (tmp_path / "work/sites").rglob("*"):
        text = path.read_bytes() if path.is_file() and ".cache" not in path.parts else b""
        assert leaves.encode() not in text or path.name in ("bags.csv", "hierarchy.csv"), path
