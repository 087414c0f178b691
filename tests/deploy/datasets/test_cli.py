"""`fedbags bags build`: options reach the build, the report is readable as table and as JSON."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from client.data.bags import BagStore
from common.errors import UserError
from deploy.cli.bags import app


def build(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["build", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_synthetic_sites_by_command(tmp_path: Path) -> None:
    options = ["--source", "synthetic", "--sites", "2", "--images-per-site", "40", "--image-size", "16"]
    text = build(*options, "--bag-size", "8", "--out", str(tmp_path / "table"))
    assert "hospital-1" in text
    assert "Note: No patient" in text
    text = build(*options, "--bag-size", "8", "--json", "--out", str(tmp_path / "json"))
    report = json.loads(text)
    assert [site["bags"] for site in report["sites"]] == [5, 5]
    assert len(BagStore.open(tmp_path / "json/hospital-2", 16)) == 5


def test_an_archive_whose_groups_keep_within_sites(tmp_path: Path) -> None:
    labels = np.arange(64) % 2
    np.savez(
        tmp_path / "x.npz", x=np.zeros((64, 8, 8), np.uint8), y1=labels, is_test=np.zeros(64, np.bool_),
        names1=["a", "b"], group=np.arange(64) // 4,
    )  # fmt: skip
    options = ["--source", "archive", "--images", str(tmp_path / "x.npz"), "--sites", "2", "--json"]
    most = {
        groups: json.loads(
            build(*options, "--bag-size", "4", "--groups", groups, "--out", str(tmp_path / groups))
        )["max_bags_per_group"]
        for groups in ("bags", "sites")
    }
    assert most["bags"] == 1
    assert most["sites"] > 1


def test_bad_rows_with_and_without_skip_bad(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    rows = ["image,diagnosis_1,ward,split"]
    for index in range(20):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        rows.append(f"{index}.png,{'ab'[index % 2]},{index % 2},{'test' if index > 15 else 'train'}")
    rows.append("missing.png,a,0,train")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels.csv")]
    options += ["--split-column", "split", "--group-column", "ward", "--sites", "1", "--bag-size", "4"]
    options += ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"labels.csv, row 22: 'missing.png': no such image"):
        build(*options)
    assert not (tmp_path / "out").exists()
    assert "1 bad row(s) left out" in build(*options, "--skip-bad").replace("\n", " ")
    assert (tmp_path / "out/quarantine.csv").is_file()


def test_levels_fold_case_and_missing_groups_reach_the_sources(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    rows = ["image;diagnosis_1;diagnosis_2;patient"]
    for index in range(16):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
        rows.append(f"{index};{['a', 'b', 'B', 'a'][index % 4]};;{'p' if index < 8 else ''}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = ["--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels.csv"), "--sites", "1"]
    options += ["--bag-size", "4", "--group-column", "patient", "--out", str(tmp_path / "out")]
    given: list[str] = []
    for more, missing in (
        (["--levels", "1"], "with --levels 1"),
        (["--fold-case"], "--fold-case"),
        (["--missing-groups", "alone"], "--missing-groups alone"),
    ):
        with pytest.raises(UserError, match=missing):
            build(*options, *given)
        assert not (tmp_path / "out").exists()
        given += more
    text = " ".join(build(*options, *given).split())
    assert "16 of 16 images used" in text
    assert "4 label(s) were joined with others: 'b' (4)." in text
    assert "8 image(s) without patient are each a group of its own" in text
    for source, option in (("folders", "--levels"), ("cub", "--fold-case"), ("archive", "--fold-case")):
        value = ["1"] if option == "--levels" else []
        with pytest.raises(UserError, match=f"--source {source} does not read {option}"):
            build("--source", source, "--images", str(tmp_path), option, *value, "--out", str(tmp_path / "x"))


def test_the_help_teaches_and_loads_nothing_heavy() -> None:
    assert "fedbags bags build --source table" in build("--help")
    code = "import sys, deploy.cli.bags; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
