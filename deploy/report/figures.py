"""Choose the figures that each site of the report gets, and find records of a site that disagree.

The module asks ``accounts`` for all epsilons at once and computes none itself.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from common.privacy.events import UNIT, Adjacency, DiscreteLaplace, PoissonGaussian, merge
from common.privacy.randomness import Generator
from deploy.report.accounts import ACCOUNTANT, Accountants, EpsilonQuery, Epsilons, Events
from deploy.report.evidence import Collected, Evidence, RunEvidence, Statement, check_ledgers
from deploy.report.model import (
    CurvePoint,
    GeneratorKind,
    LedgerFile,
    Looks,
    Problem,
    Release,
    Site,
    Spending,
    Stated,
    Status,
    Training,
    WhatIf,
    Worst,
)
from deploy.report.spending import (
    Charge,
    charges,
    events_up_to,
    looks_of,
    refusals_of,
    releases_of,
    rows_of,
    training_of,
)

_ALL_POINTS = 120
"""Rounds at which spending is computed, all sites together: many for one site, few each for several."""
_MANY = 20
"""Sites from which on only the worst gets every figure, so that the report takes seconds."""
_TOLERANCE = 1e-3
"""How far, relatively, a stated figure may be from the one computed from its own events."""

_MOST_STATED = 100
"""Events of different noise in a statement whose cost is computed again: each takes a while."""


@dataclass(frozen=True)
class _Extent:
    """Set how much is asked about a site."""

    points: int
    """Rounds at which its spending is computed."""
    more_rounds: tuple[int, ...]
    """Numbers of further rounds whose cost is asked."""
    deltas: tuple[float, ...]
    """Further deltas at which the curve is read."""


_FULL = _Extent(24, (1, 10, 100), tuple(10.0**-exponent for exponent in range(2, 11)))
_BRIEF = _Extent(4, (), (1e-2, 1e-6, 1e-10))


def assemble(found: Collected, accountants: Accountants) -> tuple[dict[str, Site], list[Problem]]:
    """Return every site with its figures, in the order of the names, and all problems of the records."""
    run = found.runs[0] if len(found.runs) == 1 else None
    every = [found.sites[name] for name in sorted(found.sites)]
    extent = _BRIEF
    if len(every) < _MANY:
        extent = replace(_FULL, points=min(_FULL.points, _ALL_POINTS // max(len(every), 1)))
    asked = {item.name: _ask(item, run, extent) for item in every}
    questions = [inquiry.question for inquiry in asked.values() if inquiry.question is not None]
    answers = accountants.answer_all(questions, meanwhile=lambda: check_ledgers(found))
    problems = [problem for item in every for problem in item.problems]
    sites: dict[str, Site] = {}
    for item in every:
        inquiry = asked[item.name]
        answer = answers[inquiry.question] if inquiry.question else None
        problems += _disagreements(item, answer)
        sites[item.name] = _site(item, inquiry, answer)
    # Of many sites only the worst is asked about in full, since a report must take seconds and the
    # federation's figure is that of its worst site.
    worst = worst_of(sites.values())
    if worst is not None and extent is _BRIEF:
        item = found.sites[worst.site]
        inquiry = _ask(item, run, _FULL)
        assert inquiry.question is not None
        answers = accountants.answer_all([inquiry.question], meanwhile=lambda: None)
        sites[item.name] = _site(item, inquiry, answers[inquiry.question])
    return sites, problems


def worst_of(sites: Iterable[Site]) -> Worst | None:
    """Return the figures of the site that spent most, or None unless every site is bounded."""
    every = list(sites)
    # One site without a bound takes the guarantee from the federation, whatever the others spent.
    if not every or any(site.status is not Status.BOUNDED for site in every):
        return None
    site = max(every, key=lambda site: (site.epsilon or 0.0, site.delta or 0.0))
    return Worst.model_validate(site.model_dump(include=set(Worst.model_fields)) | {"site": site.name})


def _rounds_shown(item: Evidence, points: int) -> dict[int, Events]:
    """Return rounds of training, counted over the ledger's life, with the events before the next round."""
    # Where statements hold an epsilon for every round, the plot takes those and nothing is computed again.
    if item.state is None or _covered_by_statements(item):
        return {}
    events = [charge.event for charge in charges(item.state)]
    ends = [number for number, event in enumerate(events, 1) if isinstance(event, PoissonGaussian)]
    shown = {0: merge(events[: ends[0] - 1] if ends else events)}
    for place in range(1, points + 1):
        round = math.ceil(len(ends) * place / points)
        if round:
            shown[round] = merge(events[: ends[round] - 1] if round < len(ends) else events)
    return shown


def _covered_by_statements(item: Evidence) -> bool:
    """Return whether the run's statements cover the ledger's whole spending."""
    if item.state is None or item.named or not item.stated:
        return False
    return len({charge.run for charge in charges(item.state)}) <= 1


@dataclass(frozen=True)
class _Inquiry:
    """Hold what is asked about a site, without a question where no figure could be believed."""

    question: EpsilonQuery | None
    rounds: tuple[int, ...] = ()
    """Rounds after which the query's prefixes end."""


def _ask(item: Evidence, run: RunEvidence | None, extent: _Extent) -> _Inquiry:
    statement, release = item.statement, item.release
    stated = merge(statement.events) if statement else ()
    if item.state is not None:
        spent = charges(item.state)
        rounds = _rounds_shown(item, extent.points)
        question = EpsilonQuery(
            events=merge(charge.event for charge in spent),
            # What is reserved counts as spent, so a crash wastes budget and never hides spending.
            confirmed=merge(charge.event for charge in spent if charge.confirmed),
            delta=item.state.cap.delta,
            next_round=_last_round(spent),
            more_rounds=extent.more_rounds,
            prefixes=tuple(rounds.values()),
            deltas=extent.deltas,
            stated=() if _too_many(stated) else stated,
        )
        return _Inquiry(question, tuple(rounds))
    if item.ledger is not None:
        return _Inquiry(None)
    if statement is not None:
        if statement.epsilon is None or statement.delta is None or _too_many(stated):
            return _Inquiry(None)
        more = _usual_round(stated, run), extent.more_rounds
        return _Inquiry(EpsilonQuery(stated, stated, statement.delta, *more, (), extent.deltas, stated))
    if run is None or run.settings.delta is None or release is None or release.mechanism == "exact":
        return _Inquiry(None)
    # It enrolled and never trained: the release, if there was one, is all that it sent.
    events = () if release.event is None else (release.event,)
    return _Inquiry(EpsilonQuery(events, events, run.settings.delta, (), (), (), extent.deltas))


def _too_many(stated: Events) -> bool:
    """Return whether a statement has too many different events to compute their epsilon again."""
    # The events are the site's word alone, and could keep the accountant busy for minutes or hours.
    return len(stated) > _MOST_STATED


def _last_round(spent: Sequence[Charge]) -> Events:
    """Return the events of the newest round of training and of its evaluation on held-back bags.

    The result is empty without training.
    """
    rounds = [place for place, charge in enumerate(spent) if isinstance(charge.event, PoissonGaussian)]
    if not rounds:
        return ()
    return tuple(
        charge.event for charge in spent[rounds[-1] :] if charge.is_evaluation or charge is spent[rounds[-1]]
    )


def _usual_round(events: Events, run: RunEvidence | None) -> Events:
    """Return the events of one more round, where only merged events are known.

    The round has as many steps as the run's rounds. The result is empty where the run evaluates on held-back
    bags, because the cost of one evaluation cannot be read from merged events.
    """
    steps = run.settings.steps_per_round if run and run.settings.metrics_scale is None else None
    training = [event for event in events if isinstance(event, PoissonGaussian)]
    return (training[-1].model_copy(update={"steps": steps}),) if training and steps else ()


def _disagreements(item: Evidence, answer: Epsilons | None) -> list[Problem]:
    """Return the problems of a statement that contradicts itself or the ledger."""
    statement = item.statement
    if statement is None or statement.epsilon is None or answer is None:
        return []
    where = f"the statement of round {statement.round}"
    reasons = []
    # Epsilons can be compared at one delta only.
    compared = item.state is None or item.state.cap.delta == statement.delta
    compared = compared and not _too_many(merge(statement.events))
    if compared and not math.isclose(statement.epsilon, answer.stated, rel_tol=_TOLERANCE, abs_tol=1e-9):
        reasons.append(f"{where} says epsilon {statement.epsilon:.4g}; its events cost {answer.stated:.4g}")
    own, stated = answer.stated_alone, statement.epsilon_alone
    if compared and (own is None) != (stated is None):
        reasons.append(f"{where} is at odds with its events on whether noise was shared")
    elif compared and not math.isclose(stated or 0.0, own or 0.0, rel_tol=_TOLERANCE, abs_tol=1e-9):
        reasons.append(f"{where} says epsilon {stated:.4g} by its own noise alone; its events cost {own:.4g}")
    if item.state is not None:
        then = events_up_to(item.state, statement.ledger_head)
        if then is None:
            reasons.append(f"{where} names no row of the site's ledger: the statement or the ledger is false")
        elif tuple(then) != merge(statement.events):
            reasons.append(f"{where} tells other events than the ledger held then")
    return [Problem(site=item.name, row=None, reason=reason) for reason in reasons]


def _site(item: Evidence, inquiry: _Inquiry, answer: Epsilons | None) -> Site:
    question = inquiry.question
    state, run_bags = item.state, item.release.bags if item.release else None
    bags = item.training_bags or run_bags
    generators = _generators(item)
    status, why = _status(item, answer)
    bounded = answer if status is Status.BOUNDED else None
    spent = charges(state) if state else []
    cap = state.cap.epsilon if state else _stated_cap(item.statement)
    training = training_of(spent) if state else _stated_training(item)
    epsilon = bounded.epsilon if bounded else None
    # Without rounds of a ledger the plot shows what the site stated round by round.
    if bounded and not bounded.spending:
        spending = [Spending(round=r, epsilon=e) for r, e in sorted(item.stated.items())]
    else:
        pairs = zip(inquiry.rounds, bounded.spending, strict=True) if bounded else ()
        spending = [Spending(round=r, epsilon=e) for r, e in pairs if math.isfinite(e)]
    return Site(
        name=item.name,
        status=status,
        why=why,
        unit=UNIT,
        adjacency=Adjacency.REPLACE_ONE.value,
        accountant=ACCOUNTANT,
        delta=question.delta if question and bounded else None,
        epsilon=epsilon,
        confirmed=bounded.confirmed if bounded else None,
        cap=cap,
        left=max(cap - epsilon, 0.0) if cap is not None and epsilon is not None else None,
        guess_right=_guess_right(epsilon, question.delta) if question and epsilon is not None else None,
        add_remove=_finite(bounded.add_remove) if bounded else None,
        opacus_rdp=_finite(bounded.opacus_rdp) if bounded else None,
        without_amplification=_finite(bounded.without_amplification) if bounded else None,
        own_share=_finite(bounded.own_share) if bounded else None,
        own_share_cap=state.cap.alone if state else None,
        bags=bags,
        delta_limit=1 / bags if bags else None,
        steps=sum(part.steps for part in training),
        rounds=sum(part.rounds or 0 for part in training) if state else len(item.stated) or None,
        training=training,
        releases=releases_of(state) if state else _stated_release(item),
        looks=looks_of(spent) if state else _stated_looks(item),
        spending=tuple(spending),
        curve=tuple(CurvePoint(delta=d, epsilon=e) for d, e in bounded.curve if math.isfinite(e))
        if bounded
        else (),
        what_if=tuple(
            WhatIf(rounds=n, epsilon=e, fits=cap is None or e <= cap)
            for n, e in bounded.what_if
            if math.isfinite(e)
        )
        if bounded
        else (),
        refusals=refusals_of(state) if state else (),
        data_versions=_data_versions(item, spent),
        losses=max(state.losses if state else 0, item.statement.losses if item.statement else 0),
        generator=_kind_of(generators),
        generators=tuple(generators),
        declared_losses=tuple(item.declared_losses),
        stated=_stated(item.statement),
        ledger=_ledger_file(item),
        rows=rows_of(state) if state and item.named else (),
    )


def _status(item: Evidence, answer: Epsilons | None) -> tuple[Status, str]:
    # Checked first: no other record of a site is believed while its ledger cannot be trusted.
    if item.ledger is not None and (item.state is None or item.problems):
        return Status.UNKNOWN, "Its ledger was changed, or is not the one that its statements speak of."
    if item.statement is not None and item.statement.epsilon is None:
        return Status.NOT_PRIVATE, "It trained without noise: its model updates bound nothing."
    if item.release is not None and item.release.mechanism == "exact":
        return Status.NOT_PRIVATE, "It released its label counts without noise."
    kinds = merge(item.statement.events) if item.statement else ()
    if answer is None and _too_many(kinds):
        return Status.UNKNOWN, (
            f"Its statement names {len(kinds)} events of different noise, more than the {_MOST_STATED} that "
            "are computed again from a statement alone; give its ledger."
        )
    if answer is None:
        return Status.NOT_PRIVATE, "It took part in a run without privacy, and no statement bounds it."
    if not math.isfinite(answer.epsilon):
        return Status.NOT_PRIVATE, "Some of what it sent carried no noise that bounds anything."
    return Status.BOUNDED, ""


def _data_versions(item: Evidence, spent: Sequence[Charge]) -> tuple[str, ...]:
    """Return every data version that something was spent on, or that of the run where there is no ledger."""
    versions = [charge.data_version for charge in spent]
    if not versions and item.release is not None:
        versions = [item.release.data_version]
    return tuple(dict.fromkeys(version for version in versions if version))


def _generators(item: Evidence) -> tuple[Generator, ...]:
    """Return the generators that the site's records name, or UNKNOWN where a name is missing."""
    if item.state is not None:
        return item.state.generators
    if item.statement is not None and item.statement.events:
        return tuple(dict.fromkeys(map(Generator.read, item.statement.generator.split("; "))))
    drew = item.release is not None and item.release.event is not None
    return (Generator.UNKNOWN,) if drew or item.ledger is not None else ()


def _kind_of(generators: Sequence[Generator]) -> GeneratorKind:
    # One seeded generator is enough, because whoever knows the seed can subtract its noise.
    if Generator.SEEDED in generators:
        return GeneratorKind.INSECURE
    if not all(generator.secure for generator in generators):
        return GeneratorKind.UNKNOWN
    return GeneratorKind.SECURE if generators else GeneratorKind.NONE


def _finite(epsilon: float | None) -> float | None:
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None


def _guess_right(epsilon: float, delta: float) -> float:
    """Return the best balanced accuracy of telling two neighbouring data sets apart (Kairouz et al. 2015)."""
    return min((1 + delta * math.exp(-epsilon)) / (1 + math.exp(-epsilon)), 1.0)


def _stated_cap(statement: Statement | None) -> float | None:
    if statement is None or statement.budget_left is None or statement.epsilon is None:
        return None
    return statement.epsilon + statement.budget_left


def _stated_training(item: Evidence) -> tuple[Training, ...]:
    events = merge(item.statement.events) if item.statement else ()
    parts = training_of(_stated_charge(event) for event in events)
    return tuple(part.model_copy(update={"rounds": None}) for part in parts)


def _stated_charge(event: PoissonGaussian | DiscreteLaplace) -> Charge:
    is_evaluation = isinstance(event, DiscreteLaplace)
    return Charge(event, run="", data_version="", confirmed=True, row=0, is_evaluation=is_evaluation)


def _stated_looks(item: Evidence) -> tuple[Looks, ...]:
    """Return the noised figures of held-back bags that a statement holds besides the release of counts.

    A statement does not say how many evaluations they belong to.
    """
    events = list(item.statement.events) if item.statement else []
    if item.release is not None and item.release.event in events:
        events.remove(item.release.event)
    parts = looks_of(_stated_charge(event) for event in events)
    return tuple(part.model_copy(update={"looks": None}) for part in parts)


def _stated_release(item: Evidence) -> tuple[Release, ...]:
    if item.release is None or item.release.mechanism == "none":
        return ()
    event = item.release.event
    scale = event.scale if isinstance(event, DiscreteLaplace) else None
    return (
        Release(
            data_version="",
            mechanism=item.release.mechanism.replace("-", " "),
            granularity=item.release.granularity,
            unit=UNIT,
            scale=scale,
            noise_scale=None,
            epsilon_alone=2 / scale if scale else None,
        ),
    )


def _stated(statement: Statement | None) -> Stated | None:
    if statement is None:
        return None
    return Stated.model_validate(statement.model_dump(exclude={"site", "events", "losses"}))


def _ledger_file(item: Evidence) -> LedgerFile | None:
    if item.ledger is None:
        return None
    state = item.state
    return LedgerFile(
        head=state.head if state else "", rows=len(state.entries) if state else 0, intact=not item.problems
    )
