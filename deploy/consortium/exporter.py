"""``fedbags metrics`` beside a kit's other programs: Prometheus figures of the newest run, or of the site."""

from deploy.consortium.daemon import COMMAND
from deploy.consortium.kit import CoordinatorKit, SiteKit
from deploy.consortium.program import Program, answers

EXPORTER = "metrics"


def endpoint(kit: CoordinatorKit | SiteKit) -> tuple[str, int] | None:
    """Address and port of /metrics; None where the kit wants none (port 0)."""
    if isinstance(kit, SiteKit):
        address, port = kit.ports.metrics_address, kit.ports.metrics_port
    else:
        address, port = kit.server.admin_address, kit.server.metrics_port
    return (address, port) if port else None


def ports(kit: CoordinatorKit | SiteKit) -> list[tuple[str, str, int]]:
    """What ``require_ports`` has to check."""
    found = endpoint(kit)
    return [("metrics-port, for Prometheus", *found)] if found else []


def programs(kit: CoordinatorKit | SiteKit) -> list[Program]:
    """The exporter, if the kit wants one."""
    found = endpoint(kit)
    if found is None:
        return []
    address, port = found
    command = (*COMMAND, "metrics", str(kit.folder), "--address", address, "--port", str(port))
    return [Program(EXPORTER, command, ready=answers(address, port))]
