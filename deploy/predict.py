"""Use a run's model on image files: ``fedbags predict``. Knows nothing of sites, bags or training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.bags import to_tensor
from client.image_cache import CHUNK, decode_all
from common.errors import BadRow, DataError, UserError
from common.hierarchy import Hierarchy
from common.lhfglp import LHFGLP, consistent_prediction, log_probabilities
from common.model_file import load_model
from deploy.tables import console, table


def predict_images(run: Path, images: list[Path], top_codes: int) -> list[dict[str, Any]]:
    """Classify image files, brought to the model's input exactly as the training images were.

    Args:
        run: a folder with model.safetensors and model.json.
        images: image files of any size and mode.
        top_codes: dictionary atoms to tell per level, those with the largest absolute code.

    Returns:
        One row per image, in order::

            {"image": str,
             "levels": [{"level", "class", "probability"}],     each level's own best class
             "path": [class, ...],                              the best root-to-leaf path
             "path_probability_product": float,                 of the levels' probabilities along it
             "codes": [{"level", "atoms": [{"atom", "class", "value"}]}]}

        ``atom`` counts from 0 within its level, ``class`` is the class that owns it, ``value`` is its
        coefficient in units of the feature's length. Only atoms that are switched on are told, so there
        may be fewer than ``top_codes``; ``codes`` is empty for a model without dictionary.

    Raises:
        UserError: the model or an image cannot be read; every bad image is listed.
    """
    if not images:
        raise UserError("no image given: name one or more image files after the run folder")
    model, card = load_model(run)
    rows: list[dict[str, Any]] = []
    faults: list[BadRow] = []
    for start in range(0, len(images), CHUNK):
        files = images[start : start + CHUNK]
        results = list(decode_all(files, card.preprocessing.image_size))
        faults += [
            BadRow(str(file), None, result.fault)
            for file, result in zip(files, results, strict=True)
            if result.fault
        ]
        # After a fault nothing is returned: what is left is only decoded, to list every bad file.
        if not faults:
            rows += _classify(model, files, np.stack([result.pixels for result in results]), top_codes)
    if faults:
        raise DataError(
            f"{len(faults)} of {len(images)} image(s) cannot be read:",
            faults,
            "Give image files that Pillow can open (PNG, JPEG, TIFF, ...); nothing was predicted.",
        )
    return rows


def print_predictions(rows: list[dict[str, Any]]) -> None:
    """The predictions as a table: one block per image, one line per level."""
    with_codes = any(row["codes"] for row in rows)
    columns = ["image", "level", "best class", "probability", "consistent path"]
    result = table("predictions", *columns, *(["strongest codes: atom (class) value"] if with_codes else []))
    for column in (1, 2, 4, *([5] if with_codes else [])):
        result.columns[column].justify = "left"
    result.columns[0].overflow = "fold"
    for row in rows:
        for number, (level, on_path) in enumerate(zip(row["levels"], row["path"], strict=True)):
            cells = [
                row["image"] if number == 0 else "",
                level["level"],
                level["class"],
                f"{level['probability']:.3f}",
                on_path,
            ]
            if with_codes:
                cells.append("\n".join(map(_code_text, row["codes"][number]["atoms"])))
            result.add_row(*cells)
        product = f"product {row['path_probability_product']:.3f}"
        result.add_row("", "", "", "", product, style="dim", end_section=True)
    console().print(result)


def _code_text(atom: dict[str, Any]) -> str:
    return f"{atom['atom']} ({atom['class']}) {atom['value']:+.3f}"


@torch.no_grad()
def _classify(
    model: LHFGLP, files: Sequence[Path], pixels: NDArray[np.uint8], top_codes: int
) -> list[dict[str, Any]]:
    """Rows for decoded images, ``pixels`` of shape (N, S, S, 3)."""
    tree = model.hierarchy
    output = model(to_tensor(pixels))
    probabilities = [level.exp() for level in log_probabilities(output)]
    paths = consistent_prediction(output, tree)
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
                "image": str(file),
                "levels": levels,
                "path": [tree.classes[level][node] for level, node in enumerate(path)],
                "path_probability_product": product,
                "codes": [
                    {"level": tree.levels[level], "atoms": _strongest(codes[number], tree, level, top_codes)}
                    for level, codes in enumerate(output.codes)
                ],
            }
        )
    return rows


def _strongest(code: Tensor, tree: Hierarchy, level: int, number: int) -> list[dict[str, Any]]:
    """The atoms of one code, shape (K_l,), that are largest in absolute value and not zero."""
    per_class = len(code) // tree.sizes[level]
    order = code.abs().argsort(descending=True, stable=True)[:number].tolist()
    return [
        {"atom": atom, "class": tree.classes[level][atom // per_class], "value": float(code[atom])}
        for atom in order
        if code[atom] != 0
    ]
