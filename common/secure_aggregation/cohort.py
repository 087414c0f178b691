"""Compute neighbours, thresholds, and the sums that a list of survivors reveals.

These are pure functions of public facts: every site and the server compute the same from the same plan.
"""

import hashlib
import math
from collections.abc import Iterable

from common.secure_aggregation.records import SessionPlan


def is_complete(plan: SessionPlan) -> bool:
    """Return True if every site shares a mask with every other."""
    return plan.neighbours == 0 or plan.neighbours >= len(plan.adverts) - 1


def neighbourhoods(plan: SessionPlan) -> dict[str, list[str]]:
    """Return, by site, the site and its neighbours, sorted by name.

    These are all sites where the graph is complete; else a ring in which each site is joined to the
    ``neighbours / 2`` before and behind it (Harary graph, Bell et al. 2020, section 3).
    """
    sites = plan.sites
    if is_complete(plan):
        return dict.fromkeys(sites, sites)
    transcript = plan.transcript()
    # The order on the ring comes from a hash of all fresh keys, so no site can choose its place alone.
    ring = sorted(sites, key=lambda name: hashlib.sha256(transcript + name.encode()).digest())
    reach = range(-(plan.neighbours // 2), plan.neighbours // 2 + 1)
    return {
        site: sorted(ring[(place + step) % len(ring)] for step in reach) for place, site in enumerate(ring)
    }


def neighbourhood(plan: SessionPlan, site: str) -> list[str]:
    """Return one site and its neighbours, sorted by name."""
    return neighbourhoods(plan)[site]


def threshold(members: int, share: float) -> int:
    """Return how many of ``members`` sites recover a secret, or agree on a list of survivors.

    It is more than half, whatever ``share`` says.
    """
    # With at most half, the server could have two different lists signed, or collect both secrets of a site
    # from two halves. The small number guards the product against rounding up.
    return max(members // 2 + 1, math.ceil(share * members - 1e-9))


def sums(plan: SessionPlan, survivors: Iterable[str]) -> list[list[str]]:
    """Return the sets of sites whose sums unmasking reveals, each sorted, in the order of the names.

    They are the connected parts of the survivors' graph: masks hold together only what they join, so that
    each part's sum is seen apart. On the complete graph it is one sum of all survivors.
    """
    joined = neighbourhoods(plan)
    left, parts = set(survivors), []
    while left:
        part, edge = set(), {min(left)}
        while edge:
            part |= edge
            edge = {peer for site in edge for peer in joined[site]} & left - part
        parts.append(sorted(part))
        left -= part
    return parts
