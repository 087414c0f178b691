"""Define the content of report.json, which is the only thing that the page is made from.

The module knows no source, no accountant and no HTML. Every epsilon is an upper bound by ``accountant``, for
the ``unit`` and ``adjacency`` next to it, at ``delta``. None means unknown where a field's description says
so, and "no bound" for an epsilon.
"""

from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    """Provide the frozen base of the report's parts, without unknown fields and infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Status(StrEnum):
    """Classify what can be said of a site's privacy."""

    BOUNDED = "bounded"
    """Epsilon bounds what was sent."""
    NOT_PRIVATE = "not-private"
    """Something was sent without noise: no guarantee at all."""
    UNKNOWN = "unknown"
    """The records cannot be trusted, so no figure is given."""


class Problem(_Part):
    """Describe a fault of the records."""

    site: str
    row: int | None = Field(description="row of the site's ledger; null when it concerns all of it")
    reason: str


class GeneratorKind(StrEnum):
    """Classify the worst of the generators that a site's sampling and noise came from."""

    NONE = "none"
    """Nothing was drawn."""
    SECURE = "secure"
    UNKNOWN = "unknown"
    """The records do not say, so nothing may be promised on it."""
    INSECURE = "insecure"
    """Seeded: whoever knows the seed can remove all noise."""


class Training(_Part):
    """Describe equal training steps of one run on one data version."""

    run: str = Field(description="empty when only the server's statement is known")
    data_version: str
    sample_rate: float = Field(description="q: chance of each bag to be in a step")
    noise_multiplier: float = Field(description="sigma: noise standard deviation / clip norm")
    shares: int = Field(1, description="sites whose equal shares of noise make up sigma; 1: the site's own")
    steps: int
    rounds: int | None
    unconfirmed_rounds: int = Field(description="reserved, and never confirmed; they count")


class Release(_Part):
    """Describe one release of label counts."""

    data_version: str
    mechanism: str
    granularity: str = Field(description="total: one row a site; per-bag: one row a bag")
    unit: str = Field(description="what the noise was scaled for")
    scale: float | None = Field(description="b: noise scale / images of the unit")
    noise_scale: float | None = Field(description="t, images; each count's noise has about sqrt(2) t")
    epsilon_alone: float | None = Field(description="2 / b: replace-one, delta 0, of this release alone")


class Looks(_Part):
    """Describe equal evaluations on held-back bags, of one run on one data version, as noised figures."""

    run: str = Field(description="empty when only the server's statement is known")
    data_version: str
    scale: float = Field(description="b: noise scale / what one bag can move a figure by")
    figures: int = Field(description="figures sent, one a level and evaluation")
    looks: int | None
    unconfirmed_looks: int = Field(description="reserved, and never confirmed; they count")
    epsilon_alone: float = Field(description="2 / b a figure: replace-one, delta 0, as charged")


class Refusal(_Part):
    """Describe an event that the site's cap did not allow, and that cost nothing."""

    row: int
    run: str
    round: int
    time: str
    asked: str


class UnusedReply(_Part):
    """Describe something of a site that the server did not use."""

    site: str
    round: int
    phase: str
    reason: str


class Spending(_Part):
    """Hold the epsilon of everything up to and including a round."""

    round: int = Field(description="rounds of training counted over the ledger's life, or of the run")
    epsilon: float


class CurvePoint(_Part):
    """Hold the epsilon of the same spending at another delta."""

    delta: float
    epsilon: float


class WhatIf(_Part):
    """Hold the epsilon of the whole spending after more rounds like the last one."""

    rounds: int
    epsilon: float
    fits: bool = Field(description="whether the site's cap would allow it")


class Row(_Part):
    """Describe one row of a ledger."""

    row: int
    kind: str
    run: str
    round: int | None
    time: str
    what: str


class LedgerFile(_Part):
    """Describe the ledger file that was read, and whether it can be believed."""

    head: str
    rows: int
    intact: bool


class Loss(_Part):
    """Describe a site's declaration that rows of its ledger are lost, with what it had stated until then."""

    round: int
    epsilon: float | None
    delta: float | None


class Stated(_Part):
    """Hold the newest privacy statement that the site sent to the server."""

    round: int
    unit: str
    adjacency: str
    epsilon: float | None
    epsilon_alone: float | None = Field(None, description="by its own shares of noise alone")
    delta: float | None
    budget_left: float | None
    ledger_head: str
    generator: str


class Site(_Part):
    """Hold everything about one site."""

    name: str
    status: Status
    why: str = Field(description="why there is no figure; empty for a bounded site")
    unit: str
    adjacency: str
    accountant: str
    delta: float | None
    epsilon: float | None = Field(description="all events, reserved ones included")
    confirmed: float | None = Field(description="epsilon of the events whose round was finished")
    cap: float | None
    left: float | None
    guess_right: float | None = Field(
        description="most that a coin-toss guess at which of two units was used can be right, 0.5 to 1"
    )
    add_remove: float | None = Field(description="the same events for add/remove; protects less")
    opacus_rdp: float | None = Field(
        description="training steps alone, add/remove, by Opacus's Renyi accountant"
    )
    without_amplification: float | None = Field(description="had every bag been in every step")
    own_share: float | None = Field(
        None, description="by the site's own shares of noise alone; null: no noise was shared"
    )
    own_share_cap: float | None = Field(None, description="the most that the site allows of that")
    bags: int | None = Field(description="N: the bags that are trained on; not protected")
    delta_limit: float | None = Field(description="1 / N; delta must stay below")
    steps: int
    rounds: int | None
    training: tuple[Training, ...]
    releases: tuple[Release, ...]
    looks: tuple[Looks, ...]
    spending: tuple[Spending, ...]
    curve: tuple[CurvePoint, ...]
    what_if: tuple[WhatIf, ...]
    refusals: tuple[Refusal, ...]
    data_versions: tuple[str, ...] = Field(
        description="random names that the site gave to the versions of its data; they tell nothing of them"
    )
    losses: int = Field(description="how often the site's owner accepted that rows of its ledger were lost")
    generator: GeneratorKind
    generators: tuple[str, ...] = Field(description="by name, as the ledger or the statement records them")
    declared_losses: tuple[Loss, ...] = Field(description="to the server, with what was stated before")
    stated: Stated | None
    ledger: LedgerFile | None
    rows: tuple[Row, ...] = Field(description="of ledgers that were named as a source")


class Settings(_Part):
    """Hold the privacy settings of the run, each null where it was not recorded."""

    target_epsilon: float | None
    delta: float | None
    clip_norm: float | None = Field(description="C: norm that each bag's gradient is clipped to")
    expected_bags: float | None = Field(description="q N: what the noisy sum is divided by")
    steps_per_round: int | None
    release_scale: float | None
    metrics_scale: float | None
    forced_delta: bool


class Audit(_Part):
    """Hold the result of an empirical attack, which shows epsilon to be at least ``lower_bound``."""

    lower_bound: float
    confidence: float
    details: dict[str, str] = Field(description="whatever else the audit wrote down")


class Worst(_Part):
    """Hold the federation's figure, which is that of its worst site and never a mean."""

    site: str
    epsilon: float
    delta: float
    unit: str
    adjacency: str
    accountant: str
    cap: float | None
    left: float | None
    guess_right: float


class Provenance(_Part):
    """Record the sources, the software and the time of the report."""

    created: str
    packages: dict[str, str] = Field(description="of the machine that wrote the report")
    code_version: str | None = Field(description="of the package that the run's server ran")
    code_commit: str | None = Field(description="of its git checkout; -dirty: with changes")
    config_sha256: str | None
    sources: tuple[str, ...] = Field(description="names of the files and folders, without their folder")


class Disclosure(_Part):
    """Hold one of the seventeen texts that a report must contain."""

    key: str
    title: str
    text: tuple[str, ...]


class Report(_Part):
    """Hold the whole content of report.json."""

    schema_version: Literal[3] = 3
    title: str
    scope: Literal["site", "federation"]
    run: str | None
    finished: bool | None = Field(description="null when no run was among the sources")
    rounds: int | None
    stopped_early: str | None = Field(description="why the run ended before its last round, if it did")
    status: Status = Field(description="the worst of the sites'")
    headline: str
    summary: tuple[str, ...] = Field(description="the plain paragraphs")
    not_covered: tuple[str, ...]
    worst: Worst | None = Field(description="null unless every site is bounded")
    problems: tuple[Problem, ...] = Field(description="the records are not to be trusted while any is left")
    cautions: tuple[str, ...] = Field(
        description="true figures that a reader could take for more than they are"
    )
    settings: Settings | None
    sites: dict[str, Site]
    left_out: tuple[UnusedReply, ...]
    audit: Audit | None
    disclosures: tuple[Disclosure, ...] = Field(min_length=17, max_length=17)
    provenance: Provenance


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of report.json, which is written next to it as report.schema.json."""
    return Report.model_json_schema()
