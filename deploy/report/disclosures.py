"""Write the texts of the seventeen things that a rigorous privacy report discloses.

The page adds their tables. Every number here is taken from the figures that stand in the same report.
"""

from collections.abc import Callable

from deploy.report.model import Disclosure
from deploy.report.prose import UNITS, Told, listed, summary


def disclosures(told: Told) -> tuple[Disclosure, ...]:
    """Return the seventeen disclosures, in the order in which the page shows them."""
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
    lost = [site.name for site in told.sites if site.losses]
    if lost:
        text.append(
            f"Rows of the ledger were lost, and the site's owner accepted that ({listed(lost)}): what the "
            "site's second record said of them counts here; what happened beside that record is not known."
        )
    return text


def _released(told: Told) -> list[str]:
    looked = [site.name for site in told.sites if site.looks]
    return [
        "In each round the trained parameters of the model. Once per data version, where the site's policy "
        "allows it, counts of labels with noise; the same noisy counts are sent again when asked again.",
        *(
            [
                f"Noised figures of held-back bags ({listed(looked)}): sums of distances between predicted "
                "and true proportions, one a level and look, paid from the same budget. Each is charged as "
                "twice what it costs, so that the accountant needs no further kind of event."
            ]
            if looked
            else []
        ),
    ]


def _not_covered(told: Told) -> list[str]:
    return ["The figures say nothing about:"]


def _generator(told: Told) -> list[str]:
    names = list(dict.fromkeys(name for site in told.sites for name in site.generators))
    if not names:
        return ["No noise was drawn, so no generator was used."]
    return [
        "What sampling and noise were drawn from, as each site recorded it with every charge in its ledger.",
        *(f"{name} ({listed([s.name for s in told.sites if name in s.generators])})." for name in names),
    ]


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
    return [
        "The code is what the run's server recorded when the run ended. A data version is a hash over a "
        "site's tables and the sizes and times of its images. The packages are those of the machine that "
        "wrote this report."
    ]


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
