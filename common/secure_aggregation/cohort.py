"""Compute what a plan means for its cohort, and check it against the demands of one site.

Neighbours, thresholds and the sums that a list of survivors reveals are pure functions of public facts: every
site and the server compute the same from the same plan. The demands of a site hold whatever the server says;
``common.secure_aggregation.member`` calls them before each step that gives something away.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec

from common import pki
from common.errors import IdentityError, SecureAggregationRefused
from common.secure_aggregation.records import KeyAdvert, SessionPlan, UnmaskRequest

KEYS_SIGNED, SURVIVORS_SIGNED = "secure aggregation, keys", "secure aggregation, survivors"
"""What a node key's signature is for; one for the first is none for the second."""


def _is_complete(plan: SessionPlan) -> bool:
    """Return True if every site shares a mask with every other."""
    return plan.neighbours == 0 or plan.neighbours >= len(plan.adverts) - 1


def neighbourhoods(plan: SessionPlan) -> dict[str, list[str]]:
    """Return, by site, the site and its neighbours, sorted by name.

    These are all sites where the graph is complete; else a ring in which each site is joined to the
    ``neighbours / 2`` before and behind it (Harary graph, Bell et al. 2020, section 3).
    """
    sites = plan.sites
    if _is_complete(plan):
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


def _sums(plan: SessionPlan, survivors: Iterable[str]) -> list[list[str]]:
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


@dataclass(frozen=True)
class Limits:
    """Hold the limits that a site sets, whatever the server asks for."""

    minimum_sites: int
    """Fewest sites in a sum that its update may be part of; also the smallest effective number of them."""
    largest_share: float
    """Largest share of one site in the weights of a sum: a sum that is nearly one update hides nothing."""
    fewest_neighbours: int = 0
    """Fewest sites that it shares masks with where not all do so with all; 0: only ever with all."""


def check_plan(plan: SessionPlan, limits: Limits) -> None:
    """Refuse a graph that the site does not allow, and weights under which a sum would show one update.

    Raises:
        SecureAggregationRefused: the graph or the weights are outside the site's limits.
    """
    if not _is_complete(plan) and not 0 < limits.fewest_neighbours <= plan.neighbours:
        raise SecureAggregationRefused(
            f"masks with {plan.neighbours} neighbours in place of all {len(plan.adverts) - 1} other sites, "
            "which this site does not allow (policy.secure-aggregation.fewest-neighbours)"
        )
    _check_weights(plan.weights, plan.sites, limits)
    if sorted(plan.weights) != plan.sites or abs(sum(plan.weights.values()) - 1) > 1e-9:
        raise SecureAggregationRefused("the weights are not one for each site, with a sum of 1")


def _check_weights(weights: Mapping[str, float], sites: Iterable[str], limits: Limits) -> None:
    """Refuse weights under which the sum of these sites would hide one of them badly.

    Raises:
        SecureAggregationRefused: too few sites with a weight, one with nearly all of it, or an effective
            number of sites below the minimum.
    """
    # A site of weight 0 hides nobody, so it does not count as one of the sum.
    counted = [weights[site] for site in sites if weights.get(site, 0.0) > 0]
    if len(counted) < limits.minimum_sites:
        raise SecureAggregationRefused(
            f"{len(counted)} sites with a weight, this site demands {limits.minimum_sites}"
        )
    if max(counted) > limits.largest_share * sum(counted):
        raise SecureAggregationRefused(
            f"one site has more than {limits.largest_share:g} of the weight of the sum"
        )
    # Sites of tiny weight hide a large one hardly better than none, so the weights are counted as equal
    # sites.
    if effective_number(counted) < limits.minimum_sites * (1 - 1e-9):
        raise SecureAggregationRefused(
            f"the weights count as {effective_number(counted):.2f} equal sites, this site demands "
            f"{limits.minimum_sites}"
        )


def effective_number(weights: Collection[float]) -> float:
    """Return 1 / sum of the squared normalised weights.

    It is n for n equal weights, and near 1 where one site has nearly all.

    Args:
        weights: not negative, in any unit, with a sum above 0.
    """
    return sum(weights) ** 2 / sum(weight**2 for weight in weights)


def check_adverts(
    plan: SessionPlan, own: KeyAdvert, authority: str, at: datetime
) -> dict[str, ec.EllipticCurvePublicKey]:
    """Return all node keys, by site, once certificates, signatures and keys are found right.

    Args:
        plan: from the server, which is not trusted with anything in it.
        own: the keys that this site advertised.
        authority: PEM of the CA certificate in this site's own kit.
        at: now, with a time zone.

    Raises:
        SecureAggregationRefused: a foreign, swapped, replayed, duplicate or missing key, or a site that
            received other settings of the run.
        IdentityError: a certificate or signature is not valid.
    """
    names = [advert.site for advert in plan.adverts]
    if names != sorted(set(names)):
        raise SecureAggregationRefused("a site is listed twice, or the list is not in order")
    if own.site not in names:
        raise SecureAggregationRefused("this site is missing from the list of sites")
    # A server that swaps this site's keys for its own could open every share sealed for the site.
    if plan.advert(own.site).signed() != own.signed():
        raise SecureAggregationRefused("this site's own keys were replaced")
    seen: set[bytes] = set()
    owners = {}
    for advert in plan.adverts:
        # Keys from an earlier session may have shares that the server knows already.
        if (advert.run, advert.session, advert.round) != (own.run, own.session, own.round):
            raise SecureAggregationRefused(
                f"the keys of {advert.site!r} are of another run, session or round"
            )
        signer = pki.verify_certificate(advert.certificate, authority, at)
        if signer.site != advert.site:
            raise SecureAggregationRefused(
                f"the keys of {advert.site!r} came with another site's certificate"
            )
        pki.verify(signer.public_key, KEYS_SIGNED, advert.signed(), advert.signature)
        # With another configuration the other sites could be made to train nothing, so that the sum is this
        # site's update.
        if advert.settings != own.settings:
            raise SecureAggregationRefused(f"{advert.site!r} was told another configuration of this run")
        owners[advert.site] = signer.public_key
        seen |= {advert.seal_key, advert.mask_key, advert.commitment}
    # One party behind two names would count twice towards the minimum of sites and the threshold.
    if len(seen) != 3 * len(names) or len({key.public_numbers() for key in owners.values()}) != len(names):
        raise SecureAggregationRefused("two sites have the same key")
    return owners


def check_survivors(plan: SessionPlan, site: str, survivors: Collection[str], limits: Limits) -> None:
    """Refuse a list of survivors whose sum this site's vector must not be part of.

    Raises:
        SecureAggregationRefused: not a list of sites of the session, without this site, too few of all or of
            one survivor's neighbourhood, or a sum that would hide one of its sites badly.
    """
    there = set(survivors)
    if len(there) != len(survivors) or not there <= set(plan.sites):
        raise SecureAggregationRefused("survivors that take no part in this session")
    if site not in there:
        raise SecureAggregationRefused("this site sent its vector and is missing from the survivors")
    joined = neighbourhoods(plan)
    for members in (plan.sites, *(joined[survivor] for survivor in sorted(there))):
        needed = threshold(len(members), plan.threshold_share)
        if len(there & set(members)) < needed:
            raise SecureAggregationRefused(
                f"{len(there & set(members))} of {len(members)} sites survived, {needed} are needed"
            )
    # On a sparse graph lost sites can split the survivors into parts, and each part's sum is seen apart.
    for part in _sums(plan, there):
        _check_weights(plan.weights, part, limits)


def check_signatures(
    plan: SessionPlan, request: UnmaskRequest, signed: bytes, owners: Mapping[str, ec.EllipticCurvePublicKey]
) -> None:
    """Refuse unless enough of the session's sites have signed the very list that this site has.

    Args:
        plan: of the session.
        request: the list and the signatures that the server shows.
        signed: the bytes that a survivor with the same list has signed.
        owners: node keys by site, as certified.

    Raises:
        SecureAggregationRefused: fewer valid signatures of survivors than the threshold over all sites.
    """
    needed = threshold(len(plan.sites), plan.threshold_share)
    # Each site signs one list only, so two lists cannot both have more than half of all signatures.
    agreed = sum(
        _is_valid(owners[site], signed, request.signatures[site])
        for site in request.signatures.keys() & set(request.survivors) & owners.keys()
    )
    if agreed < needed:
        raise SecureAggregationRefused(
            f"{agreed} of {len(plan.sites)} sites signed this list of survivors, {needed} are needed"
        )


def _is_valid(key: ec.EllipticCurvePublicKey, signed: bytes, signature: bytes) -> bool:
    # A wrong one does not count; a single site, or the server, must not end a session with it.
    try:
        pki.verify(key, SURVIVORS_SIGNED, signed, signature)
    except IdentityError:
        return False
    return True
