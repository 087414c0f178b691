"""Read and write kit.toml, and give the places of the files in a kit.

A kit is the folder that one party starts from. Everything that runs from a kit reads it through here. Nothing
here reads a key or a certificate, or starts a process. There is no key that switches TLS or node keys off.
"""

import hashlib
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from common.errors import UserError, require_file
from common.files import write_bytes, write_text
from common.settings_file import Section, commented, read_toml, validated
from deploy.consortium.settings import (
    CERTIFICATE_DAYS,
    LOOPBACK,
    Days,
    Hash,
    Host,
    Name,
    Port,
    ServerSettings,
    SitePorts,
    join_address,
)

KIT_FILE = "kit.toml"
_KIT_VERSION = 1
"""Raised whenever a kit of the version before can no longer be run as it is."""


class Kit(Section):
    """Hold what both kinds of kit.toml have in common, and the folder that they were read from."""

    role: str
    kit_version: int = Field(_KIT_VERSION, description="form of this folder")
    consortium: Name = Field(description="the consortium that this kit belongs to")
    app_hash: Hash = Field(description="SHA-256 of the approved app (app/fedbags.fab)")
    _folder: Path = PrivateAttr(default=Path())

    headline: ClassVar[str]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the kit in ``folder``.

        Raises:
            UserError: there is no kit, or it is the other party's, or of another version.
            ConfigError: kit.toml is faulty; every fault is named.
        """
        path = folder / KIT_FILE
        require_file(path, "the kit", "Give the folder that `fedbags provision` wrote for this machine.")
        data = read_toml(path)
        # Checked first: a kit of another version may have other keys, and would only be called faulty.
        _check_version(data.get("kit-version"), path)
        expected = cls.model_fields["role"].default
        if data.get("role") != expected:
            raise UserError(
                f"{path} is a kit for role {data.get('role')!r}, and this needs role {expected!r}: "
                "give the other kit's folder"
            )
        return validated(cls, data, path).at(folder)

    def at(self, folder: Path) -> Self:
        """Return the same kit in ``folder``."""
        kit = self.model_copy()
        # Not a key of kit.toml, so that the folder can be moved.
        kit._folder = folder.absolute()
        return kit

    def save(self) -> None:
        """Write kit.toml into the kit's folder in one step, each key with its meaning above it."""
        write_text(self.folder / KIT_FILE, self.to_toml(), 0o644)

    def to_toml(self) -> str:
        """Return the commented text of kit.toml."""
        return f"# {self.headline}\n" + commented(self)

    @property
    def folder(self) -> Path:
        """Return the kit's folder, absolute."""
        return self._folder

    @property
    def ca_certificate(self) -> Path:
        """Return the path of the consortium's CA certificate, which this party trusts."""
        return self.folder / "ca.crt"

    @property
    def app(self) -> Path:
        """Return the path of the app (a Flower App Bundle) whose SHA-256 is ``app_hash``."""
        return self.folder / "app" / "fedbags.fab"

    @property
    def superexec_secret(self) -> Path:
        """Return the path of the secret (0600) that SuperExec shows to the Runtime API."""
        return self.folder / "superexec.secret"

    @property
    def state(self) -> Path:
        """Return the folder of databases, pid files and runs, which the processes make."""
        return self.folder / "state"

    @property
    def logs(self) -> Path:
        """Return the folder with one log per process, made at run time."""
        return self.folder / "logs"

    @property
    def flower_home(self) -> Path:
        """Return the folder that is FLWR_HOME of this kit's processes."""
        return self.folder / "flower"


class CoordinatorKit(Kit):
    """Hold the coordinator's kit.toml."""

    headline: ClassVar[str] = (
        "The coordinator's kit. Written by `fedbags provision`; keep the folder private."
    )

    role: Literal["coordinator"] = "coordinator"
    sites: tuple[Name, ...] = Field((), description="every site of the consortium, with or without its key")
    certificate_days: Days = Field(CERTIFICATE_DAYS, description="how long new certificates hold")
    server: ServerSettings

    @property
    def server_certificate(self) -> Path:
        """Return the path of the server's certificate, issued by the consortium's CA."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """Return the path of the server's private key (0600)."""
        return self.folder / "server.key"

    @property
    def nodes(self) -> Path:
        """Return the folder of the sites' public keys and certificates."""
        return self.folder / "nodes"

    @property
    def registered_sites(self) -> tuple[str, ...]:
        """Return the names, sorted, of the sites whose keys are in nodes/ and that may therefore connect."""
        # Read from the folder each time: a running coordinator takes up keys that are added or removed.
        return tuple(sorted(path.stem for path in self.nodes.glob("*.pub")))

    def node_public_key(self, site: str) -> Path:
        """Return the path of a site's public key (OpenSSH form)."""
        return self.nodes / f"{site}.pub"

    def node_certificate(self, site: str) -> Path:
        """Return the path of a site's certificate, which binds its public key to its name (CN)."""
        return self.nodes / f"{site}.crt"

    @property
    def database(self) -> Path:
        """Return the path of the SuperLink's SQLite state."""
        return self.state / "flower.db"

    @property
    def metrics_endpoint(self) -> tuple[str, int] | None:
        """Return address and port of /metrics, or None where the kit wants none (port 0)."""
        return (self.server.admin_address, self.server.metrics_port) if self.server.metrics_port else None

    @property
    def statements(self) -> Path:
        """Return the folder with the last privacy statement of each site, over all runs."""
        return self.state / "statements"

    @property
    def runs(self) -> Path:
        """Return the folder of run folders that ServerApps write."""
        return self.state / "runs"

    @property
    def connection(self) -> str:
        """Return the name of the Flower connection in flower/config.toml."""
        return self.consortium


class SiteKit(Kit):
    """Hold a site's kit.toml."""

    headline: ClassVar[str] = "A site's kit. Fill in data-path; everything else comes from the coordinator."

    role: Literal["site"] = "site"
    site: Name = Field(description="this site's name")
    server: Host = Field(description="the coordinator's machine")
    port: Port = Field(description="its port for sites")
    data_path: str = Field(
        "",
        description="FILL IN: the folder with site.toml and the data; relative to this folder, or absolute",
    )
    ports: SitePorts = SitePorts()

    @property
    def server_address(self) -> str:
        """Return HOST:PORT for ``flower-supernode --superlink``."""
        return join_address(self.server, self.port)

    @property
    def runtime_address(self) -> str:
        """Return HOST:PORT of the SuperNode's Runtime API, for the executor."""
        return join_address(LOOPBACK, self.ports.runtime_port)

    @property
    def metrics_endpoint(self) -> tuple[str, int] | None:
        """Return address and port of /metrics, or None where the kit wants none (port 0)."""
        return (self.ports.metrics_address, self.ports.metrics_port) if self.ports.metrics_port else None

    @property
    def node_key(self) -> Path:
        """Return the path of the node's private key (0600, OpenSSH form), made by ``fedbags site keygen``."""
        return self.folder / "node.key"

    @property
    def node_public_key(self) -> Path:
        """Return the path of the node's public key, the one file that goes back to the coordinator."""
        return self.folder / "node.pub"

    def approve(self, content: bytes) -> Self:
        """Approve an app by storing its bytes in app/ and its hash in kit.toml.

        A running executor reads kit.toml before each task, so the approval holds from the next one.

        Returns:
            The kit as it is now.

        Raises:
            OSError: the kit cannot be written; it approves what it approved before.
        """
        self.app.parent.mkdir(parents=True, exist_ok=True)
        # The bytes go first. If the second step fails, kit.toml still pins the hash that it pinned before.
        write_bytes(self.app, content, 0o600)
        approved = self.model_copy(update={"app_hash": app_hash(content)}).at(self.folder)
        approved.save()
        return approved

    @property
    def data(self) -> Path:
        """Return the site's data folder, absolute.

        Raises:
            UserError: data-path is not filled in, or is no folder with a site.toml.
        """
        if not self.data_path:
            raise UserError(
                f"{self.folder / KIT_FILE}: data-path is empty. Fill in the folder that holds site.toml and "
                "the data of this site (README.md in the kit shows how)."
            )
        folder = (self.folder / Path(self.data_path).expanduser()).resolve()
        require_file(
            folder / "site.toml",
            "the site file",
            f"data-path in {self.folder / KIT_FILE} must be a site folder; `fedbags site check` reads it.",
        )
        return folder


def app_hash(content: bytes) -> str:
    """Return the SHA-256 of an app's bytes as 64 hexadecimal digits, the form of ``app-hash`` in kit.toml."""
    return hashlib.sha256(content).hexdigest()


def read_kit(folder: Path) -> CoordinatorKit | SiteKit:
    """Read the kit in ``folder``, be it the coordinator's or a site's.

    Raises:
        UserError: as ``Kit.load``.
    """
    path = folder / KIT_FILE
    require_file(path, "the kit", "Give the folder that `fedbags provision` wrote for this machine.")
    return (SiteKit if read_toml(path).get("role") == "site" else CoordinatorKit).load(folder)


def _check_version(version: Any, path: Path) -> None:
    if version == _KIT_VERSION:
        return
    if isinstance(version, int) and version < _KIT_VERSION:
        raise UserError(
            f"{path} has kit-version {version}, and this fedbags runs version {_KIT_VERSION}: "
            "the kit is older. Ask the coordinator for a new kit (`fedbags provision` writes it) and move "
            "node.key into it."
        )
    if isinstance(version, int):
        raise UserError(
            f"{path} has kit-version {version}, and this fedbags knows version {_KIT_VERSION}: "
            "the kit is newer. Upgrade fedbags on this machine."
        )
    raise UserError(f"{path} has no kit-version: it is not a kit that `fedbags provision` wrote")
