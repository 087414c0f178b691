"""What a site says of its label counts: nothing, the site total, or every bag, as its policy decides.

In a private run the counts are noised and charged to the site's ledger; otherwise they are exact, and the
record says so.
"""

from typing import TYPE_CHECKING

from client.bags import BagStore
from client.site import ReleaseProportions
from common.messages import ProportionRelease

if TYPE_CHECKING:  # the accountants are loaded in private runs only
    from common.privacy.proportions import CountRelease


def release_proportions(store: BagStore) -> ProportionRelease:
    """The exact release of one data version under the site's policy."""
    match store.config.policy.release_proportions:
        case ReleaseProportions.NONE:
            rows = store.leaf_counts[:0]
        case ReleaseProportions.TOTAL:
            rows = store.leaf_counts.sum(axis=0, keepdims=True)
        case ReleaseProportions.PER_BAG:
            rows = store.leaf_counts
    return _record(store, tuple(tuple(map(float, row)) for row in rows), "exact", {})


def private_release(store: BagStore, noised: "CountRelease") -> ProportionRelease:
    """The release with noised counts, and the event that they cost."""
    rows = tuple(tuple(map(float, row)) for row in noised.counts)
    return _record(store, rows, "discrete-laplace", noised.event(noised.unit).model_dump())


def _record(
    store: BagStore, rows: tuple[tuple[float, ...], ...], mechanism: str, event: dict[str, float | str]
) -> ProportionRelease:
    policy = store.config.policy.release_proportions
    sizes = tuple(store.bag_sizes.tolist()) if policy is ReleaseProportions.PER_BAG else ()
    return ProportionRelease.model_validate(
        {
            "site": store.name,
            "data_version": store.data_version,
            "hierarchy": store.hierarchy.to_dict(),
            "granularity": policy.value,
            "leaf_counts": rows,
            "bags": len(store),
            "bag_sizes": sizes,
            "mechanism": mechanism if rows else "none",
            "event": event,
        }
    )
