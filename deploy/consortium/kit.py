"""kit.toml, and where the files of a kit lie: a kit is the folder that one party starts from.

Everything that runs from a kit reads it through here. Nothing here reads a key or a certificate, or starts a
process. There is no key that switches TLS or node keys off.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from common.config_tables import Section
from common.errors import UserError, require_file
from deploy.consortium.settings import (
    LOOPBACK,
    Hash,
    Host,
    Name,
    Port,
    ServerSettings,
    SitePorts,
    join_address,
)
from deploy.consortium.toml_file import commented, read_toml, validated, write_text

KIT_FILE = "kit.toml"
KIT_VERSION = 1
"""Raised whenever a kit of the version before can no longer be run as it is."""


class Kit(Section):
    """What both kits' kit.toml say, and the folder that they were read from."""

    role: str
    kit_version: int = Field(KIT_VERSION, description="form of this folder")
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
        _check_version(data.get("kit-version"), path)
        expected = cls.model_fields["role"].default
        if data.get("role") != expected:
            raise UserError(
                f"{path} is a kit for role {data.get('role')!r}, and this needs role {expected!r}: "
                "give the other kit's folder"
            )
        return validated(cls, data, path).at(folder)

    def at(self, folder: Path) -> Self:
        """The same kit, in ``folder``."""
        kit = self.model_copy()
        kit._folder = folder.absolute()
        return kit

    def save(self) -> None:
        """Write kit.toml into the kit's folder in one step, each key with its meaning above it."""
        write_text(self.folder / KIT_FILE, self.to_toml())

    def to_toml(self) -> str:
        """kit.toml's text, commented."""
        return f"# {self.headline}\n" + commented(self)

    @property
    def folder(self) -> Path:
        """The kit's folder, absolute."""
        return self._folder

    @property
    def ca_certificate(self) -> Path:
        """The consortium's CA certificate: what this party trusts."""
        return self.folder / "ca.crt"

    @property
    def app(self) -> Path:
        """The app as it was provisioned (a Flower App Bundle), whose SHA-256 is ``app_hash``."""
        return self.folder / "app" / "fedbags.fab"

    @property
    def superexec_secret(self) -> Path:
        """The secret that SuperExec shows to the runtime beside it (0600)."""
        return self.folder / "superexec.secret"

    @property
    def state(self) -> Path:
        """What the processes keep: databases, pid files, runs. Made at run time."""
        return self.folder / "state"

    @property
    def logs(self) -> Path:
        """One log per process. Made at run time."""
        return self.folder / "logs"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of the processes of this kit."""
        return self.folder / "flower"


class CoordinatorKit(Kit):
    """The coordinator's kit.toml."""

    headline: ClassVar[str] = (
        "The coordinator's kit. Written by `fedbags provision`; keep the folder private."
    )

    role: Literal["coordinator"] = "coordinator"
    sites: tuple[Name, ...] = Field((), description="every site of the consortium, with or without its key")
    server: ServerSettings

    @property
    def server_certificate(self) -> Path:
        """The server's certificate, issued by the consortium's CA."""
        return self.folder / "server.crt"

    @property
    def server_key(self) -> Path:
        """The server's private key (0600)."""
        return self.folder / "server.key"

    @property
    def nodes(self) -> Path:
        """The folder of the sites' public keys and certificates."""
        return self.folder / "nodes"

    @property
    def registered_sites(self) -> tuple[str, ...]:
        """The sites whose keys are in nodes/, by name: those that may connect."""
        return tuple(sorted(path.stem for path in self.nodes.glob("*.pub")))

    def node_public_key(self, site: str) -> Path:
        """A site's public key in OpenSSH form, as ``flwr supernode register`` reads it."""
        return self.nodes / f"{site}.pub"

    def node_certificate(self, site: str) -> Path:
        """A site's certificate: its public key, with its name as CN, signed by the CA."""
        return self.nodes / f"{site}.crt"

    @property
    def nginx_configuration(self) -> Path:
        """What nginx is started with."""
        return self.folder / "nginx.conf"

    @property
    def database(self) -> Path:
        """The SuperLink's SQLite state."""
        return self.state / "flower.db"

    @property
    def statements(self) -> Path:
        """The last privacy statement of each site, over all runs."""
        return self.state / "statements"

    @property
    def runs(self) -> Path:
        """The folder of run folders that ServerApps write."""
        return self.state / "runs"

    @property
    def connection(self) -> str:
        """The name of the Flower connection in flower/config.toml."""
        return self.consortium


class SiteKit(Kit):
    """A site's kit.toml."""

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
        """HOST:PORT for ``flower-supernode --superlink``."""
        return join_address(self.server, self.port)

    @property
    def runtime_address(self) -> str:
        """HOST:PORT of the SuperNode's Runtime API, for the executor."""
        return join_address(LOOPBACK, self.ports.runtime_port)

    @property
    def node_key(self) -> Path:
        """The node's private key (0600, OpenSSH form), made here by ``fedbags site keygen``."""
        return self.folder / "node.key"

    @property
    def node_public_key(self) -> Path:
        """The node's public key: the one file that goes back to the coordinator."""
        return self.folder / "node.pub"

    @property
    def data(self) -> Path:
        """The site's data folder, absolute.

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


def read_kit(folder: Path) -> CoordinatorKit | SiteKit:
    """The kit in ``folder``, whichever it is.

    Raises:
        UserError: as ``Kit.load``.
    """
    path = folder / KIT_FILE
    require_file(path, "the kit", "Give the folder that `fedbags provision` wrote for this machine.")
    return (SiteKit if read_toml(path).get("role") == "site" else CoordinatorKit).load(folder)


def _check_version(version: Any, path: Path) -> None:
    if version == KIT_VERSION:
        return
    if isinstance(version, int) and version < KIT_VERSION:
        raise UserError(
            f"{path} has kit-version {version}, and this fedbags runs version {KIT_VERSION}: "
            "the kit is older. Ask the coordinator for a new kit (`fedbags provision` writes it) and move "
            "node.key into it."
        )
    if isinstance(version, int):
        raise UserError(
            f"{path} has kit-version {version}, and this fedbags knows version {KIT_VERSION}: "
            "the kit is newer. Upgrade fedbags on this machine."
        )
    raise UserError(f"{path} has no kit-version: it is not a kit that `fedbags provision` wrote")
