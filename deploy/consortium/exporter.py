"""Serve the figures of a kit for Prometheus, with ``fedbags metrics`` as one of the kit's programs.

The figures are those of the coordinator's newest run, or of the site.
"""

from deploy.consortium.foreground import COMMAND, Program, answers
from deploy.consortium.kit import CoordinatorKit, SiteKit

EXPORTER = "metrics"


def endpoint(kit: CoordinatorKit | SiteKit) -> tuple[str, int] | None:
    """Return address and port of /metrics, or None where the kit wants none (port 0)."""
    if isinstance(kit, SiteKit):
        address, port = kit.ports.metrics_address, kit.ports.metrics_port
    else:
        address, port = kit.server.admin_address, kit.server.metrics_port
    return (address, port) if port else None


def ports(kit: CoordinatorKit | SiteKit) -> list[tuple[str, str, int]]:
    """Return the exporter's port in the form that ``require_ports`` checks."""
    found = endpoint(kit)
    return [("metrics-port, for Prometheus", *found)] if found else []


def programs(kit: CoordinatorKit | SiteKit) -> list[Program]:
    """Return the exporter, if the kit wants one."""
    found = endpoint(kit)
    if found is None:
        return []
    address, port = found
    command = (*COMMAND, "metrics", str(kit.folder), "--address", address, "--port", str(port))
    return [Program(EXPORTER, command, ready=answers(address, port))]
