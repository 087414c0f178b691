"""Check that a part keeps the house's contracts: what ``fedbags parts check`` and the pytest plugin run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from client.data.batch import Batch
from client.private_check import refuse_unsound_run
from client.terms.base import Objective, Setting, SiteBags
from common import parts
from common.config import RunConfig
from common.errors import ConfigError, UserError
from common.hierarchy import Hierarchy
from common.model.build import build_model
from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs
from common.model.model_file import ModelCard, load_model, save_model
from common.parts import Kind, Part

_SIZE = 32
_TREE = Hierarchy.from_rows(["group", "leaf"], [["a", "b"], ["a", "c"], ["d", "e"]])
_KEYS = {
    Kind.BACKBONE: "model.backbone",
    Kind.BLOCK: "model.block",
    Kind.HEAD: "model.head",
    Kind.TERM: "model.terms",
}
"""Where a part stands in a configuration; explainers and probes are tried by what uses them."""


def check(part: Part) -> list[str]:
    """Run every check on a part.

    Returns:
        What a reader wants to know of it, a line each: its arrays, and whether it may train privately.

    Raises:
        UserError: names the part, the contract and what was found.
    """
    with _known(part):
        if part.kind not in _KEYS:
            return ["nothing of it is trained"]
        config = _config(part)
        for contract in (
            _arrays_are_float32,
            _files_round_trip,
            _order_does_not_matter,
            _images_alone,
            _learns,
        ):
            try:
                contract(part, config)
            except UserError as error:
                raise UserError(f"the {part.kind.value} {part.name!r} does not conform: {error}") from error
        return [_arrays(part, config), _privacy(config)]


@contextmanager
def _known(part: Part) -> Iterator[None]:
    """Make a part known while it is checked, if nobody knows it yet."""
    if part.name in parts.names(part.kind):
        yield
        return
    parts.register_part(part)
    try:
        yield
    finally:
        parts.forget(part)


def _config(part: Part) -> RunConfig:
    changes: dict[str, Any] = {
        "model.image-size": _SIZE,
        "model.atoms-per-class": 2,
        _KEYS[part.kind]: part.name,
    }
    if part.kind is Kind.TERM:
        changes["model.terms"] = f"matching,{part.name}" if part.name != "matching" else part.name
    return RunConfig().with_changes(changes)


def _model(config: RunConfig) -> HierarchicalClassifier:
    return build_model(config.model, _TREE, 0, config.parts)


def _inputs(number: int = 4) -> Inputs:

    images = torch.rand(number, 3, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Inputs(images, torch.zeros(number, dtype=torch.int64))


def _arrays_are_float32(part: Part, config: RunConfig) -> None:

    for name, value in _model(config).named_parameters():
        if value.dtype != torch.float32:
            raise UserError(
                f"array {name!r} is {value.dtype}: what is trained travels and is noised as float32"
            )


def _files_round_trip(part: Part, config: RunConfig) -> None:

    model = _model(config).eval()
    with TemporaryDirectory() as folder:
        card = ModelCard.describe(config.model, _TREE, 0, config.parts)
        save_model(Path(folder), model, card)
        again, _ = load_model(Path(folder))
    with torch.no_grad():
        pairs = zip(model(_inputs()).scores, again(_inputs()).scores, strict=True)
        if not all(torch.equal(one, other) for one, other in pairs):
            raise UserError(
                "a model that was written and read again predicts otherwise: it keeps more than arrays"
            )


def _order_does_not_matter(part: Part, config: RunConfig) -> None:

    inputs, order = _inputs(), torch.tensor([2, 0, 3, 1])
    model = _model(config).eval()
    with torch.no_grad():
        straight, turned = model(inputs).scores, model(inputs.take(order, inputs.bag_index)).scores
    for one, other in zip(straight, turned, strict=True):
        if not torch.allclose(one[order], other, atol=1e-5):
            raise UserError("the order of a bag's images changes what is predicted of them")


def _images_alone(part: Part, config: RunConfig) -> None:

    images = _inputs().images
    model = _model(config).eval()
    with torch.no_grad():
        together = model(Inputs.alone(images)).scores
        for row in range(len(images)):
            alone = model(Inputs.alone(images[row : row + 1])).scores
            for one, other in zip(together, alone, strict=True):
                if not torch.allclose(one[row], other[0], atol=1e-5):
                    raise UserError("images that are alone in their bags change each other's predictions")


def _learns(part: Part, config: RunConfig) -> None:

    counts = np.array([[2, 1, 1]])
    levels = [torch.from_numpy(level).float() for level in _TREE.roll_up(counts)]
    cpu = torch.device("cpu")
    for rows in (counts, np.array([[1, 0, 0]])):
        bags = SiteBags(torch.zeros(1, dtype=torch.int64), torch.from_numpy(rows).float())
        setting = Setting(config, _TREE, "conformance", 1, 1.0, cpu, bags)
        try:
            objective = Objective(setting)
        except UserError:
            continue  # a bound takes bags of one image only
        number = int(rows.sum())
        levels = [torch.from_numpy(level).float() for level in _TREE.roll_up(rows)]
        batch = Batch(_inputs(number), levels, torch.zeros(1, dtype=torch.int64))
        model = _model(config).train()
        loss = objective(model, batch, torch.Generator().manual_seed(0))
        if loss.shape != () or not torch.isfinite(loss):
            raise UserError(f"its loss is {loss.tolist()} and not one finite number")
        loss.backward()  # type: ignore[no-untyped-call]
        unreached = [name for name, value in model.named_parameters() if value.grad is None]
        if unreached:
            raise UserError(
                f"no gradient reaches {unreached[0]!r}: it would travel and be noised for nothing"
            )
        return
    raise UserError("no made-up bag can be trained on")


def _arrays(part: Part, config: RunConfig) -> str:
    def shapes(made: RunConfig) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in _model(made).named_parameters()}

    usual = RunConfig().with_changes({"model.image-size": _SIZE, "model.atoms-per-class": 2})
    own = {name: shape for name, shape in shapes(config).items() if shapes(usual).get(name) != shape}
    told = ", ".join(f"{name} {'x'.join(map(str, shape)) or '1'}" for name, shape in list(own.items())[:4])
    more = f" and {len(own) - 4} more" if len(own) > 4 else ""
    return f"{len(own)} arrays of its own{': ' + told + more if own else ''}"


def _privacy(config: RunConfig) -> str:

    try:
        refuse_unsound_run(config.with_changes({"dp.epsilon": 8.0}))
    except ConfigError as error:
        return str(error).partition("\n")[0]
    return "may train privately: one bag alone, checked"
