"""The short mark of docs/benchmarks.md, on real images: LHFGLP does not fall below plain matching."""

from pathlib import Path

import pytest

from deploy.compare.run import Request, compare

ROOT = Path(__file__).parents[3]
SHORT = ROOT / "benchmarks" / "short.toml"
SIGNS = ROOT.parent / "shared" / "data" / "gtsrb.npz"
PASSES = 4
CHANCE = 1 / 43

with_signs = pytest.mark.skipif(
    not SIGNS.exists(), reason="the traffic signs (gtsrb.npz) are not beside this checkout"
)


@with_signs
@pytest.mark.usefixtures("in_this_process", "no_pictures")
def test_lhfglp_learns_real_signs_from_bags(tmp_path: Path) -> None:
    """The twin for continuous integration: small images and few of them (0.076 at the leaf, seed 0)."""
    text = SHORT.read_text(encoding="utf-8")
    for usual, small in (
        ('source = "archive"', 'source = "archive"\nlimit = 2400'),
        ("images-per-step = 64", "images-per-step = 32"),
        ("model.image-size = 32", "model.image-size = 16"),
    ):
        assert usual in text
        text = text.replace(usual, small)
    (tmp_path / "small.toml").write_text(text, encoding="utf-8")
    outcome = compare(
        tmp_path / "small.toml", tmp_path / "out", Request(data=SIGNS, passes=PASSES, only="lhfglp_*"), jobs=1
    )
    assert not outcome.failed
    (row,) = outcome.table["rows"]
    assert row["levels"][-1]["accuracy"] > 2 * CHANCE


@pytest.mark.slow
@with_signs
def test_lhfglp_is_above_dllp_at_the_leaf(tmp_path: Path) -> None:
    for method in ("lhfglp", "dllp"):
        outcome = compare(SHORT, tmp_path, Request(passes=PASSES, only=f"{method}_*"), jobs=1)
        assert not outcome.failed
    leaf = {row["method"]: row["levels"][-1] for row in outcome.table["rows"]}
    assert leaf["lhfglp"]["accuracy"] > leaf["dllp"]["accuracy"]
    assert leaf["lhfglp"]["accuracy"] > 2 * CHANCE  # far from chance, so that the order means something
