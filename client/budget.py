"""Connect a site's privacy budget with a round, through the plan and the ledger.

The site decides. A site with a budget in site.toml takes part in private runs only, and its ledger lies in
its own folder; a simulated site without one gets the run's budget, and a ledger under the run. Noise and
sampling come from a cryptographic generator wherever real patients are; only a simulated node may repeat
them from a seed.

The noise multiplier that a site found for its run is kept on disk. A deployed site answers each message in a
process of its own, so that it would search once per message instead of once per run. What is kept is only a
number: the plan is made anew around it, and charges for exactly that
number, so a changed file can cost budget or be refused by the cap, and hides nothing.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from client.data.bags import CACHE_FOLDER, BagStore
from client.ledger.anchor import anchor_file, newest_mark
from client.ledger.ledger import Ledger, Opening
from client.ledger.state import Reservation
from client.session import SiteSession
from client.site import PrivateMetrics, ReleaseProportions, journal_path
from common.config import RunConfig
from common.errors import ConfigError
from common.files import write_text
from common.privacy.accounting import calibrate
from common.privacy.events import Adjacency, DiscreteLaplace, PoissonGaussian, merge
from common.privacy.plan import PlanSettings, PrivacyPlan
from common.privacy.proportions import CountRelease, Granularity, noise_generator, release_counts
from common.privacy.randomness import InsecureSeededRandomness, Randomness, SecureRandomness
from common.records import PrivacyStatement

_PLAN_FILE = "plan.json"


class SigmaCache:
    """Find noise multipliers as ``accounting.calibrate`` does, and remember the newest in a file."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _PLAN_FILE

    def __call__(
        self,
        target_epsilon: float,
        delta: float,
        sample_rate: float,
        steps: int,
        *,
        also: Iterable[PoissonGaussian | DiscreteLaplace] = (),
    ) -> float:
        """Return the noise multiplier, from the file if it was found for exactly these arguments.

        Raises:
            UserError: as ``calibrate`` does; a refusal is not remembered.
        """
        others = merge(also)
        asked = {
            "target": target_epsilon,
            "delta": delta,
            "rate": sample_rate,
            "steps": steps,
            "beside": [event.model_dump() for event in others],
            "adjacency": Adjacency.REPLACE_ONE.value,
            # Another release of the accountant may find another number for the same question.
            "accountant": version("dp-accounting"),
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        sigma = self._stored(key)
        if sigma is None:
            sigma = calibrate(target_epsilon, delta, sample_rate, steps, also=others)
            self._store(key, sigma)
        return sigma

    def _stored(self, key: str) -> float | None:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            sigma = float(record["sigma"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none yet, or damaged: it is found again
        # A multiplier out of any sensible range can only come from a damaged file.
        return sigma if record.get("key") == key and 0 < sigma <= 1e6 and math.isfinite(sigma) else None

    def _store(self, key: str, sigma: float) -> None:
        # Only time is lost where the folder cannot be written.
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"key": key, "sigma": sigma}), 0o600, sync="nothing")


@dataclass(frozen=True)
class Budget:
    """Hold one site's plan for one run, and the ledger that is asked before each part of it."""

    session: SiteSession
    ledger: Ledger

    @property
    def run_id(self) -> str:
        """Return the name of the run in the ledger."""
        return self.session.run_name

    @cached_property
    def plan(self) -> PrivacyPlan:
        """Make the plan when it is first needed, which may take seconds, and return it.

        Raises:
            UserError: the settings make no plan.
        """
        return _plan_of(self.session)

    def reserve(self, round: int) -> Reservation:
        """Charge a round before it is trained.

        Raises:
            BudgetRefused: the site's cap does not allow it.
        """
        # Before the plan is made: the search for its noise takes seconds, and a server can ask as often
        # as it likes.
        self.ledger.refuse_used_up(self.run_id, round)
        return self.ledger.reserve(
            self.plan.round_event(), self.run_id, round, generator=self.plan.randomness.description
        )

    def reserve_evaluation(self, round: int) -> Reservation:
        """Charge an evaluation of all levels on held-back bags before it is made.

        Raises:
            BudgetRefused: the site's cap does not allow it.
        """
        self.ledger.refuse_used_up(self.run_id, round)
        levels, generator = self.plan.evaluation, noise_generator(self.plan.randomness)
        return self.ledger.reserve(levels[0], self.run_id, round, copies=len(levels), generator=generator)

    def confirm(self, reservation: Reservation, round: int) -> PrivacyStatement:
        """Record that the round or evaluation was finished, and return what is spent."""
        self.ledger.confirm(reservation)
        return self.ledger.statement(round)

    def release(self, scale: float) -> CountRelease:
        """Return the noised label counts of this data version, drawn and charged once and then repeated."""
        store = self.session.store
        stored = self.ledger.release_for(store.data_version)
        if stored is not None:
            return stored
        self.ledger.refuse_used_up(self.run_id, 0)
        randomness = self.plan.randomness  # settings that make no plan must not cost a release
        drawn = release_counts(
            store.leaf_counts,
            scale=scale,
            granularity=Granularity(store.config.policy.release_proportions.value),
            randomness=randomness,
        )
        generator = noise_generator(randomness)
        return self.ledger.store_release(drawn, self.run_id, generator=generator)


def open_budget(session: SiteSession) -> Budget:
    """Open the budget of a private run at this site.

    Raises:
        ConfigError: a real site without a budget of its own, or settings that make no plan.
    """
    own, dp = session.site.policy.budget, session.config.dp
    if own.epsilon is None and not session.simulated:
        raise ConfigError(
            "this site has no privacy budget: write [policy.budget] epsilon and delta into site.toml"
        )
    path = session.ledger_path
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = journal_path(session.node)
    opening = Opening(
        session.site.name,
        session.store.data_version,
        dp.epsilon if own.epsilon is None else own.epsilon,
        dp.delta if own.delta is None else own.delta,
        own.alone_epsilon,
    )
    if session.config.shares > 1 and not session.simulated:
        _refuse_shared_noise(session)
    ledger = Ledger.open(
        path,
        opening,
        # Two witnesses outside the ledger: an older copy put back has to deceive both to pass.
        anchor=anchor_file(path, session.kit),
        seen=newest_mark(journal) if journal else (),
    )
    return Budget(session, ledger)


def _refuse_shared_noise(session: SiteSession) -> None:
    """Refuse noise that counts on other sites, unless the site's owner allows it and caps what is left alone.

    Raises:
        ConfigError: site.toml does not allow it, or has no cap.
    """
    policy = session.site.policy
    if not policy.secure_aggregation.shared_noise:
        raise ConfigError(
            "this site adds all of its noise itself (dp.noise = 'local'): its owner may set "
            "shared-noise = true in [policy.secure-aggregation] of site.toml"
        )
    if policy.budget.alone_epsilon is None:
        raise ConfigError(
            "shared noise needs a cap for what the site's own share gives, should the masks fail: write "
            "alone-epsilon into [policy.budget] of site.toml"
        )


def _plan_of(session: SiteSession) -> PrivacyPlan:
    """Make the plan of a site for its run, around the noise multiplier that was found for it before.

    Raises:
        UserError: the settings make no plan for this number of bags; all faults are listed.
    """
    cache = SigmaCache(session.folder / CACHE_FOLDER)
    return make_plan(session.config, session.store, _choose_randomness(session), cache)


def make_plan(
    config: RunConfig, store: BagStore, randomness: Randomness, find_sigma: Callable[..., float] = calibrate
) -> PrivacyPlan:
    """Make a site's plan for all rounds and evaluations of the run and its release of counts together.

    Raises:
        UserError: the settings make no plan for this number of bags; all faults are listed.
    """
    dp = config.dp
    training, held_back = store.split(config.train.held_back, config.seed)
    noises = store.config.policy.private_metrics is PrivateMetrics.NOISE
    evaluates = dp.metrics_scale > 0 and noises and len(held_back) > 0
    releases = store.config.policy.release_proportions is not ReleaseProportions.NONE
    settings = PlanSettings(
        delta=dp.delta,
        clip_norm=dp.clip_norm,
        # Held-back bags are never trained on, so only the others are sampled. Their number decides the
        # sampling rate.
        number_of_bags=len(training),
        sample_rate=dp.sample_rate or min(dp.expected_bags / max(len(training), 1), 1.0),
        steps_per_round=dp.steps_per_round,
        rounds=config.rounds,
        # The noise that sites share must be the same for all, whatever each of them releases.
        release=DiscreteLaplace(scale=dp.release_scale) if releases or config.shares > 1 else None,
        # Evaluations and the release are part of the plan from the start: paid for later, they would take
        # the budget of the last rounds.
        evaluation=(DiscreteLaplace(scale=dp.metrics_scale),) * len(store.hierarchy.levels)
        if evaluates
        else (),
        evaluations=config.evaluation.looks(config.rounds),
        shares=config.shares,
        force_delta=dp.force_delta,
    )
    return PrivacyPlan.build(settings, randomness, epsilon=dp.epsilon, find_sigma=find_sigma)


def _choose_randomness(session: SiteSession) -> Randomness:
    """Return a cryptographic generator at a real site and a seeded one at a simulated site.

    No server can ask a real site for a seeded one: whoever knows the seed can take the noise off.
    """
    if session.simulated:
        return InsecureSeededRandomness(session.config.seed, session.site.name)
    return SecureRandomness()
