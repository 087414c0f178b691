"""Read and check what ledgers and run folders hold.

A ledger is believed as far as ``client.ledger.check`` finds it intact. A run folder only repeats what its
sites stated, so a statement is compared with the site's ledger wherever that is at hand. The module knows no
accountant and no page.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.ledger.check import verify
from client.ledger.file import LedgerError, reading
from client.ledger.state import LedgerState
from common.config import RunConfig
from common.config_tables import DPConfig
from common.errors import RunError, UserError
from common.privacy.events import Event
from common.run_records import RunSummary, Stated, UpdateTaken
from deploy.report.model import Audit, Loss, Problem, Settings, UnusedReply
from deploy.runs.reading import read_summary, run_events
from server import run_folder

_LEDGER = "ledger.sqlite"


class Statement(BaseModel):
    """Hold the privacy statement of a site, with the fields of ``common.records.PrivacyStatement``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    site: str
    round: int
    unit: str
    adjacency: str
    epsilon: float | None = Field(ge=0)
    epsilon_alone: float | None = Field(None, ge=0)
    delta: float | None = Field(gt=0, lt=1)
    events: tuple[Event, ...]
    budget_left: float | None
    ledger_head: str
    generator: str = ""
    losses: int = Field(0, ge=0)


class _ReleaseStatement(BaseModel):
    """Hold what the server keeps of a site's release, without the counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mechanism: str
    granularity: str
    bags: int
    event: Event | None
    data_version: str = ""


@dataclass
class Evidence:
    """Hold what is known of one site."""

    name: str
    state: LedgerState | None = None
    ledger: Path | None = None
    """The ledger's file; without a ``state`` it cannot be believed."""
    named: bool = False
    """Whether its ledger is itself a source, so that every row is shown."""
    statement: Statement | None = None
    release: _ReleaseStatement | None = None
    stated: dict[int, float] = field(default_factory=dict)
    """Stated epsilon by round of the run."""
    training_bags: int | None = None
    declared_losses: list[Loss] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class RunEvidence:
    """Hold what is known of one run."""

    name: str
    finished: bool
    rounds: int
    settings: Settings
    config_sha256: str
    stopped_early: str | None
    code: Mapping[str, str | None]
    audit: Audit | None


@dataclass
class Collected:
    """Hold what all sources together contain."""

    sites: dict[str, Evidence] = field(default_factory=dict)
    runs: list[RunEvidence] = field(default_factory=list)
    left_out: list[UnusedReply] = field(default_factory=list)


def collect(sources: Sequence[Path]) -> Collected:
    """Read every source.

    Raises:
        UserError: a source is missing, is neither a run nor a ledger, has an unknown schema, or two
            sources speak of one site.
    """
    found = Collected()
    # Runs are read first, because a ledger that is given together with a run completes the run's site.
    for path in sorted(sources, key=lambda path: not (path / "config.toml").is_file()):
        if (path / "config.toml").is_file():
            _read_run(path, found)
        elif path.is_file() or (path / _LEDGER).is_file():
            _read_named_ledger(path if path.is_file() else path / _LEDGER, found)
        else:
            raise UserError(
                f"neither a run folder nor a ledger: {path}\n"
                "Give a run folder (with config.toml), or a site's ledger.sqlite."
            )
    return found


def expected_sites(sources: Sequence[Path]) -> int:
    """Return roughly how many sites the sources contain, from the configurations alone.

    The number only decides whether worker processes are started, so nothing is checked and no error is
    raised.
    """
    number = 0
    for path in sources:
        number += 1
        with suppress(OSError, ValueError, KeyError, TypeError):
            number += int(tomllib.loads((path / "config.toml").read_text())["federation"]["sites"])
    return number


def check_ledgers(found: Collected) -> None:
    """Add every fault of the ledgers, by themselves and against what the sites stated, to the evidence."""
    for evidence in found.sites.values():
        if evidence.ledger is None:
            continue
        # The stated head must be a row of the ledger: a ledger that was rolled back, or replaced, is
        # consistent in itself and lacks that row.
        head = evidence.statement.ledger_head if evidence.statement else ""
        for problem in verify(evidence.ledger, head=head or None):
            evidence.problems.append(Problem(site=evidence.name, row=problem.row, reason=problem.reason))


def _read_named_ledger(path: Path, found: Collected) -> None:
    state = _read_state(path)
    name = _name_of(path, state)
    evidence = found.sites.setdefault(name, Evidence(name))
    # Two ledgers of one site can be an old copy and the present one, of which the old one lacks spending.
    if evidence.state is not None and (state is None or evidence.state.head != state.head):
        raise UserError(
            f"site {name!r} is in two sources, with different ledgers: {path}\n"
            "A site's ledger holds all its runs: give the newest one alone."
        )
    if evidence.state is None:
        evidence.state, evidence.ledger = state, path
    evidence.named = True


def _read_state(path: Path) -> LedgerState | None:
    """Return the ledger's content, or None where it is damaged or was tampered with."""
    # A file that is no ledger, or is of another release, is the user's mistake and no sign of tampering.
    # It raises here and is not taken for a damaged ledger.
    with reading(path):
        pass
    try:
        return LedgerState.read(path)
    except LedgerError:
        return None


def _name_of(path: Path, state: LedgerState | None) -> str:
    """Return the name of the site that a ledger belongs to, or of its folder where it cannot be read."""
    return state.site if state else path.resolve().parent.name or path.name


def _read_run(path: Path, found: Collected) -> None:
    dp = RunConfig.from_toml(path / "config.toml").dp
    summary, finished = _summary(path)
    try:
        # The statements come from sites, so their form is checked before any figure is taken from them.
        statements = {site: Statement.model_validate(s) for site, s in summary.statements.items()}
        releases = {site: _release(release) for site, release in summary.releases.items()}
    except (ValidationError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the statements of the run {path} are not of a form that this release reads: {error}"
        ) from error
    found.left_out += [
        UnusedReply(site=item.site, round=item.round, phase=item.phase, reason=item.reason)
        for item in summary.left_out
    ]
    # The epsilons of two runs must not be added or compared here: only the ledger composes what both spent.
    for name in sorted({*statements, *releases, *summary.per_site}):
        if name in found.sites:
            raise UserError(
                f"site {name!r} is in two of the runs: what it spent in both is only in its ledger.\n"
                "Give one run, or the site's ledger.sqlite."
            )
        found.sites[name] = Evidence(name, statement=statements.get(name), release=releases.get(name))
    for loss in summary.losses:
        declared = Loss(round=loss.round, epsilon=loss.epsilon, delta=loss.delta)
        found.sites[loss.site].declared_losses.append(declared)
    for event in run_events(path):
        match event:
            case Stated(site=site, epsilon=float(epsilon)) if site in found.sites:
                found.sites[site].stated[event.round] = epsilon
            case UpdateTaken(site=site, bags=int(bags)) if site in found.sites:
                found.sites[site].training_bags = bags
    _read_run_ledgers(path, found)
    found.runs.append(
        RunEvidence(
            name=path.resolve().name,
            finished=finished,
            rounds=summary.rounds,
            settings=_settings(dp),
            config_sha256=hashlib.sha256((path / "config.toml").read_bytes()).hexdigest(),
            stopped_early=summary.stopped_early,
            code=summary.code,
            audit=_audit(path / "audit.json"),
        )
    )


def _read_run_ledgers(path: Path, found: Collected) -> None:
    """Read the ledgers that simulated sites keep below the run folder."""
    for file in sorted((path / "sites").glob(f"*/{_LEDGER}")):
        state = _read_state(file)
        name = _name_of(file, state)
        evidence = found.sites.setdefault(name, Evidence(name))
        evidence.state, evidence.ledger = state, file


def _summary(path: Path) -> tuple[RunSummary, bool]:
    """Return the summary of the finished run, or one of the rounds up to its newest checkpoint.

    The second value tells whether the run has finished.
    """
    finished = (path / "summary.json").is_file()
    if finished:
        summary = read_summary(path)
        if {"statements", "releases"} <= summary.model_fields_set:
            return summary, True
    try:
        newest = run_folder.newest_checkpoint(path / "checkpoints")
    except RunError as error:
        raise UserError(str(error)) from error
    if newest is None:
        raise UserError(
            f"the run has no finished round, so no site has stated anything yet: {path}\n"
            f"Go on with it: fedbags simulate --out {path} --resume"
        )
    state = newest[0]
    return RunSummary(
        rounds=state.round,
        stopped_early=state.stopped_early or None,
        statements={site: record.model_dump(mode="json") for site, record in state.statements.items()},
        releases={site: record.model_dump(mode="json") for site, record in state.releases.items()},
        losses=state.losses,
        left_out=state.left_out,
    ), finished


def _release(data: Mapping[str, Any]) -> _ReleaseStatement:
    kept = {key: data[key] for key in ("mechanism", "granularity", "bags")}
    version = data.get("data_version", "")
    return _ReleaseStatement.model_validate({**kept, "event": data["event"] or None, "data_version": version})


def _settings(dp: DPConfig) -> Settings:
    if not dp.epsilon:
        # The other keys meant nothing to a run without privacy.
        absent = dict.fromkeys(Settings.model_fields)
        return Settings.model_validate({**absent, "forced_delta": dp.force_delta})
    return Settings(
        target_epsilon=dp.epsilon,
        delta=dp.delta,
        clip_norm=dp.clip_norm,
        expected_bags=dp.expected_bags,
        steps_per_round=dp.steps_per_round,
        release_scale=dp.release_scale,
        metrics_scale=dp.metrics_scale or None,
        forced_delta=dp.force_delta,
    )


def _audit(path: Path) -> Audit | None:
    if not path.is_file():
        return None
    data = _json(path)
    try:
        return Audit(
            lower_bound=data.pop("lower_bound"),
            confidence=data.pop("confidence"),
            details={
                str(key): value if isinstance(value, str) else json.dumps(value)
                for key, value in data.items()
            },
        )
    except (KeyError, ValidationError) as error:
        raise UserError(f"{path} is no audit result: lower_bound and confidence are expected") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is damaged: a JSON object is expected")
    return data
