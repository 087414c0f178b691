"""Read what a site's ledger state holds as the charges, releases, evaluations and rows of a report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.ledger.file import Entry, Kind
from client.ledger.state import LedgerState
from common.privacy.events import DiscreteLaplace, PoissonGaussian, event_from_dict
from deploy.report.model import Looks, Refusal, Release, Row, Training


@dataclass(frozen=True)
class Charge:
    """Describe one event that a row of the ledger charged."""

    event: PoissonGaussian | DiscreteLaplace
    run: str
    data_version: str
    confirmed: bool
    row: int
    is_evaluation: bool = False
    """Whether it is one noised figure of held-back bags."""


def charges(state: LedgerState) -> list[Charge]:
    """Return every charge in the order of the rows, with the events of ``state.events``."""
    # A row may charge several events, which state.events lists one by one.
    rows = [entry for entry in state.entries for _ in range(_events_of(entry))]
    return [
        Charge(
            event=event,
            run=str(entry.body.get("run_id", "")),
            data_version=state.identifiers.get(str(entry.body.get("data_version", "")), ""),
            confirmed=entry.seq not in state.open_reservations,
            row=entry.seq,
            is_evaluation=entry.kind == Kind.RESERVED and isinstance(event, DiscreteLaplace),
        )
        for entry, event in zip(rows, state.events, strict=True)
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
    groups: dict[tuple[str, str, float, float, int], list[Charge]] = {}
    for charge in spent:
        if isinstance(event := charge.event, PoissonGaussian):
            kind = (event.sample_rate, event.noise_multiplier, event.shares)
            groups.setdefault((charge.run, charge.data_version, *kind), []).append(charge)
    return tuple(
        Training(
            run=run,
            data_version=version,
            sample_rate=rate,
            noise_multiplier=sigma,
            shares=shares,
            steps=sum(c.event.steps for c in group if isinstance(c.event, PoissonGaussian)),
            rounds=len(group),
            unconfirmed_rounds=sum(not c.confirmed for c in group),
        )
        for (run, version, rate, sigma, shares), group in groups.items()
    )


def looks_of(spent: Iterable[Charge]) -> tuple[Looks, ...]:
    """Return the evaluations on held-back bags, with equal ones of one run and data version merged."""
    groups: dict[tuple[str, str, float], list[Charge]] = {}
    for charge in spent:
        if charge.is_evaluation and isinstance(charge.event, DiscreteLaplace):
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


def releases_of(state: LedgerState) -> tuple[Release, ...]:
    """Return every release, without its counts."""
    return tuple(
        Release(
            data_version=state.identifiers.get(version, ""),
            mechanism="discrete Laplace",
            granularity=release.granularity.value,
            unit=release.unit,
            scale=release.scale,
            noise_scale=release.noise_scale,
            epsilon_alone=2 / release.event.scale,
        )
        for version, release in state.releases.items()
    )


def refusals_of(state: LedgerState) -> tuple[Refusal, ...]:
    """Return the requests that the cap did not allow."""
    return tuple(
        Refusal(
            row=entry.seq,
            run=str(entry.body.get("run_id", "")),
            round=int(entry.body.get("round", 0)),
            time=str(entry.body.get("time", "")),
            asked=_name_event(entry.body),
        )
        for entry in state.entries
        if entry.kind == Kind.REFUSED
    )


def rows_of(state: LedgerState) -> tuple[Row, ...]:
    """Return every row of the ledger."""
    return tuple(_row(entry, state) for entry in state.entries)


def _name_event(body: Mapping[str, Any]) -> str:
    """Return the event of a reserved or refused row in words."""
    event = event_from_dict(body["event"])
    if isinstance(event, DiscreteLaplace):
        # An evaluation on held-back bags has a round, and a release of counts has none.
        what = (
            f"evaluation on held-back bags, {body.get('copies', 1)} figure(s)"
            if body.get("round")
            else "counts"
        )
        return f"{what}, discrete Laplace, scale {event.scale:g}"
    shared = f" of {event.shares} sites together" if event.shares > 1 else ""
    return f"{event.steps} steps, q {event.sample_rate:.4g}, sigma {event.noise_multiplier:.4g}{shared}"


def events_up_to(state: LedgerState, head: str) -> Sequence[PoissonGaussian | DiscreteLaplace] | None:
    """Return the merged events when ``head`` was the newest row, or None where no row has that hash."""
    for number, entry in enumerate(state.entries, start=1):
        if entry.hash == head:
            then = state if number == len(state.entries) else type(state).of(state.entries[:number])
            return then.merged
    return None


def _row(entry: Entry, state: LedgerState) -> Row:
    body = entry.body
    open_ = entry.seq in state.open_reservations
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
            return _name_event(body)
