"""Check a kit's files and this machine before anything is added to a kit or started from one.

The files must be complete, belong together, be valid now, and private where needed; ports must be free, nginx
installed and the clock right. Each check raises one error that says what is wrong and what to do. Nothing
here starts or changes anything.
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
from pathlib import Path

from cryptography.x509 import Certificate

from common.errors import UserError, require_file
from common.pki import read_node_key
from deploy.consortium.kit import CoordinatorKit, Kit, SiteKit, app_hash
from deploy.consortium.pki import (
    certified_hosts,
    check_certificate,
    read_certificate,
    read_private_key,
    read_public_key,
    require_private,
)

_CLOCK_SKEW = 240.0
"""Seconds; a SuperLink refuses a signature that is older than 300 s (flwr's TIMESTAMP_TOLERANCE)."""
_ADMIN_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"


def check_coordinator_kit(kit: CoordinatorKit) -> None:
    """Check all that the coordinator's processes start from.

    Raises:
        UserError: the first fault: a file is missing or readable by others, a certificate is foreign, expired
            or not valid yet, or two files do not belong together.
    """
    authority = check_authority(kit)
    check_bundle(kit)
    certificate = check_server(kit, authority)
    missing = set(kit.server.certificate_hosts) - certified_hosts(certificate)
    if missing:
        raise UserError(
            f"{kit.server_certificate} is not for {', '.join(sorted(missing))}: run `fedbags "
            "provision renew KITS server`"
        )
    _require_secret(kit, "`fedbags provision` adds a missing one.")
    for site in kit.registered_sites:
        check_node(kit, site, authority)


def check_site_kit(kit: SiteKit) -> None:
    """Check all that a site's processes start from, except its data.

    Raises:
        UserError: the first fault, as ``check_coordinator_kit``.
    """
    check_authority(kit)
    key = read_node_key(kit.node_key)
    require_private(kit.node_key)
    if key.public_key() != read_public_key(kit.node_public_key):
        raise UserError(
            f"{kit.node_public_key} is not the public key of {kit.node_key.name}: bring back the pair that "
            "`fedbags site keygen` wrote"
        )
    _require_secret(kit, "`fedbags site keygen KIT` makes it.")


def check_authority(kit: Kit) -> Certificate:
    """Return the kit's CA certificate, if it holds now.

    Raises:
        UserError: missing, not a certificate, or expired or not valid yet.
    """
    require_file(
        kit.ca_certificate, "the consortium's CA certificate", "It came with the kit: take it from there."
    )
    certificate = read_certificate(kit.ca_certificate)
    check_certificate(certificate, certificate, f"the CA certificate {kit.ca_certificate}")
    return certificate


def check_bundle(kit: Kit) -> None:
    """Check that the kit's app is the one that kit.toml names.

    Raises:
        UserError: missing, or another.
    """
    require_file(kit.app, "the app", "It came with the kit: take it from there.")
    # Sites approved the app of this hash and would refuse any other.
    if app_hash(kit.app.read_bytes()) != kit.app_hash:
        raise UserError(
            f"{kit.app} is not the app that kit.toml names (app-hash): one of the two was changed alone. "
            "Bring back the file, or run `fedbags provision update-app KITS`."
        )


def check_server(kit: CoordinatorKit, authority: Certificate, *, holding: bool = True) -> Certificate:
    """Return the server's certificate, if it belongs to the server's key and (with ``holding``) holds now.

    Raises:
        UserError: as ``check_coordinator_kit``.
    """
    key = read_private_key(kit.server_key)
    certificate = read_certificate(kit.server_certificate)
    _check_issued(certificate, authority, f"the server's certificate {kit.server_certificate}", holding)
    if certificate.public_key() != key.public_key():
        raise UserError(
            f"{kit.server_key} is not the key of {kit.server_certificate.name}: bring back the pair that "
            "belongs together, or remove both and run `fedbags provision` again"
        )
    return certificate


def check_node(kit: CoordinatorKit, site: str, authority: Certificate, *, holding: bool = True) -> None:
    """Check that a site's certificate belongs to its key and (with ``holding``) holds now.

    Raises:
        UserError: as ``check_coordinator_kit``.
    """
    certificate = read_certificate(kit.node_certificate(site))
    _check_issued(certificate, authority, f"the certificate of site {site!r}", holding)
    if certificate.public_key() != read_public_key(kit.node_public_key(site)):
        raise UserError(
            f"{kit.node_public_key(site)} is not the key in {kit.node_certificate(site).name}: run `fedbags "
            f"provision revoke KITS {site}`, then add the site's node.pub again"
        )


def _check_issued(certificate: Certificate, authority: Certificate, what: str, holding: bool) -> None:
    # Checked at its own last moment, an expired certificate passes here and a foreign one does not.
    check_certificate(certificate, authority, what, now=None if holding else certificate.not_valid_after_utc)


def _require_secret(kit: Kit, advice: str) -> Path:
    path = require_file(kit.superexec_secret, "the secret between SuperExec and its runtime", advice)
    require_private(path)
    return path


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
    if abs(ahead) > _CLOCK_SKEW:
        raise UserError(
            f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the "
            "coordinator's, so that the node's signatures would be refused: set the clock "
            "(`timedatectl set-ntp true`) on the machine that is wrong."
        )
    return ""
