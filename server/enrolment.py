"""Who takes part: connected nodes become named sites once their proportion release is accepted."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.config import FederationConfig
from common.errors import RunError
from common.hierarchy import Hierarchy
from common.messages import MessageError, ProportionRelease, check_only, from_records
from server.exchange import Note, ask

log = logging.getLogger("fedbags.server")

PROPORTIONS = "query.proportions"

Report = Callable[[str, str, str], None]
"""Called with (site, phase, reason) for everything that is left out."""


@dataclass
class Roster:
    """The sites of a run, by name, with the node that speaks for each."""

    hierarchy: Hierarchy | None = None
    nodes: dict[str, int] = field(default_factory=dict)
    releases: dict[str, ProportionRelease] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def leave(self, site: str) -> None:
        """Take a site out for the rest of the run; what it released stays known."""
        del self.nodes[site]

    def names(self) -> list[str]:
        """Site names in the order in which their updates are added up."""
        return sorted(self.nodes)


def wait_for_nodes(grid: Grid, config: FederationConfig) -> list[int]:
    """Wait until ``federation.sites`` nodes are connected, or the enrolment deadline.

    Raises:
        RunError: fewer nodes than the quorum by then.
    """
    end = time.monotonic() + config.enrol_deadline
    announced = -1
    while len(nodes := sorted(grid.get_node_ids())) < config.sites and time.monotonic() < end:
        if len(nodes) != announced:
            log.info("waiting for sites: %d of %d connected", len(nodes), config.sites)
            announced = len(nodes)
        time.sleep(0.5)
    if len(nodes) < min(config.quorum, config.sites):
        raise RunError(
            f"only {len(nodes)} site(s) connected within {config.enrol_deadline:g} s, "
            f"the quorum is {config.quorum}; start the missing sites or lower federation.quorum"
        )
    return nodes


def enrol(
    grid: Grid,
    roster: Roster,
    config: FederationConfig,
    round: int,
    report: Report,
    note: Note | None = None,
) -> list[str]:
    """Ask every node not seen before for its release and add the accepted ones to the roster.

    A site is left out (and reported) when it does not answer, is not on the allow-list, takes the name
    of another node, or has another label tree than most sites.

    Returns:
        The names added.
    """
    fresh = [node for node in sorted(grid.get_node_ids()) if node not in roster.seen]
    roster.seen.update(fresh)
    allowed = {name.strip() for name in config.allow.split(",") if name.strip()}
    offered: dict[str, tuple[int, ProportionRelease]] = {}
    requests = {node: RecordDict() for node in fresh}
    for reply in ask(grid, requests, PROPORTIONS, round=round, deadline=config.enrol_deadline, note=note):
        label = f"node {reply.node}"
        if reply.content is None:
            report(label, "enrol", reply.failure)
            continue
        try:
            check_only(reply.content, ProportionRelease)
            release = from_records(reply.content, ProportionRelease)
            release.tree()
        except (MessageError, ValueError, KeyError) as error:
            report(label, "enrol", f"unreadable release: {error}")
            continue
        if allowed and release.site not in allowed:
            report(release.site, "enrol", "not on the allow-list (federation.allow)")
        elif release.site in roster.nodes or release.site in offered:
            report(release.site, "enrol", f"{label} uses the name of another site")
        else:
            offered[release.site] = (reply.node, release)
    if roster.hierarchy is None and offered:
        roster.hierarchy = _majority_tree([release for _, release in offered.values()])
    added = []
    for site, (node, release) in sorted(offered.items()):
        if release.tree() != roster.hierarchy:
            report(site, "enrol", "its label tree differs from the federation's")
            continue
        roster.nodes[site] = node
        roster.releases[site] = release
        added.append(site)
    return added


def _majority_tree(releases: list[ProportionRelease]) -> Hierarchy:
    """The label tree of most sites; ties go to the first by site name."""
    trees = [release.tree() for release in sorted(releases, key=lambda release: release.site)]
    return Counter(trees).most_common(1)[0][0]
