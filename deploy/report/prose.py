"""Write the report's texts: headline, plain paragraphs, warnings, and the seventeen disclosures.

Every number here is taken from the figures that stand in the same report. The paragraphs follow TensorFlow
Privacy's compute_dp_sgd_privacy_statement: what is protected, then the figure, then what it leaves open. The
disclosures are those that a rigorous privacy report makes; the page adds their tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.report.model import (
    Audit,
    Disclosure,
    GeneratorKind,
    Problem,
    Provenance,
    Settings,
    Site,
    Status,
    Worst,
)

_UNIT = "one bag of images (all images and labels of the bag)"
NOT_COVERED = (
    "how many bags a site has, and how large they are",
    "which sites took part, in which rounds, and how long they took",
    "what was learned from the data before training: choices of settings after looking at results",
    "results on labelled test images, and any metric that a site's policy lets leave without noise",
    "a patient whose images lie in k bags: the guarantee for that person is k times weaker",
    "data that a site gave away by other ways than this software",
)

_OF_NOISE = ("trust", "mechanism", "sampling", "accountant", "delta")
"""The disclosures that describe what a private run does."""
_UNUSED = "No noise was drawn here, so nothing of this was used, and there is no guarantee."

_NOT_SECURE = (GeneratorKind.INSECURE, GeneratorKind.UNKNOWN)

_STRONG, _WEAK = 1.0, 10.0
"""Up to the first, an epsilon is commonly held to be strong; above the second, to promise little."""
_NEARLY_SURE = 0.95
"""From this chance of being right on, the attacker of the bet is as good as certain."""


@dataclass(frozen=True)
class ReportContext:
    """Hold the facts that the texts are about."""

    run: str | None
    rounds: int | None
    finished: bool | None
    stopped_early: str | None
    sites: Sequence[Site]
    worst: Worst | None
    problems: Sequence[Problem]
    settings: Settings | None
    audit: Audit | None
    provenance: Provenance

    def of(self, status: Status) -> list[Site]:
        """Return the sites of a status."""
        return [site for site in self.sites if site.status is status]


def status_of(sites: Sequence[Site]) -> Status:
    """Return the worst status of these sites."""
    found = {site.status for site in sites}
    return next(
        (s for s in (Status.NOT_PRIVATE, Status.UNKNOWN) if s in found),
        Status.BOUNDED if sites else Status.UNKNOWN,
    )


def headline(context: ReportContext) -> str:
    """Return the one sentence at the top of the report."""
    exposed, unknown, worst = context.of(Status.NOT_PRIVATE), context.of(Status.UNKNOWN), context.worst
    if exposed:
        return f"No privacy guarantee: {_listed([s.name for s in exposed])} sent something without noise."
    if unknown:
        return f"No figure can be given: the records of {_listed([s.name for s in unknown])} do not hold up."
    if worst is None:
        return "No privacy guarantee: there is no site to report on."
    # Without a known cap it is unknown whether a site kept within its budget.
    within = all(site.cap is not None and (site.epsilon or 0.0) <= site.cap for site in context.sites)
    count = len(context.sites)
    who = worst.site if count == 1 else "Both sites" if count == 2 else f"All {count} sites"
    whose = "its" if count == 1 else "their"
    if within:
        return f"{who} stayed within {whose} own privacy budget."
    return f"{who} spent a bounded amount of privacy."


def summary(context: ReportContext) -> tuple[str, ...]:
    """Return the plain paragraphs of the first screen."""
    return (_what_was_done(context), *_what_it_means(context))


def cautions(context: ReportContext) -> tuple[str, ...]:
    """Return warnings about true figures that a reader could take for more than they are."""
    found = []
    seeded, untold = ([s.name for s in context.sites if s.generator is kind] for kind in _NOT_SECURE)
    if seeded:
        found.append(
            f"INSECURE random generator at {_listed(seeded)}: this was a simulation, and its noise came from "
            "a seed. Whoever knows the seed can repeat the noise and subtract it. The figures hold for the "
            "method, and protect nobody's data."
        )
    if untold:
        found.append(
            f"The records of {_listed(untold)} do not say which generator drew the noise. Whoever can "
            "predict noise can subtract it, so the figures promise nothing until that is known."
        )
    if shared := [site for site in context.sites if site.own_share is not None]:
        highest = max(shared, key=lambda site: site.own_share or 0.0)
        found.append(
            f"Noise was shared at {_listed([site.name for site in shared])}: the figures hold as long as "
            "secure aggregation shows nothing but sums, and as many sites as are counted on keep their noise "
            "to themselves. Should the masks fail, or all other sites work with the server, each site's own "
            f"share is left: epsilon {epsilon_text(highest.own_share or 0.0)} at most ({highest.name}, "
            f"{highest.adjacency} {highest.unit}, delta {highest.delta:g}, {highest.accountant})."
        )
    if (worst := context.worst) is not None and worst.epsilon > _WEAK:
        found.append(
            f"An epsilon above {_WEAK:g} is weak: staying within such a budget alone protects little "
            f"({worst.site}: {epsilon_text(worst.epsilon)}, {worst.adjacency} {worst.unit}, "
            f"delta {worst.delta:g}, {worst.accountant})."
        )
    for site in context.sites:
        if site.delta is not None and site.delta_limit is not None and site.delta >= site.delta_limit:
            found.append(
                f"{site.name}: delta {site.delta:g} is not below 1 / {site.bags} bags, so the guarantee "
                "would allow one bag to be given away entirely. The run was forced to accept it."
            )
    if context.stopped_early:
        found.append(
            f"The run ended early, after round {context.rounds}: {context.stopped_early}. What the refused "
            "round would have cost was not spent."
        )
    if context.finished is False:
        found.append(f"The run has not finished: these are the figures up to round {context.rounds}.")
    return tuple(found)


def _what_was_done(context: ReportContext) -> str:
    names = _listed([site.name for site in context.sites])
    if context.run is None:
        opening = (
            f"This report covers everything that {names} ever sent, over all runs and all versions of the "
            "data, as the ledger on the site's own disk recorded it before it was sent."
        )
    else:
        count = f"{len(context.sites)} sites" if len(context.sites) > 1 else "one site"
        opening = (
            f"In the run {context.run} ({context.rounds} rounds), {count} trained an image classifier "
            f"together: {names}. No image left a site; model updates and counts of labels did."
        )
    return opening


def _what_it_means(context: ReportContext) -> tuple[str, ...]:
    worst = context.worst
    if worst is None:
        exposed = context.of(Status.NOT_PRIVATE)
        why = " ".join(f"{site.name}: {site.why}" for site in (exposed or context.of(Status.UNKNOWN)))
        tail = (
            "What a model learned without noise can reveal any of the images behind it, and no noise that is "
            "added elsewhere or later takes that back. The federation as a whole has no guarantee."
            if exposed
            else "Find out what happened to the ledger before anything more is sent from that site."
        )
        return (f"{why} {tail}",)
    one = len(context.sites) == 1
    who = worst.site if one else f"the worst site, {worst.site}"
    return (
        "What was sent was limited and mixed with random noise, so that there is a bound on what anybody can "
        f"tell from it about {_UNIT}: whether it was there, or another in its place. The bound "
        f"is epsilon: at {who}, epsilon is {epsilon_text(worst.epsilon)} at delta {worst.delta:g} (unit: "
        f"{worst.unit}; adjacency: {worst.adjacency}; accountant: {worst.accountant}), over everything that "
        "was ever sent. Smaller is more private; delta is the chance that the bound fails.",
        f"Put as a bet: somebody who knows everything else, sees all that {worst.site} sent and must say "
        f"which of two bags was used, is right at most {100 * worst.guess_right:.4g} % of the time, where a "
        f"coin is right 50 %. {_judgement(worst)}",
    )


def _judgement(worst: Worst) -> str:
    """Return where an epsilon stands on the usual scale, and what that means for an attacker."""
    scale = (
        "On the scale that is usually read (Ponomareva et al. 2023: up to 1 strong, up to "
        f"{_WEAK:g} what private training commonly reaches, above that weak)"
    )
    if worst.epsilon <= _STRONG:
        return f"{scale} this is strong: even such an attacker does little better than the coin."
    if worst.epsilon > _WEAK:
        return f"{scale} this is weak: the bound alone protects little, and only an audit can say more."
    if worst.guess_right < _NEARLY_SURE:
        return f"{scale} this is in the middle: such an attacker has an advantage, and stays in doubt."
    return (
        f"{scale} this is in the middle, and the bet says what that means here: the bound does not hold off "
        "an attacker who knows everything else. What protects a bag then is that real attackers know "
        "much less; how much they find out is not bounded by this figure, and an audit measures it."
    )


def epsilon_text(epsilon: float) -> str:
    """Return an epsilon for a sentence, with four digits and no more than thousandths."""
    return "less than 0.001" if 0 < epsilon < 1e-3 else f"{epsilon:.4g}"


def _listed(names: Sequence[str], most: int = 6) -> str:
    """Return the names as ``a, b and c``, with the rest of a long list counted."""
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def disclosures(context: ReportContext) -> tuple[Disclosure, ...]:
    """Return the seventeen disclosures, in the order in which the page shows them."""
    unused = () if _asked(context) or any(site.generators for site in context.sites) else (_UNUSED,)
    return tuple(
        Disclosure(key=key, title=title, text=(*(unused if key in _OF_NOISE else ()), *write(context)))
        for key, title, write in _DISCLOSURES
    )


def _asked(context: ReportContext) -> bool:
    """Return whether the run asked for privacy.

    Then it is not called one without noise, even where no site's record is left.
    """
    return context.settings is not None and bool(context.settings.target_epsilon)


def _epsilon(context: ReportContext) -> list[str]:
    return [
        "Epsilon and delta of each site, for the unit and adjacency named beside them. The curves with each "
        "site show the same spending read at other deltas; a single pair says less."
    ]


def _unit(context: ReportContext) -> list[str]:
    return [
        *(f"The unit is the {unit}: {_UNIT}." for unit in {site.unit for site in context.sites}),
        "An image lies in exactly one bag. A bag's gradient is clipped as a whole, because the loss of a bag "
        "couples its images. A person whose images are in k bags has the k-fold group guarantee.",
    ]


def _adjacency(context: ReportContext) -> list[str]:
    return [
        "Budgets are kept for replace-one: two data sets are neighbours when one unit is replaced by "
        "another. Replacing moves the clipped sum by up to twice the clip norm.",
        "The figures for add/remove (one unit more or less), which many tools print, are smaller for the "
        "same noise and protect less. They stand beside for comparison, by two accountants.",
    ]


def _trust(context: ReportContext) -> list[str]:
    shared = [
        f"{site.name} shared its noise with others: each site added one of "
        f"{max(part.shares for part in site.training)} equal shares, and only a sum with that many was "
        "unmasked. Against the server under secure aggregation the figure is "
        f"{epsilon_text(site.epsilon or 0.0)}; by its own share alone it is {epsilon_text(site.own_share)}. "
        "If t of n sites in a sum work with the server, the noise of n - t shares is left."
        for site in context.sites
        if site.own_share is not None
    ]
    return [
        *shared,
        "Noise is added at each site before anything is sent. The guarantee holds against the server, the "
        "other sites, whoever reads the network, and everybody who gets the model. It does not hold against "
        "somebody inside the site, who has the images themselves.",
        "It assumes that the site runs this software unchanged, and that its random numbers stay secret.",
    ]


def _mechanism(context: ReportContext) -> list[str]:
    clip = context.settings.clip_norm if context.settings else None
    at = f"norm C = {clip:g}" if clip is not None else "the clip norm C of the run (not in these records)"
    return [
        f"Bag-level DP-SGD: the gradient of each drawn bag is clipped to {at}; Gaussian noise of standard "
        "deviation sigma times C is added to the sum; the sum is divided by the expected number of bags q N, "
        "never by the number that was drawn."
    ]


def _sampling(context: ReportContext) -> list[str]:
    return [
        "Assumed and implemented alike: Poisson sampling. In each step each bag is drawn on its own with "
        "chance q. A step in which no bag was drawn adds noise and counts like the others. No amplification "
        "is claimed from the server's choice of sites."
    ]


def _accountant(context: ReportContext) -> list[str]:
    packages = context.provenance.packages
    return [
        f"Of record: privacy loss distributions of dp-accounting {packages['dp-accounting']}, rounded "
        "upwards, so that every epsilon is an upper bound. Training and releases are composed by it "
        "together.",
        f"As a second opinion for add/remove: the Renyi accountant of Opacus {packages['opacus']}. It cannot "
        "hold a release of counts, so its figure is of the training steps alone.",
    ]


def _scope(context: ReportContext) -> list[str]:
    ledgers = [site.name for site in context.sites if site.ledger is not None]
    rest = [site.name for site in context.sites if site.ledger is None]
    text = []
    if ledgers:
        text.append(
            f"From the ledger ({_listed(ledgers)}): all runs, all data versions, and every round that was "
            "reserved, also those that broke off, were tried again or were never used by the server."
        )
    if rest:
        text.append(
            f"From the last statement that the server received ({_listed(rest)}): the site's whole ledger at "
            "that time. A round that broke off later is only in the site's ledger."
        )
    lost = [site.name for site in context.sites if site.losses]
    if lost:
        text.append(
            f"Rows of the ledger were lost, and the site's owner accepted that ({_listed(lost)}): what the "
            "site's second record said of them counts here; what happened beside that record is not known."
        )
    return text


def _released(context: ReportContext) -> list[str]:
    looked = [site.name for site in context.sites if site.looks]
    noised = [site.name for site in context.sites if any(r.mechanism != "exact" for r in site.releases)]
    exact = [site.name for site in context.sites if any(r.mechanism == "exact" for r in site.releases)]
    return [
        "In each round the trained parameters of the model.",
        *([f"Exact counts of labels ({_listed(exact)}), which no epsilon covers."] if exact else []),
        *(
            [
                f"Counts of labels with noise ({_listed(noised)}), once per data version; the same noisy "
                "counts are sent again when asked again."
            ]
            if noised
            else []
        ),
        *(
            [
                f"Noised figures of held-back bags ({_listed(looked)}): sums of distances between predicted "
                "and true proportions, one a level and evaluation, paid from the same budget. Each is "
                "charged as twice what it costs, so that the accountant needs no further kind of event."
            ]
            if looked
            else []
        ),
    ]


def _not_covered(context: ReportContext) -> list[str]:
    return ["The figures say nothing about:"]


def _generator(context: ReportContext) -> list[str]:
    names = list(dict.fromkeys(name for site in context.sites for name in site.generators))
    if not names:
        unknown = "No record of a site is left, so it is not known what noise was drawn from."
        return [unknown if _asked(context) else "No noise was drawn, so no generator was used."]
    return [
        "What sampling and noise were drawn from, as each site recorded it with every charge in its ledger.",
        *(f"{name} ({_listed([s.name for s in context.sites if name in s.generators])})." for name in names),
    ]


def _delta(context: ReportContext) -> list[str]:
    return [
        "Delta must stay below one in the number of bags. Without amplification: epsilon had every bag been "
        "in every step, which is what would be left of the claim if the draws were known; closed form for "
        "the Gaussian steps (Balle and Wang 2018), releases added."
    ]


def _limit(context: ReportContext) -> list[str]:
    refused = sum(len(site.refusals) for site in context.sites)
    happened = (
        f"{refused} request(s) were refused before any training, and cost nothing."
        if refused
        else "No request was refused."
    )
    return [
        "The cap is the site's own, and no server can raise it. A round is reserved in the ledger before it "
        f"starts and counts from then on, finished or not. {happened}"
    ]


def _per_site(context: ReportContext) -> list[str]:
    if context.worst is None:
        return ["There is no figure for the federation, because not every site has one."]
    return [
        f"The federation's figure is that of its worst site, {context.worst.site}: never a mean, because a "
        "mean protects nobody. Each site's figures are below."
    ]


def _provenance(context: ReportContext) -> list[str]:
    return [
        "The code is what the run's server recorded when the run ended. A data version stands for a site's "
        "tables and the sizes and times of its images; its name is the site's own, and tells nothing of "
        "them. The packages are those of the machine that wrote this report."
    ]


def _audit(context: ReportContext) -> list[str]:
    if context.audit is None:
        return ["None. No attack was tried on this run; the figures rest on the mathematics and the tests."]
    audit = context.audit
    return [
        f"An attack on the real training showed that epsilon is at least {audit.lower_bound:.4g}, with "
        f"confidence {100 * audit.confidence:g} %. A correct guarantee lies at or above that."
    ]


def _plain(context: ReportContext) -> list[str]:
    return list(summary(context))


_DISCLOSURES: tuple[tuple[str, str, Callable[[ReportContext], list[str]]], ...] = (
    ("epsilon", "Epsilon, delta and the curve", _epsilon),
    ("unit", "Unit, and what one unit contributes", _unit),
    ("adjacency", "Adjacency", _adjacency),
    ("trust", "Trust model", _trust),
    ("mechanism", "Mechanism, noise, clipping and normalisation", _mechanism),
    ("sampling", "Sampling, steps and rounds", _sampling),
    ("accountant", "Accountant and version", _accountant),
    ("scope", "Scope of composition", _scope),
    ("released", "What was released", _released),
    ("not-covered", "What is not covered", _not_covered),
    ("generator", "Random generator", _generator),
    ("delta", "Delta against the number of bags, and no amplification", _delta),
    ("limit", "Limit, spent, left, and what happened at the limit", _limit),
    ("per-site", "Per site, and the federation's worst", _per_site),
    ("provenance", "Provenance", _provenance),
    ("audit", "Empirical audit", _audit),
    ("plain", "In plain words", _plain),
)
