"""Define the protected unit, the adjacency, and the events that privacy accounting counts.

Events are kept in ledgers, statements and reports, and an epsilon is always computed from them by
``common.privacy.accounting``. Nothing here samples, adds noise or computes an epsilon.

Both events are written relative to what one unit, a bag, can contribute:

- a Gaussian step's noise multiplier is relative to the clip norm of one bag's gradient;
- a release's noise scale is relative to the most images that one bag can move between classes: the size of
  the largest bag.
"""

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    model_serializer,
)

GRID_COST: Final = 1e-5
"""Epsilon that one step with noise on the grid of secure aggregation may cost beyond a continuous one."""
UNIT: Final = "bag"
"""The unit in which two neighbouring data sets differ, and that every figure protects: one whole bag, all its
images and labels. It covers a patient whose images lie in one bag."""
UNIT_EXPLANATION = f"{UNIT}: one whole bag (all its images and labels) is replaced by another of its size"
"""What a figure for this unit covers, in words for a report."""


class Adjacency(StrEnum):
    """Name the way in which two neighbouring data sets differ by one unit."""

    REPLACE_ONE = "replace-one"
    """One unit is replaced by another: the clipped sum moves by up to twice the clip norm."""
    ADD_REMOVE = "add-remove"
    """One unit is added or removed: the clipped sum moves by up to the clip norm. The convention of
    Opacus's accountants; its epsilon is smaller and protects less."""


class _Event(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _whole(value: object) -> object:
    """Turn a whole number that JSON or a record carried as a float, such as 30.0, into an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _truth(value: object) -> object:
    """Turn 0 and 1, as which a record carries truth values, into one."""
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


class PoissonGaussian(_Event):
    """Describe steps of bag-level DP-SGD.

    Each step samples bags by Poisson sampling, clips the gradient of each, and adds Gaussian noise to the
    clipped sum. A step in which no bag was drawn adds noise and counts like any other.
    """

    kind: Literal["poisson_gaussian"] = "poisson_gaussian"
    sample_rate: float = Field(gt=0, le=1, description="q: chance of each bag to be in a step")
    noise_multiplier: float = Field(
        ge=0, le=1e6, description="sigma: noise standard deviation / clip norm; 0 bounds nothing"
    )
    steps: Annotated[int, BeforeValidator(_whole)] = Field(ge=1, le=10**9)
    shares: Annotated[int, BeforeValidator(_whole)] = Field(
        1,
        ge=1,
        le=10**6,
        description="sites whose equal shares of noise add up to sigma; 1: all is the site's own",
    )
    discrete: Annotated[bool, BeforeValidator(_truth)] = Field(
        False, description="the noise is drawn on the grid of secure aggregation (see shared_noise.py)"
    )

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Events of noise of a site's own keep the form that ledgers of earlier releases are hashed in.
        content: dict[str, Any] = handler(self)
        # A record's numbers and texts have no truth values.
        content["discrete"] = int(self.discrete)
        usual = {"shares": 1, "discrete": 0}
        return {key: value for key, value in content.items() if usual.get(key) != value}

    def alone(self) -> "PoissonGaussian":
        """Return what the site's own share of the noise gives, should the masks hide no other site."""
        if self.shares == 1:
            return self
        sigma = self.noise_multiplier / math.sqrt(self.shares)
        return self.model_copy(update={"noise_multiplier": sigma, "shares": 1})


class DiscreteLaplace(_Event):
    """Describe one release of integer counts, or of one noised metric, with discrete Laplace noise.

    The noise has P(z) proportional to exp(-|z| / t). For metrics see proportions.py.

    ``scale`` is b = t / m: the noise scale t in images, relative to the m images that one unit can move
    between classes (L1 distance 2 m of the counts: up to m leave some classes, up to m join others). The
    epsilon of the release alone is 2 / b for replace-one and 1 / b for add/remove.
    """

    kind: Literal["discrete_laplace"] = "discrete_laplace"
    scale: float = Field(gt=0, le=1e9, description="b: noise scale / images per unit")


Event = Annotated[PoissonGaussian | DiscreteLaplace, Field(discriminator="kind")]

_EVENT: TypeAdapter[PoissonGaussian | DiscreteLaplace] = TypeAdapter(Event)


def event_from_dict(data: Mapping[str, Any]) -> PoissonGaussian | DiscreteLaplace:
    """Read one event from the form that ``event.model_dump()`` returns.

    Raises:
        pydantic.ValidationError: another kind, a missing or unknown key, or a value out of bounds.
    """
    return _EVENT.validate_python(dict(data))


def merge(
    events: Iterable[PoissonGaussian | DiscreteLaplace],
) -> tuple[PoissonGaussian | DiscreteLaplace, ...]:
    """Return the events in one fixed order, the steps of equal Gaussian events added up.

    Composition does not depend on the order.
    """
    # One entry of 200 steps composes at once where 200 entries took 48 s, and the fixed order makes equal
    # spending give equal floats.
    steps: dict[tuple[float, float, int, bool], int] = {}
    releases = []
    for event in events:
        if isinstance(event, DiscreteLaplace):
            releases.append(event)
        else:
            key = (event.sample_rate, event.noise_multiplier, event.shares, event.discrete)
            steps[key] = steps.get(key, 0) + event.steps
    gaussians = [
        PoissonGaussian(
            sample_rate=rate, noise_multiplier=sigma, steps=number, shares=shares, discrete=discrete
        )
        for (rate, sigma, shares, discrete), number in sorted(steps.items())
    ]
    return (*sorted(releases, key=lambda event: event.scale), *gaussians)


def alone(
    events: Iterable[PoissonGaussian | DiscreteLaplace],
) -> tuple[PoissonGaussian | DiscreteLaplace, ...]:
    """Return the events with the site's own share of every shared noise in place of the sum of the shares."""
    return tuple(event.alone() if isinstance(event, PoissonGaussian) else event for event in events)


def is_shared(events: Iterable[PoissonGaussian | DiscreteLaplace]) -> bool:
    """Return True if some event counts on the noise of other sites."""
    return any(isinstance(event, PoissonGaussian) and event.shares > 1 for event in events)
