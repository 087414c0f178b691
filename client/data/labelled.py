"""Read the labelled test images of a site (test.csv) for evaluation.

This is the only module that opens instance labels. Training never imports it, and a test checks that.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.bags import CACHE_FOLDER
from client.data.features import open_features
from client.data.images import CacheKey, Progress, open_cache, to_tensor
from client.data.tables import (
    TEST_FILE,
    Fault,
    collect_images,
    content_hash,
    read_csv,
    read_hierarchy,
    unknown_label,
)
from client.site import SiteConfig
from common.errors import BadRow, DataError
from common.hierarchy import Hierarchy
from common.model.features.bank import feature_bank
from common.model.interfaces import Inputs


@dataclass(frozen=True)
class LabelledImages:
    """Hold test images with their leaf labels.

    Attributes:
        hierarchy: the site's label tree.
        images: shape (N, S, S, 3) uint8, read-only.
        labels: shape (N,) int64, leaf indices.
        listed: rows of test.csv, used or not.
        features: shape (N, F) float32, the run's fixed features of the images, or None.
    """

    hierarchy: Hierarchy
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    listed: int
    features: NDArray[np.float32] | None = None

    def inputs(self, rows: slice) -> Inputs:
        """Return what a model looks at of these rows, each image alone."""
        if self.features is None:
            return Inputs.alone(to_tensor(self.images[rows]))
        # The copy is what torch may write to: the cache is mapped read-only.
        features = torch.from_numpy(np.array(self.features[rows]))
        return Inputs.of_features(features, torch.arange(len(features)))

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
    ) -> Self | None:
        """Read test.csv and its images, which are cached like those of the bags.

        Args:
            site_dir: the site folder.
            image_size: S, side of the square images in pixels.
            features: names of fixed features (``model.features``), computed unless that was done before.
            skip_bad: leave bad rows out instead of refusing.
            progress: called with (done, all) while decoding, and again while computing features.
            site: the content of site.toml, if the caller has read it.

        Returns:
            None when the site has no test.csv, or one without rows.

        Raises:
            ConfigError: site.toml is faulty.
            DataError: bad rows, all of them.
            UserError: the cache cannot be written.
        """
        config = SiteConfig.load(site_dir) if site is None else site
        if not (site_dir / TEST_FILE).exists():
            return None
        fatal: list[BadRow] = []
        ragged: list[BadRow] = []
        table = read_csv(site_dir / TEST_FILE, ("path", "label"), fatal, ragged)
        hierarchy = read_hierarchy(site_dir, config, fatal)
        summary = f"the test images of site {config.name!r} cannot be read: {site_dir}"
        if table is None or hierarchy is None:
            raise DataError(summary, fatal, "Mend these files, or remove test.csv.")
        faults = [Fault(row) for row in ragged]
        known = []
        for image in collect_images(site_dir, table, "label", faults):
            if image.key in hierarchy.leaf_index:
                known.append(image)
                continue
            faults.append(Fault(BadRow(TEST_FILE, image.line, unknown_label(image.key, hierarchy))))
        keep = np.arange(len(known))
        images = np.zeros((0, image_size, image_size, 3), dtype=np.uint8)
        found = None
        if known:
            caches = site_dir / CACHE_FOLDER
            key = CacheKey("test", content_hash(site_dir, (TEST_FILE,), known), image_size)
            cache = open_cache(caches, key, [site_dir / image.path for image in known], progress)
            if features:
                found = open_features(caches, key, cache.images, feature_bank(features, image_size), progress)
            for index, reason in cache.failed.items():
                row = BadRow(TEST_FILE, known[index].line, f"{known[index].path!r}: {reason}")
                faults.append(Fault(row))
            if cache.failed:
                keep = np.setdiff1d(keep, list(cache.failed))
            images = cache.images[keep] if cache.failed else cache.images
            found = found[keep] if cache.failed and found is not None else found
        if faults and not skip_bad:
            advice = "Mend these rows, or leave them out with --skip-bad."
            raise DataError(summary, [fault.row for fault in faults], advice)
        if not len(keep):
            return None
        labels = np.array([hierarchy.leaf_index[known[index].key] for index in keep], dtype=np.int64)
        return cls(hierarchy, images, labels, len(table), found)
