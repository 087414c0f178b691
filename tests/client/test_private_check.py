"""What remembers, writes or mixes is refused by its name before a private step: checked, and not declared."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.data.bags import BagStore
from client.private_check import Unchanged, refuse_unsound
from client.private_training import train_round_privately
from client.terms.base import ONE_BAG_ALONE, Setting, Step
from client.terms.proportions import Matching
from client.training import make_setting
from common import parts
from common.config import RunConfig
from common.errors import ConfigError, RunError
from common.model.build import build_model
from common.model.classifier import HierarchicalClassifier
from common.model.methods import method_names
from common.parts import Kind, NoSettings, Part

from .conftest import write_hand_made_site
from .test_private_training import make_plan

PRIVATE = {"lhfglp", "dllp", "dllp-hierarchical", "llp-vat", "rot"}
WHY_NOT = {
    "llpfc": "'llpfc'.*counts of other bags of the site",
    "easyllp": "'easyllp'.*counts of other bags of the site",
    "supervised": "'labels'.*counts of other bags of the site",
    "supervised-hierarchical": "'labels'.*counts of other bags of the site",
    "mixbag": "'mixbag'.*depends on the other bags of the step",
}
_seen = 0


class Push(Matching):
    """Copies a private feature into a parameter, as prototype networks do."""

    def __call__(self, step: Step) -> Tensor:
        feature = step.output.features.pooled[0]
        with torch.no_grad():
            step.model.heads[0].weight[0].copy_(feature)
        return super().__call__(step)


class HiddenPush(Matching):
    """The same through ``.data``, which moves no version counter."""

    def __call__(self, step: Step) -> Tensor:
        step.model.heads[0].weight.data[0] = step.output.features.pooled[0].detach()
        return super().__call__(step)


class Centre(Matching):
    """Keeps a running mean of features, as self-distillation does."""

    centre = torch.zeros(1)

    def __call__(self, step: Step) -> Tensor:
        self.centre = 0.9 * self.centre + 0.1 * step.output.features.pooled.detach().mean(dim=0)
        return super().__call__(step)


class Queue(Matching):
    """Keeps the features of earlier bags, as contrastive learning does."""

    def __init__(self, setting: Setting, settings: NoSettings) -> None:
        super().__init__(setting, settings)
        self.queue: list[Tensor] = []

    def __call__(self, step: Step) -> Tensor:
        self.queue.append(step.output.features.pooled.detach()[0])
        return super().__call__(step)


class Renormalise(Matching):
    """Scales a parameter to unit length in place."""

    def __call__(self, step: Step) -> Tensor:
        weight = step.model.heads[0].weight
        weight.data.div_(weight.data.norm())
        return super().__call__(step)


class Alternate(Matching):
    """Uses one loss for even steps and another for odd ones."""

    i = 0

    def __call__(self, step: Step) -> Tensor:
        self.i += 1
        return super().__call__(step) * (1 + self.i % 2)


class AlternateInClass(Matching):
    """The same, with the count in the class."""

    i = 0

    def __call__(self, step: Step) -> Tensor:
        type(self).i += 1
        return super().__call__(step) * (1 + self.i % 2)


class AlternateInModule(Matching):
    """The same, with the count where no attribute shows it."""

    def __call__(self, step: Step) -> Tensor:
        global _seen
        _seen += 1
        return super().__call__(step) * (1 + _seen % 2)


class Mixing(Matching):
    """Compares each bag with the mean of the batch."""

    def __call__(self, step: Step) -> Tensor:
        return super().__call__(step) + step.output.features.pooled.mean()


class Scalar(Matching):
    """Returns one number for the whole batch."""

    def __call__(self, step: Step) -> Tensor:
        return super().__call__(step).mean()


PLANTED = [
    (Push, "changes 'heads.0.weight' outside of the optimiser's step"),
    (HiddenPush, "changes 'heads.0.weight' outside of the optimiser's step"),
    (Renormalise, "changes 'heads.0.weight' outside of the optimiser's step"),
    (Centre, "attribute 'centre' keeps something from one bag to the next"),
    (Queue, "attribute 'queue' keeps something from one bag to the next"),
    (Alternate, "attribute 'i' keeps something from one bag to the next"),
    (AlternateInClass, "attribute 'i' keeps something from one bag to the next"),
    (AlternateInModule, "gives another value for a bag after it saw another one"),
    (Mixing, "its value of a bag depends on the other bags of the step"),
    (Scalar, r"a tensor of shape \(\) and not one number per bag"),
]


@pytest.fixture
def store(tmp_path: Path) -> BagStore:
    return BagStore.open(write_hand_made_site(tmp_path), 16)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], str]]:
    """Register a term under the name 'planted'."""
    monkeypatch.setattr(parts, "_registered", {})

    def register(kind: Any) -> str:
        parts.register_part(Part(Kind.TERM, "planted", kind, "a test"))
        return "planted"

    return register


def configure(**changes: Any) -> RunConfig:
    return RunConfig().with_changes({"model.image-size": 16, "train.held-back": 0.0, **changes})


def check(store: BagStore, config: RunConfig) -> HierarchicalClassifier:
    model = build_model(config.model, store.hierarchy, 0, config.parts).train()
    refuse_unsound(model, make_setting(store, config, 1, bags=None))
    return model


@pytest.mark.parametrize("method", method_names())
def test_every_method_passes_or_is_refused_with_its_reason(store: BagStore, method: str) -> None:
    config = configure(**{"model.method": method})
    assert (method in re.findall(r"[\w-]+", ONE_BAG_ALONE.splitlines()[-1])) == (method in PRIVATE)
    if method in PRIVATE:
        check(store, config)
        return
    with pytest.raises(ConfigError, match=WHY_NOT[method]):
        check(store, config)


@pytest.mark.parametrize(("kind", "reason"), PLANTED, ids=[kind.__name__ for kind, _ in PLANTED])
def test_a_planted_term_is_refused_by_its_name(
    store: BagStore, plant: Callable[[Any], str], kind: Any, reason: str
) -> None:
    config = configure(**{"model.method": "dllp", "model.terms": plant(kind)})
    with pytest.raises(ConfigError, match=f"private training cannot use .*term 'planted'.*{reason}"):
        check(store, config)


@pytest.mark.parametrize("kind", [HiddenPush, Renormalise])
def test_what_is_written_only_on_private_bags_is_found_before_the_step(
    store: BagStore, plant: Callable[[Any], str], kind: Any
) -> None:
    """A term that keeps still on made-up bags is caught where it writes."""

    class Sly(kind):  # type: ignore[misc]
        def __call__(self, step: Step) -> Tensor:
            made_up = len(step.inputs) in (2, 4)
            value: Tensor = Matching.__call__(self, step) if made_up else super().__call__(step)
            return value

    config = configure(**{"model.method": "dllp", "model.terms": plant(Sly)})
    model = check(store, config)
    with pytest.raises(RunError, match=r"changed 'heads\.0\.weight' of the model outside"):
        train_round_privately(model, store, config, 1, make_plan())


def test_a_term_is_made_anew_for_every_bag(store: BagStore, plant: Callable[[Any], str]) -> None:
    made = []

    class Counted(Matching):
        def __init__(self, setting: Setting, settings: NoSettings) -> None:
            super().__init__(setting, settings)
            made.append(self)

    config = configure(**{"model.method": "dllp", "model.terms": plant(Counted)})
    model = check(store, config)
    made.clear()
    train_round_privately(model, store, config, 1, make_plan(expected=3.0))
    assert len(made) == 3  # one for each drawn bag; the check is not repeated for this model


def test_a_block_that_counts_is_refused_by_its_place(store: BagStore) -> None:
    config = configure()
    model = build_model(config.model, store.hierarchy, 0).train()

    class Counting(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.seen = inner, 0

        def forward(self, *arguments: Any) -> Any:
            self.seen += 1
            return self.inner(*arguments)

    model.blocks[1] = Counting(model.blocks[1])
    with pytest.raises(ConfigError, match=r"part 'blocks\.1'.*'seen' keeps something"):
        refuse_unsound(model, make_setting(store, config, 1, bags=None))


def test_every_bit_of_a_model_is_watched() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    unchanged = Unchanged(model)
    assert unchanged.changed() == []
    model.bias.data.neg_()
    assert unchanged.changed() == ["bias"]
    unchanged.accept_step()
    assert unchanged.changed() == []
