"""Check, rather than declare, that a model and its loss terms may be trained privately.

Bag-level DP-SGD bounds the influence of a bag only if what is clipped, the gradient of one bag, depends on
that bag alone, and if nothing else of a bag stays anywhere: not in a parameter that is written outside of the
optimiser's step, not in a buffer, not in a Python attribute. Before the first private step all of it is tried
on made-up bags, A, B, A and A again; a part that fails is refused by its name. While private bags are trained
on, ``Unchanged`` watches every number of the model.

The check finds mistakes. Code that means to deceive runs in the same process and can: what a site runs is
what it approved.
"""

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from client.data.batch import Batch
from client.terms.base import ONE_BAG_ALONE, Objective, Setting, Step
from common.config import RunConfig
from common.errors import ConfigError
from common.hierarchy import Hierarchy
from common.model.build import rebuild_model
from common.model.classifier import HierarchicalClassifier
from common.model.interfaces import Inputs

_IMAGES = 2
"""In a made-up bag."""
_SEEDS = range(2)
"""Of the tries whether bags are mixed, since a term may mix them by chance."""
_OF_MODULES = frozenset(vars(nn.Module()))
_checked: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""The configuration that each model of this process was found sound for."""


class Unchanged:
    """Remember every number of a model, and name those that something else than the optimiser changed.

    Values are compared, since a write through ``.data`` moves no version counter of torch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = {name: value.detach().clone() for name, value in _numbers(model)}

    def changed(self) -> list[str]:
        """Return the names of the parameters and buffers that differ in any bit."""
        return [name for name, value in _numbers(self._model) if not _same(value, self._values[name])]

    def accept_step(self) -> None:
        """Take the present values of the trained parameters as those that the optimiser's step left."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                self._values[name].copy_(parameter.detach())


def refuse_unsound(model: HierarchicalClassifier, setting: Setting) -> None:
    """Refuse a model or a loss term that private training cannot bound, once per model and configuration.

    Args:
        model: in training mode, on the run's device; stays as it is.
        setting: without the counts of the whole site.

    Raises:
        ConfigError: names the part and what it does.
    """
    config = setting.config
    key = config.model_copy(update={"seed": 0}).to_toml() + str(setting.hierarchy.sizes)
    if _checked.get(model) == key:
        return
    objective = Objective(setting)
    bags = [_made_up_bag(setting.hierarchy, config.model.image_size, seed) for seed in range(3)]
    first, second, third = (bag.to(setting.device) for bag in bags)
    with torch.random.fork_rng(devices=[]):
        _refuse_state(model, objective, first, second)
        # Not a number, so that it shows in whatever it takes part in.
        nothing = replace(
            third, inputs=third.inputs.with_images(torch.full_like(third.inputs.images, torch.nan))
        )
        _refuse_mixing(model, objective, _together(first, second), _together(first, nothing))
    _checked[model] = key


def refuse_unsound_run(config: RunConfig) -> None:
    """Refuse a private run whose parts private training cannot bound, before anything of it starts.

    Raises:
        ConfigError: names the part and what it does.
    """
    if not config.dp.epsilon:
        return
    hierarchy = Hierarchy.from_rows(["group", "leaf"], [["a", "b"], ["a", "c"], ["d", "e"]])
    model = rebuild_model(config.model, hierarchy, config.parts).train()
    setting = Setting(
        config=config,
        hierarchy=hierarchy,
        site="",
        round=1,
        progress=0.0,
        device=torch.device("cpu"),
        bags=None,
    )
    refuse_unsound(model, setting)


def _refuse_state(model: HierarchicalClassifier, objective: Objective, first: Batch, second: Batch) -> None:
    """Run A, B, A, A, and refuse what writes, remembers, or gives another value for A."""
    still = Unchanged(model)
    runs: list[dict[str, Tensor]] = []
    python_state: dict[str, bytes] = {}
    for bag in (first, second, first, first):
        runs.append(_values_of(model, objective, bag, still=still))
        # The first run fills caches, such as those of the label tree: attributes are compared from then on.
        python_state = python_state or _python_state(model, objective)
    after = _python_state(model, objective)
    for name in after:
        if after[name] != python_state.get(name):
            part, _, attribute = name.rpartition(".")
            raise _refusal(part, f"its attribute {attribute!r} keeps something from one bag to the next")
    for name, values in runs[0].items():
        if values.shape != (1,):
            raise _refusal(
                f"term {name!r}",
                f"it gives a tensor of shape {tuple(values.shape)} and not one number per bag",
            )
        if not all(_same(values, other[name]) for other in runs[2:]):
            raise _refusal(f"term {name!r}", "it gives another value for a bag after it saw another one")


def _refuse_mixing(model: HierarchicalClassifier, objective: Objective, first: Batch, other: Batch) -> None:
    """Refuse a term whose value of the first bag changes with the bag beside it."""
    for seed in _SEEDS:
        mine, theirs = (_values_of(model, objective, batch, seed) for batch in (first, other))
        for name in mine:
            if not _same(mine[name][:1], theirs[name][:1]):
                raise _refusal(f"term {name!r}", "its value of a bag depends on the other bags of the step")


def _refusal(part: str, reason: str) -> ConfigError:
    return ConfigError(f"private training cannot use {part}: {reason}\n{ONE_BAG_ALONE}")


def _values_of(
    model: HierarchicalClassifier,
    objective: Objective,
    batch: Batch,
    seed: int = 0,
    still: Unchanged | None = None,
) -> dict[str, Tensor]:
    """Return the terms of a batch on the random numbers of a seed.

    Raises:
        ConfigError: a number of the model, which ``still`` watches, changed on the way.
    """

    def watch(part: str) -> None:
        if written := still.changed() if still else []:
            raise _refusal(
                part,
                f"it changes {written[0]!r} outside of the optimiser's step, so what it writes would leave "
                "the site without noise",
            )

    torch.manual_seed(seed)
    step = Step(model, batch, torch.Generator().manual_seed(seed))
    _ = step.output
    watch("the model")
    values = {}
    for name, term in objective.terms.items():
        values[name] = term(step).detach()
        watch(f"term {name!r}")
    return values


def _made_up_bag(hierarchy: Hierarchy, image_size: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(_IMAGES, [1 / hierarchy.sizes[-1]] * hierarchy.sizes[-1])
    images = rng.uniform(-1, 1, (_IMAGES, 3, image_size, image_size)).astype(np.float32)
    return Batch(
        Inputs(torch.from_numpy(images), torch.zeros(_IMAGES, dtype=torch.int64)),
        [torch.from_numpy(level).float() for level in hierarchy.roll_up(counts[None])],
        torch.tensor([seed]),
    )


def _together(one: Batch, other: Batch) -> Batch:
    return Batch(
        Inputs(
            torch.cat([one.inputs.images, other.inputs.images]),
            torch.cat([one.inputs.bag_index, other.inputs.bag_index + 1]),
        ),
        [torch.cat(pair) for pair in zip(one.level_counts, other.level_counts, strict=True)],
        torch.cat([one.bags, other.bags]),
    )


def _python_state(model: HierarchicalClassifier, objective: Objective) -> dict[str, bytes]:
    """Return every Python attribute of the terms and the model's modules, and of their classes, as bytes."""
    state: dict[str, bytes] = {}
    for name, term in objective.terms.items():
        state |= _attributes(f"term {name!r}", vars(term))
        state |= _attributes(f"the class of term {name!r}", _data_of_class(type(term)))
    for path, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
        state |= _attributes(f"the model's part {path or type(module).__name__!r}", own)
    return state


def _data_of_class(kind: type) -> Mapping[str, Any]:
    return {
        name: value
        for name, value in vars(kind).items()
        if not (name.startswith("__") or callable(value) or hasattr(value, "__get__"))
    }


def _attributes(owner: str, attributes: Mapping[str, Any]) -> dict[str, bytes]:
    found = {}
    for name, value in attributes.items():
        if isinstance(value, nn.Module):
            continue  # its numbers are watched, and its attributes listed, with the model's
        try:
            found[f"{owner}.{name}"] = pickle.dumps(value)
        except Exception as error:
            # Whatever a foreign object raises: what cannot be compared is not trusted.
            raise _refusal(
                owner, f"its attribute {name!r} cannot be compared ({type(error).__name__})"
            ) from error
    return found


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(one: Tensor, other: Tensor) -> bool:
    """Return True if two tensors are equal bit for bit, which NaN is to itself."""
    if one.is_floating_point():
        bits = [value.detach().reshape(-1).view(torch.uint8) for value in (one, other)]
        return torch.equal(*bits)
    return torch.equal(one, other)
