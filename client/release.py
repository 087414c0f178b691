"""What a site says of its label counts: nothing, the site total, or every bag, as its policy decides.

The counts are exact for now and the record says so (``mechanism = "exact"``, not private).
"""

from client.bags import BagStore
from client.site import ReleaseProportions
from common.messages import ProportionRelease


def release_proportions(store: BagStore) -> ProportionRelease:
    """The release of one data version under the site's policy."""
    policy = store.config.policy.release_proportions
    match policy:
        case ReleaseProportions.NONE:
            rows = store.leaf_counts[:0]
        case ReleaseProportions.TOTAL:
            rows = store.leaf_counts.sum(axis=0, keepdims=True)
        case ReleaseProportions.PER_BAG:
            rows = store.leaf_counts
    per_bag = policy is ReleaseProportions.PER_BAG
    return ProportionRelease(
        site=store.name,
        data_version=store.data_version,
        hierarchy=store.hierarchy.to_dict(),
        granularity=policy.value,
        leaf_counts=tuple(tuple(map(float, row)) for row in rows),
        bags=len(store),
        bag_sizes=tuple(store.bag_sizes.tolist()) if per_bag else (),
        mechanism="none" if policy is ReleaseProportions.NONE else "exact",
        event={},
    )
