"""The short mark of docs/benchmarks.md, on real images: LHFGLP does not fall below plain matching."""

from pathlib import Path

import pytest

from deploy.compare.run import compare

ROOT = Path(__file__).parents[3]
SIGNS = ROOT.parent / "shared" / "data" / "gtsrb.npz"
PASSES = 4


@pytest.mark.skipif(not SIGNS.exists(), reason="the traffic signs (gtsrb.npz) are not beside this checkout")
def test_lhfglp_is_above_dllp_at_the_leaf(tmp_path: Path) -> None:
    for method in ("lhfglp", "dllp"):
        outcome = compare(
            ROOT / "benchmarks" / "short.toml", tmp_path, passes=PASSES, only=f"{method}_*", jobs=1
        )
        assert not outcome.failed
    leaf = {row["method"]: row["levels"][-1] for row in outcome.table["rows"]}
    assert leaf["lhfglp"]["accuracy"] > leaf["dllp"]["accuracy"]
    assert leaf["lhfglp"]["accuracy"] > 2 / 43  # far from chance, so that the order means something
