"""Read, check and write the configuration of a run.

Flower hands a run a flat table of scalars with dotted, kebab-case keys (``model.image-size``), from
``[tool.flwr.app.config]`` and ``--run-config``. This module alone reads it. It turns the table into one
frozen, bounded object, refuses unknown keys, and writes it back as the ``config.toml`` from which a run can
be repeated.
"""

import math
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from common import parts
from common.config_tables import (
    DPConfig,
    EvaluationConfig,
    FederationConfig,
    LossConfig,
    ModelConfig,
    SecureAggregationConfig,
    Strategy,
    TrainConfig,
    TrainedPart,
)
from common.errors import ConfigError, require_file
from common.model.methods import NO_BLOCK
from common.parts import Kind
from common.settings_file import Section, nearest, read_toml

Scalar = str | int | float | bool

_PARTS = "parts."
_OBJECTIVE = "objective."
"""Where 0.1 kept what is in the tables of parts now: ``objective.rot-weight`` for ``parts.rot.weight``."""

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
    train: TrainConfig = TrainConfig()
    federation: FederationConfig = FederationConfig()
    dp: DPConfig = DPConfig()
    secure_aggregation: SecureAggregationConfig = SecureAggregationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    parts: dict[str, SerializeAsAny[Section]] = Field(
        {}, description="settings of the run's parts, one table each; of no other part"
    )

    @model_validator(mode="before")
    @classmethod
    def _every_part_of_the_run_has_its_settings(cls, data: Any) -> Any:
        given = dict(data.get("parts", {}))
        try:
            model = ModelConfig.model_validate(data.get("model", {}))
        except ValidationError:
            return {**data, "parts": {}}  # the faults of the table are listed with those of the others
        tables = {}
        for name in _parts_with_settings(model, _strategy(data)):
            table = given.pop(name, {})
            tables[name] = (
                table if isinstance(table, Section) else parts.settings_of(name).model_validate(table)
            )
        if given:
            name = next(iter(given))
            raise ValueError(
                f"parts.{name} is set, and no part {name!r} is in this run: choose it, as with model.terms "
                "or a method that has it, or leave its settings out"
            )
        return {**data, "parts": tables}

    @model_validator(mode="after")
    def _quorum_can_be_reached(self) -> Self:
        if self.federation.quorum > self.federation.sites:
            raise ValueError(
                f"federation.quorum = {self.federation.quorum} is above federation.sites = "
                f"{self.federation.sites}: no round could ever be made"
            )
        return self

    @model_validator(mode="after")
    def _parts_are_known(self) -> Self:
        recipe = self.model.recipe
        used = [(Kind.HEAD, recipe.head), *((Kind.TERM, term) for term in recipe.terms)]
        used += [(Kind.BLOCK, recipe.block)] if recipe.block != NO_BLOCK else []
        used.append((Kind.STRATEGY, self.federation.strategy))
        for kind, name in used:
            if name not in parts.names(kind):
                known = parts.names(kind)
                places = {Kind.TERM: "model.terms", Kind.STRATEGY: "federation.strategy"}
                raise ValueError(
                    f"{places.get(kind, f'model.{kind}')}: there is no {kind.value} {name!r}"
                    f"{nearest(name, known)}; known: {', '.join(known)}"
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
        # Of strategies that others bring only the built one knows (``server.aggregation.build_optimiser``).
        if strategy in (Strategy.MEDIAN, Strategy.TRIMMED_MEAN, Strategy.KRUM):
            raise ValueError(
                f"federation.strategy = '{strategy}' compares the sites' updates, and with secure "
                "aggregation nobody sees them: use a strategy of means, or secure-aggregation.enabled = false"
            )
        if secure.minimum_sites > self.federation.sites:
            raise ValueError(
                f"secure-aggregation.minimum-sites = {secure.minimum_sites} is above federation.sites = "
                f"{self.federation.sites}: no round could ever be made"
            )
        return self

    @model_validator(mode="after")
    def _shared_noise_is_one_step_of_a_masked_sum(self) -> Self:
        if self.dp.noise != "shared":
            return self
        needed = {
            "dp.epsilon above 0": self.dp.epsilon > 0,
            "secure-aggregation.enabled = true": self.secure_aggregation.enabled,
            "dp.sample-rate above 0, the same at every site": self.dp.sample_rate > 0,
            "dp.steps-per-round = 1: a round is one step of all sites": self.dp.steps_per_round == 1,
            "dp.metrics-scale = 0": self.dp.metrics_scale == 0,
            "federation.strategy = 'fedavg'": self.federation.strategy == Strategy.FEDAVG,
            "dp.colluders below secure-aggregation.minimum-sites - 1": self.shares > 1,
            # So many could have two lists of survivors signed: the difference is one site's own sum.
            "fewer dp.colluders, or a higher secure-aggregation.threshold-share": self.dp.colluders
            < max(1, 2 * self._threshold - self.federation.sites),
        }
        missing = [key for key, is_so in needed.items() if not is_so]
        if missing:
            raise ValueError(f"dp.noise = 'shared' needs {', '.join(missing)}")
        return self

    @property
    def _threshold(self) -> int:
        """Return how many sites sign a list of survivors (``common.secure_aggregation.cohort.threshold``)."""
        sites, share = self.federation.sites, self.secure_aggregation.threshold_share
        return max(sites // 2 + 1, math.ceil(share * sites - 1e-9))

    @property
    def shares(self) -> int:
        """Return how many shares of noise a sum has at least, of sites that do not work with the server."""
        if self.dp.noise == "local":
            return 1
        return self.secure_aggregation.minimum_sites - self.dp.colluders

    @property
    def attendance(self) -> FederationConfig:
        """Return the ``federation`` table with the quorum that secure aggregation needs.

        A sum of fewer sites than ``secure-aggregation.minimum-sites`` would not be unmasked.
        """
        secure = self.secure_aggregation
        quorum = max(self.federation.quorum, secure.minimum_sites if secure.enabled else 1)
        return self.federation.model_copy(update={"quorum": quorum})

    @property
    def part_names(self) -> tuple[str, ...]:
        """Return the names of the parts that the run is made of; a torchvision model is none."""
        named = [name.partition("@")[0] for name in self.model.feature_names] or [self.model.backbone]
        own = tuple(name for name in named if name in parts.names(Kind.BACKBONE))
        return (*own, *self.model.recipe.parts)

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
            flat: dotted kebab-case keys; missing keys take their defaults. Keys of parts that are not in the
                run may stand there with their defaults, as in the table that Flower knows all keys from.

        Raises:
            ConfigError: every unknown key (with the nearest known one) and out-of-range value.
        """
        return cls._read(flat, {})

    @classmethod
    def _read(cls, flat: Mapping[str, Scalar], carried: Mapping[str, Scalar]) -> Self:
        """Read ``flat``, and of ``carried`` the keys of parts that are in the run."""
        known = cls().to_flat()
        problems = []
        nested: dict[str, Any] = {}
        of_parts: dict[str, Scalar] = {}
        for key, value in flat.items():
            if key in _CENTRAL_DP:
                if value and key == _CENTRAL_NOISE:
                    problems.append(f"{key} = {value!r}: {_CENTRAL_DP_IS_GONE}")
            elif key.startswith(_PARTS):
                of_parts[key] = value
            elif key.startswith(_OBJECTIVE):
                # 0.1 wrote the settings of every method into every configuration.
                carried = {**carried, _PARTS + key.removeprefix(_OBJECTIVE).replace("-", ".", 1): value}
            elif key not in known:
                problems.append(f"unknown key {key!r}{nearest(key, known)}")
            else:
                _put(nested, key, value)
        # Faults of the table itself are found below.
        with suppress(ValidationError):
            model = ModelConfig.model_validate(nested.get("model", {}))
            used = list(_parts_with_settings(model, _strategy(nested)))
            of_parts = {key: v for key, v in carried.items() if key.split(".")[1] in used} | of_parts
            for key, value in of_parts.items():
                try:
                    usual = _default(key) if key.count(".") == 2 else None
                    if usual is not None and (key.split(".")[1] in used or value != usual):
                        _put(nested, key, value)
                    elif key.count(".") != 2:
                        problems.append(f"unknown key {key!r}: settings of a part are parts.NAME.KEY")
                except ConfigError as error:
                    problems.append(f"unknown key {key!r}: {error}")
        for name, table in nested.get("parts", {}).items():
            try:
                nested["parts"][name] = parts.settings_of(name).model_validate(table)
            except ValidationError as error:
                nested["parts"][name] = parts.settings_of(name)()
                problems += _faults(error, f"{_PARTS}{name}.")
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            problems += _faults(error)
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
        tables = self.model_dump(mode="json", by_alias=True)
        return tomli_w.dumps({key: value for key, value in tables.items() if value != {}})

    def with_changes(self, changes: Mapping[str, Scalar]) -> Self:
        """Return a copy with some flat keys replaced, validated like ``from_flat``.

        Where another method or part is chosen, the settings of parts that are no longer in the run go.
        """
        own = self.to_flat()
        of_parts = {key: value for key, value in own.items() if key.startswith(_PARTS)}
        rest = {key: value for key, value in own.items() if key not in of_parts}
        return self._read({**rest, **changes}, of_parts)


def refuse_unknown_key(key: str) -> None:
    """Refuse a flat key that no configuration has.

    Raises:
        ConfigError: names the nearest known key.
    """
    if key.startswith(_PARTS) and key.count(".") == 2:
        _default(key)
    elif key not in (known := RunConfig().to_flat()) and not key.startswith(_OBJECTIVE):
        raise ConfigError(f"unknown key {key!r}{nearest(key, known)}")


def _strategy(tables: Mapping[str, Any]) -> str:
    table = tables.get("federation", {})
    if isinstance(table, FederationConfig):
        return table.strategy
    return str(table.get("strategy", FederationConfig().strategy))


def _parts_with_settings(model: ModelConfig, strategy: str) -> Iterator[str]:
    """Yield the names of the run's parts that have keys of their own, in the order of their kinds."""
    for name in dict.fromkeys((model.backbone, *model.recipe.parts, strategy)):
        if parts.has_settings(name):
            yield name


def _faults(error: ValidationError, prefix: str = "") -> Iterator[str]:
    for fault in error.errors():
        key = ".".join(str(place) for place in fault["loc"])
        reason = fault["msg"].removeprefix("Value error, ")
        yield f"{prefix}{key} = {fault['input']!r}: {reason}" if key else reason


def _default(key: str) -> Scalar | None:
    """Return the default of a key ``parts.NAME.KEY``.

    Raises:
        ConfigError: no such part has settings, or none of this name.
    """
    _, name, last = key.split(".")
    usual: dict[str, Scalar] = parts.settings_of(name)().model_dump(mode="json", by_alias=True)
    if last not in usual:
        raise ConfigError(f"part {name!r} has no such setting{nearest(last, usual)}")
    return usual[last]


def _put(nested: dict[str, Any], key: str, value: Scalar) -> None:
    *tables, last = key.split(".")
    for table in tables:
        nested = nested.setdefault(table, {})
    nested[last] = value


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
