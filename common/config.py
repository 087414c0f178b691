"""RunConfig: everything one run needs, and the one reader of Flower's run configuration.

Flower hands a run a flat table of scalars with dotted, kebab-case keys (``model.image-size``), from
``[tool.flwr.app.config]`` and ``--run-config``. This module turns it into one frozen, bounded object,
refuses unknown keys, and writes it back as the ``config.toml`` from which a run can be repeated.
"""

import difflib
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError, require_file
from common.methods import Method as Method

Scalar = str | int | float | bool


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """A frozen table of the configuration: strict about unknown keys, kebab-case outside."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=_kebab, populate_by_name=True, protected_namespaces=()
    )


class Norm(StrEnum):
    """What replaces BatchNorm, whose statistics would mix images across bags and sites."""

    GROUP = "group"
    """GroupNorm: affine weights are kept, running statistics are dropped."""
    FROZEN_BATCH = "frozen-batch"
    """BatchNorm with the statistics of the weights file, as constants; needs a weights file."""


class Strategy(StrEnum):
    """How the server turns the sites' models into the next one."""

    FEDAVG = "fedavg"
    FEDPROX = "fedprox"
    FEDAVGM = "fedavgm"
    FEDADAM = "fedadam"
    FEDYOGI = "fedyogi"
    FEDPALS = "fedpals"
    """FedAvg whose weights align the sites' label marginals with the target (arXiv 2411.03799)."""
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed-mean"
    KRUM = "krum"


class Transport(StrEnum):
    """How the arrays of a ModelUpdate travel; both sides compute in 32 bits or more."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    """Rounded to IEEE half precision: half the bytes, a relative error of at most 2**-11."""


class ModelConfig(Section):
    """The classifier. Sizes are pixels, counts or plain numbers."""

    method: Method = Method.LHFGLP
    backbone: str = Field("resnet-small", description="resnet-small, colour-histogram or a torchvision model")
    weights: str = Field("", description="local weights file (.safetensors or .pth), or empty")
    norm: Norm = Norm.GROUP
    image_size: int = Field(32, ge=8, le=1024, description="side of the square input, pixels")
    atoms_per_class: int = Field(8, ge=1, le=256, description="dictionary atoms per class (k)")
    iterations: int = Field(3, ge=1, le=50, description="unrolled ISTA steps (T)")
    dictionary: bool = Field(True, description="switch for the sparse dictionary blocks")
    masks: bool = Field(True, description="switch for the category-aware masks")
    tied: bool = Field(True, description="switch for one distribution over the tree's paths")


class Part(StrEnum):
    """A part of the model that is trained; the rest keeps its values and is never sent."""

    AUTO = "auto"
    """``all``; under differential privacy ``norm-head``, since noise grows with what is trained."""
    ALL = "all"
    NORM_HEAD = "norm-head"
    """Heads, dictionary, and the scales and shifts of the backbone's normalisation layers."""
    HEAD = "head"
    """Heads and dictionary; the backbone is a fixed map from images to features."""


class LossConfig(Section):
    """The hierarchical proportion loss. Weights are relative and >= 0."""

    coarse_weight: float = Field(0.3, ge=0, le=100, description="weight of each level above leaf, final")
    anneal_from: float = Field(
        1.0,
        ge=0,
        le=100,
        description="weight of each level above leaf in round 1; falls linearly to coarse-weight",
    )
    anneal_share: float = Field(0.5, ge=0, le=1, description="share of the rounds the fall takes")
    reconstruction: float = Field(0.01, ge=0, le=100, description="alpha of the reconstruction error")
    sparsity: float = Field(0.0001, ge=0, le=100, description="beta of the l1 norm of the codes")
    refinement: float = Field(
        0.5,
        ge=0,
        le=1,
        description="lhfglp: share of refined labels in the loss; 0: off",
    )
    refine_from: float = Field(0.15, ge=0, le=1, description="share of the rounds before refinement begins")
    temperature: float = Field(
        0.5, ge=0.05, le=100, description="entropy of refined labels; 1 is an E-step, small is hard"
    )


class Augmentation(StrEnum):
    """How images are changed before each look at them; counts stay true."""

    FULL = "full"
    """Flips, quarter turns, small shifts, brightness and contrast."""
    SHIFT = "shift"
    """Without flips and turns: for classes that differ by them, as signs, letters and vehicles do."""
    NONE = "none"


class ObjectiveConfig(Section):
    """What the methods beside LHFGLP can be tuned by; a key begins with its method (docs/methods.md)."""

    vat_weight: float = Field(0.05, ge=0, le=100, description="llp-vat: weight of the consistency, final")
    vat_radius: float = Field(
        3.0, gt=0, le=1e4, description="llp-vat: norm of an image's change; pixels are in [-1, 1]"
    )
    rot_weight: float = Field(1.0, ge=0, le=100, description="rot: weight of the pseudo-labels")
    rot_temperature: float = Field(
        1.0, ge=0.05, le=100, description="rot: entropy of the pseudo-labels; small is hard"
    )
    llpfc_group: int = Field(
        0, ge=0, le=100_000, description="llpfc: fewest bags of a group; 0: as many as leaves"
    )
    llpfc_regroup: int = Field(20, ge=1, le=100_000, description="llpfc: rounds between new groups")
    mixbag_confidence: float = Field(
        0.99, gt=0, lt=1, description="mixbag: confidence of the interval within which a class costs nothing"
    )


class TrainConfig(Section):
    """Local training at a site."""

    local_epochs: int = Field(1, ge=1, le=1000, description="passes over the site's bags per round")
    rounds_per_pass: int = Field(
        1, ge=1, le=100_000, description="rounds that share one pass; above 1 sites are averaged more often"
    )
    bags_per_step: int = Field(2, ge=1, le=4096, description="bags per optimiser step")
    optimiser: Annotated[str, Field(pattern="^(sgd|adamw)$")] = "adamw"
    learning_rate: float = Field(0.002, gt=0, le=10, description="at round 1; cosine to 5% at the end")
    weight_decay: float = Field(0.0001, ge=0, le=1)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd only")
    clip_gradient: float = Field(5.0, gt=0, le=1e6, description="norm the step's gradient is clipped to")
    augmentation: Augmentation = Field(
        Augmentation.FULL, description="full: flips, quarter turns, shifts, light; shift: the last two; none"
    )
    part: Part = Field(Part.AUTO, description="what is trained; auto: all, and norm-head under dp")
    held_back: float = Field(0.1, ge=0, le=0.9, description="share of bags held back for selection")
    device: Annotated[str, Field(pattern="^(auto|cpu|cuda)$")] = "auto"
    threads: int = Field(1, ge=1, le=256, description="torch threads per site; 1 is bitwise repeatable")


class FederationConfig(Section):
    """Who takes part, how long the server waits, and how it aggregates."""

    strategy: Strategy = Strategy.FEDAVG
    sites: int = Field(5, ge=1, le=100_000, description="sites the server waits for at the start")
    quorum: int = Field(1, ge=1, le=100_000, description="fewest good updates that make a round")
    deadline: float = Field(3600.0, gt=0, le=1e7, description="seconds to wait for replies in a round")
    enrol_deadline: float = Field(600.0, gt=0, le=1e7, description="seconds to wait for sites to appear")
    patience: float = Field(
        3600.0, ge=0, le=1e7, description="seconds below the quorum before the run gives up"
    )
    allow: str = Field("", description="comma-separated site names that may take part; empty: all")
    max_update_mb: float = Field(1024.0, gt=0, le=1e6, description="largest update accepted, MiB")
    max_change: float = Field(
        1000.0, gt=0, le=1e30, description="largest change accepted: L2 norm / (1 + norm of the model)"
    )
    transport: Transport = Transport.FLOAT32
    proximal_mu: float = Field(0.01, ge=0, le=100, description="FedProx: weight of the proximal term")
    server_learning_rate: float = Field(1.0, gt=0, le=100, description="fedavgm, fedadam, fedyogi")
    server_decay: bool = Field(
        False, description="fedavgm, fedadam, fedyogi: the server's rate falls as the sites' does"
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="fedavgm momentum; fedadam/fedyogi beta 1")
    trim: float = Field(0.2, ge=0, lt=0.5, description="trimmed-mean: share cut at each end")
    byzantine: int = Field(0, ge=0, le=100_000, description="krum: sites assumed malicious")
    pals_target: Annotated[str, Field(pattern="^(uniform|pooled)$")] = "uniform"
    pals_regularisation: float = Field(
        0.1, ge=0, le=1e6, description="fedpals: 0 aligns label marginals, large weighs by bags"
    )


class DPConfig(Section):
    """Bag-level differential privacy. What is asked for here; a site's own budget (site.toml) wins."""

    epsilon: float = Field(
        0.0,
        ge=0,
        le=1e4,
        description="most that one run may spend at each site, replace-one bag; 0: not private",
    )
    delta: float = Field(1e-4, gt=0, lt=1, description="must be below 1 / bags of every site")
    clip_norm: float = Field(
        0.5, gt=0, le=1e6, description="norm that the gradient of each bag is clipped to"
    )
    expected_bags: float = Field(
        32.0, gt=0, le=1e6, description="mean bags per step (at most all of a site's)"
    )
    steps_per_round: int = Field(4, ge=1, le=100_000)
    release_scale: float = Field(
        8.0, gt=0, le=1e6, description="noise of released counts / images of the largest bag; costs 2 / scale"
    )
    metrics_scale: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="noise of held-back figures / one bag, if sites allow it; each costs 2 / scale; 0: off",
    )
    force_delta: bool = Field(False, description="accept delta >= 1 / bags; the report marks it")


class CentralDPConfig(Section):
    """Noise added by the server (Flower's fixed clipping); its unit is the site. See docs/privacy.md."""

    noise_multiplier: float = Field(0.0, ge=0, le=1e4, description="noise / clip norm of the mean; 0: off")
    clip_norm: float = Field(1.0, gt=0, le=1e6, description="norm that each site's update is clipped to")


class SecureAggregationConfig(Section):
    """SecAgg+: the server sees the sum of the updates only. See docs/secure-aggregation.md."""

    enabled: bool = False
    threshold_share: float = Field(
        0.66, gt=0.5, le=1, description="share of the sites that must stay, for the sum to be unmasked"
    )
    neighbours: int = Field(
        0, ge=0, le=10_000, multiple_of=2, description="sites that each shares masks with; 0: all others"
    )
    clip_range: float = Field(
        16.0, gt=0, le=1e6, description="each coordinate of an update is clipped to +-this"
    )
    minimum_sites: int = Field(
        3, ge=2, le=100_000, description="fewest sites in a sum; a site that demands more gets more"
    )
    certificates: str = Field(
        "", description="the server's folder of SITE.crt, for sites that do not send their own"
    )


class EvaluationConfig(Section):
    """When the held-back bags are looked at."""

    every: int = Field(1, ge=1, le=10_000, description="rounds between looks at the held-back bags")

    def is_due(self, round: int, rounds: int) -> bool:
        """Whether the held-back bags are looked at after this round of ``rounds``."""
        return round % self.every == 0 or round == rounds

    def looks(self, rounds: int) -> int:
        """Looks in a run of ``rounds``."""
        return -(-rounds // self.every)


class RunConfig(Section):
    """One run, complete. ``config.toml`` in the run folder is this object."""

    name: str = Field("fedbags", min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    seed: int = Field(0, ge=0, lt=2**31, description="fixes data order, augmentation and initial weights")
    rounds: int = Field(12, ge=1, le=100_000)
    run_dir: str = Field("", description="run folder; empty: ~/.fedbags/runs/NAME-RUN_ID")
    sites_dir: str = Field("", description="folder of site folders (simulation); empty: synthetic hospitals")
    skip_bad: bool = Field(False, description="leave out a site's bad rows (listed in quarantine.csv)")
    resume: bool = Field(False, description="go on from the run folder's newest checkpoint")
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    federation: FederationConfig = FederationConfig()
    dp: DPConfig = DPConfig()
    central_dp: CentralDPConfig = CentralDPConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _quorum_can_be_reached(self) -> Self:
        if self.federation.quorum > self.federation.sites:
            raise ValueError(
                f"federation.quorum = {self.federation.quorum} is above federation.sites = "
                f"{self.federation.sites}: no round could ever be made"
            )
        return self

    @model_validator(mode="after")
    def _privacy_is_for_losses_of_one_bag_each(self) -> Self:
        reason = self.model.method.why_not_private
        if reason and (self.dp.epsilon or self.central_dp.noise_multiplier):
            sound = ", ".join(method.value for method in Method if not method.why_not_private)
            raise ValueError(
                f"model.method = '{self.model.method.value}' is not offered under differential privacy: "
                f"{reason}. The unit of privacy is the bag: use one of {sound}"
            )
        return self

    @model_validator(mode="after")
    def _a_round_is_whole_passes_or_a_part_of_one(self) -> Self:
        if self.train.rounds_per_pass > 1 and self.train.local_epochs > 1:
            raise ValueError(
                f"train.rounds-per-pass = {self.train.rounds_per_pass} makes a round a part of a pass, and "
                f"train.local-epochs = {self.train.local_epochs} several passes: set one of them to 1"
            )
        return self

    @model_validator(mode="after")
    def _only_a_mean_can_be_made_of_a_sum(self) -> Self:
        secure, strategy = self.secure_aggregation, self.federation.strategy
        if not secure.enabled:
            return self
        if strategy in (Strategy.MEDIAN, Strategy.TRIMMED_MEAN, Strategy.KRUM):
            raise ValueError(
                f"federation.strategy = '{strategy.value}' compares the sites' updates, and with secure "
                "aggregation nobody sees them: use a strategy of means, or secure-aggregation.enabled = false"
            )
        if self.central_dp.noise_multiplier:
            raise ValueError(
                "central-dp clips each site's update at the server, and with secure aggregation nobody sees "
                "it there: use --dp (noise at the sites), or secure-aggregation.enabled = false"
            )
        if secure.minimum_sites > self.federation.sites:
            raise ValueError(
                f"secure-aggregation.minimum-sites = {secure.minimum_sites} is above federation.sites = "
                f"{self.federation.sites}: no round could ever be made"
            )
        return self

    @model_validator(mode="after")
    def _central_noise_is_tied_to_its_clip_norm(self) -> Self:
        if self.central_dp.noise_multiplier:
            if self.federation.strategy is not Strategy.FEDAVG:
                raise ValueError(
                    "central-dp needs federation.strategy = 'fedavg': Flower adds the noise after the "
                    "strategy's step, and only the plain mean of clipped updates moves by clip-norm / sites"
                )
            if self.federation.quorum != self.federation.sites:
                raise ValueError(
                    "central-dp needs federation.quorum = federation.sites: the noise is made for the mean "
                    "of that many updates, and a mean of fewer moves by more"
                )
        return self

    @property
    def attendance(self) -> FederationConfig:
        """``federation``, whose quorum makes a sum that may be unmasked where aggregation is secure."""
        secure = self.secure_aggregation
        quorum = max(self.federation.quorum, secure.minimum_sites if secure.enabled else 1)
        return self.federation.model_copy(update={"quorum": quorum})

    @property
    def trained_part(self) -> Part:
        """What ``train.part`` means in this run."""
        if self.train.part is not Part.AUTO:
            return self.train.part
        return Part.NORM_HEAD if self.dp.epsilon else Part.ALL

    @classmethod
    def from_flat(cls, flat: Mapping[str, Scalar]) -> Self:
        """Read Flower's flat run configuration.

        Args:
            flat: dotted kebab-case keys; missing keys take their defaults.

        Raises:
            ConfigError: every unknown key (with the nearest known one) and out-of-range value.
        """
        known = cls().to_flat()
        problems = []
        nested: dict[str, Any] = {}
        for key, value in flat.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                problems.append(f"unknown key {key!r}{hint}")
                continue
            *tables, last = key.split(".")
            target = nested
            for table in tables:
                target = target.setdefault(table, {})
            target[last] = value
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            for fault in error.errors():
                key = ".".join(str(part) for part in fault["loc"])
                problems.append(f"{key} = {fault['input']!r}: {fault['msg']}" if key else fault["msg"])
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise ConfigError(
                f"the run configuration has {len(problems)} fault(s):\n{lines}\n"
                "`fedbags config` lists every key with its unit and bounds."
            )
        return config

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a ``config.toml``, nested or dotted."""
        require_file(path, "the configuration file", "Give the config.toml of a run folder.")
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        return cls.from_flat(flatten(data))

    def to_flat(self) -> dict[str, Scalar]:
        """The flat form that Flower carries; the inverse of from_flat."""
        return flatten(self.model_dump(mode="json", by_alias=True))

    def to_toml(self) -> str:
        """The complete configuration as TOML text."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True))

    def with_changes(self, changes: Mapping[str, Scalar]) -> Self:
        """A copy with some flat keys replaced, validated like from_flat."""
        return type(self).from_flat({**self.to_flat(), **changes})


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Nested tables to dotted keys."""
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_setting(text: str) -> tuple[str, Scalar]:
    """Parse one ``KEY=VALUE`` of ``--set``; the value is a TOML scalar, else taken as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write KEY=VALUE, for example train.learning-rate=0.001")
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if not isinstance(parsed, str | int | float | bool):
        raise ConfigError(f"--set {text!r}: the value must be a text, a number or true/false")
    return key.strip(), parsed
