"""Decide which metrics may leave in which reply.

The site's terms, the run's privacy and the number of bags decide. Handlers fill a reply by it and the guard
checks the reply against it. Knows nothing of how a metric is computed and of the form it has.
"""

from client.site import PrivateMetrics, ReleaseProportions, SiteConfig, Terms
from common.config import RunConfig

UNCOVERED_BY_DP = frozenset({"num-bags", "confusion"})
"""Metrics that may leave a private run. They are not covered by its epsilon, and the report says so: the
number of bags, and counts on labelled test images, which are never trained on."""

NOISED = frozenset({"noised-bags-tv", "held-back-bags"})
"""What may leave a private run of a look at the held-back bags, where ``private-metrics`` is "noise": sums
with noise that the ledger has paid for (common/privacy/proportions.py), and the number of bags, which is
public."""

OF_TRAINING = frozenset({"num-bags", "num-images", "loss"})
IN_REPLY = {
    "train": OF_TRAINING,
    "train.masked": OF_TRAINING,
    "evaluate.bags": frozenset({"bags-kl", "bags-l1", "held-back-bags"}),
    "evaluate.test": frozenset({"confusion"}),
}
"""The metrics of each message type that has any, before noise."""


def may_leave(
    kind: str, config: RunConfig, site: SiteConfig, terms: Terms, *, training: int, held_back: int
) -> frozenset[str]:
    """Return the names of the metrics that a reply may hold.

    Args:
        kind: the message type.
        config: the run.
        site: the site, with its policy.
        terms: what holds at this node.
        training: bags that are trained on.
        held_back: bags that are held back.
    """
    found = IN_REPLY.get(kind, frozenset())
    beside = frozenset(site.policy.secure_aggregation.metrics)
    if config.dp.epsilon:
        if kind == "evaluate.bags":
            return NOISED if site.policy.private_metrics is PrivateMetrics.NOISE else frozenset()
        # A loss is computed from private data and no epsilon covers it, so a policy that names it does
        # not help.
        found &= terms.metrics & UNCOVERED_BY_DP
        return found & beside if kind == "train.masked" else found
    found &= terms.metrics
    if kind == "train.masked":
        found &= beside
    released = site.policy.release_proportions is ReleaseProportions.PER_BAG
    # A site that releases counts per bag has given away what these figures could tell; a simulated one
    # has no patients.
    if not terms.strict or released:
        return found
    if kind == "evaluate.bags":
        masked = config.secure_aggregation.enabled or site.policy.secure_aggregation.required
        # In clear, figures of a model that the server chose would tell what the masks hide.
        found &= beside if masked else found
        # An exact mean over one bag is that bag's figure: a server that sends chosen models reads its
        # counts off it.
        return found if held_back >= terms.minimum_held_back_bags else frozenset()
    # Rounds that see a part of the bags each: the differences of their figures would tell of few bags.
    if config.train.rounds_per_pass > 1:
        found -= {"loss", "num-images"}
    return found if training >= terms.minimum_held_back_bags else found - {"loss"}


def bags_of_a_round(config: RunConfig, training: int) -> int:
    """Return the smallest number of bags that one round trains on."""
    return max(1, training // config.train.rounds_per_pass)
