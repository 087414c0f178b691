"""Read, check and write the configuration of a run.

Flower hands a run a flat table of scalars with dotted, kebab-case keys (``model.image-size``), from
``[tool.flwr.app.config]`` and ``--run-config``. This module alone reads it. It turns the table into one
frozen, bounded object, refuses unknown keys, and writes it back as the ``config.toml`` from which a run can
be repeated.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import Field, ValidationError, model_validator

from common.config_tables import (
    DPConfig,
    EvaluationConfig,
    FederationConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    SecureAggregationConfig,
    Strategy,
    TrainConfig,
    TrainedPart,
)
from common.errors import ConfigError, require_file
from common.model.methods import Method
from common.settings_file import Section, nearest, read_toml

Scalar = str | int | float | bool

_CENTRAL_NOISE = "central-dp.noise-multiplier"
# Every configuration that 0.1 wrote has both keys, in almost all with noise 0.
_CENTRAL_DP = (_CENTRAL_NOISE, "central-dp.clip-norm")
_CENTRAL_DP_IS_GONE = (
    "noise added by the server is no longer offered; use dp.epsilon, which protects bags at the sites"
)


class RunConfig(Section):
    """Hold all settings of one run, as ``config.toml`` in the run folder states them."""

    name: str = Field(
        "fedbags",
        min_length=1,
        max_length=100,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="name of the run: letters, digits and . _ -",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="fixes data order, augmentation and initial weights")
    rounds: int = Field(12, ge=1, le=100_000, description="federated rounds")
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
        if reason and self.dp.epsilon:
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
        if secure.minimum_sites > self.federation.sites:
            raise ValueError(
                f"secure-aggregation.minimum-sites = {secure.minimum_sites} is above federation.sites = "
                f"{self.federation.sites}: no round could ever be made"
            )
        return self

    @property
    def attendance(self) -> FederationConfig:
        """Return the ``federation`` table with the quorum that secure aggregation needs.

        A sum of fewer sites than ``secure-aggregation.minimum-sites`` would not be unmasked.
        """
        secure = self.secure_aggregation
        quorum = max(self.federation.quorum, secure.minimum_sites if secure.enabled else 1)
        return self.federation.model_copy(update={"quorum": quorum})

    @property
    def trained_part(self) -> TrainedPart:
        """Return the part of the model to train, with ``auto`` resolved."""
        if self.train.part is not TrainedPart.AUTO:
            return self.train.part
        return TrainedPart.NORM_HEAD if self.dp.epsilon else TrainedPart.ALL

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
            if key in _CENTRAL_DP:
                if value and key == _CENTRAL_NOISE:
                    problems.append(f"{key} = {value!r}: {_CENTRAL_DP_IS_GONE}")
                continue
            if key not in known:
                problems.append(f"unknown key {key!r}{nearest(key, known)}")
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
        """Read a ``config.toml`` with nested or dotted keys."""
        require_file(path, "the configuration file", "Give the config.toml of a run folder.")
        return cls.from_flat(flatten(read_toml(path)))

    def to_flat(self) -> dict[str, Scalar]:
        """Return the flat form that Flower carries and ``from_flat`` reads."""
        return flatten(self.model_dump(mode="json", by_alias=True))

    def to_toml(self) -> str:
        """Return the complete configuration as TOML text."""
        return tomli_w.dumps(self.model_dump(mode="json", by_alias=True))

    def with_changes(self, changes: Mapping[str, Scalar]) -> Self:
        """Return a copy with some flat keys replaced, validated like ``from_flat``."""
        return type(self).from_flat({**self.to_flat(), **changes})


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Turn nested tables into one table with dotted keys."""
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_setting(text: str) -> tuple[str, Scalar]:
    """Parse one ``KEY=VALUE`` of ``--set``.

    The value is read as a TOML scalar, and taken as text where it is none.

    Raises:
        ConfigError: no key is given, or the value is no text, number or truth value.
    """
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
