"""Attack a site's private training, and compare the result with the claimed epsilon.

This is the work of ``fedbags audit``. It runs where the site's data is and sends nothing, so nothing is
charged to a ledger. The result is computed from private data without noise, and is the site's own to keep or
to show.
"""

import secrets
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from client.budget import make_plan
from client.data.bags import BagStore
from client.private_training import train_round_privately
from client.training import train_round
from common.config import RunConfig
from common.errors import UserError
from common.model.build import build_model, trainable_parameters
from common.model.classifier import HierarchicalClassifier
from common.privacy.accounting import spent
from common.privacy.events import UNIT, Adjacency
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.randomness import InsecureSeededRandomness, Randomness, SecureRandomness
from deploy.audit.bound import best_bound, canaries_needed, lower_bound
from deploy.audit.canaries import CanaryStore, count_right, score_canaries
from deploy.audit.label_inference import attack_model, attack_proportions

_METHOD = "one-run audit, white-box gradient canaries (Steinke, Nasr & Jagielski 2023, Corollary 5.4)"
_NOTE = (
    "A lower bound under the claim does not prove the claim; one above it refutes it. Covers the steps of "
    "training, not the release of counts. Computed from private data without noise: share it only on purpose."
)
_GUESSED_SHARES = (0.25, 0.8)
"""Shares of the canaries that are guessed: the surest (best for small leaks), and nearly all (for large).
Not all: half of them are guessed to be there, but the coins seldom fall half and half."""
_SPARE, _FEWEST, _MOST = 2.0, 100, 400
"""Canaries by default: twice those that could refute the claim, for wrong guesses and abstentions."""
_CONTROL = 0.5
"""Share of the bags that the attacked models are not trained on."""

Progress = Callable[[int, int], None]


def audit_site(  # noqa: PLR0913 (what is audited, how long, and who is told)
    config: RunConfig,
    store: BagStore,
    *,
    canaries: int | None = None,
    seed: int | None = None,
    confidence: float = 0.95,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Audit the private training of ``config`` on one site's bags, and attack its labels.

    Args:
        config: the run; ``dp.epsilon`` > 0. All its rounds are trained, by this site alone.
        store: the site's bags.
        canaries: m; by default as many as could refute the claim, at most 400.
        seed: repeats the audit with insecure randomness; None draws coins and noise afresh, by the
            generator that real sites use.
        confidence: chance that the lower bound is right, whatever the training does.
        progress: called with (done, all) rounds.

    Returns:
        The content of audit.json. ``lower_bound`` is an epsilon for adding or removing one bag, and so
        lies under that for replacing one.

    Raises:
        UserError: no privacy to audit, too few bags, or too many canaries.
        RunError: the private training broke its promise.
    """
    if not config.dp.epsilon:
        raise UserError("training without privacy claims nothing, so there is nothing to audit")
    if len(store) < 2:
        raise UserError(f"site {store.name!r} has {len(store)} bag(s); an audit needs at least two")
    started = time.monotonic()
    # Canaries are recognised by their pixels, which augmentation would change.
    config = config.with_changes({"train.augmentation": "none"})
    # A name of its own, so that with a seed no random number of the run itself is drawn again.
    name = f"audit of {store.name}"
    randomness: Randomness = SecureRandomness() if seed is None else InsecureSeededRandomness(seed, name)
    rng = np.random.default_rng(secrets.randbits(128) if seed is None else [seed, 1])
    planned = make_plan(config, store, randomness)
    delta = planned.delta
    epsilon = {
        adjacency: spent(_plan_for(planned, planned.number_of_bags).all_events(), delta, adjacency)
        for adjacency in Adjacency
    }
    number = canaries or _default_canaries(epsilon[Adjacency.ADD_REMOVE], delta, confidence)
    total, done = 3 * config.rounds, 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    slots = CanaryStore.insert(store, number, rng)
    # The canaries are trained on like bags of the site, at its sample rate and noise.
    plan = _plan_for(planned, planned.number_of_bags + number)
    scores = score_canaries(slots, config, plan, rng, advance)
    guesses = [round(share * number) for share in _GUESSED_SHARES]
    right = [(some, count_right(scores, slots.included, some)) for some in guesses]
    bound = best_bound(number, right, delta, confidence)
    # The best of several bounds is reported, so each must hold with more confidence (union bound).
    each = 1 - (1 - confidence) / len(_GUESSED_SHARES)
    return {
        "method": _METHOD,
        "site": store.name,
        "adjacency": Adjacency.ADD_REMOVE.value,
        "unit": UNIT,
        "canaries": number,
        "guesses": bound.guesses,
        "correct": bound.correct,
        "confidence": confidence,
        "delta": delta,
        "lower_bound": bound.lower_bound,
        "largest_possible_bound": lower_bound(number, max(guesses), max(guesses), delta, each),
        "reported_epsilon": {
            "replace_one": epsilon[Adjacency.REPLACE_ONE],
            "add_remove": epsilon[Adjacency.ADD_REMOVE],
        },
        "holds": bound.lower_bound <= epsilon[Adjacency.ADD_REMOVE],
        "rounds": config.rounds,
        "randomness": randomness.description,
        "label_inference": {
            "level": store.hierarchy.levels[-1],
            "proportions": attack_proportions(store, config.dp.release_scale, randomness),
            "model": _attack_models(config, store, planned, advance),
        },
        "note": _NOTE,
        "seconds": time.monotonic() - started,
    }


def _default_canaries(epsilon: float, delta: float, confidence: float) -> int:
    needed = canaries_needed(epsilon, delta, confidence, len(_GUESSED_SHARES))
    return _MOST if needed is None else min(max(round(_SPARE * needed), _FEWEST), _MOST)


def _plan_for(plan: PrivacyPlan, number_of_bags: int) -> PrivacyPlan:
    """Return a plan of the same steps, sample rate and noise for another number of bags.

    Its epsilon is therefore the same.
    """
    settings = PlanSettings(
        delta=plan.delta,
        clip_norm=plan.clip_norm,
        number_of_bags=number_of_bags,
        sample_rate=plan.sample_rate,
        steps_per_round=plan.steps_per_round,
        rounds=plan.rounds,
        release=None,
        # Delta was checked against the site's own bags, and canaries are nobody's data.
        force_delta=True,
    )
    return PrivacyPlan.build(settings, plan.randomness, noise_multiplier=plan.noise_multiplier)


def _attack_models(
    config: RunConfig, store: BagStore, planned: PrivacyPlan, advance: Callable[[], None]
) -> dict[str, Any]:
    """Train on half of the bags, without and with DP, and guess the labels of both halves."""
    config = config.with_changes({"train.held-back": _CONTROL})
    trained, control = store.split(_CONTROL, config.seed)
    # Fewer bags at the same sample rate and noise keep the epsilon of the claim.
    plan = _plan_for(planned, len(trained))

    def fresh(settings: RunConfig) -> HierarchicalClassifier:
        model = build_model(settings.model, store.hierarchy, settings.seed, settings.parts)
        trainable_parameters(model, settings.trained_part)
        return model

    exact_config = config.with_changes({"dp.epsilon": 0.0})
    exact, private = fresh(exact_config), fresh(config)
    for round in range(1, config.rounds + 1):
        train_round(exact, store, exact_config, round)
        advance()
        train_round_privately(private, store, config, round, plan)
        advance()
    return {
        "bags": {"trained": len(trained), "not_trained": len(control)},
        "without_dp": attack_model(exact, store, config, (trained, control)),
        "with_dp": attack_model(private, store, config, (trained, control)),
    }
