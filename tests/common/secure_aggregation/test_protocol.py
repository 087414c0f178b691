"""The protocol gives the exact sum, survives losses down to its threshold, and refuses what it must."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.errors import IdentityError, RunError, SecureAggregationRefused
from common.pki import read_node_key
from common.secure_aggregation import keys, member
from common.secure_aggregation.cohort import (
    KEYS_SIGNED,
    Limits,
    _check_weights,
    _sums,
    effective_number,
    neighbourhood,
    threshold,
)
from common.secure_aggregation.records import SEALED_BYTES, MaskRequest, SessionOffer
from common.secure_aggregation.recovery import MaskedSum
from deploy.simulation.simulate import _ephemeral_kit
from tests.certificates import issue

Make = Callable[..., Any]
SESSION, RUN, ROUND = "ab" * 16, 7, 3
SETTINGS = bytes(32)


def masked_by_all(group: Any, sent: dict[str, Any]) -> Any:
    """A session up to the vectors; its plan."""
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    for name in group.names:
        group.masked(name, sent[name])
    return plan


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
        (12, 6, {"no_vector": ["site-03"], "no_answer": ["site-08"]}),  # 9 of 12 must sign
    ],
)
def test_the_sum_is_exact_whoever_is_lost(
    consortium: Make, vectors: Make, sites: int, neighbours: int, lost: dict[str, list[str]]
) -> None:
    group = consortium(sites, neighbours=neighbours, limits=Limits(3, 0.8, fewest_neighbours=2))
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
    outside = _ephemeral_kit(tmp_path / "outside", "site-02")
    forged, _ = member.advertise(
        SessionOffer(session=SESSION, round=ROUND),
        "site-02",
        RUN,
        SETTINGS,
        read_node_key(outside / "node.key"),
    )
    forged = forged.model_copy(update={"certificate": (outside / "node.crt").read_text()})
    with pytest.raises(IdentityError, match="not of this consortium"):
        group.share("site-00", group.plan(group.adverts | {"site-02": forged}))


def test_keys_under_another_sites_certificate_are_refused(consortium: Make) -> None:
    group = consortium(4)
    group.advertise()
    forged, _ = member.advertise(
        SessionOffer(session=SESSION, round=ROUND),
        "site-02",
        RUN,
        SETTINGS,
        group.node_keys["site-03"],
    )
    forged = forged.model_copy(update={"certificate": group.certificates["site-03"]})
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
        SETTINGS,
        group.node_keys["site-02"],
    )
    old = old.model_copy(update={"certificate": group.certificates["site-02"]})
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
    signature = member.pki.sign(group.node_keys["site-02"], KEYS_SIGNED, doubled.signed())
    doubled = doubled.model_copy(
        update={"signature": signature, "certificate": same_key_certificate(group, "site-03", "site-02")}
    )
    with pytest.raises(SecureAggregationRefused, match="two sites have the same key"):
        group.share("site-00", group.plan(group.adverts | {"site-03": doubled}))


def same_key_certificate(group: Any, name: str, owner: str) -> str:
    """What an authority would issue that gave one key two names."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

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
        ([0.55, 0.15, 0.15, 0.15], "count as 2.70 equal sites, this site demands 3"),
        ([0.79, 0.07, 0.07, 0.07], "count as 1.57 equal sites"),
        ([0.5, 0.5, 0.0, 0.0], "2 sites with a weight"),
        ([0.5, 0.4, 0.3, 0.3], "sum of 1"),
        ([0.2, 0.2, 0.2, 0.2], "sum of 1"),
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
    with pytest.raises(
        SecureAggregationRefused, match="1 of 4 sites can be opened, 3 are needed: the others saw"
    ):
        group.receive(sealed)


def test_shares_from_outside_the_neighbourhood_are_refused(consortium: Make) -> None:
    group = consortium(9, neighbours=4, limits=Limits(3, 0.8, fewest_neighbours=2))
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names}
    me = group.names[0]
    stranger = next(name for name in group.names if name not in neighbourhood(plan, me))
    shares = {name: sealed[name].shares[me] for name in neighbourhood(plan, me) if name != me}
    for given in (shares | {stranger: b"x" * SEALED_BYTES}, dict(list(shares.items())[1:])):
        request = MaskRequest(session=SESSION, round=ROUND, sharing=tuple(group.names), shares=given)
        with pytest.raises(SecureAggregationRefused, match="not one share of each neighbour"):
            member.receive(group.states[me], request, group.model)


def test_survivors_are_checked_at_the_site(consortium: Make, vectors: Make) -> None:
    group = consortium(5)
    masked_by_all(group, vectors(group, length=4))
    everybody = group.names
    good = group.agreed(everybody)
    for lie, changes, reason in [
        (everybody[:3], {}, "3 of 5 sites survived, 4 are needed"),
        ([*everybody, "ghost"], {}, "take no part"),
        ([*everybody[:4], everybody[0]], {}, "take no part"),
        (everybody[1:], {}, "sent its vector and is missing"),
        (everybody, {"round": 4}, "no keys for"),
        (everybody, {"session": "cd" * 16}, "no keys for"),
    ]:
        with pytest.raises(SecureAggregationRefused, match=reason):
            group.sign("site-00", lie, **changes)
        lied = good.model_copy(update={"survivors": tuple(lie), **changes})
        with pytest.raises(SecureAggregationRefused, match=reason):
            member.unmask(group.states["site-00"], lied, group.limits)
    strict = Limits(minimum_sites=5, largest_share=0.8)
    with pytest.raises(SecureAggregationRefused, match="4 sites with a weight, this site demands 5"):
        member.unmask(group.states["site-00"], group.agreed(everybody[:4]), strict)


def test_a_site_that_sent_no_vector_has_no_part_in_unmasking(consortium: Make) -> None:
    """Its training failed, or another process is still at it: be it listed or not."""
    group = consortium(5)
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    for listed in (group.names, group.names[1:]):
        with pytest.raises(SecureAggregationRefused, match="sent no vector"):
            group.sign("site-00", listed)


def test_shares_are_given_to_a_list_that_enough_sites_signed_and_to_no_other(
    consortium: Make, vectors: Make
) -> None:
    group = consortium(5)  # threshold 4
    sent = vectors(group, length=4)
    masked_by_all(group, sent)
    good = group.agreed(group.names)
    state = group.states["site-00"]

    def refused(**changes: Any) -> None:
        with pytest.raises(SecureAggregationRefused, match="signed this list of survivors, 4 are needed"):
            member.unmask(state, good.model_copy(update=changes), group.limits)

    own = good.signatures
    refused(signatures={})
    refused(signatures=dict(list(own.items())[:3]))
    refused(signatures=dict.fromkeys(own, own["site-01"]))  # one signer in many names
    refused(signatures={**own, "site-01": own["site-02"], "site-02": own["site-01"]})
    refused(signatures=dict.fromkeys(own, b"junk"))
    refused(survivors=tuple(group.names[:4]))  # signed for another list
    four = group.agreed(group.names[:4])
    refused(signatures=four.signatures)
    # A signature of keys is none of survivors, and one of another session is none of this one.
    refused(signatures={name: group.adverts[name].signature for name in group.names})
    masked_by_all(group, sent)
    state = group.states["site-00"]
    refused()
    # Four of five are enough, whatever the fifth is: a wrong one does not end the session.
    good = group.agreed(group.names)
    noisy = good.model_copy(update={"signatures": {**good.signatures, "site-03": b"junk", "ghost": b"junk"}})
    assert member.unmask(state, noisy, group.limits).self_masks.keys() == set(group.names)


@pytest.mark.parametrize("change", ["weights", "clip_range", "model", "sharing"])
def test_masks_are_of_one_plan_one_list_and_one_model(consortium: Make, change: str) -> None:
    """The same keys under another plan or model give other masks: nothing of one session is in another."""
    group = consortium(3)
    group.advertise()
    plan = group.plan()
    group.receive({name: group.share(name, plan) for name in group.names})
    state = group.states["site-00"]
    weights = dict(zip(group.names, [0.3, 0.3, 0.4], strict=True))
    other = {
        "weights": {"plan": plan.model_copy(update={"weights": weights})},
        "clip_range": {"plan": plan.model_copy(update={"clip_range": 2.0})},
        "model": {"model": b"n" * 32},
        "sharing": {"sharing": ("site-00", "site-01")},
    }[change]
    first, second = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    member.mask(state, first)
    member.mask(state.model_copy(update=other), second)
    assert np.count_nonzero(first == second) <= 1
    # The pair masks alone, and the self-masks alone: of two of these, the pair masks cancel.
    alone = state.model_copy(update={"seed": bytes(32)})
    for seed in (None, b"s" * 32):
        for vector, one in ((first, alone), (second, alone.model_copy(update=other))):
            vector[:] = 0
            member.mask(one, vector)
            if seed is None:
                context = member.mask_context(one.agreed(), one.sharing, one.model)
                member.subtract_mask(vector, keys.derive_key(one.seed, member.SELF_MASK, context))
            else:
                again = np.zeros(64, np.uint32)
                member.mask(one.model_copy(update={"seed": seed}), again)
                vector -= again
        assert np.count_nonzero(first == second) <= 1


def test_sites_that_were_sent_different_models_give_no_sum(consortium: Make) -> None:
    """A model that stops all others' gradients would make the sum one site's own (Pasquini et al. 2022)."""
    group = consortium(5)
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names}
    models = dict.fromkeys(group.names, b"m" * 32) | {"site-02": b"x" * 32}
    seeds = {name: group.states[name].seed for name in group.names}
    for name, model in models.items():
        shares = {peer: reply.shares[name] for peer, reply in sealed.items() if peer != name}
        request = MaskRequest(session=SESSION, round=ROUND, sharing=tuple(group.names), shares=shares)
        group.states[name] = member.receive(group.states[name], request, model)
    total = np.sum(
        [group.masked(name, np.full(100_000, 9, np.uint32)) for name in group.names], axis=0, dtype=np.uint32
    )
    request = group.agreed(group.names)
    with pytest.raises(SecureAggregationRefused, match="1 of 5 sites signed this list"):
        member.unmask(group.states["site-02"], request, group.limits)
    # With every self-mask off, the pair masks of the odd one with all others are still there.
    for name, model in models.items():
        member.subtract_mask(
            total,
            keys.derive_key(seeds[name], member.SELF_MASK, member.mask_context(plan, group.names, model)),
        )
    assert stats.chisquare(np.bincount(total.view(np.uint8), minlength=256)).pvalue > 1e-6


def test_a_survivor_with_too_much_of_the_weight_is_not_unmasked(consortium: Make) -> None:
    group = consortium(5, limits=Limits(3, 0.4))
    group.advertise()
    weights = dict(zip(group.names, [0.36, 0.16, 0.16, 0.16, 0.16], strict=True))
    plan = group.plan().model_copy(update={"weights": weights})
    group.receive({name: group.share(name, plan) for name in group.names})
    for name in group.names:
        group.masked(name, np.zeros(4, np.uint32))
    with pytest.raises(SecureAggregationRefused, match="of the weight of the sum"):
        group.sign("site-01", group.names[:4])


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
    context = member.mask_context(plan, group.names, group.model)

    def without(*colluding: str, own_mask: bool) -> Any:
        words = open_to_try.copy()
        for peer in colluding:
            key = keys.pairwise_key(
                mask_keys[peer], plan.advert("site-00").mask_key, member.PAIR_MASK, context
            )
            member.subtract_mask(words, key)  # site-00 comes first by name: it added
        if own_mask:
            member.subtract_mask(words, keys.derive_key(seed, member.SELF_MASK, context))
        return words

    everybody = ("site-01", "site-02", "site-03", "site-04")
    assert np.array_equal(without(*everybody, own_mask=True), constant)  # the attack itself is right
    for words in (without("site-01", "site-02", own_mask=True), without(*everybody, own_mask=False)):
        assert stats.chisquare(np.bincount(words.view(np.uint8), minlength=256)).pvalue > 1e-6


@pytest.mark.parametrize("lost", [False, True], ids=["self-mask", "mask key"])
@pytest.mark.parametrize("wrong", ["one bit", "another secret", "no shares"])
def test_a_recovered_secret_is_the_one_that_was_committed_to(
    consortium: Make, vectors: Make, lost: bool, wrong: str
) -> None:
    """Shares that fit together and give another secret would leave noise in the sum without a word."""
    group = consortium(5)
    sent = vectors(group, length=8)
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names}
    group.receive(sealed)
    total = MaskedSum(plan, sealed, 8, group.model)
    there = group.names[:4] if lost else group.names
    for name in there:
        total.add(name, group.masked(name, sent[name]))
    request = group.agreed(there)
    answers = {name: member.unmask(group.states[name], request, group.limits) for name in there}
    kind, owner = ("mask_keys", "site-04") if lost else ("self_masks", "site-02")
    other = keys.split(keys.new_secret(), 4, group.names)
    for name, answer in answers.items():
        shares = dict(getattr(answer, kind))
        if wrong == "one bit" and name == "site-00":
            shares[owner] = shares[owner][:-1] + bytes([shares[owner][-1] ^ 1])
        elif wrong == "another secret":
            shares[owner] = other[name]
        elif wrong == "no shares":
            del shares[owner]
        answers[name] = answer.model_copy(update={kind: shares})
    before = total.total.copy()
    if not lost and wrong == "one bit":
        del answers["site-01"]  # or four right ones would do
    assert total.missing(answers) == [owner]
    with pytest.raises(RunError, match=f"of '{owner}' cannot be recovered"):
        total.unmask(answers)
    assert before.shape == total.total.shape


@pytest.mark.parametrize("change", [{"round": ROUND + 1}, {"round": ROUND - 1}, {"session": "cd" * 16}])
def test_every_step_is_of_the_round_and_session_that_the_keys_are_for(
    consortium: Make, vectors: Make, change: dict[str, Any]
) -> None:
    group = consortium(4)
    sent = vectors(group, length=4)
    group.advertise()
    plan = group.plan()
    me = "site-00"
    with pytest.raises(SecureAggregationRefused, match="no keys for"):
        group.share(me, plan.model_copy(update=change))
    sealed = {name: group.share(name, plan) for name in group.names}
    shares = {name: reply.shares[me] for name, reply in sealed.items() if name != me}
    request = MaskRequest(session=SESSION, round=ROUND, sharing=tuple(group.names), shares=shares)
    with pytest.raises(SecureAggregationRefused, match="no keys for"):
        member.receive(group.states[me], request.model_copy(update=change), group.model)
    group.receive(sealed)
    for name in group.names:
        group.masked(name, sent[name])
    with pytest.raises(SecureAggregationRefused, match="no keys for"):
        group.sign(me, group.names, **change)
    good = group.agreed(group.names)
    with pytest.raises(SecureAggregationRefused, match="no keys for"):
        member.unmask(group.states[me], good.model_copy(update=change), group.limits)


def test_the_server_takes_each_vector_once_and_in_shape(consortium: Make) -> None:
    group = consortium(3)
    group.advertise()
    plan = group.plan()
    sealed = {name: group.share(name, plan) for name in group.names[:2]}
    total = MaskedSum(plan, sealed, 4, group.model)
    total.add("site-00", np.zeros(4, np.uint32))
    for name, length in (("site-00", 4), ("site-01", 5), ("site-02", 4)):
        with pytest.raises(RunError):
            total.add(name, np.zeros(length, np.uint32))


@pytest.mark.parametrize("members", range(3, 40))
def test_the_threshold_is_above_half(members: int) -> None:
    for share in (0.1, 0.501, 0.66, 1.0):
        assert members / 2 < threshold(members, share) <= members
    assert (threshold(3, 0.66), threshold(5, 0.66), threshold(6, 2 / 3)) == (2, 4, 4)


def test_every_connected_part_of_the_survivors_is_a_sum_of_its_own(consortium: Make) -> None:
    group = consortium(12, neighbours=4)
    group.advertise()
    plan = group.plan()
    joined = {name: set(neighbourhood(plan, name)) for name in group.names}
    two = [name for name in group.names if name not in joined["site-00"] or name == "site-00"]
    assert ["site-00"] in _sums(plan, two)  # without its neighbours its sum is its own vector
    assert _sums(plan, group.names) == [group.names]
    assert _sums(group.plan().model_copy(update={"neighbours": 0}), two) == [two]


def test_a_sparse_sum_that_falls_into_small_parts_is_not_unmasked(consortium: Make, vectors: Make) -> None:
    """All listed sites have more than half of their neighbourhood, and yet three of them are a sum apart."""
    group = consortium(15, neighbours=4, threshold_share=0.51, limits=Limits(4, 0.8, fewest_neighbours=4))
    plan = masked_by_all(group, vectors(group, length=4))
    order = ring_of(plan)
    lost = {*order[3:5], *order[-2:]}
    listed = [name for name in group.names if name not in lost]
    assert sorted(order[:3]) in _sums(plan, listed)
    with pytest.raises(SecureAggregationRefused, match="3 sites with a weight, this site demands 4"):
        group.sign(order[7], listed)


def ring_of(plan: Any) -> list[str]:
    """The sites in the order of the ring of a graph with 4 neighbours."""
    joined = {name: set(neighbourhood(plan, name)) for name in plan.sites}
    first = plan.sites[0]

    # Next to each other on the ring are those who share three more neighbours.
    def beside(name: str) -> list[str]:
        return [peer for peer in sorted(joined[name] - {name}) if len(joined[name] & joined[peer]) == 4]

    order = [first, beside(first)[0]]
    while len(order) < len(plan.sites):
        order.append(next(peer for peer in beside(order[-1]) if peer != order[-2]))
    return order


@pytest.mark.parametrize(
    ("weights", "number"),
    [
        ([0.2] * 5, 5.0),
        ([1.0], 1.0),
        ([2.0, 2.0, 0.0], 2.0),
        ([0.79, 0.105, 0.105], 1.548),
        ([0.5, 0.3, 0.2], 2.632),
    ],
)
def test_weights_count_as_so_many_equal_sites(weights: list[float], number: float) -> None:
    assert effective_number(weights) == pytest.approx(number, abs=1e-3)
    named = {str(place): weight for place, weight in enumerate(weights)}
    for least in (1, 2, 3, 4, 5):
        enough = number >= least - 1e-9
        with nullcontext() if enough else pytest.raises(SecureAggregationRefused, match="sites"):
            _check_weights(named, named, Limits(least, 1.0))


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
