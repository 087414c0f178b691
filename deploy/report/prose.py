"""The report in words: headline, plain paragraphs, and the seventeen disclosures.

Every number here is taken from the figures that stand in the same report. The paragraphs follow TensorFlow
Privacy's compute_dp_sgd_privacy_statement: what is protected, then the figure, then what it leaves open.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.report.model import Audit, Disclosure, Problem, Provenance, Settings, Site, Status, Worst

UNITS = {
    "bag": "one bag of images (all images and labels of the bag)",
    "image": "one image with its label (a whole bag is protected less)",
}
NOT_COVERED = (
    "how many bags a site has, and how large they are",
    "which sites took part, in which rounds, and how long they took",
    "what was learned from the data before training: choices of settings after looking at results",
    "results on labelled test images, and any metric that a site's policy lets leave without noise",
    "a patient whose images lie in k bags: the guarantee for that person is k times weaker",
    "data that a site gave away by other ways than this software",
)

WEAK = 10.0
"""Above this, an epsilon is commonly held to promise little."""


@dataclass(frozen=True)
class Told:
    """What the words are about."""

    run: str | None
    rounds: int | None
    finished: bool | None
    sites: Sequence[Site]
    worst: Worst | None
    problems: Sequence[Problem]
    settings: Settings | None
    audit: Audit | None
    provenance: Provenance

    def of(self, status: Status) -> list[Site]:
        """The sites of a status."""
        return [site for site in self.sites if site.status is status]


def status_of(sites: Sequence[Site]) -> Status:
    """The worst of the sites'."""
    found = {site.status for site in sites}
    return next(
        (s for s in (Status.NOT_PRIVATE, Status.UNKNOWN) if s in found),
        Status.BOUNDED if sites else Status.UNKNOWN,
    )


def headline(told: Told) -> str:
    """The one sentence on top."""
    exposed, unknown, worst = told.of(Status.NOT_PRIVATE), told.of(Status.UNKNOWN), told.worst
    if exposed:
        return f"No privacy guarantee: {listed([s.name for s in exposed])} sent something without noise."
    if unknown:
        return f"No figure can be given: the records of {listed([s.name for s in unknown])} do not hold up."
    if worst is None:
        return "No privacy guarantee: there is no site to report on."
    within = all(site.cap is not None and (site.epsilon or 0.0) <= site.cap for site in told.sites)
    count = len(told.sites)
    who = worst.site if count == 1 else "Both sites" if count == 2 else f"All {count} sites"
    whose = "its" if count == 1 else "their"
    if within:
        return f"{who} stayed within {whose} own privacy budget."
    return f"{who} spent a bounded amount of privacy."


def summary(told: Told) -> tuple[str, ...]:
    """The plain paragraphs of the first screen."""
    return (_what_was_done(told), *_what_it_means(told))


def cautions(told: Told) -> tuple[str, ...]:
    """True figures that a reader could take for more than they are."""
    found = []
    if told.settings and told.settings.randomness and "insecure" in told.settings.randomness:
        found.append(
            "This was a simulation: its noise came from a seeded generator, which whoever knows the seed can "
            "repeat and subtract. The figures hold for the method, and protect nobody's data."
        )
    if told.worst is not None and told.worst.epsilon > WEAK:
        found.append(
            f"An epsilon above {WEAK:g} is weak: staying within such a budget alone protects little "
            f"({told.worst.site}: {told.worst.epsilon:.4g}, {told.worst.adjacency} {told.worst.unit}, delta "
            f"{told.worst.delta:g}, {told.worst.accountant})."
        )
    for site in told.sites:
        if site.delta is not None and site.delta_limit is not None and site.delta >= site.delta_limit:
            found.append(
                f"{site.name}: delta {site.delta:g} is not below 1 / {site.bags} bags, so the guarantee "
                "would allow one bag to be given away entirely. The run was forced to accept it."
            )
    if told.finished is False:
        found.append(f"The run has not finished: these are the figures up to round {told.rounds}.")
    return tuple(found)


def _what_was_done(told: Told) -> str:
    names = listed([site.name for site in told.sites])
    if told.run is None:
        opening = (
            f"This report covers everything that {names} ever sent, over all runs and all versions of the "
            "data, as the ledger on the site's own disk recorded it before it was sent."
        )
    else:
        count = f"{len(told.sites)} sites" if len(told.sites) > 1 else "one site"
        opening = (
            f"In the run {told.run} ({told.rounds} rounds), {count} trained an image classifier together: "
            f"{names}. No image left a site; model updates and counts of labels did."
        )
    return opening


def _what_it_means(told: Told) -> tuple[str, ...]:
    worst = told.worst
    if worst is None:
        exposed = told.of(Status.NOT_PRIVATE)
        why = " ".join(f"{site.name}: {site.why}" for site in (exposed or told.of(Status.UNKNOWN)))
        tail = (
            "What a model learned without noise can reveal any of the images behind it, and no noise that is "
            "added elsewhere or later takes that back. The federation as a whole has no guarantee."
            if exposed
            else "Find out what happened to the ledger before anything more is sent from that site."
        )
        return (f"{why} {tail}",)
    one = len(told.sites) == 1
    who = worst.site if one else f"the worst site, {worst.site}"
    return (
        "What was sent was limited and mixed with random noise, so that there is a bound on what anybody can "
        f"tell from it about {UNITS[worst.unit]}: whether it was there, or another in its place. The bound "
        f"is epsilon: at {who}, epsilon is {worst.epsilon:.4g} at delta {worst.delta:g} (unit: {worst.unit}; "
        f"adjacency: {worst.adjacency}; accountant: {worst.accountant}), over everything that was ever sent. "
        "Smaller is more private; delta is the chance that the bound fails.",
        f"Put as a bet: somebody who knows everything else, sees all that {worst.site} sent and must say "
        f"which of two bags was used, is right at most {100 * worst.guess_right:.4g} % of the time, where a "
        f"coin is right 50 %. {_judgement(worst.epsilon)}",
    )


def _judgement(epsilon: float) -> str:
    if epsilon <= 1:
        return "By common reading (Ponomareva et al. 2023) an epsilon of at most 1 is a strong guarantee."
    if epsilon <= WEAK:
        return (
            "By common reading (Ponomareva et al. 2023) an epsilon above 1 and up to 10 is a reasonable "
            "guarantee: this bound is for the worst imaginable attacker, and real attacks do worse."
        )
    return (
        "By common reading (Ponomareva et al. 2023) an epsilon above 10 is weak: the bound alone protects "
        "little, and only an audit can say more."
    )


def disclosures(told: Told) -> tuple[Disclosure, ...]:
    """The seventeen, in the order of the rule book."""
    return tuple(
        Disclosure(key=key, title=title, text=tuple(write(told))) for key, title, write in _DISCLOSURES
    )


def _epsilon(told: Told) -> list[str]:
    return [
        "Epsilon and delta of each site, for the unit and adjacency named beside them. The curves with each "
        "site show the same spending read at other deltas; a single pair says less."
    ]


def _unit(told: Told) -> list[str]:
    units = sorted({site.unit for site in told.sites})
    return [
        *(f"The unit is the {unit}: {UNITS[unit]}." for unit in units),
        "An image lies in exactly one bag. A bag's gradient is clipped as a whole, because the loss of a bag "
        "couples its images. A person whose images are in k bags has the k-fold group guarantee.",
    ]


def _adjacency(told: Told) -> list[str]:
    return [
        "Budgets are kept for replace-one: two data sets are neighbours when one unit is replaced by "
        "another. Replacing moves the clipped sum by up to twice the clip norm.",
        "The figures for add/remove (one unit more or less), which many tools print, are smaller for the "
        "same noise and protect less. They stand beside for comparison, by two accountants.",
    ]


def _trust(told: Told) -> list[str]:
    return [
        "Noise is added at each site before anything is sent. The guarantee holds against the server, the "
        "other sites, whoever reads the network, and everybody who gets the model. It does not hold against "
        "somebody inside the site, who has the images themselves.",
        "It assumes that the site runs this software unchanged, and that its random numbers stay secret.",
    ]


def _mechanism(told: Told) -> list[str]:
    clip = told.settings.clip_norm if told.settings else None
    at = f"norm C = {clip:g}" if clip is not None else "the clip norm C of the run (not in these records)"
    return [
        f"Bag-level DP-SGD: the gradient of each drawn bag is clipped to {at}; Gaussian noise of standard "
        "deviation sigma times C is added to the sum; the sum is divided by the expected number of bags q N, "
        "never by the number that was drawn.",
    ]


def _sampling(told: Told) -> list[str]:
    return [
        "Assumed and implemented alike: Poisson sampling. In each step each bag is drawn on its own with "
        "chance q. A step in which no bag was drawn adds noise and counts like the others. No amplification "
        "is claimed from the server's choice of sites.",
    ]


def _accountant(told: Told) -> list[str]:
    packages = told.provenance.packages
    return [
        f"Of record: privacy loss distributions of dp-accounting {packages['dp-accounting']}, rounded "
        "upwards, so that every epsilon is an upper bound. Training and releases are composed by it "
        "together.",
        f"As a second opinion for add/remove: the Renyi accountant of Opacus {packages['opacus']}. It cannot "
        "hold a release of counts, so its figure is of the training steps alone.",
    ]


def _scope(told: Told) -> list[str]:
    ledgers = [site.name for site in told.sites if site.ledger is not None]
    rest = [site.name for site in told.sites if site.ledger is None]
    text = []
    if ledgers:
        text.append(
            f"From the ledger ({listed(ledgers)}): all runs, all data versions, and every round that was "
            "reserved, also those that broke off, were tried again or were never used by the server."
        )
    if rest:
        text.append(
            f"From the last statement that the server received ({listed(rest)}): the site's whole ledger at "
            "that time. A round that broke off later is only in the site's ledger."
        )
    return text


def _released(told: Told) -> list[str]:
    return [
        "In each round the trained parameters of the model. Once per data version, where the site's policy "
        "allows it, counts of labels with noise; the same noisy counts are sent again when asked again.",
    ]


def _not_covered(told: Told) -> list[str]:
    return ["The figures say nothing about:"]


def _generator(told: Told) -> list[str]:
    used = told.settings.randomness if told.settings else None
    if used is None:
        return ["Which generator drew the noise is not in these records."]
    if "insecure" in used:
        return [
            f"{used}: repeatable numbers of a seed, for simulations only. Whoever has the seed can "
            "remove all noise."
        ]
    return [f"{used}: AES-256 in counter mode, with fresh keys from the operating system for every round."]


def _delta(told: Told) -> list[str]:
    return [
        "Delta must stay below one in the number of bags. Without amplification: epsilon had every bag been "
        "in every step, which is what would be left of the claim if the draws were known; closed form for "
        "the Gaussian steps (Balle and Wang 2018), releases added.",
    ]


def _limit(told: Told) -> list[str]:
    refused = sum(len(site.refusals) for site in told.sites)
    happened = (
        f"{refused} request(s) were refused before any training, and cost nothing."
        if refused
        else "No request was refused."
    )
    return [
        "The cap is the site's own, and no server can raise it. A round is reserved in the ledger before it "
        f"starts and counts from then on, finished or not. {happened}",
    ]


def _per_site(told: Told) -> list[str]:
    if told.worst is None:
        return ["There is no figure for the federation, because not every site has one."]
    return [
        f"The federation's figure is that of its worst site, {told.worst.site}: never a mean, because a mean "
        "protects nobody. Each site's figures are below."
    ]


def _provenance(told: Told) -> list[str]:
    return ["Versions are those of the machine that wrote this report."]


def _audit(told: Told) -> list[str]:
    if told.audit is None:
        return ["None. No attack was tried on this run; the figures rest on the mathematics and the tests."]
    audit = told.audit
    return [
        f"An attack on the real training showed that epsilon is at least {audit.lower_bound:.4g}, with "
        f"confidence {100 * audit.confidence:g} %. A correct guarantee lies at or above that."
    ]


def _plain(told: Told) -> list[str]:
    return list(summary(told))


_DISCLOSURES: tuple[tuple[str, str, Callable[[Told], list[str]]], ...] = (
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


def listed(names: Sequence[str], most: int = 6) -> str:
    """``a, b and c``; the rest of a long list is counted."""
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)
