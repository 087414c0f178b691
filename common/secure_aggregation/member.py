"""Compute a site's side of one session by pure functions.

The steps are advertise -> share -> receive -> mask -> agree -> unmask. Each takes the site's
``MemberState``, and those before ``agree`` return a new one. The caller must see to it that no step is done
twice (``client.secure_aggregation``), because that must hold between processes. The demands of a site are
in ``cohort``. This module knows nothing of Flower, files and models; an update is a vector of words.
"""

import hashlib
from collections.abc import Iterable
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

from common import pki
from common.errors import SecureAggregationRefused
from common.records import Record
from common.secure_aggregation import keys
from common.secure_aggregation.cohort import (
    KEYS_SIGNED,
    SURVIVORS_SIGNED,
    Limits,
    check_adverts,
    check_plan,
    check_signatures,
    check_survivors,
    neighbourhood,
    threshold,
)
from common.secure_aggregation.keys import add_mask, subtract_mask
from common.secure_aggregation.records import (
    SHARE_BYTES,
    InSession,
    KeyAdvert,
    MaskRequest,
    SealedShares,
    SessionOffer,
    SessionPlan,
    SurvivorList,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
    Words,
    canonical,
)

SELF_MASK, PAIR_MASK = "self-mask", "pairwise mask"


class MemberState(Record):
    """Hold the secrets and the knowledge of a site in one session, which never leave the site."""

    advert: KeyAdvert
    """What it said of its own keys, its site, run, session and round; without signature and certificate."""
    seal_key: bytes = Field(b"", repr=False)
    mask_key: bytes = Field(b"", repr=False)
    seed: bytes = Field(b"", repr=False)
    plan: SessionPlan | None = None
    owners: dict[str, bytes] = Field(default={})
    """By site: its certified node key, a compressed point of P-384."""
    held: dict[str, tuple[bytes, bytes]] = Field(default={}, repr=False)
    """By site, its own name included: the shares that it holds, of the self-mask's seed and the mask key."""
    sharing: tuple[str, ...] = ()
    """The sites that it was told share secrets, in all of the session: its masks hold for this list only."""
    model: bytes = b""
    """SHA-256 of the model that it was sent to train in this session."""

    @property
    def site(self) -> str:
        """Return the site's own name."""
        return self.advert.site

    @property
    def session(self) -> str:
        """Return the session that the secrets belong to."""
        return self.advert.session

    def belongs_to(self, request: InSession) -> None:
        """Raise SecureAggregationRefused unless the request is of this session and round."""
        if (request.session, request.round) != (self.advert.session, self.advert.round):
            raise SecureAggregationRefused(
                f"asked for a session of round {request.round} that this site has no keys for"
            )

    def agreed(self) -> SessionPlan:
        """Return the plan that this site has checked.

        Raises:
            SecureAggregationRefused: it has checked none.
        """
        if self.plan is None:
            raise SecureAggregationRefused("no list of sites has been agreed in this session")
        return self.plan


def advertise(
    offer: SessionOffer, site: str, run: int, settings: bytes, key: ec.EllipticCurvePrivateKey
) -> tuple[KeyAdvert, MemberState]:
    """Make fresh keys and a fresh seed, and sign what the others need of them.

    Args:
        offer: from the server.
        site: the site's name.
        run: the run's number.
        settings: SHA-256 of the run's configuration as the site received it.
        key: the site's node key.

    Returns:
        The signed public keys to send, to which the site adds its certificate, and the state with the
        secrets, which stays.
    """
    # Every session has fresh secrets, so that shares given in a failed session say nothing about the next
    # one.
    seal_key, mask_key, seed = keys.new_secret(), keys.new_secret(), keys.new_secret()
    advert = KeyAdvert(
        session=offer.session,
        round=offer.round,
        site=site,
        run=run,
        settings=settings,
        seal_key=keys.public_key(seal_key),
        mask_key=keys.public_key(mask_key),
        commitment=keys.commit(seed),
    )
    state = MemberState(advert=advert, seal_key=seal_key, mask_key=mask_key, seed=seed)
    signature = pki.sign(key, KEYS_SIGNED, advert.signed())
    return advert.model_copy(update={"signature": signature}), state


def share(
    state: MemberState, plan: SessionPlan, authority: str, at: datetime, limits: Limits
) -> tuple[SealedShares, MemberState]:
    """Check all keys, and seal a share of both of this site's secrets for each neighbour.

    Args:
        state: after ``advertise``.
        plan: from the server, which is not trusted with anything in it.
        authority: PEM of the CA certificate in this site's own kit.
        at: now, with a time zone.
        limits: this site's own.

    Raises:
        SecureAggregationRefused: too few sites, a foreign, swapped, replayed, duplicate or missing key, a
            graph that the site does not allow, or weights under which the sum would show one site's update.
        IdentityError: a certificate or signature is not valid.
    """
    state.belongs_to(plan)
    owners = check_adverts(plan, state.advert, authority, at)
    check_plan(plan, limits)
    members = neighbourhood(plan, state.site)
    needed = threshold(len(members), plan.threshold_share)
    # Among two sites a sum tells each of them the other's update.
    if len(members) < max(3, needed):
        raise SecureAggregationRefused(f"{len(members)} sites are too few to share secrets among")
    seeds = keys.split(state.seed, needed, members)
    mask_keys = keys.split(state.mask_key, needed, members)
    transcript = plan.transcript()
    sealed = {
        peer: keys.commit_share(seeds[peer])
        + keys.commit_share(mask_keys[peer])
        + keys.Channel(state.seal_key, plan.advert(peer).seal_key, state.site, peer, transcript).seal(
            seeds[peer] + mask_keys[peer]
        )
        for peer in members
        if peer != state.site
    }
    # Certificates were checked above; without them the state that waits between messages is smaller.
    bare = plan.model_copy(
        update={"adverts": tuple(a.model_copy(update={"certificate": ""}) for a in plan.adverts)}
    )
    points = {
        site: key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint) for site, key in owners.items()
    }
    own = {state.site: (seeds[state.site], mask_keys[state.site])}
    reply = SealedShares(session=plan.session, round=plan.round, site=state.site, shares=sealed)
    return reply, state.model_copy(update={"plan": bare, "owners": points, "held": own})


def receive(state: MemberState, request: MaskRequest, model: bytes) -> MemberState:
    """Open the neighbours' shares.

    Neighbours that sent none are no longer part of the session.

    Shares that do not open, or are not those whose digests came with them, are not held: without them the
    owner's secret is harder to recover, and no other site loses anything. The pair's masks stay as they are.

    Args:
        state: after ``share``.
        request: from the server.
        model: SHA-256 of the model that came with it.

    Raises:
        SecureAggregationRefused: too few are left, not one share of each neighbour on the list, or so few
            that open that most of them must have been told another plan than this site.
    """
    state.belongs_to(request)
    plan = state.agreed()
    members = neighbourhood(plan, state.site)
    sharing = tuple(sorted(set(request.sharing)))
    # A server that leaves a site off the list, or adds invented ones, could give each site another list and
    # separate the masks.
    if sharing != request.sharing or state.site not in sharing or not set(sharing) <= set(plan.sites):
        raise SecureAggregationRefused("not a list of sites of this session with this site on it")
    # A neighbour on the list without its share would hold a mask that this site could not help to remove.
    if request.shares.keys() != set(sharing) & set(members) - {state.site}:
        raise SecureAggregationRefused("not one share of each neighbour that shared its secrets")
    needed = threshold(len(members), plan.threshold_share)
    if len(request.shares) + 1 < needed:
        raise SecureAggregationRefused(
            f"{len(request.shares) + 1} of {len(members)} sites are left, {needed} are needed"
        )
    transcript = plan.transcript()
    held = dict(state.held)
    for peer, sealed in sorted(request.shares.items()):
        public, digests, closed = plan.advert(peer).seal_key, sealed[:64], sealed[64:]
        try:
            opened = keys.Channel(state.seal_key, public, peer, state.site, transcript).unseal(closed)
        except SecureAggregationRefused:
            continue
        pair = (opened[:SHARE_BYTES], opened[SHARE_BYTES:])
        # A share of another length could not leave this site, and would take its whole answer with it.
        if len(opened) == 2 * SHARE_BYTES and digests == b"".join(map(keys.commit_share, pair)):
            held[peer] = pair
    # Of those that were handed on: sites that are lost do not make the shares of the others suspect.
    needed = threshold(len(request.shares) + 1, plan.threshold_share)
    if len(held) < needed:
        raise SecureAggregationRefused(
            f"the shares of {len(held)} of {len(request.shares) + 1} sites can be opened, {needed} are "
            "needed: the others saw another plan, or their shares were changed"
        )
    return state.model_copy(update={"held": held, "seal_key": b"", "sharing": sharing, "model": model})


def mask(state: MemberState, vector: Words) -> MemberState:
    """Add the self-mask and one mask per neighbour to the vector in place, and forget the keys.

    A pair's masks cancel in the sum: the first of the two by name adds, the other subtracts.

    Raises:
        SecureAggregationRefused: the site was sent no model, or has masked a vector in this session.
    """
    plan = state.agreed()
    if not state.model:
        raise SecureAggregationRefused("this site has not been sent a model in this session")
    # Two vectors under the same masks differ by the difference of the two updates, in clear.
    if not state.seed or not state.mask_key:
        raise SecureAggregationRefused("this site has masked a vector in this session already")
    # The list of sharing sites and the model are part of every mask's key, so masks cancel only where both
    # sites were sent the same. Otherwise a server could have some sites mask among themselves while the
    # others count on all, or send all others a model that stops their gradients (Pasquini et al. 2022).
    context = mask_context(plan, state.sharing, state.model)
    add_mask(vector, keys.derive_key(state.seed, SELF_MASK, context))
    # With every neighbour that shares, whether this site holds its shares or not: else nothing would cancel.
    for peer in sorted(set(state.sharing) & set(neighbourhood(plan, state.site)) - {state.site}):
        key = keys.pairwise_key(state.mask_key, plan.advert(peer).mask_key, PAIR_MASK, context)
        if state.site < peer:
            add_mask(vector, key)
        else:
            subtract_mask(vector, key)
    # The secrets are erased as soon as the vector is masked, for the state waits in the SuperNode's memory.
    return state.model_copy(update={"seed": b"", "mask_key": b""})


def mask_context(plan: SessionPlan, sharing: Iterable[str], model: bytes) -> bytes:
    """Return the 96 bytes from plan, list of sharing sites, and model that mask keys are derived with."""
    return plan.transcript() + hashlib.sha256(canonical(sorted(sharing))).digest() + model


def agree(
    state: MemberState, request: SurvivorList, key: ec.EllipticCurvePrivateKey, limits: Limits
) -> SurvivorSignature:
    """Sign the list of survivors that this site was given, for all others to compare with theirs.

    Raises:
        SecureAggregationRefused: this site has sent no vector or is not listed, or the sum of the listed
            would hide one of them badly.
    """
    _check_list(state, request, limits)
    signature = pki.sign(key, SURVIVORS_SIGNED, _signed(state, request))
    return SurvivorSignature(
        session=request.session, round=request.round, site=state.site, signature=signature
    )


def unmask(state: MemberState, request: UnmaskRequest, limits: Limits) -> UnmaskShares:
    """Give one share per neighbour whose shares it holds, of a survivor's self-mask or a lost one's mask key.

    Raises:
        SecureAggregationRefused: as for ``agree``, or too few sites have signed the very same list.
    """
    _check_list(state, request, limits)
    owners = {
        site: ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP384R1(), point)
        for site, point in state.owners.items()
    }
    # A server could name a site a survivor to some and lost to others, and collect both of its secrets.
    # Signatures over one list by more than half of all sites exclude a second list.
    check_signatures(state.agreed(), request, _signed(state, request), owners)
    survivors = set(request.survivors)
    return UnmaskShares(
        session=request.session,
        round=request.round,
        site=state.site,
        # Of each neighbour one secret only: self-mask and mask key together would show its vector.
        self_masks={peer: held[0] for peer, held in state.held.items() if peer in survivors},
        mask_keys={peer: held[1] for peer, held in state.held.items() if peer not in survivors},
    )


def _check_list(state: MemberState, request: SurvivorList, limits: Limits) -> None:
    state.belongs_to(request)
    plan = state.agreed()
    # Only sites on the list may unmask (Bonawitz et al. 2017). A seed that is still there shows that no
    # vector was masked.
    if state.seed:
        raise SecureAggregationRefused("this site has sent no vector, so it has no part in unmasking")
    check_survivors(plan, state.site, request.survivors, limits)
    if not set(request.survivors) <= set(state.sharing):
        # The survivors that it has no mask with would be no part of the sum that comes off.
        raise SecureAggregationRefused(
            "survivors that shared no secrets in the session as this site knows it"
        )


def _signed(state: MemberState, request: SurvivorList) -> bytes:
    """Return the bytes that survivors sign, equal only where plan, run, model and list are equal."""
    return canonical(
        {
            "run": state.advert.run,
            "session": request.session,
            "round": request.round,
            "transcript": state.agreed().transcript().hex(),
            "model": state.model.hex(),
            "survivors": sorted(request.survivors),
        }
    )
