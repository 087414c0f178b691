"""Enrol connected nodes as named sites once their proportion release is accepted.

This module knows the answers of nodes, and nothing of rounds or of time (see quorum.py).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from common.config_tables import FederationConfig, Strategy
from common.hierarchy import Hierarchy
from common.records import MessageError, ProportionRelease, SiteError
from common.run_records import ENROL, Cause, LeftOut
from server.acceptance import cause_of, read_release
from server.exchange import Reply

PROPORTIONS = "query.proportions"
ATTEMPTS = 3
"""Times that a silent node is asked the same thing. Each may cost privacy budget at the site."""


@dataclass
class Roster:
    """Hold the sites of a run by name, the node that speaks for each, and the nodes that are no site."""

    hierarchy: Hierarchy | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Fingerprint of the key of each such node, as Flower knows it; empty where nodes have none."""
    releases: dict[str, ProportionRelease] = field(default_factory=dict)
    """Of every site that ever took part, those that left included."""
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)
    """Nodes that answered, but not so that they can take part: the site (or node), and why."""
    strangers: set[int] = field(default_factory=set)
    """Nodes whose name is not on the allow-list."""
    rivals: dict[int, str] = field(default_factory=dict)
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
        self.strangers &= set(connected)
        # A node with a duplicate name may ask again once the name is free: it may be the site itself, back
        # under another node id.
        self.rivals = {n: site for n, site in self.rivals.items() if n in connected and site in self.nodes}
        self.silent = Counter({node: times for node, times in self.silent.items() if node in connected})
        return gone

    def newcomers(self, connected: Collection[int]) -> list[int]:
        """Return the connected nodes that are still to be asked for their release."""
        known = {*self.nodes.values(), *self.refused, *self.strangers, *self.rivals}
        return sorted(n for n in connected if n not in known and self.silent[n] < ATTEMPTS)


def enrol(
    roster: Roster, replies: Iterable[Reply], config: FederationConfig, report: Callable[[LeftOut], None]
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

    allowed = allowed_names(config)
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
        if config.strategy is Strategy.FEDPALS and not release.leaf_counts:
            reason = "releases no label counts by policy, and strategy fedpals needs them"
            roster.refused[reply.node] = (release.site, reason)
            leave_out(release.site, Cause.NOT_ADMITTED, reason)
        elif release.site in roster.expelled:
            reason = f"out for the rest of the run: {roster.expelled[release.site]}"
            roster.refused[reply.node] = (release.site, reason)
            leave_out(release.site, Cause.NOT_ADMITTED, reason)
        elif allowed and release.site not in allowed:
            roster.strangers.add(reply.node)
            leave_out(release.site, Cause.NOT_ADMITTED, "not on the allow-list (federation.allow)")
        # The name belongs to the node that gave it first. Otherwise a second node could replace a site by
        # giving its name.
        elif release.site in roster.nodes or release.site in offered:
            roster.rivals[reply.node] = release.site
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


def allowed_names(config: FederationConfig) -> set[str]:
    """Return the names of ``federation.allow``.

    An empty set allows everybody.
    """
    return {name.strip() for name in config.allow.split(",") if name.strip()}


def majority_tree(releases: list[ProportionRelease]) -> Hierarchy:
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
