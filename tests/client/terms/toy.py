"""A problem small enough for seconds: four classes of tiny images, in random bags of four to eight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.data.batch import Batch
from client.terms.base import Objective, Setting, SiteBags
from common.config import RunConfig
from common.config_tables import ModelConfig
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier, Levels, Pieces
from common.model.dictionary import PART as DICTIONARY
from common.model.heads import LINEAR
from common.model.interfaces import Features, Inputs, Level, Output
from common.model.methods import recipe
from common.parts import NoSettings, Part

TREE = Hierarchy(("group", "leaf"), (("x", "y"), ("a", "b", "c", "d")), ((), (0, 0, 1, 1)))
CENTRES = 0.5 * torch.tensor([[1.0, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]])
"""Colour of each leaf; the first channel tells the groups apart."""
BAGS_PER_STEP = 8


class TinyBackbone(nn.Module):
    """12 pixels to 16 features."""

    n_features = 16

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Tanh())

    def forward(self, inputs: Inputs) -> Features:
        return Features(self.body(inputs.images))


class GivenScores(HierarchicalClassifier):
    """A model whose leaf scores are parameters, one row per image, for values computed by hand."""

    def __init__(self, *scores: Tensor) -> None:
        nn.Module.__init__(self)
        self.scores = nn.ParameterList(scores)

    def forward(self, inputs: Inputs) -> Output:
        """The rows that the images' first pixels name."""
        rows = inputs.images[:, 0, 0, 0].long()
        # Levels above that a test does not give are those that no term of it looks at.
        given = [level[rows] for level in self.scores]
        absent = [torch.zeros(len(rows), 1)] * (2 - len(given))
        return Output((*absent, *given), Features(torch.zeros(len(rows), 1)), {}, {})


def build_objective(setting: Setting, seed: int = 0) -> Callable[[HierarchicalClassifier, Batch], Tensor]:
    """The run's loss, whose random numbers flow on from call to call."""
    objective, generator = Objective(setting), torch.Generator().manual_seed(seed)
    return lambda model, batch: objective(model, batch, generator)


def batch_of(sizes: list[int], *level_counts: Tensor, bags: list[int] | None = None) -> Batch:
    """Images that carry their number as a value, in bags of these sizes."""
    number = sum(sizes)
    return Batch(
        Inputs(
            torch.arange(number).float().view(-1, 1, 1, 1).expand(number, 3, 2, 2),
            torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        ),
        [counts.float() for counts in level_counts],
        torch.arange(len(sizes)) if bags is None else torch.tensor(bags),
    )


def setting_of(
    method: str,
    leaf_counts: Tensor,
    *,
    hierarchy: Hierarchy = TREE,
    round: int = 1,
    progress: float = 1.0,
    whole_site: bool = True,
    loss: Mapping[str, float] | None = None,
    **options: float,
) -> Setting:
    """What a term may know; ``options`` are keys of parts, as ``rot_weight``, ``loss`` those of its table."""
    changes = {f"parts.{key.replace('_', '.', 1)}": value for key, value in options.items()}
    changes |= {f"loss.{key}": value for key, value in (loss or {}).items()}
    return Setting(
        config=RunConfig().with_changes({"model.method": method, **changes}),
        hierarchy=hierarchy,
        site="site-1",
        round=round,
        progress=progress,
        device=torch.device("cpu"),
        bags=SiteBags(torch.arange(len(leaf_counts)), leaf_counts.float()) if whole_site else None,
    )


@dataclass(frozen=True)
class Toy:
    """Bags of the toy problem."""

    images: Tensor
    sizes: Tensor
    leaf_counts: Tensor

    @classmethod
    def draw(cls, bags: int, smallest: int, largest: int, generator: torch.Generator) -> "Toy":
        """Random bags of random images."""
        sizes = torch.randint(smallest, largest + 1, (bags,), generator=generator)
        images, labels = draw_images(int(sizes.sum()), generator)
        bag_index = torch.repeat_interleave(torch.arange(bags), sizes)
        counts = torch.zeros(bags, 4).index_put((bag_index, labels), torch.ones(len(labels)), accumulate=True)
        return cls(images, sizes, counts)

    def batch(self, bags: Tensor) -> Batch:
        """These bags."""
        starts = self.sizes.cumsum(0) - self.sizes
        rows = torch.cat([torch.arange(starts[bag], starts[bag] + self.sizes[bag]) for bag in bags.tolist()])
        leaf = self.leaf_counts[bags]
        return Batch(
            Inputs(self.images[rows], torch.repeat_interleave(torch.arange(len(bags)), self.sizes[bags])),
            [leaf.view(-1, 2, 2).sum(dim=2), leaf],
            bags,
        )


def draw_images(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (number, 3, 2, 2) around the centres of their classes, and the classes."""
    labels = torch.randint(0, 4, (number,), generator=generator)
    noise = torch.randn(number, 3, 2, 2, generator=generator)
    return CENTRES[labels][:, :, None, None] + 0.25 * noise, labels


def toy_model(method: str) -> HierarchicalClassifier:
    """The method's pipeline on the tiny backbone."""
    own = recipe(method)
    config = ModelConfig(method=method, atoms_per_class=2, iterations=2)
    backbone = TinyBackbone()

    def made(part: Part, level: int) -> nn.Module:
        module: nn.Module = part.build(Level(16, None, TREE, level, config), NoSettings())
        return module

    heads = [made(LINEAR, level) for level in ((1,) if own.leaf_only else (0, 1))]
    blocks = [made(DICTIONARY, level) for level in (0, 1)] if own.block == "dictionary" else []
    return HierarchicalClassifier(
        TREE,
        Pieces(backbone=backbone, heads=heads, blocks=blocks),
        Levels(masks=bool(blocks), tied=own.tied, leaf_only=own.leaf_only),
    )


def accuracy_after_training(method: str, *, smallest: int, largest: int, steps: int, seed: int) -> float:
    """Share of right leaves among 1000 new images after training on 60 bags."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    toy = Toy.draw(60, smallest, largest, generator)
    model = toy_model(method)
    objective = build_objective(setting_of(method, toy.leaf_counts, progress=0.5), seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(steps):
        bags = torch.randperm(len(toy.sizes), generator=generator)[:BAGS_PER_STEP]
        loss = objective(model, toy.batch(bags))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, labels = draw_images(1000, generator)
    with torch.no_grad():
        return float((model(Inputs.alone(images)).scores[-1].argmax(dim=1) == labels).float().mean())
