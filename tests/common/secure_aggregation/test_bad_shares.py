"""Sealed shares that are of no use cost the site that sealed them, and nobody else is named for them."""

import os
from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from common.errors import RunError, SecureAggregationRefused
from common.secure_aggregation import keys, member
from common.secure_aggregation.cohort import Limits, threshold
from common.secure_aggregation.keys import add_mask, subtract_mask
from common.secure_aggregation.records import (
    SEALED_BYTES,
    SHARE_BYTES,
    MaskRequest,
    SealedShares,
    SessionPlan,
    UnmaskShares,
    Words,
)
from common.secure_aggregation.recovery import MaskedSum
from tests.cases import shortened

Make = Callable[..., Any]
CULPRIT, VICTIM = "site-02", "site-04"
Bad = Callable[[Any, SessionPlan, SealedShares, int], SealedShares]


def random_for(count: Callable[[int, int], int]) -> Bad:
    """Random bytes of the right length, for ``count(sites, threshold)`` neighbours."""

    def bend(group: Any, plan: SessionPlan, reply: SealedShares, needed: int) -> SealedShares:
        first = sorted(reply.shares)[: count(len(group.names), needed)]
        return reply.model_copy(
            update={"shares": reply.shares | {peer: os.urandom(SEALED_BYTES) for peer in first}}
        )

    return bend


def sealed_anew(content: Callable[[], bytes], *, told: bool = True) -> Bad:
    """Something else, sealed as it should be, for all; ``told``: with the digests that belong to it."""

    def bend(group: Any, plan: SessionPlan, reply: SealedShares, needed: int) -> SealedShares:
        private, shares = group.states[CULPRIT].seal_key, {}
        for peer, right in reply.shares.items():
            inside = content()
            digests = keys.commit_share(inside[:SHARE_BYTES]) + keys.commit_share(inside[SHARE_BYTES:])
            public = plan.advert(peer).seal_key
            closed = keys.Channel(private, public, CULPRIT, peer, plan.transcript()).seal(inside)
            shares[peer] = (digests if told else right[:64]) + closed
        return reply.model_copy(update={"shares": shares})

    return bend


ALL, ONE = random_for(lambda sites, needed: sites - 1), random_for(lambda sites, needed: 1)
ALL_BUT_TOO_FEW = random_for(lambda sites, needed: sites - needed)
WRONG = sealed_anew(lambda: os.urandom(2 * SHARE_BYTES))
BAD: dict[str, tuple[Bad, bool]] = {
    "random for one": (ONE, False),
    "random for all but t - 1": (ALL_BUT_TOO_FEW, False),
    "random for all but t - 1, its own kept back": (ALL_BUT_TOO_FEW, True),
    "random for all": (ALL, False),
    "wrong, well sealed, for all": (WRONG, False),
    "of a wrong length, well sealed, for all": (sealed_anew(lambda: os.urandom(120)), False),
    "others than it shows digests of": (
        sealed_anew(lambda: os.urandom(2 * SHARE_BYTES), told=False),
        False,
    ),
}
COSTS_NOTHING = ("random for one", "random for all but t - 1")


def masked_with(
    group: Any, sent: Mapping[str, Words], bend: Bad | None = None
) -> tuple[SessionPlan, MaskedSum, dict[str, bytes]]:
    """A session up to the vectors, in which the culprit seals what it likes; everybody's seeds too."""
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names}
    if bend is not None:
        needed = threshold(len(group.names), plan.threshold_share)
        sealed[CULPRIT] = bend(group, plan, sealed[CULPRIT], needed)
    seeds = {name: group.states[name].seed for name in group.names}
    group.receive(sealed)
    total = MaskedSum(plan, sealed, len(sent[CULPRIT]), group.model)
    for name in group.names:
        total.add(name, group.masked(name, sent[name]))
    return plan, total, seeds


def unmasked(group: Any, names: list[str]) -> dict[str, UnmaskShares]:
    request = group.agreed(names)
    return {name: member.unmask(group.states[name], request, group.limits) for name in names}


def without(answer: UnmaskShares, owner: str) -> UnmaskShares:
    return answer.model_copy(
        update={
            kind: {site: share for site, share in getattr(answer, kind).items() if site != owner}
            for kind in ("self_masks", "mask_keys")
        }
    )


def wrongly(answer: UnmaskShares, owner: str) -> UnmaskShares:
    share = answer.self_masks[owner]
    return answer.model_copy(
        update={"self_masks": answer.self_masks | {owner: share[:4] + os.urandom(len(share) - 4)}}
    )


@pytest.mark.parametrize("kind", BAD)
def test_shares_that_are_of_no_use_cost_their_owner_and_nobody_else(
    consortium: Make, vectors: Make, kind: str
) -> None:
    """Everybody masks, pair masks cancel whatever could be opened, and only the culprit is ever named."""
    bend, keeps_own = BAD[kind]
    group = consortium(7)  # threshold 5
    sent = vectors(group, length=64)
    plan, total, seeds = masked_with(group, sent, bend)
    expected = np.sum(list(sent.values()), axis=0, dtype=np.uint32)
    bare = total.total.copy()
    for seed in seeds.values():
        context = member.mask_context(plan, group.names, group.model)
        subtract_mask(bare, keys.derive_key(seed, member.SELF_MASK, context))
    assert np.array_equal(bare, expected)

    held = [share for state in group.states.values() for pair in state.held.values() for share in pair]
    assert {len(share) for share in held} == {SHARE_BYTES}  # the guard lets no other out
    answers = unmasked(group, group.names)
    assert all(set(group.names) - {CULPRIT} <= answer.self_masks.keys() for answer in answers.values())
    if keeps_own:
        answers[CULPRIT] = without(answers[CULPRIT], CULPRIT)
    assert total.wrong_shares(answers) == []
    if kind in COSTS_NOTHING:
        assert (total.missing(answers), total.bad_owners(answers)) == ([], [])
        assert list(total.withheld(answers)) == [CULPRIT]
        total.unmask(answers)
        assert np.array_equal(total.total, expected)
    else:
        assert (total.missing(answers), total.bad_owners(answers)) == ([CULPRIT], [CULPRIT])
        with pytest.raises(RunError, match=f"of '{CULPRIT}' cannot be recovered"):
            total.unmask(answers)


@pytest.mark.parametrize("silent", [False, True], ids=["answers", "gives no answer"])
def test_a_site_cannot_hide_behind_its_own_share(consortium: Make, vectors: Make, silent: bool) -> None:
    """Shares that do not open for as few as can be, and its own one missing or wrong."""
    group = consortium(5)  # threshold 4
    _, total, _ = masked_with(group, vectors(group, length=4), ALL_BUT_TOO_FEW)
    answers = unmasked(group, group.names)
    answers[CULPRIT] = wrongly(answers[CULPRIT], CULPRIT)
    if silent:
        del answers[CULPRIT]
    assert total.bad_owners(answers) == [CULPRIT]


@pytest.mark.parametrize("how", [without, wrongly], ids=["kept back", "wrong"])
@pytest.mark.parametrize("sites", [5, 7, 12])
def test_fewer_holders_than_beyond_the_threshold_cannot_get_an_honest_site_named(
    consortium: Make, vectors: Make, how: Callable[[UnmaskShares, str], UnmaskShares], sites: int
) -> None:
    """Up to n - t change nothing; one more can by keeping back, and wrong shares only name who gives them."""
    group = consortium(sites)
    sent = vectors(group, length=64)
    plan, total, _ = masked_with(group, sent)
    answers = unmasked(group, group.names)
    spare = sites - threshold(sites, plan.threshold_share)
    colluding = [name for name in group.names if name != VICTIM][: spare + 1]
    fewer = answers | {name: how(answers[name], VICTIM) for name in colluding[:spare]}
    enough = answers | {name: how(answers[name], VICTIM) for name in colluding}
    assert total.missing(enough) == [VICTIM]
    assert total.bad_owners(enough) == ([VICTIM] if how is without else [])
    assert total.wrong_shares(enough) == ([] if how is without else [(n, VICTIM) for n in colluding])
    assert (total.missing(fewer), total.bad_owners(fewer)) == ([], [])
    wrong = [] if how is without else [(name, VICTIM) for name in colluding[:spare]]
    assert total.wrong_shares(fewer) == wrong
    total.unmask(fewer)
    assert np.array_equal(total.total, np.sum(list(sent.values()), axis=0, dtype=np.uint32))


def test_sites_that_are_lost_get_nobody_named(consortium: Make, vectors: Make) -> None:
    group = consortium(5)  # threshold 4
    _, total, _ = masked_with(group, vectors(group, length=4))
    answers = unmasked(group, group.names)
    few = {name: answers[name] for name in group.names[:3]}
    assert total.missing(few) == group.names
    assert (total.bad_owners(few), total.wrong_shares(few), total.withheld(few)) == ([], [], {})


def test_a_holder_that_gives_no_shares_at_all_is_named_itself(consortium: Make, vectors: Make) -> None:
    group = consortium(5)
    _, total, _ = masked_with(group, vectors(group, length=4))
    answers = unmasked(group, group.names)
    answers[CULPRIT] = answers[CULPRIT].model_copy(update={"self_masks": {}})
    assert total.withheld(answers) == {CULPRIT: [name for name in group.names if name != CULPRIT]}
    assert total.bad_owners(answers) == []


def received(group: Any, junk: list[str], lost: list[str]) -> None:
    """What site-00 does where so many sites' shares are random, and so many sites sent none."""
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names if name not in lost}
    for name in junk:
        sealed[name] = random_for(lambda sites, needed: sites)(group, plan, sealed[name], 0)
    group.receive({"site-00": sealed["site-00"]} | sealed)


def test_a_site_that_can_open_too_few_shares_refuses(consortium: Make) -> None:
    group = consortium(5)
    with pytest.raises(SecureAggregationRefused, match="3 of 5 sites can be opened, 4 are needed"):
        received(group, ["site-01", "site-02"], [])


def test_one_site_and_one_loss_make_nobody_refuse(consortium: Make) -> None:
    """Else a site that waits for another to be lost would end the run unnamed."""
    group = consortium(5)
    received(group, ["site-01"], ["site-02"])
    assert group.states["site-00"].held.keys() == {"site-00", "site-03", "site-04"}


FORGED: dict[str, Callable[[str, str], bool]] = {
    "for one receiver": lambda owner, holder: holder == "site-01" and owner == VICTIM,
    "of one owner for all": lambda owner, holder: owner == VICTIM,
    "between two parts": lambda owner, holder: (owner < "site-04") != (holder < "site-04"),
    "of one owner for half": lambda owner, holder: owner == VICTIM and holder < "site-02",
    "on a ring": lambda owner, holder: int(holder[-1]) == (int(owner[-1]) + 1) % 5,
}


@pytest.mark.parametrize("forged", shortened(FORGED, ["of one owner for all", "between two parts"]))
@pytest.mark.parametrize(
    "lost", [None, "site-00", VICTIM], ids=["all", "one left out", "the victim left out"]
)
def test_a_server_that_forges_sealed_shares_learns_no_sum_of_fewer_sites(
    consortium: Make, vectors: Make, forged: str, lost: str | None
) -> None:
    """It hands on random bytes to whom it likes, and leaves a vector out: the list's one sum, or nothing."""
    group = consortium(5, threshold_share=0.51, limits=Limits(3, 0.8))
    sent = vectors(group, length=64)
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names}
    masked: dict[str, Words] = {}
    for name in group.names:
        shares = {
            owner: os.urandom(SEALED_BYTES) if FORGED[forged](owner, name) else reply.shares[name]
            for owner, reply in sealed.items()
            if owner != name
        }
        request = MaskRequest(
            session=plan.session, round=plan.round, sharing=tuple(group.names), shares=shares
        )
        try:
            group.states[name] = member.receive(group.states[name], request, group.model)
        except SecureAggregationRefused:
            continue
        masked[name] = group.masked(name, sent[name])
    listed = [name for name in masked if name != lost]
    answers: dict[str, UnmaskShares] = {}
    if len(listed) >= 3:
        answers = unmasked(group, listed)
    clean = [some for some in subsets(masked) if comes_off(group, plan, some, masked, sent, answers)]
    assert clean in ([], [listed])
    assert len(listed) >= 3 or not clean
    assert clean or forged != "for one receiver"  # the attack leaves sums that do come off


def subsets(names: Mapping[str, Any]) -> list[list[str]]:
    return [list(some) for size in range(1, len(names) + 1) for some in combinations(sorted(names), size)]


def comes_off(
    group: Any,
    plan: SessionPlan,
    some: list[str],
    masked: Mapping[str, Words],
    sent: Mapping[str, Words],
    answers: Mapping[str, UnmaskShares],
) -> bool:
    """Whether all that these answers give away takes the masks off the sum of these sites' vectors."""
    needed = threshold(len(group.names), plan.threshold_share)
    context = member.mask_context(plan, group.names, group.model)
    total = np.sum([masked[name] for name in some], axis=0, dtype=np.uint32)

    def recovered(kind: str, owner: str) -> bytes | None:
        shares = {h: getattr(a, kind)[owner] for h, a in answers.items() if owner in getattr(a, kind)}
        secret = keys.join(shares, needed)
        advert = plan.advert(owner)
        if secret is None:
            return None
        right = (
            keys.commit(secret) == advert.commitment
            if kind == "self_masks"
            else (keys.public_key(secret) == advert.mask_key)
        )
        return secret if right else None

    for name in some:
        if (seed := recovered("self_masks", name)) is not None:
            subtract_mask(total, keys.derive_key(seed, member.SELF_MASK, context))
    for outside in set(group.names) - set(some):
        if (private := recovered("mask_keys", outside)) is None:
            continue
        for name in some:
            key = keys.pairwise_key(private, plan.advert(name).mask_key, member.PAIR_MASK, context)
            (subtract_mask if name < outside else add_mask)(total, key)
    return np.array_equal(total, np.sum([sent[name] for name in some], axis=0, dtype=np.uint32))
