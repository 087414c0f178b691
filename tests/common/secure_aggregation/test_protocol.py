"""The protocol gives the exact sum, survives losses down to its threshold, and refuses what it must."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from client.throwaway import throwaway_kit
from common.errors import IdentityError, RunError, SecureAggregationRefused
from common.identity import load_node_key
from common.secure_aggregation import keys, member
from common.secure_aggregation.cohort import least_in_a_sum, neighbourhood, threshold
from common.secure_aggregation.member import Limits
from common.secure_aggregation.records import MaskRequest, SessionOffer, UnmaskRequest
from common.secure_aggregation.recovery import MaskedSum

Make = Callable[..., Any]
SESSION, RUN, ROUND = "ab" * 16, 7, 3


def survivors_of(*names: str) -> UnmaskRequest:
    return UnmaskRequest(session=SESSION, round=ROUND, survivors=names)


@pytest.mark.parametrize(
    ("sites", "neighbours", "lost"),
    [
        (3, 0, {}),
        (5, 0, {}),
        (5, 0, {"no_shares": ["site-01"]}),
        (5, 0, {"no_vector": ["site-00"]}),
        (5, 0, {"no_vector": ["site-04"]}),
        (5, 0, {"no_answer": ["site-02"]}),
        (7, 0, {"no_shares": ["site-03"], "no_vector": ["site-05"]}),
        (12, 6, {"no_vector": ["site-03"], "no_answer": ["site-08"]}),
    ],
)
def test_the_sum_is_exact_whoever_is_lost(
    consortium: Make, vectors: Make, sites: int, neighbours: int, lost: dict[str, list[str]]
) -> None:
    group = consortium(sites, neighbours=neighbours)
    sent = vectors(group)
    result = group.run(sent, **lost)
    gone = {*lost.get("no_shares", []), *lost.get("no_vector", [])}
    assert set(result.survivors) == set(group.names) - gone
    expected = np.sum([sent[name] for name in result.survivors], axis=0, dtype=np.uint32)
    assert np.array_equal(result.total, expected)


def test_below_the_threshold_nothing_can_be_unmasked(consortium: Make, vectors: Make) -> None:
    group = consortium(5)  # threshold 4
    with pytest.raises(SecureAggregationRefused, match="3 of 5 sites survived, 4 are needed"):
        group.run(vectors(group), no_vector=["site-00", "site-01"])


def test_too_few_answers_leave_the_sum_masked(consortium: Make, vectors: Make) -> None:
    group = consortium(5)
    with pytest.raises(RunError, match="cannot be recovered: too few"):
        group.run(vectors(group), no_answer=["site-00", "site-01"])


def test_too_few_sites_left_are_not_masked_for(consortium: Make, vectors: Make) -> None:
    group = consortium(5)
    with pytest.raises(SecureAggregationRefused, match="3 of 5 sites are left, 4 are needed"):
        group.run(vectors(group), no_shares=["site-00", "site-01"])


def test_a_swapped_key_is_found_by_every_peer(consortium: Make) -> None:
    group = consortium(4)
    group.advertise()
    mine = keys.new_secret()  # the server's own, in place of site-02's
    for field in ("seal_key", "mask_key", "commitment"):
        forged = group.adverts["site-02"].model_copy(update={field: keys.public_key(mine)})
        plan = group.plan(group.adverts | {"site-02": forged})
        for name in ("site-00", "site-01", "site-03"):
            with pytest.raises(IdentityError, match="signature"):
                group.share(name, plan)
        with pytest.raises(SecureAggregationRefused, match="own keys were replaced"):
            group.share("site-02", plan)


def test_keys_of_a_foreign_authority_are_refused(consortium: Make, tmp_path: Path) -> None:
    group = consortium(4)
    group.advertise()
    outside = throwaway_kit(tmp_path / "outside", "site-02")
    forged, _ = member.advertise(
        SessionOffer(session=SESSION, round=ROUND),
        "site-02",
        RUN,
        load_node_key(outside / "node.key"),
        (outside / "node.crt").read_text(),
    )
    with pytest.raises(IdentityError, match="not of this consortium"):
        group.share("site-00", group.plan(group.adverts | {"site-02": forged}))


def test_keys_under_another_sites_certificate_are_refused(consortium: Make) -> None:
    group = consortium(4)
    group.advertise()
    forged, _ = member.advertise(
        SessionOffer(session=SESSION, round=ROUND),
        "site-02",
        RUN,
        group.node_keys["site-03"],
        group.certificates["site-03"],
    )
    with pytest.raises(SecureAggregationRefused, match="another site's certificate"):
        group.share("site-00", group.plan(group.adverts | {"site-02": forged}))


@pytest.mark.parametrize("change", [{"round": ROUND - 1}, {"session": "cd" * 16}, {"run": RUN - 1}])
def test_replayed_keys_are_refused(consortium: Make, change: dict[str, Any]) -> None:
    group = consortium(4)
    group.advertise()
    told = {"session": SESSION, "round": ROUND, "run": RUN} | change
    old, _ = member.advertise(
        SessionOffer(session=told["session"], round=told["round"]),
        "site-02",
        told["run"],
        group.node_keys["site-02"],
        group.certificates["site-02"],
    )
    with pytest.raises(SecureAggregationRefused, match="another run, session or round"):
        group.share("site-00", group.plan(group.adverts | {"site-02": old}))
    # Saying otherwise on the envelope breaks the signature.
    renamed = old.model_copy(update={"session": SESSION, "round": ROUND, "run": RUN})
    with pytest.raises(IdentityError, match="signature"):
        group.share("site-00", group.plan(group.adverts | {"site-02": renamed}))


def test_missing_doubled_and_too_few_sites_are_refused(consortium: Make) -> None:
    group = consortium(4)
    group.advertise()
    adverts = group.adverts
    without_me = {name: advert for name, advert in adverts.items() if name != "site-00"}
    with pytest.raises(SecureAggregationRefused, match="this site is missing"):
        group.share("site-00", group.plan(without_me))
    plan = group.plan()
    twice = plan.model_copy(update={"adverts": (*plan.adverts, plan.adverts[-1])})
    with pytest.raises(SecureAggregationRefused, match="listed twice"):
        group.share("site-00", twice)
    two = {name: adverts[name] for name in ("site-00", "site-01")}
    with pytest.raises(SecureAggregationRefused, match="2 sites with a weight, this site demands 3"):
        group.share("site-00", group.plan(two))


def test_a_site_under_two_names_is_refused(consortium: Make) -> None:
    group = consortium(4)
    group.node_keys["site-03"] = group.node_keys["site-02"]
    group.advertise()
    same = group.adverts["site-02"]
    doubled = group.adverts["site-03"].model_copy(update={"mask_key": same.mask_key})
    signature = member.identity.sign(group.node_keys["site-02"], member.SIGNING, doubled.signed())
    doubled = doubled.model_copy(
        update={"signature": signature, "certificate": same_key_certificate(group, "site-03", "site-02")}
    )
    with pytest.raises(SecureAggregationRefused, match="two sites have the same key"):
        group.share("site-00", group.plan(group.adverts | {"site-03": doubled}))


def same_key_certificate(group: Any, name: str, owner: str) -> str:
    """What an authority would issue that gave one key two names."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from client.throwaway import issue

    root = group.root
    signer = load_pem_private_key((root / "ca.key").read_bytes(), None)
    return issue(name, group.node_keys[owner].public_key(), signer, group.authority.encode()).decode()


def test_an_expired_certificate_is_refused(consortium: Make) -> None:
    group = consortium(4)
    group.advertise()
    with pytest.raises(IdentityError, match="is valid from"):
        group.share("site-00", group.plan(), at=datetime.now(UTC) + timedelta(days=4000))


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([0.97, 0.01, 0.01, 0.01], "more than 0.8 of the weight"),
        ([0.5, 0.5, 0.0, 0.0], "2 sites with a weight"),
        ([0.5, 0.4, 0.3, 0.3], "sum of 1"),
    ],
)
def test_weights_that_show_one_site_are_refused(consortium: Make, weights: list[float], reason: str) -> None:
    group = consortium(4)
    group.advertise()
    plan = group.plan().model_copy(update={"weights": dict(zip(group.names, weights, strict=True))})
    with pytest.raises(SecureAggregationRefused, match=reason):
        group.share("site-01", plan)


def test_sites_that_were_told_different_things_cannot_read_each_other(consortium: Make) -> None:
    group = consortium(4)
    group.advertise()
    plan = group.plan()
    other = plan.model_copy(update={"weights": dict(zip(group.names, [0.4, 0.2, 0.2, 0.2], strict=True))})
    sealed = {"site-00": group.share("site-00", other)}
    sealed |= {name: group.share(name, plan) for name in group.names[1:]}
    with pytest.raises(SecureAggregationRefused, match="saw another list of sites"):
        group.receive(sealed)


def test_shares_from_outside_the_neighbourhood_are_refused(consortium: Make) -> None:
    group = consortium(9, neighbours=4)
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names}
    me = group.names[0]
    stranger = next(name for name in group.names if name not in neighbourhood(plan, me))
    shares = {name: sealed[name].shares[me] for name in neighbourhood(plan, me) if name != me}
    request = MaskRequest(session=SESSION, round=ROUND, shares=shares | {stranger: b"x" * 120})
    with pytest.raises(SecureAggregationRefused, match="no neighbours"):
        member.receive(group.states[me], request)


def test_no_list_of_survivors_gets_both_secrets_of_a_site(consortium: Make, vectors: Make) -> None:
    """The strongest split view: half of the sites are told that the victim survived, half that it did not."""
    group = consortium(6)  # threshold 4
    sent = vectors(group, length=4)
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    victim = "site-05"
    self_masks, mask_keys = {}, {}
    for index, name in enumerate(group.names):
        listed = group.names if index % 2 else group.names[:-1]
        group.masked(name, sent[name])
        answer = member.unmask(group.states[name], survivors_of(*listed), group.limits)
        assert not answer.self_masks.keys() & answer.mask_keys.keys()
        self_masks |= {name: answer.self_masks[victim]} if victim in answer.self_masks else {}
        mask_keys |= {name: answer.mask_keys[victim]} if victim in answer.mask_keys else {}
    assert len(self_masks) == len(mask_keys) == 3
    assert keys.join(self_masks, 4) is None
    assert keys.join(mask_keys, 4) is None
    # Not even with the wrong threshold do three shares give anything but noise.
    guess = keys.join(self_masks, 3)
    assert guess is None or keys.commit(guess) != plan.advert(victim).commitment


def test_survivors_are_checked_at_the_site(consortium: Make, vectors: Make) -> None:
    group = consortium(5)
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    state, all_sites = group.states["site-00"], group.names
    for lie, reason in [
        (survivors_of(*all_sites[:3]), "3 of 5 sites survived"),
        (survivors_of(*all_sites, "ghost"), "take no part"),
        (survivors_of(*all_sites[:4], all_sites[0]), "take no part"),
        (UnmaskRequest(session=SESSION, round=4, survivors=tuple(all_sites)), "no keys for"),
    ]:
        with pytest.raises(SecureAggregationRefused, match=reason):
            member.unmask(state, lie, group.limits)
    strict = Limits(minimum_sites=5, largest_share=0.8)
    with pytest.raises(SecureAggregationRefused, match="the sum could hold fewer than 5"):
        member.unmask(state, survivors_of(*all_sites[:4]), strict)


def test_a_survivor_with_nearly_all_the_weight_is_not_unmasked(consortium: Make) -> None:
    group = consortium(5)
    group.advertise()
    weights = dict(zip(group.names, [0.78, 0.05, 0.05, 0.05, 0.07], strict=True))
    plan = group.plan().model_copy(update={"weights": weights})
    group.receive({name: group.share(name, plan) for name in group.names})
    with pytest.raises(SecureAggregationRefused, match="of the weight of the sum"):
        member.unmask(group.states["site-01"], survivors_of(*group.names[:4]), group.limits)


def test_a_vector_is_masked_once(consortium: Make, vectors: Make) -> None:
    group = consortium(4)
    sent = vectors(group, length=8)
    group.run(sent)
    with pytest.raises(SecureAggregationRefused, match="already"):
        group.masked("site-00", sent["site-00"])


def test_one_masked_vector_is_uniform_noise(consortium: Make) -> None:
    """A constant update, masked, passes a chi-square test per byte; so does the sum without unmasking."""
    group = consortium(4)
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    constant = np.full(400_000, 123_456, np.uint32)
    masked = {name: group.masked(name, constant) for name in group.names}
    total = np.sum(list(masked.values()), axis=0, dtype=np.uint32)
    for words in (masked["site-00"], masked["site-03"], total):
        for byte in words.view(np.uint8).reshape(-1, 4).T:
            assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-6
        assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 0.01
    assert stats.chisquare(np.bincount(constant.view(np.uint8), minlength=256)).pvalue < 1e-6


def test_all_but_one_lack_the_others_masks(consortium: Make) -> None:
    """A server that works with two of five sites (below the threshold) cannot unmask a third."""
    group = consortium(5)
    group.advertise()
    plan = group.plan()
    mask_keys = {name: group.states[name].mask_key for name in group.names}
    seed = group.states["site-00"].seed
    group.receive({name: group.share(name, plan) for name in group.names})
    constant = np.full(100_000, 9, np.uint32)
    open_to_try = group.masked("site-00", constant)
    transcript = plan.transcript()

    def without(*colluding: str, own_mask: bool) -> Any:
        words = open_to_try.copy()
        for peer in colluding:
            key = keys.pairwise_key(
                mask_keys[peer], plan.advert("site-00").mask_key, member.PAIR_MASK, transcript
            )
            member.subtract_mask(words, key)  # site-00 comes first by name: it added
        if own_mask:
            member.subtract_mask(words, keys.derive(seed, member.SELF_MASK, transcript))
        return words

    everybody = ("site-01", "site-02", "site-03", "site-04")
    assert np.array_equal(without(*everybody, own_mask=True), constant)  # the attack itself is right
    for words in (without("site-01", "site-02", own_mask=True), without(*everybody, own_mask=False)):
        assert stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_a_wrong_share_is_found(consortium: Make, vectors: Make) -> None:
    group = consortium(4)
    sent = vectors(group, length=8)
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    total = MaskedSum(plan, group.names, 8)
    for name in group.names:
        total.add(name, group.masked(name, sent[name]))
    answers = {
        name: member.unmask(group.states[name], survivors_of(*group.names), group.limits)
        for name in group.names
    }
    wrong = {**answers["site-01"].self_masks, "site-02": b"\1\0\0\0" + bytes(48)}
    answers["site-01"] = answers["site-01"].model_copy(update={"self_masks": wrong})
    with pytest.raises(RunError, match=r"self-mask of 'site-02' cannot be recovered"):
        total.unmask(answers)


def test_the_server_takes_each_vector_once_and_in_shape(consortium: Make) -> None:
    group = consortium(3)
    group.advertise()
    total = MaskedSum(group.plan(), group.names[:2], 4)
    total.add("site-00", np.zeros(4, np.uint32))
    for name, length in (("site-00", 4), ("site-01", 5), ("site-02", 4)):
        with pytest.raises(RunError):
            total.add(name, np.zeros(length, np.uint32))


@pytest.mark.parametrize("members", range(3, 40))
def test_the_threshold_is_above_half(members: int) -> None:
    for share in (0.1, 0.501, 0.66, 1.0):
        assert members / 2 < threshold(members, share) <= members
    assert (threshold(3, 0.66), threshold(5, 0.66), threshold(6, 2 / 3)) == (2, 4, 4)


def test_the_least_sum_is_right_by_brute_force() -> None:
    """All lists that three or four sites can be told; the smallest sum that any choice unmasks."""
    from itertools import product

    for sites in (3, 4):
        needed = threshold(sites, 0.66)
        lists = [mask for mask in range(2**sites) if mask.bit_count() >= needed]
        smallest = sites
        for told in product(lists, repeat=sites):
            listed = [sum(mask >> site & 1 for mask in told) for site in range(sites)]
            if all(count >= needed or sites - count >= needed for count in listed):
                smallest = min(smallest, sum(count >= needed for count in listed))
        assert smallest >= least_in_a_sum(sites, sites, needed, needed) >= 2


def test_the_ring_joins_both_ways(consortium: Make) -> None:
    group = consortium(11, neighbours=4)
    group.advertise()
    plan = group.plan()
    joined = {name: set(neighbourhood(plan, name)) for name in group.names}
    for name, members in joined.items():
        assert len(members) == 5
        assert name in members
        assert all(name in joined[other] for other in members)
    first = {frozenset(members) for members in joined.values()}
    group.advertise()  # fresh keys, another ring
    plan = group.plan()
    assert first != {frozenset(neighbourhood(plan, name)) for name in group.names}
