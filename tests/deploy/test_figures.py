"""The pictures of a run: they exist and show something; what cannot be drawn is said, not raised."""

import contextlib
import csv
import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torchvision.models.vision_transformer import VisionTransformer

from client.site import SiteConfig
from common.config import RunConfig
from common.config_tables import ModelConfig
from common.errors import UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.model_file import ModelCard, save_model
from deploy.figures import draw
from deploy.figures.activation import activate, choose_images
from deploy.figures.charts import _row_shares, draw_confusion, draw_curves, tree_order
from deploy.figures.draw import _confusion_names, draw_figures
from deploy.figures.embedding import _draw_bags
from deploy.figures.finished_run import FinishedRun, labels
from deploy.figures.samples import NoTestImages, TestSample, find_sites, read_sample
from deploy.figures.style import class_styles, house_style, save

# The second top class interrupts the first's children; a dollar sign is no formula.
TREE = Hierarchy.from_rows(
    ["top", "mid level", "leaf"],
    [["a", "m", "1"], ["b", "o", "4"], ["a", "n", "3"], ["a", "m", "2$x$"], ["b", "p", "5"]],
)
SIZE = 32
NAMES = [
    "curves.png",
    "confusion-top.png",
    "confusion-mid-level.png",
    "confusion-leaf.png",
    "tsne.png",
    "activation.png",
]


def make_sites(folder: Path, images: int = 20) -> Path:
    """Two sites with test images only: the pictures read nothing else."""
    rng = np.random.default_rng(1)
    for name in ("east", "west"):
        site = folder / name
        site.mkdir(parents=True)
        SiteConfig(name=name).save(site)
        TREE.to_csv(site / "hierarchy.csv")
        with (site / "test.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["path", "label"])
            for number in range(images):
                pixels = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(site / f"{number}.png")
                writer.writerow([f"{number}.png", TREE.classes[-1][number % TREE.sizes[-1]]])
    return folder


def make_run(
    folder: Path,
    sites: Path,
    method: str = "lhfglp",
    backbone: str = "resnet-small",
    size: int = SIZE,
) -> Path:
    """A finished run of three rounds, with an untrained model."""
    config = RunConfig(
        sites_dir=str(sites),
        rounds=3,
        model=ModelConfig(method=method, backbone=backbone, image_size=size, atoms_per_class=2),
    )
    model = build_model(config.model, TREE, seed=0)
    save_model(folder, model, ModelCard.describe(config.model, TREE, round=2))
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    events: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        for site in ("east", "west"):
            events.append({"event": "update", "round": number, "site": site, "bags": 4, "loss": 1 / number})
        events.append({"event": "round", "round": number, "updates": 2, "loss": 1 / number})
        levels = [{"level": name, "kl": 0.5 / number, "l1": 0.7 / number} for name in TREE.levels]
        events.append({"event": "bags", "round": number, "levels": levels, "score": 1.0})
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    counts = [(np.eye(size) * 4).astype(int).tolist() for size in TREE.sizes]
    (folder / "confusion.json").write_text(json.dumps({"argmax": counts, "path": counts}), encoding="utf-8")
    site_figures = {"bags": 4, "release": "exact", "epsilon": None}
    shares = ("accuracy", "balanced_accuracy", "macro_f1", "consistent_accuracy")
    level_figures = {"classes": 5, **dict.fromkeys(shares, 1.0)}
    summary = {
        "rounds": 3, "selected_round": 2, "per_site": dict.fromkeys(("east", "west"), site_figures),
        "levels": [level_figures | {"name": name} for name in TREE.levels],
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sites(tmp_path_factory.mktemp("data") / "sites")


@pytest.fixture
def run(tmp_path: Path, sites: Path) -> Path:
    return make_run(tmp_path / "run", sites)


def assert_pictures(paths: list[Path]) -> None:
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert min(image.size) > 400
            assert max(image.size) < 4000
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


@pytest.fixture(scope="module")
def drawn(sites: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], str]:
    """A run whose pictures are drawn once for the tests that look at them: run, pictures, what was said."""
    run, said = make_run(tmp_path_factory.mktemp("drawn") / "run", sites), io.StringIO()
    with contextlib.redirect_stderr(said):
        return run, draw_figures([run], None), said.getvalue()


def test_every_picture_of_one_run(drawn: tuple[Path, list[Path], str]) -> None:
    run, paths, said = drawn
    assert paths == [run / "figures" / name for name in NAMES]
    assert_pictures(paths)
    assert sorted(path.name for path in (run / "figures").iterdir()) == sorted(NAMES)
    assert said == ""


def test_pictures_do_not_change_from_one_drawing_to_the_next(
    drawn: tuple[Path, list[Path], str], tmp_path: Path
) -> None:
    run, first, _ = drawn
    again = draw_figures([run], tmp_path / "again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_runs_side_by_side(drawn: tuple[Path, list[Path], str], sites: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn[0], run)
    other = make_run(tmp_path / "plain", sites, "dllp", size=48)
    paths = draw_figures([run, other], None)
    assert paths == [run / "figures" / "side-by-side" / name for name in NAMES]
    assert_pictures(paths)
    for alone in drawn[1]:
        assert (run / "figures" / alone.name).read_bytes() == alone.read_bytes()


def test_pictures_without_data_are_left_out_and_said(
    run: Path, sites: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "confusion.json").unlink()
    config = RunConfig.from_toml(run / "config.toml")
    moved = config.with_changes({"sites-dir": str(sites / "gone")})
    (run / "config.toml").write_text(moved.to_toml(), encoding="utf-8")
    assert [path.name for path in draw_figures([run], None)] == ["curves.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(NAMES) - 1
    assert any("tsne.png left out: the sites have moved" in line for line in lines)
    assert any("confusion-top.png left out" in line for line in lines)


def test_a_deployment_has_no_images_to_draw(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig.from_toml(run / "config.toml").with_changes({"sites-dir": ""})
    (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    assert len(draw_figures([run], None)) == 4
    assert "real sites" in capsys.readouterr().err


def test_curves_without_losses_and_bags(run: Path) -> None:
    event = {"event": "round", "round": 1, "updates": 2, "loss": None}
    (run / "metrics.jsonl").write_text(json.dumps(event) + "\n", encoding="utf-8")
    with house_style():
        assert_pictures([save(draw_curves([FinishedRun.open(run)]), run / "figures" / "curves.png")])


@pytest.mark.parametrize("withheld", [{"l1"}, {"kl"}, {"kl", "l1"}])
def test_curves_of_what_sites_withhold_say_so(run: Path, withheld: set[str]) -> None:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    for event in events:
        for level in event.get("levels", ()):
            for key in withheld:
                del level[key]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with house_style():
        figure = draw_curves([FinishedRun.open(run)])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts == [[], *(["withheld by the sites"] if key in withheld else [] for key in ("kl", "l1"))]
    assert [bool(axes.lines) for axes in figure.axes[1:]] == [True, True]


def test_a_matrix_with_suppressed_counts_says_so_and_gives_bounds(run: Path, sites: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    bounds = {"cells": 14, "below": 5, "accuracy": [0.612, 0.681], "consistent_accuracy": [0.4, 0.5]}
    summary["levels"][2]["suppressed"] = bounds
    (run / "summary.json").write_text(json.dumps(summary))
    with house_style():
        figures = [draw_confusion([FinishedRun.open(run)], level) for level in (1, 2)]
    titles = [[axes.get_title() for axes in figure.axes[:2]] for figure in figures]
    assert [title.partition(": ")[2] for title in titles[0]] == ["accuracy 1.000"] * 2
    assert [title.partition(": ")[2] for title in titles[1]] == ["accuracy 0.61-0.69", "accuracy 0.40-0.50"]
    heads = [figure.get_suptitle().splitlines()[0] for figure in figures]
    assert ["suppressed" in head for head in heads] == [False, True]
    assert heads[1].endswith("14 cells below 5 suppressed")


@pytest.mark.parametrize(
    ("removed", "message"),
    [("config.toml", "no run in"), ("summary.json", "has not finished"), ("model.json", "card not found")],
)
def test_unfinished_runs_are_user_errors(run: Path, removed: str, message: str) -> None:
    (run / removed).unlink()
    with pytest.raises(UserError, match=message):
        draw_figures([run], None)
    assert not (run / "figures").exists()


def test_damaged_missing_and_unlike_runs_are_user_errors(run: Path, sites: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run given"):
        draw_figures([], None)
    with pytest.raises(UserError, match="no run in"):
        draw_figures([tmp_path / "nowhere"], None)
    other = make_run(tmp_path / "other", sites)
    tree = Hierarchy.from_rows(["leaf"], [["x"], ["y"]])
    config = ModelConfig(image_size=SIZE)
    save_model(other, build_model(config, tree, 0), ModelCard.describe(config, tree, round=0))
    with pytest.raises(UserError, match="different label trees"):
        draw_figures([run, other], None)
    (run / "confusion.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        draw_figures([run], None)


def test_a_folder_that_cannot_be_written_is_a_user_error(run: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be written"):
        draw_figures([run], blocked)


def test_classes_stand_by_parents_and_rows_are_shares() -> None:
    assert tree_order(TREE, 1) == [0, 2, 1, 3]
    assert [TREE.classes[-1][leaf] for leaf in tree_order(TREE, 2)] == ["1", "2$x$", "3", "4", "5"]
    shares = _row_shares(np.array([[1, 3], [0, 0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0.75], [np.nan, np.nan]])


def test_confusion_of_many_classes_names_parents_only(run: Path, tmp_path: Path) -> None:
    rows = [[f"order {n // 10}", f"species {n}"] for n in range(120)]
    tree = Hierarchy.from_rows(["order", "species"], rows)
    config = ModelConfig(image_size=SIZE, method="dllp")
    save_model(run, build_model(config, tree, 0), ModelCard.describe(config, tree, round=0))
    counts = [np.eye(size, dtype=int).tolist() for size in tree.sizes]
    (run / "confusion.json").write_text(json.dumps({"argmax": counts, "path": counts}), encoding="utf-8")
    with house_style():
        figure = draw_confusion([FinishedRun.open(run)], 1)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == list(tree.classes[0])
    with house_style():
        assert_pictures([save(figure, tmp_path / "many.png")])


def test_bags_hold_every_image_once_and_stay_within_a_site(run: Path) -> None:
    opened = FinishedRun.open(run)
    sample = read_sample(opened, find_sites(opened), SIZE, most=1000)
    bags = _draw_bags(sample, TREE, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate(bags)), np.arange(40))
    assert all(len(np.unique(sample.sites[bag])) == 1 for bag in bags)


def test_samples_are_capped_and_the_same_at_every_size(run: Path) -> None:
    opened = FinishedRun.open(run)
    small, large = (read_sample(opened, find_sites(opened), size, most=12) for size in (SIZE, 48))
    assert small.images.shape == (12, SIZE, SIZE, 3)
    assert large.images.shape == (12, 48, 48, 3)
    np.testing.assert_array_equal(small.labels, large.labels)
    np.testing.assert_array_equal(small.sites, large.sites)


def test_images_to_explain_cover_the_coarse_classes() -> None:
    labels_ = np.arange(40) % TREE.sizes[-1]
    sample = TestSample(np.zeros((40, SIZE, SIZE, 3), np.uint8), labels_, np.zeros(40, np.int64))
    chosen = choose_images(sample, TREE, seed=0)
    assert sorted(chosen.labels.tolist()) == [0, 1, 2, 3, 4]  # one image per leaf, six at most


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_tiny", "swin_t"])
def test_activation_maps_of_any_convolutional_backbone(backbone: str) -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(backbone=backbone, image_size=64, atoms_per_class=2), TREE, seed=0).eval()
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    seen = activate(model, images)
    assert seen.explanation.maps.shape == (2, 64, 64)
    assert 0 <= seen.explanation.maps.min() <= seen.explanation.maps.max() <= 1
    assert not any(module._forward_hooks for module in model.modules())


def test_a_vit_has_no_feature_map(
    tmp_path: Path, sites: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchvision's transformer with one narrow layer; no picture but this one is drawn from images."""
    narrow = partial(VisionTransformer, SIZE, 16, 1, 2, 32, 64)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **_: narrow())

    def left_out(_: object) -> Figure:
        raise NoTestImages("not drawn here")

    monkeypatch.setattr(draw, "_embedding", left_out)
    run = make_run(tmp_path / "vit", sites, backbone="vit_b_32", size=SIZE)
    (run / "confusion.json").unlink()
    assert [path.name for path in draw_figures([run], None)] == ["curves.png"]
    assert "activation.png left out" in (said := capsys.readouterr().err)
    assert "vit_b_32 has no feature map" in said


@pytest.mark.slow
def test_a_published_vit_has_no_feature_map(
    tmp_path: Path, sites: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "vit", sites, backbone="vit_b_32", size=SIZE)
    assert "activation.png" not in [path.name for path in draw_figures([run], None)]
    assert "vit_b_32 has no feature map" in capsys.readouterr().err


def test_names_styles_and_labels(run: Path, sites: Path, tmp_path: Path) -> None:
    twins = Hierarchy.from_rows(["a/b", "a b", "x"], [["1", "2", "3"]])
    assert _confusion_names(twins) == ["confusion-1-a-b.png", "confusion-2-a-b.png", "confusion-x.png"]
    styles = class_styles(TREE, 2)
    assert len({(style.colour, style.marker) for style in styles}) == TREE.sizes[2]
    other = make_run(tmp_path / "again", sites)
    opened = [FinishedRun.open(run), FinishedRun.open(other)]
    assert labels(opened) == ["LHFGLP, run", "LHFGLP, again"]
    assert labels(opened[:1]) == ["LHFGLP"]
