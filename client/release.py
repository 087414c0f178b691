"""Build the record of label counts that a site releases, as its policy decides.

The policy releases nothing, the site total, or every bag. In a private run the counts are noised and charged
to the site's ledger; otherwise they are exact, and the record states it.
"""

from typing import TYPE_CHECKING

from client.data.bags import BagStore
from client.site import ReleaseProportions
from common.records import ProportionRelease

if TYPE_CHECKING:  # the accountants are loaded in private runs only
    from common.privacy.proportions import CountRelease


def release_proportions(store: BagStore, version: str) -> ProportionRelease:
    """Return the exact release of a data version, under the name ``version``, as the site's policy allows."""
    match store.config.policy.release_proportions:
        case ReleaseProportions.NONE:
            rows = store.leaf_counts[:0]
        case ReleaseProportions.TOTAL:
            rows = store.leaf_counts.sum(axis=0, keepdims=True)
        case ReleaseProportions.PER_BAG:
            rows = store.leaf_counts
    return _record(store, version, tuple(tuple(map(float, row)) for row in rows), "exact", {})


def private_release(store: BagStore, noised: "CountRelease", version: str) -> ProportionRelease:
    """Return the release of noised counts, with the event that they cost.

    ``version`` is the ledger's name of the data version.
    """
    rows = tuple(tuple(map(float, row)) for row in noised.counts)
    return _record(store, version, rows, "discrete-laplace", noised.event(noised.unit).model_dump())


def _record(
    store: BagStore,
    version: str,
    rows: tuple[tuple[float, ...], ...],
    mechanism: str,
    event: dict[str, float | str],
) -> ProportionRelease:
    policy = store.config.policy.release_proportions
    # Counts per bag tell the sizes of the bags anyway; with less released, the sizes stay here.
    sizes = tuple(store.bag_sizes.tolist()) if policy is ReleaseProportions.PER_BAG else ()
    return ProportionRelease.model_validate(
        {
            "site": store.name,
            "data_version": version,
            "hierarchy": store.hierarchy.to_dict(),
            "granularity": policy.value,
            "leaf_counts": rows,
            "bags": len(store),
            "bag_sizes": sizes,
            "mechanism": mechanism if rows else "none",
            "event": event,
        }
    )
