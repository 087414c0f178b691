"""A site's side of one session: pure functions from what it knows and is asked to what it says.

advertise -> share -> receive -> mask -> unmask. Each takes the site's ``MemberState`` and gives a new one.
That no step is done twice is the caller's business (``client.secure_aggregation``): it must hold between
processes. Knows nothing of Flower, files and models; an update is a vector of words.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field

from common import identity
from common.errors import SecureAggregationRefused
from common.record import Record
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import least_in_a_sum, neighbourhood, threshold
from common.secure_aggregation.masking import add_mask, subtract_mask
from common.secure_aggregation.records import (
    KeyAdvert,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    UnmaskRequest,
    UnmaskShares,
    Words,
)

SIGNING = "secure aggregation, keys"
SELF_MASK, PAIR_MASK = "self-mask", "pairwise mask"


@dataclass(frozen=True)
class Limits:
    """What a site demands, whatever the server asks for."""

    minimum_sites: int
    """Fewest sites in a sum that its update may be part of."""
    largest_share: float
    """Largest share of one site in the weights of a sum: a sum that is nearly one update hides nothing."""


class MemberState(Record):
    """What a site knows in one session. Secret: it stays at the site."""

    site: str
    run: int
    session: str
    round: int
    seal_key: bytes = Field(b"", repr=False)
    mask_key: bytes = Field(b"", repr=False)
    seed: bytes = Field(b"", repr=False)
    plan: SessionPlan | None = None
    held: dict[str, tuple[bytes, bytes]] = Field(default={}, repr=False)
    """By site, its own name included: the shares it was given, of the self-mask's seed and the mask key."""

    def belongs_to(self, request: SessionOffer | SessionPlan | MaskRequest | UnmaskRequest) -> None:
        """Raise SecureAggregationRefused unless the request is of this session and round."""
        if (request.session, request.round) != (self.session, self.round):
            raise SecureAggregationRefused(
                f"asked for a session of round {request.round} that this site has no keys for"
            )

    def agreed(self) -> SessionPlan:
        """The plan that this site has checked."""
        if self.plan is None:
            raise SecureAggregationRefused("no list of sites has been agreed in this session")
        return self.plan


def advertise(
    offer: SessionOffer, site: str, run: int, key: ec.EllipticCurvePrivateKey, certificate: str = ""
) -> tuple[KeyAdvert, MemberState]:
    """Make fresh keys and a fresh seed, and sign what the others need of them."""
    state = MemberState(
        site=site,
        run=run,
        session=offer.session,
        round=offer.round,
        seal_key=keys.new_secret(),
        mask_key=keys.new_secret(),
        seed=keys.new_secret(),
    )
    advert = KeyAdvert(
        session=offer.session,
        round=offer.round,
        site=site,
        run=run,
        seal_key=keys.public_key(state.seal_key),
        mask_key=keys.public_key(state.mask_key),
        commitment=keys.commit(state.seed),
        certificate=certificate,
    )
    signature = identity.sign(key, SIGNING, advert.signed())
    return advert.model_copy(update={"signature": signature}), state


def share(
    state: MemberState, plan: SessionPlan, authority: str, at: datetime, limits: Limits
) -> tuple[SealedShares, MemberState]:
    """Check everybody's keys, and seal a share of both of this site's secrets for each neighbour.

    Args:
        state: after ``advertise``.
        plan: from the server, which is not trusted with anything in it.
        authority: PEM of the CA certificate in this site's own kit.
        at: now, with a time zone.
        limits: this site's own.

    Raises:
        SecureAggregationRefused: too few sites, a foreign, swapped, replayed, duplicate or missing key, or
            weights under which the sum would show one site's update.
        IdentityError: a certificate or signature is not valid.
    """
    state.belongs_to(plan)
    _check_adverts(state, plan, authority, at)
    check_weights(plan.weights, plan.sites, limits)
    if sorted(plan.weights) != plan.sites or sum(plan.weights.values()) > 1 + 1e-9:
        raise SecureAggregationRefused("the weights are not one for each site, with a sum of 1")
    members = neighbourhood(plan, state.site)
    needed = threshold(len(members), plan.threshold_share)
    if len(members) < max(3, needed):
        raise SecureAggregationRefused(f"{len(members)} sites are too few to share secrets among")
    seeds = keys.split(state.seed, needed, members)
    mask_keys = keys.split(state.mask_key, needed, members)
    transcript = plan.transcript()
    sealed = {
        peer: keys.seal(
            state.seal_key,
            plan.advert(peer).seal_key,
            state.site,
            peer,
            transcript,
            seeds[peer] + mask_keys[peer],
        )
        for peer in members
        if peer != state.site
    }
    bare = plan.model_copy(
        update={"adverts": tuple(a.model_copy(update={"certificate": ""}) for a in plan.adverts)}
    )
    own = {state.site: (seeds[state.site], mask_keys[state.site])}
    reply = SealedShares(session=state.session, round=state.round, site=state.site, shares=sealed)
    return reply, state.model_copy(update={"plan": bare, "held": own})


def receive(state: MemberState, request: MaskRequest) -> MemberState:
    """Open the neighbours' shares; those who sent none are no longer part of the session.

    Raises:
        SecureAggregationRefused: too few are left, or a share is not what its sender sealed.
    """
    state.belongs_to(request)
    plan = state.agreed()
    members = neighbourhood(plan, state.site)
    peers = set(members) - {state.site}
    if not request.shares.keys() <= peers:
        raise SecureAggregationRefused("shares of sites that are no neighbours of this one")
    needed = threshold(len(members), plan.threshold_share)
    if len(request.shares) + 1 < needed:
        raise SecureAggregationRefused(
            f"{len(request.shares) + 1} of {len(members)} sites are left, {needed} are needed"
        )
    transcript = plan.transcript()
    held = dict(state.held)
    for peer, sealed in sorted(request.shares.items()):
        public = plan.advert(peer).seal_key
        opened = keys.unseal(state.seal_key, public, peer, state.site, transcript, sealed)
        if len(opened) != 2 * keys.SHARE_BYTES:
            raise SecureAggregationRefused(f"the shares of {peer!r} have a wrong length")
        held[peer] = (opened[: keys.SHARE_BYTES], opened[keys.SHARE_BYTES :])
    return state.model_copy(update={"held": held, "seal_key": b""})


def mask(state: MemberState, vector: Words) -> MemberState:
    """Add the self-mask and one mask per neighbour to the vector in place, and forget the keys.

    A pair's masks cancel in the sum: the first of the two by name adds, the other subtracts.
    """
    plan = state.agreed()
    if not state.seed or not state.mask_key:
        raise SecureAggregationRefused("this site has masked a vector in this session already")
    transcript = plan.transcript()
    add_mask(vector, keys.derive(state.seed, SELF_MASK, transcript))
    for peer in sorted(state.held.keys() - {state.site}):
        key = keys.pairwise_key(state.mask_key, plan.advert(peer).mask_key, PAIR_MASK, transcript)
        if state.site < peer:
            add_mask(vector, key)
        else:
            subtract_mask(vector, key)
    return state.model_copy(update={"seed": b"", "mask_key": b""})


def unmask(state: MemberState, request: UnmaskRequest, limits: Limits) -> UnmaskShares:
    """Give one share per neighbour: of the self-mask of a survivor, of the mask key of anybody else.

    Raises:
        SecureAggregationRefused: the survivors are too few, not of this session, or one of them has nearly
            all the weight.
    """
    state.belongs_to(request)
    plan = state.agreed()
    survivors = set(request.survivors)
    if len(survivors) != len(request.survivors) or not survivors <= set(plan.sites):
        raise SecureAggregationRefused("survivors that take no part in this session")
    members = neighbourhood(plan, state.site)
    needed = threshold(len(members), plan.threshold_share)
    listed = len(survivors & set(members))
    if listed < needed:
        raise SecureAggregationRefused(f"{listed} of {len(members)} sites survived, {needed} are needed")
    if least_in_a_sum(len(plan.sites), len(members), needed, listed) < limits.minimum_sites:
        raise SecureAggregationRefused(
            f"{len(survivors)} of {len(plan.sites)} sites survived: the sum could hold fewer than "
            f"{limits.minimum_sites}"
        )
    check_weights(plan.weights, survivors, limits)
    return UnmaskShares(
        session=state.session,
        round=state.round,
        site=state.site,
        self_masks={peer: held[0] for peer, held in state.held.items() if peer in survivors},
        mask_keys={peer: held[1] for peer, held in state.held.items() if peer not in survivors},
    )


def check_weights(weights: dict[str, float], sites: Iterable[str], limits: Limits) -> None:
    """Raise SecureAggregationRefused where the weighted sum of these sites would hide one of them badly."""
    counted = [weights[site] for site in sites if weights.get(site, 0.0) > 0]
    if len(counted) < limits.minimum_sites:
        raise SecureAggregationRefused(
            f"{len(counted)} sites with a weight, this site demands {limits.minimum_sites}"
        )
    if max(counted) > limits.largest_share * sum(counted):
        raise SecureAggregationRefused(
            f"one site has more than {limits.largest_share:g} of the weight of the sum"
        )


def _check_adverts(state: MemberState, plan: SessionPlan, authority: str, at: datetime) -> None:
    names = [advert.site for advert in plan.adverts]
    if names != sorted(set(names)):
        raise SecureAggregationRefused("a site is listed twice, or the list is not in order")
    if state.site not in names:
        raise SecureAggregationRefused("this site is missing from the list of sites")
    own = plan.advert(state.site)
    made = (keys.public_key(state.seal_key), keys.public_key(state.mask_key), keys.commit(state.seed))
    if (own.seal_key, own.mask_key, own.commitment) != made:
        raise SecureAggregationRefused("this site's own keys were replaced")
    seen: set[bytes] = set()
    owners = set()
    for advert in plan.adverts:
        if (advert.run, advert.session, advert.round) != (state.run, state.session, state.round):
            raise SecureAggregationRefused(
                f"the keys of {advert.site!r} are of another run, session or round"
            )
        signer = identity.verify_certificate(advert.certificate, authority, at)
        if signer.site != advert.site:
            raise SecureAggregationRefused(
                f"the keys of {advert.site!r} came with another site's certificate"
            )
        identity.verify(signer.public_key, SIGNING, advert.signed(), advert.signature)
        owners.add(signer.public_key.public_numbers())
        seen |= {advert.seal_key, advert.mask_key, advert.commitment}
    if len(seen) != 3 * len(names) or len(owners) != len(names):
        raise SecureAggregationRefused("two sites have the same key")
