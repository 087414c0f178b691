"""`fedbags predict`: equal to calling the model, and one clear error for everything that is wrong."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.data.images import square, to_rgb, to_tensor
from common.config_tables import ModelConfig
from common.errors import UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.classifier import consistent_prediction, log_probabilities
from common.model.interfaces import Inputs
from common.model.methods import method_names
from common.model.model_file import ModelCard, load_model, save_model
from deploy.api import Run
from deploy.datasets.dicom import to_8_bits
from deploy.runs import pictures
from deploy.runs.predict import Classifier, predict_images, print_predictions, write_csv
from tests.deploy import in_process

TREE = Hierarchy.from_rows(
    ["top", "middle", "leaf"], [["a", "m", "1"], ["a", "m", "2"], ["a", "n", "3"], ["b", "o", "4"]]
)


def make_model(folder: Path, method: str = "lhfglp") -> Path:
    config = ModelConfig(method=method, image_size=32, atoms_per_class=2)
    save_model(folder, build_model(config, TREE, seed=3), ModelCard.describe(config, TREE, round=1))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_model(tmp_path / "run")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """A square, a wide, a grey and a palette image."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 255, (40, 90, 3), dtype=np.uint8))
    pictures = [wide.resize((32, 32)), wide, wide.convert("L"), wide.convert("P")]
    paths = [tmp_path / f"image-{number}.png" for number in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


@pytest.mark.parametrize("method", method_names())
def test_prediction_is_a_direct_model_call(tmp_path: Path, images: list[Path], method: str) -> None:
    run = make_model(tmp_path / "run", method)
    rows = predict_images(run, images, codes=2).rows

    model, _ = load_model(run)
    pixels = [square(to_rgb(Image.open(path)), 32) for path in images]
    with torch.no_grad():
        output = model(Inputs.alone(to_tensor(np.stack(pixels))))
    paths = consistent_prediction(output, TREE).tolist()
    assert [row["image"] for row in rows] == [str(path) for path in images]
    for number, row in enumerate(rows):
        product = 1.0
        for level, log in enumerate(log_probabilities(output)):
            said = row["levels"][level]
            assert said["level"] == TREE.levels[level]
            assert said["class"] == TREE.classes[level][int(log[number].argmax())]
            assert said["probability"] == pytest.approx(float(log[number].exp().max()))
            assert row["path"][level] == TREE.classes[level][paths[number][level]]
            product *= float(log[number, paths[number][level]].exp())
        assert row["path"] in TREE.to_rows()
        assert row["path_probability_product"] == pytest.approx(product)


def test_codes_are_the_largest_and_belong_to_their_class(run: Path, images: list[Path]) -> None:
    (row,) = predict_images(run, images[:1], codes=3).rows
    model, _ = load_model(run)
    with torch.no_grad():
        output = model(Inputs.alone(to_tensor(np.asarray(Image.open(images[0]))[None])))
    for level, told in enumerate(row["codes"]):
        code = output.evidence["codes"][level][0]
        values = [atom["value"] for atom in told["atoms"]]
        assert [abs(value) for value in values] == sorted(map(abs, values), reverse=True)
        assert abs(values[0]) == pytest.approx(float(code.abs().max()))
        for atom in told["atoms"]:
            assert atom["value"] == pytest.approx(float(code[atom["atom"]]))
            assert atom["class"] == TREE.classes[level][atom["atom"] // 2]


def test_without_dictionary_there_are_no_codes(tmp_path: Path, images: list[Path]) -> None:
    run = make_model(tmp_path / "plain", "dllp-hierarchical")
    assert [row["codes"] for row in predict_images(run, images, codes=3).rows] == [[]] * len(images)


def test_evidence_is_given_in_full_by_its_name(run: Path, images: list[Path], tmp_path: Path) -> None:
    model, _ = load_model(run)
    with torch.no_grad():
        codes = model(Inputs.alone(to_tensor(np.asarray(Image.open(images[0]))[None]))).evidence["codes"]
    (row,) = Run(run).predict(images[:1], evidence=["codes"])
    assert list(row["evidence"]["codes"]) == list(TREE.levels)
    for told, code in zip(row["evidence"]["codes"].values(), codes, strict=True):
        assert code is not None
        assert told == pytest.approx(code[0].tolist())
    classifier = Classifier.load(run)
    (in_memory,) = classifier.predict_images([Image.open(images[0])], [str(images[0])], evidence=["codes"])
    assert in_memory == row
    assert "evidence" not in classifier.predict_files(images[:1]).rows[0]
    with pytest.raises(UserError, match="no evidence 'code'; known: codes"):
        classifier.predict_files(images[:1], evidence=["code"])
    with pytest.raises(UserError, match="no evidence 'codes'; known: none"):
        Classifier.load(make_model(tmp_path / "plain", "dllp")).predict_files(images[:1], evidence=["codes"])


def test_every_bad_image_is_listed_at_once(run: Path, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    text = tmp_path / "notes.txt"
    text.write_text("no image", encoding="utf-8")
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = [tmp_path / "missing.png", empty, text, broken]
    with pytest.raises(UserError, match=r"4 of 5 image\(s\) cannot be read") as caught:
        predict_images(run, [images[0], *bad])
    for path in bad:
        assert f"{path}: " in str(caught.value)
    assert str(images[0]) not in str(caught.value)


def test_one_bad_image_does_not_stop_the_others(run: Path, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    alone = predict_images(run, images)
    found = predict_images(run, [images[0], broken, *images[1:]], skip_bad=True)
    assert found.rows == alone.rows
    assert [row.file for row in found.skipped] == [str(broken)]
    with pytest.raises(UserError, match=r"1 of 1 image\(s\) cannot be read"):
        predict_images(run, [broken], skip_bad=True)


def test_every_one_of_many_bad_images_is_listed(run: Path, tmp_path: Path) -> None:
    missing = [tmp_path / f"missing-{number}.png" for number in range(50)]
    with pytest.raises(UserError, match=r"50 of 50") as caught:
        predict_images(run, missing)
    assert all(str(path) in str(caught.value) for path in missing)


def test_a_folder_is_searched_and_hidden_files_are_counted(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    for place in ("a/deep", "b", ".hidden", "@eaDir/x.png", "__MACOSX"):
        (folder / place).mkdir(parents=True)
    wanted = [folder / "a/deep/1.png", folder / "b/2.JPG"]
    for path, source in zip(wanted, images, strict=False):
        Image.open(source).convert("RGB").save(path)
    for place in (".hidden/3.png", "@eaDir/x.png/THUMB.png", "__MACOSX/4.png", "b/._2.png"):
        (folder / place).write_bytes(b"none of the user's")
    for place in ("notes.txt", "README"):
        (folder / place).write_text("no picture")
    found = predict_images(run, [folder, folder / "b", wanted[0]])
    assert [row["image"] for row in found.rows] == [str(path) for path in wanted]
    told = " ".join(found.notes)
    for word in (".hidden", "@eaDir", "__MACOSX", "._*", ".txt"):
        assert word in told


def test_dicom_is_predicted_as_bags_build_reads_it(run: Path, tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    folder = tmp_path / "dicom"
    folder.mkdir()
    source = Path(pydicom.data.get_testdata_file("CT_small.dcm"))
    for name in ("slice.dcm", "1.2.840.113619", "IM000001"):
        shutil.copy(source, folder / name)
    png = tmp_path / "same.png"
    Image.fromarray(to_8_bits(source)).convert("RGB").save(png)
    (expected,) = predict_images(run, [png]).rows
    rows = predict_images(run, [folder]).rows
    assert len(rows) == 3
    for row in rows:
        assert row["path"] == expected["path"]
        for level, other in zip(row["levels"], expected["levels"], strict=True):
            assert level["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_dicom_without_its_extra_says_how_to_install_it(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "IM1"
    file.write_bytes(bytes(128) + b"DICM")
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedbags\[dicom\]'"):
        predict_images(run, [file], skip_bad=True)


def test_missing_run_is_a_user_error(images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="card not found"):
        predict_images(tmp_path / "nowhere", images)


def test_the_table_is_written_whole_or_not_at_all(
    run: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = predict_images(run, images).rows
    target = tmp_path / "out.csv"
    write_csv(target, rows)
    with target.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["image"] for line in lines] == [str(path) for path in images]
    for line, row in zip(lines, rows, strict=True):
        for level, on_path in zip(row["levels"], row["path"], strict=True):
            assert line[level["level"]] == level["class"]
            assert float(line[f"{level['level']}_probability"]) == pytest.approx(
                level["probability"], abs=1e-6
            )
            assert line[f"path_{level['level']}"] == on_path
    before = target.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"):
        write_csv(target, rows)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.glob("out*")] == ["out.csv"]


def assert_a_bad_image_ends_with_2(
    predict: Callable[..., subprocess.CompletedProcess[str]], image: Path, folder: Path
) -> None:
    table, missing = folder / "out.csv", folder / "missing.png"
    refused = predict(image, missing, "--csv", table)
    assert refused.returncode == 2, refused.stderr
    assert str(missing) in refused.stderr
    assert not table.exists()
    done = predict(image, missing, "--csv", table, "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    assert f"left out: {missing}: no such file" in done.stderr
    assert len(json.loads(done.stdout)) == len(table.read_text().splitlines()) - 1 == 1
    wrong = predict(image, "--csv", folder / "none" / "out.csv")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_the_command_ends_with_2_and_writes_nothing_for_a_bad_image(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    predict = partial(in_process.fedbags, "predict", run, cwd=tmp_path)
    assert_a_bad_image_ends_with_2(predict, images[0], tmp_path)


@pytest.mark.slow
def test_a_process_of_the_command_ends_with_2_and_writes_nothing_for_a_bad_image(
    run: Path, images: list[Path], tmp_path: Path
) -> None:
    def predict(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "fedbags", "predict", run, *arguments]
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)

    assert_a_bad_image_ends_with_2(predict, images[0], tmp_path)


@pytest.mark.parametrize("method", ["lhfglp", "dllp"])
def test_table_names_every_level_and_leaves_brackets_alone(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str], method: str
) -> None:
    run = make_model(tmp_path / "run", method)
    image = images[0].rename(tmp_path / "[red]x.png")
    for codes in (0, 1):
        rows = predict_images(run, [image], codes).rows
        rows[0]["image"] = image.name
        print_predictions(rows)
        printed = capsys.readouterr().out
        assert "[red]x.png" in printed
        assert all(level in printed for level in TREE.levels)
        assert ("strongest" in printed) == (codes > 0 and method == "lhfglp")


def test_the_table_fits_80_columns_and_cuts_nothing(
    run: Path, images: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = predict_images(run, images[:1]).rows
    rows[0]["image"] = "slide.png"
    for level, name in zip(rows[0]["levels"], ("lineage", "cell-type", "diagnosis"), strict=True):
        level |= {"level": name, "class": f"immature {name} with a long name, not otherwise specified"}
    print_predictions(rows)
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert "…" not in printed
    for word in ("immature", "specified", "lineage", "cell-type", "diagnosis", "slide.png"):
        assert word in printed
