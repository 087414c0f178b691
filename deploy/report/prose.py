"""Write the report's headline, its plain paragraphs, and warnings about figures that could be misread.

Every number here is taken from the figures that stand in the same report. The paragraphs follow TensorFlow
Privacy's compute_dp_sgd_privacy_statement: what is protected, then the figure, then what it leaves open.

Translate a ledger's rows into the parts of the report, without computing any epsilon.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from client.ledger.file import Entry, Kind
from common.privacy.events import DiscreteLaplace, PoissonGaussian, Unit, event_from_dict
from deploy.report.model import (
    Audit,
    GeneratorKind,
    Looks,
    Problem,
    Provenance,
    Refusal,
    Release,
    Row,
    Settings,
    Site,
    Status,
    Training,
    Worst,
)

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

NOT_SECURE = (GeneratorKind.INSECURE, GeneratorKind.UNKNOWN)

STRONG, WEAK = 1.0, 10.0
"""Up to the first, an epsilon is commonly held to be strong; above the second, to promise little."""
NEARLY_SURE = 0.95
"""From this chance of being right on, the attacker of the bet is as good as certain."""


@dataclass(frozen=True)
class Told:
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


def headline(told: Told) -> str:
    """Return the one sentence at the top of the report."""
    exposed, unknown, worst = told.of(Status.NOT_PRIVATE), told.of(Status.UNKNOWN), told.worst
    if exposed:
        return f"No privacy guarantee: {listed([s.name for s in exposed])} sent something without noise."
    if unknown:
        return f"No figure can be given: the records of {listed([s.name for s in unknown])} do not hold up."
    if worst is None:
        return "No privacy guarantee: there is no site to report on."
    # Without a known cap it is unknown whether a site kept within its budget.
    within = all(site.cap is not None and (site.epsilon or 0.0) <= site.cap for site in told.sites)
    count = len(told.sites)
    who = worst.site if count == 1 else "Both sites" if count == 2 else f"All {count} sites"
    whose = "its" if count == 1 else "their"
    if within:
        return f"{who} stayed within {whose} own privacy budget."
    return f"{who} spent a bounded amount of privacy."


def summary(told: Told) -> tuple[str, ...]:
    """Return the plain paragraphs of the first screen."""
    return (_what_was_done(told), *_what_it_means(told))


def cautions(told: Told) -> tuple[str, ...]:
    """Return warnings about true figures that a reader could take for more than they are."""
    found = []
    seeded, untold = ([s.name for s in told.sites if s.generator is kind] for kind in NOT_SECURE)
    if seeded:
        found.append(
            f"INSECURE random generator at {listed(seeded)}: this was a simulation, and its noise came from "
            "a seed. Whoever knows the seed can repeat the noise and subtract it. The figures hold for the "
            "method, and protect nobody's data."
        )
    if untold:
        found.append(
            f"The records of {listed(untold)} do not say which generator drew the noise. Whoever can predict "
            "noise can subtract it, so the figures promise nothing until that is known."
        )
    if told.worst is not None and told.worst.epsilon > WEAK:
        found.append(
            f"An epsilon above {WEAK:g} is weak: staying within such a budget alone protects little "
            f"({told.worst.site}: {figure(told.worst.epsilon)}, {told.worst.adjacency} {told.worst.unit}, "
            f"delta {told.worst.delta:g}, {told.worst.accountant})."
        )
    for site in told.sites:
        if site.delta is not None and site.delta_limit is not None and site.delta >= site.delta_limit:
            found.append(
                f"{site.name}: delta {site.delta:g} is not below 1 / {site.bags} bags, so the guarantee "
                "would allow one bag to be given away entirely. The run was forced to accept it."
            )
    if told.stopped_early:
        found.append(
            f"The run ended early, after round {told.rounds}: {told.stopped_early}. What the refused round "
            "would have cost was not spent."
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
        f"is epsilon: at {who}, epsilon is {figure(worst.epsilon)} at delta {worst.delta:g} (unit: "
        f"{worst.unit}; adjacency: {worst.adjacency}; accountant: {worst.accountant}), over everything that "
        "was ever sent. Smaller is more private; delta is the chance that the bound fails.",
        f"Put as a bet: somebody who knows everything else, sees all that {worst.site} sent and must say "
        f"which of two bags was used, is right at most {100 * worst.guess_right:.4g} % of the time, where a "
        f"coin is right 50 %. {judgement(worst)}",
    )


def judgement(worst: Worst) -> str:
    """Return where an epsilon stands on the usual scale, and what that means for an attacker."""
    scale = (
        "On the scale that is usually read (Ponomareva et al. 2023: up to 1 strong, up to "
        f"{WEAK:g} what private training commonly reaches, above that weak)"
    )
    if worst.epsilon <= STRONG:
        return f"{scale} this is strong: even such an attacker does little better than the coin."
    if worst.epsilon > WEAK:
        return f"{scale} this is weak: the bound alone protects little, and only an audit can say more."
    if worst.guess_right < NEARLY_SURE:
        return f"{scale} this is in the middle: such an attacker has an advantage, and stays in doubt."
    return (
        f"{scale} this is in the middle, and the bet says what that means here: the bound does not hold off "
        "an attacker who knows everything else. What protects a bag then is that real attackers know "
        "much less; how much they find out is not bounded by this figure, and an audit measures it."
    )


def figure(epsilon: float) -> str:
    """Return an epsilon for a sentence, with four digits and no more than thousandths."""
    return "less than 0.001" if 0 < epsilon < 1e-3 else f"{epsilon:.4g}"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return the names as ``a, b and c``, with the rest of a long list counted."""
    shown = list(names[:most])
    if len(names) > most:
        return f"{', '.join(shown)} and {len(names) - most} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


if TYPE_CHECKING:  # see collect.py
    from client.ledger.book import Book


@dataclass(frozen=True)
class Charge:
    """Describe one event that a row of the ledger charged."""

    event: PoissonGaussian | DiscreteLaplace
    run: str
    data_version: str
    confirmed: bool
    row: int
    is_look: bool = False
    """Whether it is one noised figure of held-back bags."""


def charges(book: "Book") -> list[Charge]:
    """Return every charge in the order of the rows, with the events of ``book.events``."""
    # A row may charge several events, which book.events lists one by one.
    rows = [entry for entry in book.entries for _ in range(_events_of(entry))]
    return [
        Charge(
            event=event,
            run=str(entry.body.get("run_id", "")),
            data_version=book.identifiers.get(str(entry.body.get("data_version", "")), ""),
            confirmed=entry.seq not in book.open_reservations,
            row=entry.seq,
            is_look=entry.kind == Kind.RESERVED and isinstance(event, DiscreteLaplace),
        )
        for entry, event in zip(rows, book.events, strict=True)
    ]


def _events_of(entry: Entry) -> int:
    """Return how many events a row charges."""
    match Kind(entry.kind):
        case Kind.RESERVED | Kind.RELEASED:
            return int(entry.body.get("copies", 1))
        case Kind.LOST:
            return sum(number for _, number in entry.body["events"])
        case _:
            return 0


def training_of(spent: Iterable[Charge]) -> tuple[Training, ...]:
    """Return the training steps, with equal ones of one run and data version merged."""
    groups: dict[tuple[str, str, float, float], list[Charge]] = {}
    for charge in spent:
        if isinstance(charge.event, PoissonGaussian):
            rate, sigma = charge.event.sample_rate, charge.event.noise_multiplier
            groups.setdefault((charge.run, charge.data_version, rate, sigma), []).append(charge)
    return tuple(
        Training(
            run=run,
            data_version=version,
            sample_rate=rate,
            noise_multiplier=sigma,
            steps=sum(c.event.steps for c in group if isinstance(c.event, PoissonGaussian)),
            rounds=len(group),
            unconfirmed_rounds=sum(not c.confirmed for c in group),
        )
        for (run, version, rate, sigma), group in groups.items()
    )


def looks_of(spent: Iterable[Charge]) -> tuple[Looks, ...]:
    """Return the evaluations on held-back bags, with equal ones of one run and data version merged."""
    groups: dict[tuple[str, str, float], list[Charge]] = {}
    for charge in spent:
        if charge.is_look and isinstance(charge.event, DiscreteLaplace):
            groups.setdefault((charge.run, charge.data_version, charge.event.scale), []).append(charge)
    return tuple(
        Looks(
            run=run,
            data_version=version,
            scale=scale,
            figures=len(group),
            looks=len({c.row for c in group}),
            unconfirmed_looks=len({c.row for c in group if not c.confirmed}),
            # A figure is charged as twice what it costs, which saves the accountant another kind of event.
            epsilon_alone=len(group) * 2 / scale,
        )
        for (run, version, scale), group in groups.items()
    )


def releases_of(book: "Book") -> tuple[Release, ...]:
    """Return every release, without its counts."""
    return tuple(
        Release(
            data_version=book.identifiers.get(version, ""),
            mechanism="discrete Laplace",
            granularity=release.granularity.value,
            unit=release.unit.value,
            scale=release.scale,
            noise_scale=release.noise_scale,
            epsilon_alone=2 / release.event(book.unit).scale,
        )
        for version, release in book.releases.items()
    )


def refusals_of(book: "Book") -> tuple[Refusal, ...]:
    """Return the requests that the cap did not allow."""
    return tuple(
        Refusal(
            row=entry.seq,
            run=str(entry.body.get("run_id", "")),
            round=int(entry.body.get("round", 0)),
            time=str(entry.body.get("time", "")),
            asked=name_event(entry.body),
        )
        for entry in book.entries
        if entry.kind == Kind.REFUSED
    )


def rows_of(book: "Book") -> tuple[Row, ...]:
    """Return every row of the ledger."""
    return tuple(_row(entry, book) for entry in book.entries)


def name_event(body: Mapping[str, Any]) -> str:
    """Return the event of a reserved or refused row in words."""
    event = event_from_dict(body["event"])
    if isinstance(event, DiscreteLaplace):
        # An evaluation on held-back bags has a round, and a release of counts has none.
        what = f"look at held-back bags, {body.get('copies', 1)} figure(s)" if body.get("round") else "counts"
        return f"{what}, discrete Laplace, scale {event.scale:g}"
    return f"{event.steps} steps, q {event.sample_rate:.4g}, sigma {event.noise_multiplier:.4g}"


def events_up_to(book: "Book", head: str, unit: Unit) -> Sequence[PoissonGaussian | DiscreteLaplace] | None:
    """Return the merged events when ``head`` was the newest row, or None where no row has that hash."""
    for number, entry in enumerate(book.entries, start=1):
        if entry.hash == head:
            then = book if number == len(book.entries) else type(book).of(book.entries[:number])
            return then.events_for(unit)
    return None


def _row(entry: Entry, book: "Book") -> Row:
    body = entry.body
    open_ = entry.seq in book.open_reservations
    return Row(
        row=entry.seq,
        kind="reserved, not confirmed" if open_ else entry.kind,
        run=str(body.get("run_id", "")),
        round=body.get("round"),
        time=str(body.get("time", "")),
        what=_what(entry.kind, body),
    )


def _what(kind: str, body: Mapping[str, Any]) -> str:
    match Kind(kind):
        case Kind.OPENED:
            return f"cap epsilon {body['cap_epsilon']:g} at delta {body['cap_delta']:g}"
        case Kind.ACCEPTED:
            name = str(body.get("identifier", ""))[:12]
            return f"data version {name} accepted by the site's owner" if name else "a data version accepted"
        case Kind.LOST:
            return "rows of the ledger were lost, and the site's owner accepted that; what is known counts on"
        case Kind.CARRIED:
            return "what all rows so far come to"
        case Kind.CONFIRMED:
            return f"round of row {body['reservation']} finished"
        case Kind.RELEASED:
            release = body["release"]
            scale = f"scale {release['scale']:g} per {release['unit']}"
            return f"{release['granularity']} counts, discrete Laplace, {scale}"
        case Kind.RESERVED | Kind.REFUSED:
            return name_event(body)
