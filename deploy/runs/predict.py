"""Classify image files with a run's model, for ``fedbags predict``.

Knows nothing of sites, bags or training.
"""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.box import SIMPLE_HEAD
from torch import Tensor

from client.data.images import CHUNK, Progress, decode_all, describe_fault, square, to_rgb, to_tensor
from common.errors import BadRow, UserError
from common.files import write_text
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier, consistent_prediction, log_probabilities
from common.model.interfaces import Inputs
from common.model.model_file import ModelCard, load_model
from common.parts import discover
from deploy.cli.terminal import console, table
from deploy.runs.pictures import find_pictures, open_picture


@dataclass(frozen=True)
class _Predictions:
    """Hold a row for each image that could be read, in order, and the images that could not.

    A row is::

        {"image": str,
         "levels": [{"level", "class", "probability"}],     each level's own best class
         "path": [class, ...],                              the best root-to-leaf path
         "path_probability_product": float,                 of the levels' probabilities along it
         "codes": [{"level", "atoms": [{"atom", "class", "value"}]}],
         "evidence": {name: {level: values}}}               of those levels that have it; if asked for

    ``atom`` counts from 0 within its level, ``class`` is the class that owns it, ``value`` is its coefficient
    in units of the feature's length. Only atoms that are switched on are listed, so there may be fewer than
    were asked for; ``codes`` is empty where none were, and for a model without dictionary.
    """

    rows: list[dict[str, Any]]
    skipped: tuple[BadRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Classifier:
    """Classify images with the model of one run, which is read from disk once.

    Attributes:
        model: the trained model, on the processor.
        card: how images are brought to its input, and what its classes are.
    """

    model: HierarchicalClassifier
    card: ModelCard

    @classmethod
    def load(cls, run: Path) -> Self:
        """Read the model of a run folder.

        Raises:
            UserError: there is no complete model in it.
        """
        discover()
        return cls(*load_model(run))

    def predict_images(
        self,
        images: Sequence[Image.Image | NDArray[Any]],
        names: Sequence[str],
        codes: int = 0,
        evidence: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """Classify images that are in memory, brought to the model's input as the training images were.

        Args:
            images: pictures of Pillow, or arrays that Pillow understands: (H, W) or (H, W, 3) of uint8,
                (H, W) of any number for deep greyscale.
            names: what the rows call them, one each.
            codes: dictionary atoms to list per level.
            evidence: names of what blocks and heads tell, such as ``codes``, to give in full.

        Returns:
            Rows as in Predictions.

        Raises:
            UserError: an array that is no image, or the model has no such evidence.
        """
        pixels = [
            _pixels(image, name, self.card.preprocessing.image_size)
            for image, name in zip(images, names, strict=True)
        ]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(pixels), CHUNK):
            chunk = slice(start, start + CHUNK)
            rows += _classify(self.model, names[chunk], np.stack(pixels[chunk]), codes, evidence)
        return rows

    def predict_files(
        self,
        paths: Sequence[Path],
        codes: int = 0,
        evidence: Sequence[str] = (),
        *,
        skip_bad: bool = False,
        progress: Progress | None = None,
    ) -> _Predictions:
        """Classify image files, as ``predict_images`` of this module does."""
        pictures = find_pictures(paths)
        rows: list[dict[str, Any]] = []
        bad = list(pictures.bad)
        # In chunks, so that the memory for decoded images does not grow with their number.
        for start in range(0, len(pictures.files), CHUNK):
            files = pictures.files[start : start + CHUNK]
            results = list(decode_all(files, self.card.preprocessing.image_size, read=open_picture))
            read = [
                (file, result.pixels) for file, result in zip(files, results, strict=True) if not result.fault
            ]
            bad += [
                BadRow(str(file), None, result.fault)
                for file, result in zip(files, results, strict=True)
                if result.fault
            ]
            # After a fault nothing is returned: what is left is only decoded, to list every bad file.
            if read and (skip_bad or not bad):
                names, pixels = zip(*read, strict=True)
                rows += _classify(self.model, names, np.stack(pixels), codes, evidence)
            if progress is not None:
                progress(start + len(files), len(pictures.files))
        if bad and not (skip_bad and rows):
            of = len(pictures.files) + len(pictures.bad)
            raise UserError(
                "\n".join(
                    [
                        f"{len(bad)} of {of} image(s) cannot be read:",
                        *(f"  {row}" for row in bad),
                        "Nothing was predicted. Give images (PNG, JPEG, TIFF, DICOM, ...)"
                        + ("." if skip_bad else ", or leave these out with --skip-bad."),
                    ]
                )
            )
        return _Predictions(rows, tuple(bad), pictures.notes)


def predict_images(
    run: Path,
    paths: Sequence[Path],
    codes: int = 0,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> _Predictions:
    """Classify images, brought to the model's input exactly as the training images were.

    Args:
        run: a folder with model.safetensors and model.json.
        paths: image files of any size and mode, DICOM files, and folders of these.
        codes: dictionary atoms to list per level, those with the largest absolute code.
        skip_bad: leave out images that cannot be read; they are listed in ``skipped``.
        progress: called with (images done, images in all).

    Raises:
        UserError: the model or an image cannot be read; every bad image is listed. With ``skip_bad``: none
            could be read.
    """
    return Classifier.load(run).predict_files(paths, codes, skip_bad=skip_bad, progress=progress)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write predictions to a CSV file, one image a line, complete or not at all.

    Columns: image; for each level its best class and that class's probability; for each level the class on
    the best path; the product of the path's probabilities.

    Raises:
        UserError: the file cannot be written.
    """
    levels = [level["level"] for level in rows[0]["levels"]]
    text = io.StringIO(newline="")
    table = csv.writer(text)
    best = [name for level in levels for name in (level, f"{level}_probability")]
    table.writerow(["image", *best, *(f"path_{level}" for level in levels), "path_probability_product"])
    for row in rows:
        own = [cell for level in row["levels"] for cell in (level["class"], f"{level['probability']:.6f}")]
        table.writerow([row["image"], *own, *row["path"], f"{row['path_probability_product']:.6f}"])
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}\nGive --csv another file."
        ) from error


def print_predictions(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the predictions, one block per image and one line per level, and codes where there are any."""
    result = table("predictions", "image", "level", "best class", "prob.", "on best path")
    result.box, result.padding, result.show_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
    for column in (1, 2, 4):
        result.columns[column].justify = "left"
    for column in (0, 2, 4):
        result.columns[column].overflow = "fold"
    for row in rows:
        for number, (level, on_path) in enumerate(zip(row["levels"], row["path"], strict=True)):
            last = number == len(row["path"]) - 1
            result.add_row(
                row["image"] if number == 0 else "",
                level["level"],
                level["class"],
                f"{level['probability']:.3f}",
                "" if on_path == level["class"] else on_path,
                end_section=last,
            )
    console().print(result)
    console().print("on best path: the class on the best path from root to leaf, where it is another one")
    for row in rows:
        for level in row["codes"]:
            atoms = ", ".join(map(_code_text, level["atoms"]))
            console().print(f"{row['image']}, {level['level']}, strongest codes: {atoms}", soft_wrap=True)


def _code_text(atom: Mapping[str, Any]) -> str:
    return f"{atom['atom']} ({atom['class']}) {atom['value']:+.3f}"


def _pixels(image: Image.Image | NDArray[Any], name: str, size: int) -> NDArray[np.uint8]:
    """Return an image in memory as shape (size, size, 3)."""
    try:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
        return square(to_rgb(picture), size)
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"{name}: this is no image ({describe_fault(error)})") from error


@torch.no_grad()
def _classify(
    model: HierarchicalClassifier,
    files: Sequence[Path | str],
    pixels: NDArray[np.uint8],
    codes_told: int,
    evidence: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the rows of decoded images, with ``pixels`` of shape (N, S, S, 3)."""
    tree = model.hierarchy
    output = model(Inputs.alone(to_tensor(pixels)))
    probabilities = [level.exp() for level in log_probabilities(output)]
    paths = consistent_prediction(output, tree)
    for name in evidence:
        if name not in output.evidence:
            known = ", ".join(output.evidence) or "none"
            raise UserError(f"the model gives no evidence {name!r}; known: {known}")
    rows = []
    for number, file in enumerate(files):
        path: list[int] = paths[number].tolist()
        levels = []
        product = 1.0
        for level, name in enumerate(tree.levels):
            own = probabilities[level][number]
            best = int(own.argmax())
            levels.append(
                {"level": name, "class": tree.classes[level][best], "probability": float(own[best])}
            )
            product *= float(own[path[level]])
        rows.append(
            {
                # A file's name need not be UTF-8, and JSON and CSV have to be.
                "image": os.fsencode(file).decode("utf-8", "backslashreplace"),
                "levels": levels,
                "path": [tree.classes[level][node] for level, node in enumerate(path)],
                "path_probability_product": product,
                "codes": [
                    {"level": tree.levels[level], "atoms": _strongest(codes[number], tree, level, codes_told)}
                    for level, codes in enumerate(output.evidence.get("codes", ()) if codes_told else [])
                    if codes is not None
                ],
            }
        )
        if evidence:
            rows[-1]["evidence"] = {
                told: {
                    level: values[number].tolist()
                    for level, values in zip(tree.levels, output.evidence[told], strict=True)
                    if values is not None
                }
                for told in evidence
            }
    return rows


def _strongest(code: Tensor, tree: Hierarchy, level: int, number: int) -> list[dict[str, Any]]:
    """Return the atoms of one code, shape (K_l,), that are largest in absolute value and not zero."""
    per_class = len(code) // tree.sizes[level]
    # Stable, so that atoms of equal codes always come in the same order.
    order = code.abs().argsort(descending=True, stable=True)[:number].tolist()
    return [
        {"atom": atom, "class": tree.classes[level][atom // per_class], "value": float(code[atom])}
        for atom in order
        if code[atom] != 0
    ]
