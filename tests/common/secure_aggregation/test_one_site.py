"""Secure aggregation never unmasks one site, whatever lists of survivors the server tells, and to whom."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from common.errors import SecureAggregationRefused
from common.secure_aggregation import keys, member
from common.secure_aggregation.cohort import Limits, neighbourhood, neighbourhoods, threshold
from common.secure_aggregation.keys import add_mask, subtract_mask
from common.secure_aggregation.records import (
    MaskRequest,
    SessionPlan,
    SurvivorList,
    UnmaskRequest,
    UnmaskShares,
    Words,
)

Make = Callable[..., Any]
SESSION, ROUND = "ab" * 16, 3
NOW: dict[str, Any] = {"session": SESSION, "round": ROUND}


def lists_against(plan: SessionPlan, victim: str) -> tuple[dict[str, list[str]], bool]:
    """What to tell each site so that the victim's self-mask and the mask keys of all its neighbours come off.

    A site takes any list with at least a threshold of its neighbourhood. Who leaves out which of the victim's
    neighbours is a flow: from sites, each of which can leave out so many, to neighbours, each of whom a
    threshold of sites must leave out. Returns the lists, and whether they are enough.
    """
    sites = plan.sites
    members = {site: neighbourhood(plan, site) for site in sites}
    needed = threshold(len(members[victim]), plan.threshold_share)
    targets = [site for site in members[victim] if site != victim]
    place = {("site", s): 1 + i for i, s in enumerate(sites)}
    place |= {("target", s): 1 + len(sites) + i for i, s in enumerate(targets)}
    end = 1 + len(sites) + len(targets)
    capacity = np.zeros((end + 1, end + 1), np.int32)
    for site in sites:
        capacity[0, place["site", site]] = len(members[site]) - needed
        for target in set(targets) & set(members[site]):
            capacity[place["site", site], place["target", target]] = 1
    for target in targets:
        capacity[place["target", target], end] = needed
    result = maximum_flow(csr_array(capacity), 0, end)
    flow = result.flow.toarray()
    told = {
        site: [
            other
            for other in sites
            if other not in targets or flow[place["site", site], place["target", other]] < 1
        ]
        for site in sites
    }
    return told, bool(result.flow_value == needed * len(targets))


def vector_of(
    plan: SessionPlan, victim: str, masked: Words, answers: Mapping[str, UnmaskShares], context: bytes
) -> Words | None:
    """The victim's own vector, if these answers give away its self-mask and all its pair masks."""
    members = neighbourhood(plan, victim)
    needed = threshold(len(members), plan.threshold_share)

    def secret(site: str, kind: str) -> Any:
        shares = {name: getattr(a, kind)[site] for name, a in answers.items() if site in getattr(a, kind)}
        return keys.join(shares, needed)

    vector = masked.copy()
    seed = secret(victim, "self_masks")
    if seed is None or keys.commit(seed) != plan.advert(victim).commitment:
        return None
    subtract_mask(vector, keys.derive_key(seed, member.SELF_MASK, context))
    for peer in members:
        if peer == victim:
            continue
        private = secret(peer, "mask_keys")
        if private is None or keys.public_key(private) != plan.advert(peer).mask_key:
            return None
        key = keys.pairwise_key(private, plan.advert(victim).mask_key, member.PAIR_MASK, context)
        if victim < peer:
            subtract_mask(vector, key)
        else:
            add_mask(vector, key)
    return vector


def masked_by_all(group: Any, sent: dict[str, Words]) -> tuple[SessionPlan, dict[str, Words]]:
    """A session up to the vectors, honest so far."""
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    return plan, {name: group.masked(name, sent[name]) for name in group.names}


def answers_to(group: Any, told: Mapping[str, list[str]]) -> dict[str, UnmaskShares]:
    """What the sites give away when each is told its own list, with every signature that fits the list."""
    signed: dict[str, tuple[list[str], bytes]] = {}
    answers = {}
    for name, listed in told.items():
        try:
            reply = member.agree(
                group.states[name],
                SurvivorList(**NOW, survivors=tuple(listed)),
                group.node_keys[name],
                group.limits,
            )
        except SecureAggregationRefused:
            continue
        signed[name] = (listed, reply.signature)
    for name, listed in told.items():
        fitting = {site: signature for site, (other, signature) in signed.items() if other == listed}
        others = {site: signature for site, (other, signature) in signed.items() if other != listed}
        for signatures in (fitting, others | fitting):
            request = UnmaskRequest(**NOW, survivors=tuple(listed), signatures=signatures)
            try:
                answers[name] = member.unmask(group.states[name], request, group.limits)
            except SecureAggregationRefused:
                continue
    return answers


GRAPHS = [
    pytest.param(sites, neighbours, share, marks=[pytest.mark.slow] if sites > 9 else [])
    for sites in (5, 9, 16, 40)
    for neighbours in (0, 2, 4, 6)
    for share in (0.51, 0.66)
    if neighbours < sites - 1
]


@pytest.mark.parametrize(("sites", "neighbours", "share"), GRAPHS)
def test_secure_aggregation_never_unmasks_one_site(
    consortium: Make, vectors: Make, sites: int, neighbours: int, share: float
) -> None:
    """Told different lists, a sparse graph's sites would give the server all masks of one site."""
    group = consortium(
        sites,
        neighbours=neighbours,
        threshold_share=share,
        limits=Limits(3, 0.8, fewest_neighbours=neighbours),
    )
    sent = vectors(group, length=4)
    plan, masked = masked_by_all(group, sent)
    victim = group.names[0]
    told, enough = lists_against(plan, victim)
    assert enough == (neighbours == 2 or (neighbours > 0 and share == 0.51))  # the attack is right
    answers = answers_to(group, told)
    context = member.mask_context(plan, group.names, group.model)
    assert vector_of(plan, victim, masked[victim], answers, context) is None
    assert not any(peer in answer.mask_keys for answer in answers.values() for peer in group.names)


@pytest.mark.parametrize("neighbours", [2, 4, 6])
def test_a_sparse_graph_is_refused_unless_the_site_allows_it(consortium: Make, neighbours: int) -> None:
    group = consortium(9, neighbours=neighbours)
    group.advertise()
    plan = group.plan()
    for fewest in (0, neighbours + 1):
        group.limits = Limits(3, 0.8, fewest_neighbours=fewest)
        with pytest.raises(SecureAggregationRefused, match="fewest-neighbours"):
            group.share("site-00", plan)
    for fewest in (1, neighbours):
        group.limits = Limits(3, 0.8, fewest_neighbours=fewest)
        assert len(group.share("site-00", plan).shares) == neighbours


def arc(plan: SessionPlan, number: int) -> list[str]:
    """The first ``number`` sites of the ring, in its order: each is joined to the next ones."""
    joined, sites = neighbourhoods(plan), plan.sites
    place = [sites[0]]
    while len(place) < len(sites):
        # Of the sites that are left, the next on the ring has most neighbours among the last ones placed.
        left = [site for site in sites if site not in place]
        place.append(max(left, key=lambda s: [back in joined[s] for back in reversed(place)]))
    return place[:number]


@pytest.mark.parametrize(
    ("sites", "inside", "changes", "weights"),
    [
        (3, 2, {}, None),
        (5, 4, {"limits": Limits(5, 0.8)}, None),
        (5, 4, {"limits": Limits(3, 0.5)}, [0.395, 0.07, 0.07, 0.07, 0.395]),
        (9, 5, {"limits": Limits(9, 0.8), "threshold_share": 0.51}, None),
        # On a ring even where the sites at the ends of the arc refuse, the others hold shares enough.
        (12, 2, {"limits": Limits(3, 0.8, 2), "neighbours": 2}, None),
        pytest.param(12, 3, {"limits": Limits(9, 0.8, 2), "neighbours": 2}, None, marks=pytest.mark.slow),
        pytest.param(
            16,
            5,
            {"limits": Limits(9, 0.8, 4), "neighbours": 4, "threshold_share": 0.51},
            None,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            16,
            7,
            {"limits": Limits(9, 0.8, 6), "neighbours": 6, "threshold_share": 0.51},
            None,
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize("told", ["own list", "full list", "own list at the border"])
def test_no_sum_over_fewer_sites_than_the_list_comes_off(
    consortium: Make,
    vectors: Make,
    sites: int,
    inside: int,
    changes: dict[str, Any],
    weights: list[float] | None,
    told: str,
) -> None:
    """A server hands shares on within a few sites only, and has all sign the list of everybody."""
    group = consortium(sites, **changes)
    sent = vectors(group, length=1000)
    group.advertise()
    plan = group.plan()
    if weights:
        plan = plan.model_copy(update={"weights": dict(zip(group.names, weights, strict=True))})
    few = arc(plan, inside) if group.neighbours else group.names[:inside]
    sealed = {name: group.share(name, plan) for name in group.names}
    joined = neighbourhoods(plan)
    masked: dict[str, Words] = {}
    lists = {name: sorted(few) if name in few else group.names for name in group.names}
    if told == "own list at the border":
        lists |= {name: group.names for name in few if set(joined[name]) <= set(few)}
    for name in group.names:
        request = MaskRequest(
            **NOW,
            sharing=tuple(group.names if told == "full list" else lists[name]),
            shares={p: sealed[p].shares[name] for p in lists[name] if p != name and p in joined[name]},
        )
        try:
            group.states[name] = member.receive(group.states[name], request, group.model)
        except SecureAggregationRefused:
            continue
        masked[name] = group.masked(name, sent[name])
    if told == "full list":
        assert not masked.keys() & set(few if inside == 2 or not group.neighbours else few[:1])
    answers = answers_to(group, dict.fromkeys(masked, group.names))
    assert not sum_of(plan, [name for name in few if name in masked], few, masked, sent, answers, group)


def sum_of(
    plan: SessionPlan,
    there: list[str],
    few: list[str],
    masked: Mapping[str, Words],
    sent: Mapping[str, Words],
    answers: Mapping[str, UnmaskShares],
    group: Any,
) -> bool:
    """Whether these answers give away the sum of the few sites."""
    if there != few:
        return False
    total = np.zeros(1000, np.uint32)
    for name in few:
        shares = {holder: a.self_masks[name] for holder, a in answers.items() if name in a.self_masks}
        seed = keys.join(shares, threshold(len(neighbourhood(plan, name)), plan.threshold_share))
        if seed is None or keys.commit(seed) != plan.advert(name).commitment:
            return False
        vector = masked[name].copy()
        context = member.mask_context(plan, group.states[name].sharing, group.model)
        subtract_mask(vector, keys.derive_key(seed, member.SELF_MASK, context))
        total += vector
    return bool(np.array_equal(total, np.sum([sent[name] for name in few], axis=0, dtype=np.uint32)))
