"""Check ports, installed programs and the clock of this machine before a kit's programs start.

Each check raises one error that says what is wrong and what to do; nothing here starts or changes anything.
"""

import errno
import http.client
import ipaddress
import shutil
import socket
import ssl
import time
from collections.abc import Iterable
from email.utils import parsedate_to_datetime

from common.errors import UserError
from deploy.consortium.kit import SiteKit

CLOCK_SKEW = 240.0
"""Seconds; a SuperLink refuses a signature that is older than 300 s (flwr's TIMESTAMP_TOLERANCE)."""
_ADMIN_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


def require_ports(wanted: Iterable[tuple[str, str, int]]) -> None:
    """Check that every port can be opened.

    Args:
        wanted: what for, address, and port.

    Raises:
        UserError: one is in use, may not be opened by this user, or its address is not this machine's.
    """
    for what, address, port in wanted:
        family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
        with socket.socket(family) as probe:
            # Without it a port whose last connection ended a moment ago would count as in use.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen(1)
            except OSError as error:
                raise UserError(_port_fault(what, address, port, error)) from error


def _port_fault(what: str, address: str, port: int, error: OSError) -> str:
    where = f"port {port} on {address} ({what})"
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"{where} is in use by another program. Find it with `ss -ltnp 'sport = :{port}'` and end "
                "it, or choose another: for a site in its kit.toml, for the coordinator in consortium.toml "
                "(then `fedbags provision` again, with --update)."
            )
        case errno.EACCES:
            return f"{where} may not be opened by this user: take a port above 1023, or let root start it."
        case errno.EADDRNOTAVAIL:
            return f"{where} cannot be opened: {address} is not an address of this machine."
        case _:
            return f"{where} cannot be opened: {error.strerror or error}"


def nginx_program() -> str:
    """Return the path of nginx, from the PATH or from where Debian puts it.

    Raises:
        UserError: it is not installed.
    """
    found = shutil.which("nginx") or shutil.which("nginx", path=_ADMIN_FOLDERS)
    if found is None:
        raise UserError(
            "nginx is not installed, and it is the only way in for the sites.\n"
            "Install it with `apt-get install nginx-light` (Debian, Ubuntu) or `dnf install nginx`; its own "
            "service is not needed: `systemctl disable --now nginx`."
        )
    return found


def reach_server(kit: SiteKit) -> str:
    """Connect to the coordinator from a site, to check TLS, the server's certificate and the two clocks.

    Returns:
        Empty, or why it cannot be reached just now (the SuperNode will go on trying).

    Raises:
        UserError: its certificate is not one of this consortium, or the clocks are too far apart.
    """
    # Only the consortium's CA is trusted, so a proxy that opens TLS shows itself here.
    context = ssl.create_default_context(cafile=str(kit.ca_certificate))
    connection = http.client.HTTPSConnection(kit.server, kit.port, timeout=10.0, context=context)
    try:
        # nginx refuses this path with 403, which is enough: it comes over checked TLS and has a date.
        connection.request("GET", "/")
        answer = connection.getresponse()
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"{kit.server_address} does not show a certificate of consortium {kit.consortium!r}: "
            f"{error.verify_message}.\nIs it the right server, the right kit (ca.crt), and the right time on "
            "this machine? The coordinator renews an expired certificate with `fedbags provision renew`."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        return f"{kit.server_address} does not answer yet: {error}"
    finally:
        connection.close()
    return _compare_clocks(answer.getheader("Date"))


def _compare_clocks(date: str | None) -> str:
    if date is None:
        return ""
    ahead = time.time() - parsedate_to_datetime(date).timestamp()
    if abs(ahead) > CLOCK_SKEW:
        raise UserError(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the "
            "coordinator's, so that the node's signatures would be refused: set the clock "
            "(`timedatectl set-ntp true`) on the machine that is wrong."
        )
    return ""
