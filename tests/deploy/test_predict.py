"""`fedbags predict`: equal to calling the model, and one clear error for everything that is wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from client.bags import to_tensor
from client.image_cache import square, to_rgb
from common.build import build_model
from common.config_tables import ModelConfig
from common.errors import UserError
from common.hierarchy import Hierarchy
from common.lhfglp import consistent_prediction, log_probabilities
from common.methods import Method
from common.model_file import ModelCard, load_model, save_model
from deploy.predict import predict_images, print_predictions

TREE = Hierarchy.from_rows(
    ["top", "middle", "leaf"], [["a", "m", "1"], ["a", "m", "2"], ["a", "n", "3"], ["b", "o", "4"]]
)


def make_model(folder: Path, method: Method = Method.LHFGLP) -> Path:
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


@pytest.mark.parametrize("method", list(Method))
def test_prediction_is_a_direct_model_call(tmp_path: Path, images: list[Path], method: Method) -> None:
    run = make_model(tmp_path / "run", method)
    rows = predict_images(run, images, top_codes=2)

    model, _ = load_model(run)
    pixels = [square(to_rgb(Image.open(path)), 32) for path in images]
    with torch.no_grad():
        output = model(to_tensor(np.stack(pixels)))
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
    (row,) = predict_images(run, images[:1], top_codes=3)
    model, _ = load_model(run)
    with torch.no_grad():
        output = model(to_tensor(np.asarray(Image.open(images[0]))[None]))
    for level, told in enumerate(row["codes"]):
        code = output.codes[level][0]
        values = [atom["value"] for atom in told["atoms"]]
        assert [abs(value) for value in values] == sorted(map(abs, values), reverse=True)
        assert abs(values[0]) == pytest.approx(float(code.abs().max()))
        for atom in told["atoms"]:
            assert atom["value"] == pytest.approx(float(code[atom["atom"]]))
            assert atom["class"] == TREE.classes[level][atom["atom"] // 2]


def test_without_dictionary_there_are_no_codes(tmp_path: Path, images: list[Path]) -> None:
    run = make_model(tmp_path / "plain", Method.DLLP_HIERARCHICAL)
    assert [row["codes"] for row in predict_images(run, images, top_codes=3)] == [[]] * len(images)


def test_every_bad_image_is_listed_at_once(run: Path, images: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(images[0].read_bytes()[:60])
    text = tmp_path / "notes.txt"
    text.write_text("no image", encoding="utf-8")
    bad = [tmp_path / "missing.png", tmp_path, text, broken]
    with pytest.raises(UserError, match=r"4 of 5 image\(s\) cannot be read") as caught:
        predict_images(run, [images[0], *bad], top_codes=1)
    for path in bad:
        assert f"{path}: " in str(caught.value)
    assert str(images[0]) not in str(caught.value)


def test_missing_run_and_no_image_are_user_errors(run: Path, images: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="card not found"):
        predict_images(tmp_path / "nowhere", images, top_codes=1)
    with pytest.raises(UserError, match="no image given"):
        predict_images(run, [], top_codes=1)


@pytest.mark.parametrize("method", [Method.LHFGLP, Method.DLLP])
def test_table_names_every_level_and_leaves_brackets_alone(
    tmp_path: Path, images: list[Path], capsys: pytest.CaptureFixture[str], method: Method
) -> None:
    run = make_model(tmp_path / "run", method)
    image = images[0].rename(tmp_path / "[red]x.png")
    rows = predict_images(run, [image], top_codes=1)
    rows[0]["image"] = image.name
    print_predictions(rows)
    printed = capsys.readouterr().out
    assert "[red]x.png" in printed
    assert all(level in printed for level in TREE.levels)
    assert ("strongest" in printed) == (method is Method.LHFGLP)
