"""Check that a kit's files are complete, belong together, are valid now, and are private where needed.

Called before anything is added to a kit and before anything is started from one. Changes nothing.
"""

import hashlib
from pathlib import Path

from cryptography.x509 import Certificate

from common.errors import UserError, require_file
from deploy.consortium.certificates import certified_hosts, check_certificate, read_certificate
from deploy.consortium.keys import read_node_key, read_private_key, read_public_key, require_private
from deploy.consortium.kit import CoordinatorKit, Kit, SiteKit


def check_coordinator(kit: CoordinatorKit) -> None:
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
            f"{kit.server_certificate} is not for {', '.join(sorted(missing))}: "
            "run `fedbags "
            "provision renew KITS server`"
        )
    _require_secret(kit, "`fedbags provision` adds a missing one.")
    for site in kit.registered_sites:
        check_node(kit, site, authority)


def check_site(kit: SiteKit) -> None:
    """Check all that a site's processes start from, except its data.

    Raises:
        UserError: the first fault, as ``check_coordinator``.
    """
    check_authority(kit)
    key = read_node_key(kit.node_key)
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
    if hashlib.sha256(kit.app.read_bytes()).hexdigest() != kit.app_hash:
        raise UserError(
            f"{kit.app} is not the app that kit.toml names (app-hash): one of the two was changed alone. "
            "Bring back the file, or run `fedbags provision update-app KITS`."
        )


def check_server(kit: CoordinatorKit, authority: Certificate, *, holding: bool = True) -> Certificate:
    """Return the server's certificate, if it belongs to the server's key and (with ``holding``) holds now.

    Raises:
        UserError: as ``check_coordinator``.
    """
    key = read_private_key(kit.server_key)
    certificate = read_certificate(kit.server_certificate)
    _check(certificate, authority, f"the server's certificate {kit.server_certificate}", holding)
    if certificate.public_key() != key.public_key():
        raise UserError(
            f"{kit.server_key} is not the key of {kit.server_certificate.name}: bring back the pair that "
            "belongs "
            "together, or remove both and run `fedbags provision` again"
        )
    return certificate


def check_node(kit: CoordinatorKit, site: str, authority: Certificate, *, holding: bool = True) -> None:
    """Check that a site's certificate belongs to its key and (with ``holding``) holds now.

    Raises:
        UserError: as ``check_coordinator``.
    """
    certificate = read_certificate(kit.node_certificate(site))
    _check(certificate, authority, f"the certificate of site {site!r}", holding)
    if certificate.public_key() != read_public_key(kit.node_public_key(site)):
        raise UserError(
            f"{kit.node_public_key(site)} is not the key in {kit.node_certificate(site).name}: run `fedbags "
            f"provision revoke KITS {site}`, then add the site's node.pub again"
        )


def _check(certificate: Certificate, authority: Certificate, what: str, holding: bool) -> None:
    # Checked at its own last moment, an expired certificate passes here and a foreign one does not.
    check_certificate(certificate, authority, what, now=None if holding else certificate.not_valid_after_utc)


def _require_secret(kit: Kit, advice: str) -> Path:
    path = require_file(kit.superexec_secret, "the secret between SuperExec and its runtime", advice)
    require_private(path)
    return path
