"""site.toml: who a site is, and what its owner lets leave the building.

The file belongs to the site. Nothing that a server sends can change it, and it knows nothing of the
run configuration: where both speak of the same thing, the stricter one is the site's.
"""

import difflib
import tempfile
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import tomli_w
from pydantic import Field, ValidationError, field_validator

from common.config import flatten
from common.config_tables import Section
from common.errors import ConfigError, require_file

SITE_FILE = "site.toml"
BUILD_ADVICE = (
    "`fedbags bags build` writes complete site folders: from labelled images, or with --source counts from "
    "images and one count per class and bag."
)
"""What to do about a folder that is not complete."""

KNOWN_METRICS = (
    "num-bags",
    "num-images",
    "loss",
    "bags-kl",
    "bags-l1",
    "held-back-bags",
    "confusion",
)
"""Every metric that a site can send at all; a policy names the ones that it may send."""


class ReleaseProportions(StrEnum):
    """How much of the label counts a site releases."""

    NONE = "none"
    TOTAL = "total"
    """The counts summed over all bags of the site."""
    PER_BAG = "per-bag"


class PrivateMetrics(StrEnum):
    """What happens to figures on held-back bags in a private run."""

    WITHHOLD = "withhold"
    NOISE = "noise"
    """Sent with noise, where the run asks for it, and charged to the ledger like training."""


class PrivacyBudget(Section):
    """The most that may ever be spent on this site's data; None leaves it to the run."""

    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    delta: float | None = Field(None, gt=0, lt=1)


class SecureAggregationPolicy(Section):
    """What the site demands before its update becomes part of a sum (docs/secure-aggregation.md)."""

    required: bool = Field(False, description="never send an update in clear, whatever the run asks for")
    minimum_sites: int = Field(3, ge=2, description="fewest sites in a sum")
    largest_share: float = Field(0.8, gt=0, lt=1, description="largest share of one site in its weights")
    fewest_neighbours: int = Field(
        0, ge=0, description="fewest sites that it shares masks with in a large consortium; 0: all others"
    )
    metrics: tuple[str, ...] = Field(
        ("num-bags",), description="of the policy's metrics, those that may leave beside a masked update"
    )


class SitePolicy(Section):
    """What the site's owner allows."""

    minimum_bag_size: int = Field(4, ge=1, description="images; a smaller bag is refused")
    release_proportions: ReleaseProportions = ReleaseProportions.TOTAL
    metrics: tuple[str, ...] = Field(KNOWN_METRICS, description="names of the metrics that may leave")
    private_metrics: PrivateMetrics = PrivateMetrics.WITHHOLD
    budget: PrivacyBudget = PrivacyBudget()
    secure_aggregation: SecureAggregationPolicy = SecureAggregationPolicy()

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in KNOWN_METRICS]
        if unknown:
            raise ValueError(f"unknown metric(s) {unknown}; known are {list(KNOWN_METRICS)}")
        return names


class SiteConfig(Section):
    """One site, as its ``site.toml`` says."""

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    hierarchy: str = Field("hierarchy.csv", pattern=r"^[^/\\]+$", description="file beside site.toml")
    policy: SitePolicy = SitePolicy()

    @classmethod
    def load(cls, site_dir: Path) -> Self:
        """Read ``site_dir/site.toml``.

        Raises:
            UserError: the file is missing.
            ConfigError: not TOML, or faulty keys; every one is named with the file.
        """
        path = site_dir / SITE_FILE
        advice = f"{BUILD_ADVICE}\nFor a folder that has images and tables: fedbags site init {site_dir}"
        require_file(path, "the site file", advice)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from error
        return cls.from_table(data, str(path))

    @classmethod
    def from_table(cls, data: Mapping[str, Any], what: str) -> Self:
        """Check what a site.toml says; ``what`` names it in errors.

        Raises:
            ConfigError: faulty keys; every one is named.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(f"{what} is faulty:\n{_faults(error)}") from error

    def save(self, site_dir: Path) -> None:
        """Write ``site_dir/site.toml`` in one step: a reader sees the old file or the new one."""
        text = tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))
        with tempfile.NamedTemporaryFile("w", dir=site_dir, delete=False, encoding="utf-8") as stream:
            stream.write(text)
        temporary = Path(stream.name)
        temporary.chmod(0o644)
        temporary.replace(site_dir / SITE_FILE)


def _faults(error: ValidationError) -> str:
    known = flatten(SiteConfig(name="x").model_dump(mode="json", by_alias=True))
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            lines.append(f"  unknown key {key!r}{hint}")
        elif fault["type"] == "missing":
            lines.append(f"  key {key!r} is missing")
        else:
            lines.append(f"  {key} = {fault['input']!r}: {fault['msg']}")
    return "\n".join(lines)
