"""Find site folders, read and write site.toml, and keep a site's secret and what is derived from it.

site.toml holds the owner's policy on what may leave. The file belongs to the site. Nothing that a server
sends can change it, and it knows nothing of the run configuration: where both set the same thing, the
stricter one is the site's.

The secret is random bytes that never leave the site. Losing the file costs nothing but continuity: what was
derived from it before cannot be derived again. The seeds are of the bag order, augmentation and dropout;
privacy noise never comes from here. A simulated site's training is fixed by (run seed, site name, round),
so that it can be repeated anywhere. A real site mixes in its secret, derived for the run: whoever knows the
model and all bags but one could else repeat the training exactly, and two runs of one model would differ by
nothing but their sites.
"""

import hmac
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import numpy as np
import tomli_w
from pydantic import Field, field_validator

from common.errors import ConfigError, UserError, require_file
from common.files import create_bytes, write_text
from common.parts import shipped_names
from common.records import SiteName
from common.settings_file import Section, read_toml, validated

SITE_FILE = "site.toml"
DATA_PATH, KIT, PARTITION = "data-path", "kit", "partition-id"
"""Keys of a node's configuration: site folder and kit of a real site, and the number of a simulated one."""
JOURNAL_FILE = "journal.jsonl"
_LOGS = "logs"
"""The kit's folder for logs."""
BUILD_ADVICE = (
    "`fedbags bags build` writes complete site folders: from labelled images, or with --source counts from "
    "images and one count per class and bag."
)
"""What to do about a folder that is not complete."""

KNOWN_METRICS = ("num-bags", "num-images", "loss", "bags-kl", "bags-l1", "held-back-bags", "confusion")
"""Every metric that a site can send at all; a policy names the ones that it may send."""
_WRITTEN_BY_0_1 = KNOWN_METRICS
"""The list that release 0.1 wrote into every site.toml, whatever its owner had said."""
_HELD_BACK = 0.1
"""Share of the bags that a real site holds back where its site.toml does not say."""

_SECRET_FILE = "site.secret"
"""The file's name in the folder of a site."""
_SECRET_BYTES = 32


class ReleaseProportions(StrEnum):
    """Name the part of the label counts that a site releases."""

    NONE = "none"
    TOTAL = "total"
    """The counts summed over all bags of the site."""
    PER_BAG = "per-bag"


class PrivateMetrics(StrEnum):
    """Name the treatment of figures on held-back bags in a private run."""

    WITHHOLD = "withhold"
    NOISE = "noise"
    """Sent with noise, where the run asks for it, and charged to the ledger like training."""


class _PrivacyBudget(Section):
    """Hold the most that may ever be spent on this site's data.

    None leaves it to the run.
    """

    epsilon: float | None = Field(None, gt=0, allow_inf_nan=False)
    delta: float | None = Field(None, gt=0, lt=1)
    alone_epsilon: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="cap for what the site's own shares of noise give alone"
    )


class _SecureAggregationPolicy(Section):
    """Hold the site's demands on a sum that its update becomes part of (docs/secure-aggregation.md)."""

    required: bool = Field(False, description="never send an update in clear, whatever the run asks for")
    minimum_sites: int = Field(3, ge=2, description="fewest sites in a sum")
    largest_share: float = Field(0.8, gt=0, lt=1, description="largest share of one site in its weights")
    fewest_neighbours: int = Field(
        0, ge=0, description="fewest sites that it shares masks with in a large consortium; 0: all others"
    )
    shared_noise: bool = Field(
        False, description="count on the noise of the other sites of a sum (docs/secure-aggregation.md)"
    )
    metrics: tuple[str, ...] = Field(
        ("num-bags",), description="of the policy's metrics, those that may leave beside a masked update"
    )


@dataclass(frozen=True)
class Terms:
    """Hold the site's policy with a default for every key that site.toml leaves out."""

    strict: bool
    """The defaults are those of a real site; a simulated one has no patients to protect."""
    metrics: frozenset[str]
    """Names of the metrics that may leave."""
    held_back: float | None
    """Share of the bags that are held back, in (0, 0.9]; None: the run says, and draws them."""
    minimum_held_back_bags: int
    """Fewest bags that an exact figure is computed over."""
    minimum_cell_size: int
    """Counts of test images below this, and above 0, are suppressed."""
    skip_bad: bool | None
    """Whether bad rows are left out; None: the run says."""
    parts: frozenset[str] | None
    """Names of the parts that a run here may be made of; None: any."""

    def refuse_parts(self, used: Iterable[str]) -> None:
        """Refuse parts that the site's owner does not allow.

        Raises:
            ConfigError: names them.
        """
        if self.parts is not None and (refused := sorted(set(used) - self.parts)):
            raise ConfigError(
                f"this site allows no part {', '.join(map(repr, refused))}: its owner may add the name to "
                "[policy] parts of site.toml"
            )


class SitePolicy(Section):
    """Hold the permissions that the site's owner gives.

    A key that is None takes the default of ``terms``.
    """

    minimum_bag_size: int = Field(4, ge=1, description="images; a smaller bag is refused")
    release_proportions: ReleaseProportions = ReleaseProportions.TOTAL
    metrics: tuple[str, ...] | None = Field(
        None, description="names of the metrics that may leave; 0.1's whole list counts as not said"
    )
    private_metrics: PrivateMetrics = PrivateMetrics.WITHHOLD
    held_back: float | None = Field(None, gt=0, le=0.9, description="share of bags held back for selection")
    minimum_held_back_bags: int | None = Field(None, ge=1, description="fewest bags of an exact figure")
    minimum_cell_size: int | None = Field(None, ge=0, le=1000, description="smallest count of test images")
    skip_bad: bool | None = Field(None, description="leave out bad rows instead of refusing")
    parts: tuple[str, ...] | None = Field(
        None, description="names of the parts that a run may be made of; not said: all that fedbags brings"
    )
    budget: _PrivacyBudget = _PrivacyBudget()
    secure_aggregation: _SecureAggregationPolicy = _SecureAggregationPolicy()

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        unknown = [name for name in names or () if name not in KNOWN_METRICS]
        if unknown:
            raise ValueError(f"unknown metric(s) {unknown}; known are {list(KNOWN_METRICS)}")
        return names

    def terms(self, *, simulated: bool) -> Terms:
        """Return the terms at a node of this policy, with defaults filled in.

        Args:
            simulated: the node is one of a simulation (``client.session._is_simulated``). It keeps what a
                run asks for; a real site has the strict defaults.
        """

        def default(own: float | None, real: float, simulation: float) -> int:
            return int((simulation if simulated else real) if own is None else own)

        # Release 0.1 wrote the whole list without asking, which would override the safe defaults of a
        # real site.
        silent = self.metrics in (None, _WRITTEN_BY_0_1)
        metrics = self.metrics or ()
        if silent:
            metrics = KNOWN_METRICS if simulated else self.safe_metrics()
        return Terms(
            strict=not simulated,
            metrics=frozenset(metrics),
            held_back=_HELD_BACK if self.held_back is None and not simulated else self.held_back,
            minimum_held_back_bags=default(self.minimum_held_back_bags, 8, 1),
            minimum_cell_size=default(self.minimum_cell_size, 5, 0),
            skip_bad=False if self.skip_bad is None and not simulated else self.skip_bad,
            parts=self._allowed_parts(simulated),
        )

    def _allowed_parts(self, simulated: bool) -> frozenset[str] | None:
        if self.parts is None:
            return None if simulated else shipped_names()
        return frozenset(self.parts)

    def safe_metrics(self) -> tuple[str, ...]:
        """Return the metrics that tell no more of the label counts than the site releases of them anyway.

        A server that sends a model of constant answers reads mean proportions off a mean KL, and single
        bags' shares of a class off a mean L1, which has a kink at each (``tests/client/test_door.py``
        does). A training loss has terms of its method that are no more linear than L1.
        """
        withheld: dict[ReleaseProportions, set[str]] = {
            ReleaseProportions.NONE: {"loss", "bags-kl", "bags-l1", "num-images"},
            ReleaseProportions.TOTAL: {"loss", "bags-l1"},
            ReleaseProportions.PER_BAG: set(),
        }
        # Figures on labelled test images are exact and no epsilon covers them, so a site with a budget
        # has to name them itself.
        budget = set() if self.budget.epsilon is None else {"confusion"}
        return tuple(n for n in KNOWN_METRICS if n not in withheld[self.release_proportions] | budget)


class SiteConfig(Section):
    """Hold the content of one site's ``site.toml``."""

    name: SiteName
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
        return validated(cls, read_toml(path), path)

    def save(self, site_dir: Path) -> None:
        """Write ``site_dir/site.toml`` in one step, so that a reader sees the old file or the new one."""
        text = tomli_w.dumps(self.model_dump(mode="json", by_alias=True, exclude_none=True))
        write_text(site_dir / SITE_FILE, text, 0o644)


def site_folders(sites_dir: Path) -> list[Path]:
    """Return every folder below ``sites_dir`` that holds a site.toml, sorted by name.

    A hidden folder is left out: a build that was broken off leaves one.

    Raises:
        UserError: there is none.
    """
    found = (path.parent for path in sites_dir.glob(f"*/{SITE_FILE}"))
    folders = sorted(folder for folder in found if not folder.name.startswith("."))
    if not folders:
        raise UserError(
            f"no site folder (one with a {SITE_FILE}) in {sites_dir}\n"
            f"{BUILD_ADVICE} Without --sites-dir there are synthetic hospitals."
        )
    return folders


def journal_path(node: Mapping[str, Any]) -> Path | None:
    """Return the path of the journal of a node with this configuration, or None at a simulated site.

    It lies in the site's kit, or in the site folder if there is no kit.
    """
    if kit := node.get(KIT):
        return Path(str(kit)) / _LOGS / JOURNAL_FILE
    if data := node.get(DATA_PATH):
        return Path(str(data)) / JOURNAL_FILE
    return None


def derive(folder: Path, purpose: str, content: bytes) -> bytes:
    """Derive 32 bytes from a site's secret, drawing the secret when it is first needed.

    HMAC-SHA256 (RFC 2104) under the secret: without it nobody can compute or check the result, however
    few contents are possible.

    Args:
        folder: the site folder.
        purpose: what the bytes are for; different purposes give unrelated bytes.
        content: what they are derived from.

    Raises:
        UserError: the secret cannot be read or made, or is damaged.
    """
    # The zero byte parts purpose and content: else one purpose could be continued into another by its
    # content.
    return hmac.digest(_read_secret(folder), purpose.encode() + b"\0" + content, "sha256")


def _read_secret(folder: Path) -> bytes:
    path = folder / _SECRET_FILE
    try:
        if not path.exists():
            create_bytes(path, os.urandom(_SECRET_BYTES))  # or a process that was faster has drawn it
        secret = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the site's secret {path} cannot be read or made: {error.strerror or error}\n"
            "Give whoever runs the site the right to read and write in the site folder."
        ) from error
    if len(secret) != _SECRET_BYTES:
        raise UserError(
            f"the site's secret {path} is damaged: {len(secret)} bytes, {_SECRET_BYTES} expected\n"
            "Put back the copy of your backup; without one, delete the file and a new one is drawn."
        )
    return secret


@dataclass(frozen=True)
class TrainingSeeds:
    """Hold the seeds of one site in one run."""

    seed: int
    """Seed of the run."""
    site: str
    secret: bytes = b""
    """Of the site for the run; empty in a simulation."""

    def of_round(self, round: int) -> tuple[int, int, int]:
        """Return the seeds of a round for the order of the bags, for torch, and for the objective.

        The same round of the same run has the same seeds however often it is asked for: of all its trainings
        one sum at most is unmasked, and nothing else of them leaves the site.
        """
        first, second, third = self._draw(3, round)
        return first, second, third

    def of_bag(self, round: int, step: int, bag: int) -> int:
        """Return the seed of one bag in one step, whichever other bags are drawn."""
        return self._draw(1, round, step, bag)[0]

    def _draw(self, number: int, *place: int) -> list[int]:
        own = [int.from_bytes(self.secret)] if self.secret else []
        sequence = np.random.SeedSequence([self.seed, zlib.crc32(self.site.encode()), *place, *own])
        # 64 bits where they must not be guessed; 32 are what simulations have always had.
        state = sequence.generate_state(number, np.uint64 if self.secret else np.uint32)
        return [int(value) for value in state]
