"""Read a site folder as bags of images with label counts.

It reads site.toml, manifest.csv, bags.csv and the hierarchy; no instance label is ever opened here.
Pixels come from the memory-mapped cache, whose rows lie bag after bag, so that a bag is a view.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from client.data.features import open_features
from client.data.images import CacheKey, Progress, open_cache
from client.data.tables import MANIFEST_FILE, Fault, Listing, data_version, read_listing
from client.site import BUILD_ADVICE, SiteConfig
from common.errors import BadRow, DataError, writable
from common.files import replacing, write_csv
from common.hierarchy import Hierarchy
from common.model.features.bank import feature_bank

CACHE_FOLDER = ".cache"
QUARANTINE_FILE = "quarantine.csv"


@dataclass(frozen=True)
class Bag:
    """Hold images whose labels are known only as counts.

    Attributes:
        bag_id: its name in the site's tables; never leaves the site.
        images: shape (m, S, S, 3) uint8, a read-only view of the cache.
        counts: shape (C_L,) int64, images per leaf; sums to m.
        features: shape (m, F) float32, the run's fixed features of the images, or None.
    """

    bag_id: str
    images: NDArray[np.uint8]
    counts: NDArray[np.int64]
    features: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _StoreSummary:
    """Count what was read when a site was opened, in images and bags."""

    listed: int
    used: int
    converted: int
    """Not 8-bit RGB: grey, palette, alpha, CMYK or 16 bits."""
    resized: int
    """Images that are not square and of the asked size."""
    quarantined: int
    """Listed but not used: bad, or in a bag that holds a bad row."""
    bags_listed: int
    bags_used: int


@dataclass(frozen=True)
class OwnSplit:
    """Describe a site's own division of its bags, no part of which a server can steer."""

    share: float
    """Share of the bags that is held back, in [0, 1)."""
    key: bytes
    """Fixes which bags are held back; derived from the site's secret."""


class Bags(Protocol):
    """Offer what training reads of a site's bags. A ``BagStore`` does, and so may a store around one."""

    @property
    def name(self) -> str:
        """Return the site's name."""

    @property
    def hierarchy(self) -> Hierarchy:
        """Return the label tree."""

    @property
    def leaf_counts(self) -> NDArray[np.int64]:
        """Return the counts of the site's own bags, shape (B, C_L)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Bag: ...

    def split(self, held_back: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Divide the bags into those to train on and those to hold back."""


@dataclass(frozen=True)
class BagStore:
    """Hold the bags of one site in the order of its manifest.

    ``store[i]`` is a Bag.
    """

    config: SiteConfig
    hierarchy: Hierarchy
    data_version: str
    """See ``client.data.tables.content_hash``."""
    summary: _StoreSummary
    bag_ids: tuple[str, ...]
    leaf_counts: NDArray[np.int64]
    """Shape (B, C_L)."""
    bag_sizes: NDArray[np.int64]
    """Shape (B,), images."""
    _starts: NDArray[np.int64]
    _images: NDArray[np.uint8]
    _features: NDArray[np.float32] | None = field(default=None, kw_only=True)
    own_split: OwnSplit | None = field(default=None, kw_only=True)
    """None: the run divides the bags, as in a simulation."""

    @classmethod
    def open(  # noqa: PLR0913 (what to open, and how)
        cls,
        site_dir: Path,
        image_size: int,
        *,
        features: tuple[str, ...] = (),
        skip_bad: bool = False,
        progress: Progress | None = None,
        site: SiteConfig | None = None,
    ) -> Self:
        """Read and check a site folder, and decode its images unless that was done before.

        Args:
            site_dir: the folder, laid out as docs/data.md describes.
            image_size: S, side of the square images in pixels.
            features: names of fixed features (``model.features``), computed unless that was done before.
            skip_bad: leave out what is bad and list it in ``quarantine.csv``. A bag that loses an
                image is left out completely: its counts include that image's label, which nobody knows,
                so the counts of the rest are unknown.
            progress: called with (done, all) while decoding, and again while computing features.
            site: the content of site.toml, if the caller has read it.

        Raises:
            ConfigError: site.toml is faulty, or there is no such feature.
            DataError: bad rows (all of them), or no bag is left.
            UserError: the cache cannot be written.
        """
        config = SiteConfig.load(site_dir) if site is None else site
        hierarchy, listing = read_listing(site_dir, config)
        faults = list(listing.faults)
        if not listing.images:
            _refuse(config, site_dir, faults, "holds no usable image")
        version = data_version(site_dir, config, listing)
        paths, key = [site_dir / row.path for row in listing.images], CacheKey("bags", version, image_size)
        cache = open_cache(site_dir / CACHE_FOLDER, key, paths, progress)
        for index, reason in cache.failed.items():
            image = listing.images[index]
            row = BadRow(MANIFEST_FILE, image.line, f"{image.path!r}: {reason}")
            faults.append(Fault(row, image.key))
        if faults and not skip_bad:
            _refuse(config, site_dir, faults, f"holds {len(faults)} bad row(s)")
        good = _good_bags(listing, faults)
        if not good.size:
            _refuse(config, site_dir, faults, "holds no usable bag")
        if skip_bad:
            write_quarantine(site_dir, [fault.row for fault in faults])
        found = None
        if features:
            bank = feature_bank(features, image_size)
            found = open_features(site_dir / CACHE_FOLDER, key, cache.images, bank, progress)
        sizes = np.diff(listing.offsets)
        used = int(sizes[good].sum())
        return cls(
            config=config,
            hierarchy=hierarchy,
            data_version=version,
            summary=_StoreSummary(
                listed=listing.listed,
                used=used,
                converted=cache.converted,
                resized=cache.resized,
                quarantined=listing.listed - used,
                bags_listed=len(listing.bag_ids),
                bags_used=len(good),
            ),
            bag_ids=tuple(listing.bag_ids[bag] for bag in good),
            leaf_counts=listing.counts[good],
            bag_sizes=sizes[good],
            _starts=listing.offsets[:-1][good],
            _images=cache.images,
            _features=found,
        )

    @property
    def name(self) -> str:
        """Return the site's name."""
        return self.config.name

    def __len__(self) -> int:
        return len(self.bag_ids)

    def __getitem__(self, index: int) -> Bag:
        if not 0 <= index < len(self):
            raise IndexError(f"bag {index} of {len(self)}")
        start = int(self._starts[index])
        stop = start + int(self.bag_sizes[index])
        features = None if self._features is None else self._features[start:stop]
        return Bag(self.bag_ids[index], self._images[start:stop], self.leaf_counts[index], features)

    def split(self, held_back: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Divide the bags into those to train on and those to hold back for selection.

        Args:
            held_back: share of the bags in [0, 1). Above 0, and with two bags or more, at least one
                bag is held back and at least one is kept. A site with a split of its own takes from it
                only whether bags are held back at all.
            seed: with the site's name it fixes the division, unless the site has its own.

        Returns:
            Bag indices to train on, and held-back ones, both ascending.
        """
        # Not Python's ``hash``, which differs from process to process.
        name_seed = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")
        entropy = [seed, name_seed]
        if self.own_split is not None:
            # A server that chose share and seed could have one bag held back at a time and read its
            # counts off the figures.
            held_back = self.own_split.share if held_back > 0 else 0.0
            entropy = [int.from_bytes(self.own_split.key, "big")]
        order = np.random.default_rng(entropy).permutation(len(self))
        number = 0
        if held_back > 0 and len(self) >= 2:
            number = min(max(1, round(held_back * len(self))), len(self) - 1)
        return np.sort(order[number:]), np.sort(order[:number])


def write_quarantine(folder: Path, rows: list[BadRow]) -> None:
    """Write the rows left out to ``folder/quarantine.csv`` in one step, or remove it if there are none.

    Raises:
        UserError: the folder cannot be written.
    """
    target = folder / QUARANTINE_FILE
    if not rows:
        target.unlink(missing_ok=True)
        return
    listed = [(row.file, row.row or "", row.reason) for row in rows]
    with writable(f"the quarantine list {target}", advice=""), replacing(target, mode=0o644) as (temporary,):
        write_csv(temporary, ("file", "row", "reason"), listed)


def _good_bags(listing: Listing, faults: list[Fault]) -> NDArray[np.int64]:
    spoilt = {fault.bag for fault in faults}
    return np.array(
        [number for number, bag in enumerate(listing.bag_ids) if bag not in spoilt], dtype=np.int64
    )


def _refuse(config: SiteConfig, site_dir: Path, faults: list[Fault], what: str) -> NoReturn:
    raise DataError(
        f"site {config.name!r} {what}: {site_dir}",
        [fault.row for fault in faults],
        "Mend these rows, or leave their bags out with --skip-bad."
        if faults
        else f"List its images in manifest.csv. {BUILD_ADVICE}",
    )
