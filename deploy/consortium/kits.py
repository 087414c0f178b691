"""Open a consortium's folder of kits, and add what is missing in it.

``KITS/authority`` stays with the coordinator, ``KITS/coordinator`` goes to the server, ``KITS/sites/NAME`` to
each site. Every step adds what is missing and leaves keys as they are. Nothing here reads consortium.toml.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import UserError
from common.files import write_bytes
from common.settings_file import nearest
from deploy.consortium.authority import CERTIFICATE_FILE, Authority
from deploy.consortium.certificates import write_certificate
from deploy.consortium.keys import fingerprint, read_private_key, read_public_key, write_public_key
from deploy.consortium.kit import KIT_FILE, CoordinatorKit, Kit, SiteKit
from deploy.consortium.kit_check import check_bundle, check_node, check_server
from deploy.consortium.render import render_kit
from deploy.consortium.settings import SitePorts

CERTIFICATE_DAYS = 398
"""How long a certificate holds, unless consortium.toml or --days says otherwise."""


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
        kits.require_whole(with_app=with_app)
        return kits

    def require_whole(self, *, with_app: bool = True) -> None:
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

    def with_sites(self, sites: tuple[str, ...]) -> Self:
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
        path, certificate = (
            self.coordinator.node_public_key(site),
            self.coordinator.node_certificate(site),
        )
        if path.exists() and fingerprint(read_public_key(path)) != fingerprint(key):
            raise UserError(
                f"site {site!r} has another key already ({path}), and it is never overwritten. If the "
                "site made a "
                f"new one: `fedbags provision revoke KITS {site}`, then add the new key."
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
                    "settings "
                    f"say {kit.site!r} at {kit.server_address}: give --update to change it"
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
