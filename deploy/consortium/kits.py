"""Open a consortium's folder of kits, add what is missing in it, and change sites, keys and certificates.

``KITS/authority`` stays with the coordinator, ``KITS/coordinator`` goes to the server, ``KITS/sites/NAME`` to
each site. Every step adds what is missing and leaves keys as they are. A running coordinator takes up keys
that come or go in its nodes/ by itself; every other change takes effect when its kit is brought up again.
A kit's plain files come from the package's templates and name each other relative to the kit, so that it can
be moved. Nothing here reads consortium.toml or talks to a process.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Self

import jinja2
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import UserError
from common.files import write_bytes, write_text
from common.settings_file import nearest
from deploy.consortium.app import AddedParts, build_bundle, read_app
from deploy.consortium.authority import CERTIFICATE_FILE, Authority
from deploy.consortium.checks import check_authority, check_bundle, check_node, check_server
from deploy.consortium.kit import KIT_FILE, CoordinatorKit, Kit, SiteKit, app_hash
from deploy.consortium.pki import (
    KeyForm,
    fingerprint,
    make_private_key,
    make_secret,
    read_private_key,
    read_public_key,
    write_certificate,
    write_public_key,
)
from deploy.consortium.settings import SitePorts, valid_site
from deploy.parts import Package, defaults_of

_COORDINATOR_FILES = {
    "nginx.conf": "nginx.conf.j2",
    "compose.yaml": "coordinator-compose.yaml.j2",
    "systemd/fedbags-coordinator.service": "coordinator.service.j2",
    "README.md": "coordinator-README.md.j2",
}
_SITE_FILES = {
    "run.sh": "run.sh.j2",
    "site.toml": "site.toml.j2",
    "compose.yaml": "site-compose.yaml.j2",
    "fedbags-site.service": "site.service.j2",
    "README.md": "site-README.md.j2",
}
"""Path in the kit -> template."""

_SERVER = "server"
"""The server, among the names that ``Kits.renew`` takes."""


@dataclass
class Changes:
    """Hold what a command wrote, and which sites' public keys have not come yet."""

    app_hash: str = ""
    written: list[Path] = field(default_factory=list)
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kits:
    """Hold an opened folder of kits with its authority and the coordinator's kit."""

    folder: Path
    authority: Authority
    coordinator: CoordinatorKit
    changes: Changes = field(default_factory=Changes)

    @classmethod
    def open(cls, folder: Path, password: bytes | None = None, *, with_app: bool = True) -> Self:
        """Open a folder of kits to change it.

        Args:
            folder: KITS.
            password: of ca.key, if it has one.
            with_app: require the app that kit.toml names.

        Raises:
            UserError: it is none, or parts of it are missing, do not belong together or do not hold.
        """
        kit = CoordinatorKit.load(folder / "coordinator")
        kits = cls(folder, Authority.open(folder / "authority", password), kit)
        kits.check_consistent(with_app=with_app)
        return kits

    def check_consistent(self, *, with_app: bool = True) -> None:
        """Check that no kit was changed halfway or mixed with another consortium's.

        Expired certificates pass: they are what ``renew`` is for.

        Raises:
            UserError: names the files that do not belong together.
        """
        kit, authority = self.coordinator, self.authority.certificate
        if with_app:
            check_bundle(kit)
        if kit.server_key.exists() or kit.server_certificate.exists():
            check_server(kit, authority, holding=False)
        for site in kit.registered_sites:
            if kit.node_certificate(site).exists():
                check_node(kit, site, authority, holding=False)
        site_kits = [SiteKit.load(path.parent) for path in sorted(self.folder.glob(f"sites/*/{KIT_FILE}"))]
        # A kit of another authority is recognised by its CA certificate, since consortiums may have one name.
        own = (self.authority.folder / CERTIFICATE_FILE).read_bytes()
        for other in (kit, *site_kits):
            if other.consortium != kit.consortium:
                raise UserError(f"{other.folder} is a kit of another consortium, {other.consortium!r}")
            if other.ca_certificate.exists() and other.ca_certificate.read_bytes() != own:
                raise UserError(
                    f"{other.ca_certificate} is not this authority's certificate: the kit is from another "
                    "authority. Bring back the authority folder that it was made with."
                )

    def site_folder(self, site: str) -> Path:
        """Return the folder of a site's kit."""
        return self.folder / "sites" / site

    def require_site(self, site: str) -> None:
        """Check that a site is one of the consortium's, or was and has its kit here.

        Raises:
            UserError: it is not; names the nearest one.
        """
        sites = self.coordinator.sites
        if site in sites or (self.site_folder(site) / KIT_FILE).is_file():
            return
        raise UserError(
            f"consortium {self.coordinator.consortium!r} has no site {site!r}{nearest(site, sites)}\n"
            f"Its sites: {', '.join(sites) or 'none'}. `fedbags provision add-site` adds one."
        )

    def add_site(self, site: str, ports: SitePorts) -> Changes:
        """Add a site and make its kit.

        Raises:
            UserError: the name is taken, or not a name.
        """
        try:
            valid_site(site)
        except ValueError as error:
            raise UserError(f"site name {site!r}: {error}") from error
        if site.lower() in {name.lower() for name in self.coordinator.sites}:
            raise UserError(f"consortium {self.coordinator.consortium!r} has a site {site!r} already")
        self.complete_site(site, ports)
        return self._with_sites((*self.coordinator.sites, site)).finished()

    def add_key(self, site: str, public_key: Path, days: int | None = None) -> Changes:
        """Put a site's public key into the coordinator's kit, with a certificate that it is that site's.

        A site that was revoked comes back with a new key.

        Args:
            site: whose key it is.
            public_key: the file that the site sent.
            days: how long the certificate holds from now; None: as long as the coordinator's kit says.

        Raises:
            UserError: unknown site, not a public P-384 key, another site's key, or the site has another one.
        """
        self.require_site(site)
        self.register(site, read_public_key(public_key), days or self.coordinator.certificate_days)
        return self._with_sites(tuple(dict.fromkeys((*self.coordinator.sites, site)))).finished()

    def revoke(self, site: str) -> Changes:
        """Take a site out of the consortium.

        Its certificates are recorded as revoked, and its key and certificate leave the coordinator's kit.

        Raises:
            UserError: unknown site.
        """
        self.require_site(site)
        # Recorded before the files go: the key is never certified again, even if the command stops here.
        self.authority.revoke(site)
        for path in (self.coordinator.node_public_key(site), self.coordinator.node_certificate(site)):
            path.unlink(missing_ok=True)
        return self._with_sites(tuple(name for name in self.coordinator.sites if name != site)).finished()

    def renew(self, names: Iterable[str] = (), days: int | None = None) -> Changes:
        """Issue certificates anew for the same keys.

        Args:
            names: ``server`` and sites; empty: the server and every site that has a key.
            days: how long they hold from now; None: as long as the coordinator's kit says.

        Raises:
            UserError: unknown site, or one without a key.
        """
        named = tuple(names) or (_SERVER, *self.coordinator.registered_sites)
        for name in named:
            if name != _SERVER:
                self.require_site(name)
                if name not in self.coordinator.registered_sites:
                    raise UserError(
                        f"site {name!r} has no key yet: `fedbags provision add-key` brings its certificate"
                    )
        days = days or self.coordinator.certificate_days
        for name in named:
            if name == _SERVER:
                self.certify_server(days)
            else:
                self.certify_site(name, days)
        return self.finished()

    def update_app(self, package: Package | None = None) -> Changes:
        """Bundle the app of this fedbags in place of the one before, with the parts of others that it held.

        Every site has to approve the new app.

        Args:
            package: parts to add, or to bring up to date.

        Raises:
            UserError: as ``build_bundle``.
        """
        stored = self.coordinator.app
        added = read_app(stored).added_parts if stored.is_file() else AddedParts()
        if package is not None:
            more = AddedParts(package.in_app(), defaults_of(package))
            added = added.and_also(more, package.name)
        content = build_bundle(added)
        kit = self.coordinator.model_copy(update={"app_hash": app_hash(content)})
        # If it stops between the two writes, check_bundle names the mismatch and a second try mends it.
        write_bytes(kit.app, content, 0o644)
        kit.save()
        self.changes.written += [kit.app, kit.folder / KIT_FILE]
        return Changes(kit.app_hash, self.changes.written)

    def _with_sites(self, sites: tuple[str, ...]) -> Self:
        """Return the same kits with these sites in the coordinator's kit.toml."""
        kit = self.coordinator.model_copy(update={"sites": sites})
        if sites != self.coordinator.sites:
            kit.save()
            self.changes.written.append(kit.folder / KIT_FILE)
        return replace(self, coordinator=kit)

    def certify_server(self, days: int) -> None:
        """Issue the server's certificate for its key and for the hosts of kit.toml."""
        kit = self.coordinator
        key = read_private_key(kit.server_key).public_key()
        certificate = self.authority.issue_server(key, kit.server.certificate_hosts, days)
        write_certificate(kit.server_certificate, certificate)
        self.changes.written.append(kit.server_certificate)

    def certify_site(self, site: str, days: int) -> None:
        """Issue a site's certificate for the public key that is in the coordinator's kit."""
        kit = self.coordinator
        key = read_public_key(kit.node_public_key(site))
        write_certificate(kit.node_certificate(site), self.authority.issue_site(site, key, days))
        self.changes.written.append(kit.node_certificate(site))

    def register(self, site: str, key: ec.EllipticCurvePublicKey, days: int) -> None:
        """Put a site's public key and its certificate into the coordinator's kit, unless they are there.

        Raises:
            UserError: the site has another key, or the key is another site's or was revoked.
        """
        path, certificate = (self.coordinator.node_public_key(site), self.coordinator.node_certificate(site))
        if path.exists() and fingerprint(read_public_key(path)) != fingerprint(key):
            raise UserError(
                f"site {site!r} has another key already ({path}), and it is never overwritten. If the "
                f"site made a new one: `fedbags provision revoke KITS {site}`, then add the new key."
            )
        if path.exists() and certificate.exists():
            return
        issued = self.authority.issue_site(site, key, days)
        # The key comes last: a running coordinator registers the site as soon as it is in nodes/.
        write_certificate(certificate, issued)
        write_public_key(path, key, site)
        self.changes.written += [path, certificate]

    def complete_common(self, kit: Kit, app: bytes) -> None:
        """Add the CA certificate and the app to a kit that lacks them."""
        kit.app.parent.mkdir(parents=True, exist_ok=True)
        authority = (self.authority.folder / CERTIFICATE_FILE).read_bytes()
        for path, content in ((kit.ca_certificate, authority), (kit.app, app)):
            if not path.exists():
                write_bytes(path, content, 0o644)
                self.changes.written.append(path)

    def complete_site(
        self, site: str, ports: SitePorts, *, keys_here: bool = False, update: bool = False
    ) -> SiteKit:
        """Make a site's kit, or add what is missing to it.

        Args:
            site: its name.
            ports: what its processes open.
            keys_here: its key is made here.
            update: take server, port and ports from here, and render its files again; data-path and the
                approved app stay the site's.

        Raises:
            UserError: the kit is there and names another server or site.
        """
        coordinator, folder = self.coordinator, self.site_folder(site)
        kit = SiteKit(
            consortium=coordinator.consortium,
            app_hash=coordinator.app_hash,
            site=site,
            server=coordinator.server.host,
            port=coordinator.server.port,
            ports=ports,
        ).at(folder)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if (folder / KIT_FILE).exists():
            found = SiteKit.load(folder)
            # These two are the site's decisions: where its data lie, and which app it approved.
            kit = kit.model_copy(update={"data_path": found.data_path, "app_hash": found.app_hash})
            if not update and (found.site, found.server, found.port) != (kit.site, kit.server, kit.port):
                raise UserError(
                    f"{folder / KIT_FILE} is for site {found.site!r} at {found.server_address}, and the "
                    f"settings say {kit.site!r} at {kit.server_address}: give --update to change it"
                )
            kit = kit if update else found
        self.complete_common(kit, coordinator.app.read_bytes())
        self.changes.written += render_kit(kit, keys_here=keys_here, update=update)
        if not (folder / KIT_FILE).exists() or SiteKit.load(folder) != kit:
            kit.save()
            self.changes.written.append(folder / KIT_FILE)
        return kit

    def finished(self) -> Changes:
        """Return what was changed since the folder was opened, and whose keys are missing."""
        kit = self.coordinator
        self.changes.app_hash = kit.app_hash
        self.changes.waiting = tuple(site for site in kit.sites if site not in kit.registered_sites)
        return self.changes


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


def render_kit(kit: Kit, *, keys_here: bool = False, update: bool = False) -> list[Path]:
    """Write the files of a kit that are not there yet.

    Args:
        kit: what the files are about.
        keys_here: the site's key was made by the coordinator, and the site's README says so.
        update: write the others again too, whatever was changed in them by hand.

    Returns:
        The files written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploy.consortium"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # The templates are configuration files, scripts and Markdown, in which HTML entities would be faults.
        autoescape=False,
    )
    values = {"kit": kit, "version": version("fedbags"), "keys_here": keys_here}
    written = []
    for name, template in (_SITE_FILES if isinstance(kit, SiteKit) else _COORDINATOR_FILES).items():
        path = kit.folder / name
        if path.exists() and not update:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        text = environment.get_template(template).render(values)
        write_text(path, text, 0o755 if path.suffix == ".sh" else 0o644)
        written.append(path)
    return written


def write_flower_connection(kit: CoordinatorKit) -> Path:
    """Write flower/config.toml with the connection named as the consortium, for ``flwr run``.

    Flower finds it with FLWR_HOME=KIT/flower. It takes only an absolute path of the CA certificate, so a kit
    that was moved needs this again.
    """
    connection = {"address": kit.server.superlink_address, "root-certificates": str(kit.ca_certificate)}
    path = kit.flower_home / "config.toml"
    path.parent.mkdir(exist_ok=True)
    text = tomli_w.dumps({"superlink": {"default": kit.connection, kit.connection: connection}})
    write_text(path, text, 0o644)
    return path
