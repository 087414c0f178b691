"""Keep the connections of this machine to itself from going through a proxy.

A hospital's shell has ``http_proxy`` or ``ALL_PROXY``, often without ``no_proxy``. httpx, gRPC and Flower
read these variables, and would ask the proxy for 127.0.0.1.
"""

from collections.abc import Mapping

HOSTS = ("127.0.0.1", "localhost", "::1")
NAMES = ("no_proxy", "NO_PROXY")
"""Libraries read one or the other: gRPC only the first, others the second if the first is not set."""


def without_proxy(environment: Mapping[str, str], *hosts: str) -> dict[str, str]:
    """Return ``no_proxy`` with the loopback addresses, and further hosts, added to what it has.

    Args:
        environment: of this process.
        hosts: names or IP addresses, without a port, that are this machine's own.
    """
    found = [part.strip() for name in NAMES for part in environment.get(name, "").split(",")]
    listed = ",".join(dict.fromkeys(part for part in (*found, *HOSTS, *hosts) if part))
    return dict.fromkeys(NAMES, listed)
