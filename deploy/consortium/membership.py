"""Change the sites, keys, certificates and the app of a running consortium.

A running coordinator takes up keys that come or go in its nodes/ by itself. Every other change takes effect
when its kit is brought up again. Nothing here talks to a process.
"""

from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from common.files import write_bytes
from deploy.consortium.admission import app_hash
from deploy.consortium.bundle import build_bundle
from deploy.consortium.keys import KeyForm, make_private_key, make_secret, read_public_key, write_public_key
from deploy.consortium.kit import KIT_FILE, SiteKit
from deploy.consortium.kit_check import check_authority
from deploy.consortium.kits import CERTIFICATE_DAYS, Changes, Kits
from deploy.consortium.settings import SitePorts, valid_site

SERVER = "server"
"""The server, among the names that ``renew`` takes."""


def add_site(kits: Kits, site: str, ports: SitePorts) -> Changes:
    """Add a site and make its kit.

    Raises:
        UserError: the name is taken, or not a name.
    """
    try:
        valid_site(site)
    except ValueError as error:
        raise UserError(f"site name {site!r}: {error}") from error
    if site.lower() in {name.lower() for name in kits.coordinator.sites}:
        raise UserError(f"consortium {kits.coordinator.consortium!r} has a site {site!r} already")
    kits.complete_site(site, ports)
    return kits.with_sites((*kits.coordinator.sites, site)).finished()


def add_key(kits: Kits, site: str, public_key: Path, days: int = CERTIFICATE_DAYS) -> Changes:
    """Put a site's public key into the coordinator's kit, with a certificate that it is that site's.

    A site that was revoked comes back with a new key.

    Raises:
        UserError: unknown site, not a public P-384 key, another site's key, or the site has another one.
    """
    kits.require_site(site)
    kits.register(site, read_public_key(public_key), days)
    return kits.with_sites(tuple(dict.fromkeys((*kits.coordinator.sites, site)))).finished()


def revoke(kits: Kits, site: str) -> Changes:
    """Take a site out of the consortium.

    Its certificates are recorded as revoked, and its key and certificate leave the coordinator's kit.

    Raises:
        UserError: unknown site.
    """
    kits.require_site(site)
    # Recorded before the files go: the key is never certified again, even if the command stops here.
    kits.authority.revoke(site)
    for path in (kits.coordinator.node_public_key(site), kits.coordinator.node_certificate(site)):
        path.unlink(missing_ok=True)
    return kits.with_sites(tuple(name for name in kits.coordinator.sites if name != site)).finished()


def renew(kits: Kits, names: Iterable[str] = (), days: int = CERTIFICATE_DAYS) -> Changes:
    """Issue certificates anew for the same keys.

    Args:
        kits: where.
        names: ``server`` and sites; empty: the server and every site that has a key.
        days: how long they hold from now.

    Raises:
        UserError: unknown site, or one without a key.
    """
    named = tuple(names) or (SERVER, *kits.coordinator.registered_sites)
    for name in named:
        if name != SERVER:
            kits.require_site(name)
            if name not in kits.coordinator.registered_sites:
                raise UserError(
                    f"site {name!r} has no key yet: `fedbags provision add-key` brings its certificate"
                )
    for name in named:
        if name == SERVER:
            kits.certify_server(days)
        else:
            kits.certify_site(name, days)
    return kits.finished()


def update_app(kits: Kits) -> Changes:
    """Bundle the app of this fedbags in place of the one before.

    Every site has to approve the new app.

    Raises:
        UserError: as ``build_bundle``.
    """
    content = build_bundle()
    kit = kits.coordinator.model_copy(update={"app_hash": app_hash(content)})
    # If it stops between the two writes, check_bundle names the mismatch and a second try mends it.
    write_bytes(kit.app, content, 0o644)
    kit.save()
    kits.changes.written += [kit.app, kit.folder / KIT_FILE]
    return Changes(kit.app_hash, kits.changes.written)


def make_node_key(kit: SiteKit) -> Path:
    """Make a site's key pair, and the secret between the site's own processes.

    Run at the site, so that the private key never travels.

    Returns:
        node.pub, the one file to send to the coordinator.

    Raises:
        UserError: there is a key already (it is left as it is), or the kit's CA certificate is missing.
    """
    check_authority(kit)
    key = make_private_key(kit.node_key, KeyForm.OPENSSH)
    write_public_key(kit.node_public_key, key.public_key(), kit.site)
    if not kit.superexec_secret.exists():
        make_secret(kit.superexec_secret)
    return kit.node_public_key
