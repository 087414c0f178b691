"""Who is whose neighbour, how many shares unmask, and how few sites a dishonest server could add up.

Pure functions of public facts: every site and the server compute the same from the same plan.
"""

import hashlib
import math

from common.secure_aggregation.records import SessionPlan


def neighbourhood(plan: SessionPlan, site: str) -> list[str]:
    """A site and its neighbours, sorted by name.

    All sites when ``plan.neighbours`` is 0 or not less than the others; else a ring in which each site is
    joined to the ``neighbours / 2`` before and behind it (Harary graph, Bell et al. 2020, section 3). The
    order on the ring comes from a hash of everybody's fresh keys, so nobody can choose his place alone.
    """
    sites = plan.sites
    if plan.neighbours == 0 or plan.neighbours >= len(sites) - 1:
        return sites
    transcript = plan.transcript()
    ring = sorted(sites, key=lambda name: hashlib.sha256(transcript + name.encode()).digest())
    place, reach = ring.index(site), plan.neighbours // 2
    return sorted(ring[(place + step) % len(ring)] for step in range(-reach, reach + 1))


def threshold(members: int, share: float) -> int:
    """Shares that recover a secret of a site with ``members`` sites in its neighbourhood, itself included.

    More than half, whatever ``share`` says: each site gives one share per neighbour, of one secret or of the
    other, so two halves that are told different things cannot reach it for both.
    """
    return max(members // 2 + 1, math.ceil(share * members - 1e-9))


def least_in_a_sum(sites: int, members: int, threshold: int, listed: int) -> int:
    """How few sites a server can add up that tells every site another list of survivors.

    Each of the ``sites`` neighbourhoods holds ``members`` sites, and each site answers once, to a list with
    at least ``listed`` of its neighbourhood. A vector can be used only if ``threshold`` sites gave a share of
    its self-mask, and left out only if ``threshold`` gave one of its mask key, so that at most
    ``members - threshold`` listed it. Counting (site, listed) pairs both ways, for a sum of S sites:

        sites * listed <= S * members + (sites - S) * (members - threshold)

    which gives S >= sites * (listed - members + threshold) / threshold. Sites that work together with the
    server give both shares and void the bound.
    """
    return max(0, math.ceil(sites * (listed - members + threshold) / threshold - 1e-9))
