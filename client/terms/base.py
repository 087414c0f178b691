"""Define a loss term: what it is made of, what it may look at, and how terms add up to a loss.

The loss of a batch is the sum of the run's terms, averaged over bags. A term sees bags with counts, never a
label of an image. Under differential privacy it is made anew for every bag and sees nothing but that bag;
``client.private_check`` refuses a term by which something would pass from one bag to the next all the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from client.data.batch import Batch
from client.terms.transport import pseudo_labels
from common import parts
from common.config import RunConfig
from common.errors import ConfigError
from common.hierarchy import Hierarchy
from common.model.classifier import HierarchicalClassifier, log_probabilities
from common.model.interfaces import Inputs, Output
from common.parts import Kind

ONE_BAG_ALONE = (
    "The unit of privacy is the bag: its loss must depend on that bag alone, and nothing of it may stay.\n"
    "Of the methods lhfglp, dllp-hierarchical, dllp, rot and llp-vat pass."
)


class NeedsWholeSiteError(ConfigError):
    """Tell that a term asked for the counts of all bags of a site, which private training does not give."""


@dataclass(frozen=True)
class SiteBags:
    """Hold the counts of all training bags of a site."""

    positions: Tensor
    """Shape (B,) int64: in the store, ascending."""
    leaf_counts: Tensor
    """Shape (B, C_L) float32; a row sums to the images of its bag."""


@dataclass(frozen=True)
class Setting:
    """Hold what a term may know of the run, the site and the round when it is made."""

    config: RunConfig
    hierarchy: Hierarchy
    site: str
    """The site's name; with the run's seed and a round it names random numbers that outlive a round."""
    round: int
    """1-based."""
    progress: float
    """Share of the run that is done at the round's start, in [0, 1]."""
    device: torch.device
    bags: SiteBags | None
    """None under differential privacy, where nothing of the whole site may be looked at."""

    @property
    def whole_site(self) -> SiteBags:
        """Return the counts of the whole site.

        Raises:
            NeedsWholeSiteError: the training is private.
        """
        if self.bags is None:
            raise NeedsWholeSiteError("its loss of a bag looks at the counts of other bags of the site")
        return self.bags


@dataclass
class Step:
    """Hold what the terms of one optimiser step look at, and compute what they share once."""

    model: HierarchicalClassifier
    """In training mode, on the batch's device."""
    batch: Batch
    """At least one bag; sizes may differ."""
    generator: torch.Generator
    """On the CPU: what is random in a term comes from here, or from torch's global generator, which the loop
    seeds (dropout). Under differential privacy it is the bag's own."""
    _output: Output | None = None
    _log_probabilities: list[Tensor] | None = None
    _soft: dict[float, Tensor] = field(default_factory=dict)

    @property
    def inputs(self) -> Inputs:
        """Return what the model looks at."""
        return self.batch.inputs

    @property
    def output(self) -> Output:
        """Return the model's output for the batch, with a graph to its parameters."""
        if self._output is None:
            self._output = self.model(self.inputs)
        return self._output

    @property
    def log_probabilities(self) -> list[Tensor]:
        """Return the log-probabilities per level, shape (N, C_l), with a graph."""
        if self._log_probabilities is None:
            self._log_probabilities = log_probabilities(self.output)
        return self._log_probabilities

    def soft_labels(self, temperature: float) -> Tensor:
        """Return labels of the images that add up to their bag's counts (see ``pseudo_labels``), (N, C_L)."""
        if temperature not in self._soft:
            with torch.no_grad():
                self._soft[temperature] = pseudo_labels(
                    self.log_probabilities[-1],
                    self.inputs.bag_index,
                    self.batch.level_counts[-1],
                    temperature,
                )
        return self._soft[temperature]


class Term(Protocol):
    """Compute one term of the loss, for every bag from that bag alone."""

    def __call__(self, step: Step) -> Tensor:
        """Return the term, shape (B,), with a graph to the model's parameters.

        Entry b depends on bag b alone, or the term is refused under differential privacy. The term's own
        weight is in it.
        """
        ...


class Objective:
    """Add up the terms of a run."""

    def __init__(self, setting: Setting) -> None:
        self.terms: dict[str, Term] = {}
        for name in setting.config.model.recipe.terms:
            found = parts.part(Kind.TERM, name)
            settings = setting.config.parts.get(name, found.settings())
            try:
                self.terms[name] = found.build(setting, settings)
            except NeedsWholeSiteError as error:
                raise ConfigError(
                    f"private training cannot use term {name!r}: {error}\n{ONE_BAG_ALONE}"
                ) from error

    def __call__(self, model: HierarchicalClassifier, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the loss, a scalar: the sum of all terms, averaged over bags."""
        return self.of_bags(model, batch, generator).mean()

    def of_bags(self, model: HierarchicalClassifier, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the sum of all terms for each bag, shape (B,)."""
        step = Step(model, batch, generator)
        return total(term(step) for term in self.terms.values())


def total(values: Iterable[Tensor]) -> Tensor:
    """Return the sum of at least one tensor, from left to right."""
    first, *rest = values
    for value in rest:
        first = first + value
    return first
