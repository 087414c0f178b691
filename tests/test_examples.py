"""Every program in examples/ runs, and ``import fedbags`` offers what docs/python.md lists."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import fedbags

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def private_run(sites_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> fedbags.Run:
    settings = {
        "rounds": 1, "model.image-size": 16, "model.atoms-per-class": 2, "federation.sites": 3,
        "dp.delta": 1e-3, "dp.expected-bags": 3.0, "dp.steps-per-round": 1,
    }  # fmt: skip
    out = tmp_path_factory.mktemp("private") / "run"
    return fedbags.simulate(out, sites=sites_dir, epsilon=8.0, settings=settings, workers=0)


def test_hospitals_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("simulate_hospitals").main(str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert fedbags.load_run(tmp_path / "run").summary["rounds"] == 2


def test_hospitals_are_built_from_class_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(48):
        folder = tmp_path / "images" / "ab"[number % 2] / f"leaf-{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 12, 3), 5 * number, np.uint8)).save(folder / f"{number}.png")
    load("build_hospitals").main(str(tmp_path / "images"), str(tmp_path / "SITES"))
    said = capsys.readouterr().out
    assert re.search(r"site-1: \d+ bags of [\d.]+ images", said)
    assert "what leaves: label counts (total)" in said
    assert len(list((tmp_path / "SITES").glob("site-*/bags.csv"))) == 2


def test_synthetic_hospitals_are_built_a_bag_per_session(tmp_path: Path) -> None:
    hospitals = fedbags.SyntheticHospitals(2, images_per_site=32, image_size=16, test_images_per_site=8)
    steps: list[tuple[int, int]] = []
    built = fedbags.build_sites(
        tmp_path / "SITES", hospitals, progress=lambda done, total: steps.append((done, total))
    )
    assert [(site["name"], site["bags"]) for site in built["sites"]] == [("hospital-1", 2), ("hospital-2", 2)]
    assert steps[-1] == (160, 160)
    again = fedbags.build_sites(tmp_path / "small", hospitals, fedbags.Division(bag_size=8, sites=1))
    assert [(site["name"], site["bags"]) for site in again["sites"]] == [("site-1", 8)]
    with pytest.raises(fedbags.UserError, match="exists already"):
        fedbags.build_sites(tmp_path / "SITES", hospitals)
    with pytest.raises(fedbags.UserError, match="unknown source 'jpeg'"):
        fedbags.build_sites(tmp_path / "x", fedbags.SourceOptions("jpeg", images=tmp_path))


def test_a_clinic_predicts(private_run: fedbags.Run, capsys: pytest.CaptureFixture[str]) -> None:
    load("predict_in_a_clinic").main(str(private_run.path))
    first, second, refused = capsys.readouterr().out.splitlines()
    assert first.startswith("0: ")
    assert " > " in second
    assert "refused: 0: this is no image" in refused


def test_a_backbone_of_ones_own_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.parts._registered", {})
    load("own_backbone").main(str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert re.search(r"backbone patches of own_backbone, source [0-9a-f]{12}\n", said)
    assert re.search(r"leaf accuracy 0\.\d{3}", said)


def test_a_report_is_read(
    private_run: fedbags.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load("read_a_report").main(str(private_run.path), str(tmp_path / "report"))
    said = capsys.readouterr().out
    assert len(re.findall(r"epsilon \d\.\d+ at delta 0\.001, of one bag", said)) == 3


def test_every_example_has_a_test_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    assert len(EXAMPLES) >= 4
    for path in EXAMPLES:
        assert f'load("{path.stem}")' in here, path


def test_images_in_memory_and_on_disk_are_classified_alike(private_run: fedbags.Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (memory,) = private_run.predict([pixels])
    (disk,) = private_run.predict([tmp_path / "a.png"])
    assert memory["levels"] == disk["levels"]
    assert memory["path"] == disk["path"]
    with pytest.raises(TypeError, match="paths, or images"):
        private_run.predict([pixels, tmp_path / "a.png"])


def test_the_public_names_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    listed = {
        name
        for row in re.findall(r"^\| (`\w+`.*?) \|", page, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    assert listed == set(fedbags.__all__)
    assert len(fedbags.__all__) <= 25
    for name in fedbags.__all__:
        assert getattr(fedbags, name).__doc__, name
    assert set(fedbags.__all__) <= set(dir(fedbags))
    with pytest.raises(AttributeError, match="no attribute 'serve'"):
        _ = fedbags.serve


def test_importing_loads_nothing_heavy() -> None:
    code = "import fedbags, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "numpy", "deploy", "pydantic", "typer"} & set(done.stdout.split())


@pytest.fixture
def counted(tmp_path: Path) -> Callable[..., dict]:
    def build(count: int) -> dict:
        bag = tmp_path / "images" / "week-1"
        bag.mkdir(parents=True, exist_ok=True)
        for number in range(4):
            Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(bag / f"{number}.png")
        (tmp_path / "counts.csv").write_text(f"bag,label,count\nweek-1,a,{count}\nweek-1,b,1\n")
        (tmp_path / "hierarchy.csv").write_text("type,leaf\nx,a\ny,b\n")
        return fedbags.build_site(
            tmp_path / "images", tmp_path / "counts.csv", tmp_path / "hierarchy.csv",
            name="north", out=tmp_path / "SITES",
        )  # fmt: skip

    return build


def test_a_site_is_built_from_counts(counted: Callable[..., dict], tmp_path: Path) -> None:
    counted(3)
    assert fedbags.check_site(tmp_path / "SITES" / "north", image_size=16)["bags"]
    with pytest.raises(fedbags.UserError):
        counted(3)


def test_counts_that_do_not_add_up_write_nothing(counted: Callable[..., dict], tmp_path: Path) -> None:
    with pytest.raises(fedbags.DataError, match="week-1"):
        counted(2)
    assert not (tmp_path / "SITES" / "north").exists()
