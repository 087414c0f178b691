"""Enrol connected nodes as sites, follow which are connected, and wait for missing ones up to a limit.

A node is a site once its proportion release is accepted. A site that is silent (no reply in time, a lost
node, a killed process) may come back, so it is waited for. A site that answered, if only with a refusal,
would answer the same again: when those alone keep the run below its quorum it ends at once. This module
knows no model and no update.
"""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.config_tables import FederationConfig, Strategy
from common.errors import RunError
from common.hierarchy import Hierarchy
from common.records import MessageError, ProportionRelease, SiteError
from common.run_records import ENROL, Cause, Joined, Left, LeftOut, SiteLeftOut, Waiting
from server.exchange import Phase, Reply, ask, cause_of, read_release
from server.run_folder import RunFolder, ServerState

log = logging.getLogger("fedbags.server")

_PROPORTIONS = "query.proportions"
ATTEMPTS = 3
"""Times that a silent node is asked the same thing. Each may cost privacy budget at the site."""

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 10.0


@dataclass
class _Roster:
    """Hold the sites of a run by name, the node that speaks for each, and the nodes that are no site."""

    hierarchy: Hierarchy | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the key of each such node, as Flower knows it; empty where nodes have none."""
    releases: dict[str, ProportionRelease] = field(default_factory=dict)
    """Of every site that ever took part, those that left included."""
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Nodes that answered, but not so that they can take part: the site (or node), and why."""
    not_allowed: set[int] = field(default_factory=set)
    """Nodes whose name is not on the allow-list."""
    duplicates: dict[int, str] = field(default_factory=dict)
    """Nodes that gave the name of a site that is there, with that name."""
    expelled: dict[str, str] = field(default_factory=dict)
    """By site that is out for the rest of the run, under whatever node it comes back: why."""
    silent: Counter[int] = field(default_factory=Counter)
    """How often a node gave no answer."""

    def names(self) -> list[str]:
        """Return the site names in the order in which their updates are added up."""
        return sorted(self.nodes)

    def leave(self, site: str, reason: str) -> None:
        """Take a site out for as long as its node stays connected.

        Its release stays known.
        """
        self.refused[self.nodes.pop(site)] = (site, reason)

    def expel(self, site: str, reason: str) -> None:
        """Take a site out for the rest of the run."""
        self.expelled.setdefault(site, reason)
        if site in self.nodes:
            self.leave(site, reason)

    def drop_disconnected(self, connected: Collection[int]) -> list[str]:
        """Forget the nodes that are gone.

        A node that comes back, under this id or another, is asked afresh.

        Returns:
            The names of the sites that left with their nodes.
        """
        gone = [site for site in self.names() if self.nodes[site] not in connected]
        for site in gone:
            del self.nodes[site]
        self.refused = {node: why for node, why in self.refused.items() if node in connected}
        self.not_allowed &= set(connected)
        # A node with a duplicate name may ask again once the name is free: it may be the site itself, back
        # under another node id.
        self.duplicates = {
            n: site for n, site in self.duplicates.items() if n in connected and site in self.nodes
        }
        self.silent = Counter({node: times for node, times in self.silent.items() if node in connected})
        return gone

    def newcomers(self, connected: Collection[int]) -> list[int]:
        """Return the connected nodes that are still to be asked for their release."""
        known = {*self.nodes.values(), *self.refused, *self.not_allowed, *self.duplicates}
        return sorted(n for n in connected if n not in known and self.silent[n] < ATTEMPTS)


def _enrol(
    roster: _Roster, replies: Iterable[Reply], config: FederationConfig, report: Callable[[LeftOut], None]
) -> list[str]:
    """Add the nodes whose releases are accepted to the roster.

    A site is left out when it does not answer, is not on the allow-list, takes the name of another node, or
    has another label tree than most sites.

    Args:
        roster: of the run.
        replies: one for each node that was asked for its release.
        config: of the federation.
        report: called with everything that is left out.

    Returns:
        The names added.
    """

    def leave_out(site: str, cause: Cause, reason: str) -> None:
        report(LeftOut(site=site, phase=ENROL, cause=cause, reason=reason))

    allowed = _allowed_names(config)
    offered: dict[str, tuple[int, ProportionRelease, Hierarchy]] = {}
    for reply in replies:
        label = f"node {reply.node}"
        found, cause, fault = _read(reply)
        if reply.content is None and not is_answer(reply.code):
            # Silence may mend, so the node is asked again, a few times only, since each question may cost
            # budget.
            roster.silent[reply.node] += 1
            leave_out(label, cause, fault)
            continue
        if found is None:
            roster.refused[reply.node] = (label, fault)
            leave_out(label, cause, fault)
            continue
        release, tree = found
        if config.strategy == Strategy.FEDPALS and not release.leaf_counts:
            reason = "releases no label counts by policy, and strategy fedpals needs them"
            roster.refused[reply.node] = (release.site, reason)
            leave_out(release.site, Cause.NOT_ADMITTED, reason)
        elif release.site in roster.expelled:
            reason = f"out for the rest of the run: {roster.expelled[release.site]}"
            roster.refused[reply.node] = (release.site, reason)
            leave_out(release.site, Cause.NOT_ADMITTED, reason)
        elif allowed and release.site not in allowed:
            roster.not_allowed.add(reply.node)
            leave_out(release.site, Cause.NOT_ADMITTED, "not on the allow-list (federation.allow)")
        # The name belongs to the node that gave it first. Otherwise a second node could replace a site by
        # giving its name.
        elif release.site in roster.nodes or release.site in offered:
            roster.duplicates[reply.node] = release.site
            leave_out(release.site, Cause.NOT_ADMITTED, f"{label} uses the name of another site")
        else:
            offered[release.site] = (reply.node, release, tree)
    if roster.hierarchy is None and offered:
        roster.hierarchy = _most_common([tree for _, (_, _, tree) in sorted(offered.items())])
    added = []
    # In the order of names, so that the result does not depend on which node answered first.
    for site, (node, release, tree) in sorted(offered.items()):
        if tree != roster.hierarchy:
            reason = "its label tree differs from the federation's"
            roster.refused[node] = (site, reason)
            leave_out(site, Cause.NOT_ADMITTED, reason)
            continue
        roster.nodes[site] = node
        roster.releases[site] = release
        added.append(site)
    return added


def is_answer(code: int) -> bool:
    """Return True if an error came from the site itself, which would answer the same again.

    Everything else (no reply in time, a lost node, a killed process) may mend by itself.
    """
    return code >= min(SiteError)


def _allowed_names(config: FederationConfig) -> set[str]:
    """Return the names of ``federation.allow``.

    An empty set allows everybody.
    """
    return {name.strip() for name in config.allow.split(",") if name.strip()}


def _majority_tree(releases: list[ProportionRelease]) -> Hierarchy:
    """Return the label tree of most sites, and on a tie the first by site name."""
    return _most_common([release.tree() for release in sorted(releases, key=lambda release: release.site)])


def _most_common(trees: list[Hierarchy]) -> Hierarchy:
    """Return the tree that occurs most often, and on a tie the first."""
    return Counter(trees).most_common(1)[0][0]


def _read(reply: Reply) -> tuple[tuple[ProportionRelease, Hierarchy] | None, Cause, str]:
    """Return a node's release and its label tree, or the cause and the reason why there is none."""
    if reply.content is None:
        return None, reply.cause, reply.failure
    try:
        return read_release(reply.content), Cause.OTHER, ""
    except MessageError as error:
        return None, cause_of(error), str(error)


class QuorumMissed(RunError):  # noqa: N818 (an outcome of waiting, which a run may end well after)
    """Report that too few sites are there for a round and waiting longer cannot help."""


class Quorum:
    """Keep the roster of a run up to date with the nodes that are connected, and report what is left out."""

    def __init__(self, grid: Grid, config: FederationConfig, folder: RunFolder, state: ServerState) -> None:
        self.grid, self.config, self.folder, self.state = grid, config, folder, state
        self.roster = _Roster(releases=state.releases, expelled=state.expelled)
        if state.releases:
            self.roster.hierarchy = _majority_tree(list(state.releases.values()))

    def wait_for_all(self) -> None:
        """Give ``federation.sites`` nodes until the enrolment deadline to connect.

        Fewer are no error yet.
        """
        end = time.monotonic() + self.config.enrol_deadline
        announced = -1
        while (connected := len(list(self.grid.get_node_ids()))) < self.config.sites:
            if time.monotonic() >= end:
                return
            if connected != announced:
                missing = self.config.sites - connected
                self.waiting(self.state.round + 1, connected, self.expected_names(), missing)
                announced = connected
            time.sleep(0.5)

    def refresh(self, round: int) -> list[str]:
        """Take out the sites whose nodes are gone and enrol the nodes that are new.

        Returns:
            The names that were added.
        """
        connected = {node.node_id: _fingerprint(node.public_key) for node in self.grid.get_nodes()}
        for site in self.roster.drop_disconnected(connected):
            self.left(round, site)
        fresh = self.roster.newcomers(connected)
        if not fresh:
            return []
        known = set(self.roster.releases)
        requests = {node: RecordDict() for node in fresh}
        phase = Phase(_PROPORTIONS, round, self.config.enrol_deadline)
        replies = ask(self.grid, requests, phase, self.folder.record)
        added = _enrol(self.roster, replies, self.config, self.report)
        for site in added:
            self.roster.keys[site] = connected[self.roster.nodes[site]]
            self.folder.record(Joined(round=round, site=site, again=site in known))
            log.info("round %(round)d: %(site)s takes part", {"round": round, "site": site})
        return added

    def expected_names(self) -> list[str]:
        """Return the names that may be waited for.

        They are the allow-list, else every site that took part before, without those that were expelled.
        """
        names = _allowed_names(self.config) or self.roster.releases.keys()
        return sorted(names - self.roster.expelled.keys())

    def report(self, left_out: LeftOut) -> None:
        """Write down that something of a site was not used in this round."""
        left_out = left_out.model_copy(update={"round": self.state.round + 1})
        self.state.left_out.append(left_out)
        self.folder.record(SiteLeftOut(**left_out.model_dump()))
        log.warning("round %(round)d: %(site)s left out of %(phase)s: %(reason)s", left_out.model_dump())

    def left(self, round: int, site: str) -> None:
        """Write down that a site's node is gone because it ended, was cut off, or was revoked."""
        reason = "its node is not connected any more"
        left_out = LeftOut(round=round, site=site, phase="connection", cause=Cause.LOST, reason=reason)
        self.state.left_out.append(left_out)
        self.folder.record(Left(round=round, site=site, reason=reason))
        log.warning("round %(round)d: %(site)s left", {"round": round, "site": site})

    def waiting(self, round: int, present: int, names: list[str], missing: int) -> None:
        """Write down that the run waits for ``missing`` more sites, probably some of ``names``."""
        quorum = self.config.quorum
        self.folder.record(Waiting(round=round, sites=names, present=present, missing=missing, quorum=quorum))
        log.warning(
            "round %(round)d: waiting for %(missing)d more site(s), of %(sites)s",
            {"round": round, "missing": missing, "sites": names},
        )


def _fingerprint(public_key: bytes) -> str:
    """Return a short name of a node's public key (PEM, as Flower keeps it), empty without a key."""
    return hashlib.sha256(public_key).hexdigest()[:16] if public_key else ""


class RoundCohort:
    """Track the sites of one round as done, refused, or still to be asked."""

    def __init__(self, sites: Quorum, round: int) -> None:
        self.round = round
        # A site whose update is in is not asked again when the round has to wait for others: its work, and
        # the budget that it spent on it, are kept.
        self.done: set[str] = set()
        self._quorum = sites
        self._refused: dict[str, str] = {}
        self._silent: dict[str, str] = {}
        self._asked: Counter[str] = Counter()
        self._short_since: float | None = None
        self._pause = _FIRST_PAUSE
        self._announced: list[str] | None = None

    def failed(self, site: str, reason: str, *, final: bool) -> None:
        """Note that a site that was asked gave nothing.

        ``final`` marks a site that would do the same again.
        """
        # Asking again may charge the site's ledger again, even if only the reply was lost.
        if not final and self._asked[site] >= ATTEMPTS:
            final, reason = True, f"asked {ATTEMPTS} times: {reason}"
        (self._refused if final else self._silent)[site] = reason

    def sites(self) -> list[str]:
        """Return the sites to ask now, as soon as they and those that are done make the quorum.

        The first call returns every site that is there; a further one means that too few of them gave a
        good update, and returns those that may yet give one.

        Raises:
            RunError: too few after ``federation.patience`` seconds, or waiting cannot help.
        """
        if self._asked:
            self._wait()
        while True:
            for site in self._quorum.refresh(self.round):
                # A site that has used its attempts stays out of this round even after a restart, for the
                # same reason.
                if self._asked[site] < ATTEMPTS:
                    self._refused.pop(site, None)  # a site that was started again may have been mended
            ready = self._ready()
            if len(self.done) + len(ready) >= self._quorum.config.quorum:
                self._asked.update(ready)
                return ready
            self._wait()

    def _ready(self) -> list[str]:
        """Return the sites that are there and may yet give an update in this round."""
        names = self._quorum.roster.names()
        return [site for site in names if site not in self.done and site not in self._refused]

    def _wait(self) -> None:
        """Pause before the next check of the sites, or raise RunError."""
        config, now = self._quorum.config, time.monotonic()
        if self._short_since is None:
            self._short_since = now
        end = self._short_since + config.patience
        roster = self._quorum.roster
        expected = max(config.sites, len(self._quorum.expected_names()))
        # Only refusals of sites that are connected are final: a site that comes back may have been mended.
        refusing = [site for site in self._refused if site in roster.nodes]
        out = roster.expelled.keys() - {site for site, _ in roster.refused.values()}
        if expected - len(refusing) - len(roster.refused) - len(out) < config.quorum:
            raise QuorumMissed(
                self._shortage("Waiting would not help: who answered would answer the same again.")
            )
        if now >= end:
            raise QuorumMissed(self._shortage(f"Waited {config.patience:g} s (federation.patience)."))
        here, names = self._here(), self._missing()
        if self._announced != names:
            self._announced = names
            self._quorum.waiting(self.round, len(here), names, config.quorum - len(here))
        time.sleep(min(self._pause, end - now))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _here(self) -> set[str]:
        """Return the sites that are done, or there and not yet asked in vain."""
        return self.done | (set(self._ready()) - self._silent.keys())

    def _missing(self) -> list[str]:
        """Return the names that could still make up the quorum, those not connected included."""
        expected = {*self._quorum.expected_names(), *self._quorum.roster.nodes}
        return sorted(expected - self._here() - self._refused.keys())

    def _shortage(self, why: str) -> str:
        """Return a text that names the missing and refusing sites, the reasons, and the remedy."""
        roster, quorum = self._quorum.roster, self._quorum.config.quorum
        names = ", ".join(self._missing()) or "no site that is known by name"
        reasons = {site: "not connected" for site in self._missing() if site not in roster.nodes}
        reasons |= roster.expelled | dict(roster.refused.values())
        reasons |= self._silent | self._refused
        lines = "".join(f"  {site}: {reason}\n" for site, reason in sorted(reasons.items()))
        have = f"{len(self.done)} good update(s)" if self._asked else f"{len(roster.nodes)} site(s) enrolled"
        return (
            f"round {self.round}: {have}, the quorum is {quorum}. Missing: {names}.\n{lines}{why}\n"
            "What was done is kept: go on with --resume when the sites are back."
        )
