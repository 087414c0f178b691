"""Our own parts pass what we ask of those of others, and planted faults do not."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.terms.base import Step
from client.terms.proportions import Matching
from common import parts
from common.errors import UserError
from common.model.heads import LinearHead
from common.model.interfaces import Features, Level
from common.model.losses import bag_means
from common.parts import Kind, NoSettings, Part
from deploy.part_checks import check

TRAINED = [
    parts.part(kind, name)
    for kind in (Kind.BACKBONE, Kind.BLOCK, Kind.HEAD, Kind.TERM)
    for name in parts.names(kind)
]


@pytest.mark.parametrize("part", TRAINED, ids=lambda part: f"{part.kind.value}-{part.name}")
def test_our_parts_conform(part: Part) -> None:
    lines = check(part)
    private = part.name not in ("labels", "llpfc", "easyllp", "mixbag")
    assert ("may train privately: one bag alone, checked" in lines) is private


class Halves(LinearHead):
    def __init__(self, level: Level, settings: NoSettings) -> None:
        super().__init__(level.n_features, level.n_classes)
        self.half()

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        return super().forward(features._replace(pooled=features.pooled.half()))


class Neighbours(LinearHead):
    """Scores an image by what is beside it."""

    def __init__(self, level: Level, settings: NoSettings) -> None:
        super().__init__(level.n_features, level.n_classes)

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        return super().forward(features._replace(pooled=features.pooled - features.pooled.mean(dim=0)))


class Ordered(Neighbours):
    """Scores an image by its place."""

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        place = torch.arange(len(features.pooled))[:, None]
        return LinearHead.forward(self, features._replace(pooled=features.pooled + place))


class Idle(Neighbours):
    """Brings an array that nothing looks at."""

    def __init__(self, level: Level, settings: NoSettings) -> None:
        super().__init__(level, settings)
        self.idle = nn.Parameter(torch.zeros(3))

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        return LinearHead.forward(self, features)


class Forgetful(Neighbours):
    """Keeps a number outside of its arrays."""

    made = 0

    def __init__(self, level: Level, settings: NoSettings) -> None:
        super().__init__(level, settings)
        type(self).made += 1
        self.factor = type(self).made

    def forward(self, features: Features) -> tuple[Tensor, Mapping[str, Tensor]]:  # type: ignore[override]
        return LinearHead.forward(self, features._replace(pooled=self.factor * features.pooled))


class Infinite(Matching):
    def __call__(self, step: Step) -> Tensor:
        return super().__call__(step) / 0


@pytest.mark.parametrize(
    ("kind", "build", "fault"),
    [
        (Kind.HEAD, Halves, "is torch.float16"),
        (Kind.HEAD, Neighbours, "change each other's predictions"),
        (Kind.HEAD, Ordered, "the order of a bag's images"),
        (Kind.HEAD, Idle, "no gradient reaches 'heads.0.idle'"),
        (Kind.HEAD, Forgetful, "it keeps more than arrays"),
        (Kind.TERM, Infinite, "not one finite number"),
    ],
)
def test_a_planted_fault_is_found(kind: Kind, build: Any, fault: str) -> None:
    with pytest.raises(UserError, match=f"the {kind.value} 'planted' does not conform.*{fault}"):
        check(Part(kind, "planted", build, "a test"))
    assert "planted" not in parts.names(kind), "it is forgotten again"


def test_the_plugin_fails_a_test_with_the_fault(conformance: Callable[[Part], list[str]]) -> None:
    with pytest.raises(AssertionError, match="change each other's predictions"):
        conformance(Part(Kind.HEAD, "planted", Neighbours, "a test"))
    assert "may train" in conformance(parts.part(Kind.HEAD, "linear"))[-1]


class Projected(Matching):
    """Looks through a layer that the term brings."""

    def __call__(self, step: Step) -> Tensor:
        seen = step.model.terms["planted"](step.output.features.pooled)
        return super().__call__(step) + bag_means(
            seen.square().sum(dim=1), step.inputs.bag_index, len(step.batch)
        )


def test_a_terms_own_module_is_an_array_of_the_model() -> None:
    """It is built with the model, written and read, reached by gradients, and may train privately."""

    def layer(level: Level, settings: NoSettings) -> nn.Linear:
        return nn.Linear(level.n_features, 2, bias=False)

    lines = check(Part(Kind.TERM, "planted", Projected, "a test", modules=layer))
    assert lines == [
        "1 arrays of its own: terms.planted.weight 2x128",
        "may train privately: one bag alone, checked",
    ]
