"""Read consortium.toml, in which the coordinator names the sites and the addresses.

The coordinator writes it by hand. Nothing here reads a key or a certificate, or starts a process; the folders
that are made from these settings are ``kit``'s. There is no key that switches TLS or node keys off.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from common.errors import require_file
from common.settings_file import Section, read_toml, validated

LOOPBACK = "127.0.0.1"
CERTIFICATE_DAYS = 398
"""How long the certificates of server and sites hold, unless consortium.toml or --days says otherwise."""
_RESERVED = {"server", "coordinator"}
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


def _valid_name(name: str) -> str:
    """Return a consortium's or site's name if it has the form of one.

    It becomes a folder, a certificate's CN and a part of a unit's name.

    Raises:
        ValueError: it has another form.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name has 1 to 63 letters, digits, '-' or '_' and begins and ends with a letter or digit"
        )
    return name


def _valid_host(host: str) -> str:
    """Return a DNS name or an IP address in the form that will stand in the server's certificate.

    Raises:
        ValueError: it is neither.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        labels = host.split(".")
        # A name that ends in a number, such as 10.0.0.999, is an IP address with a mistake in it.
        if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdecimal():
            raise ValueError("a host is a DNS name or an IP address, without port or https://") from None
        return host.lower()


def _valid_address(address: str) -> str:
    """Return an IP address that a process can bind to.

    Raises:
        ValueError: it is no IP address.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError("give an IP address of this machine, such as 127.0.0.1") from None
    return str(parsed)


def valid_site(name: str) -> str:
    """Return a site's name if it has the form of one and is not reserved.

    Raises:
        ValueError: it has another form, or commands mean the coordinator by it.
    """
    if name.lower() in _RESERVED:
        raise ValueError(f"a site cannot be called {name!r}: commands mean the coordinator by it")
    return _valid_name(name)


Name = Annotated[str, AfterValidator(_valid_name)]
_SiteName = Annotated[str, AfterValidator(valid_site)]
Host = Annotated[str, AfterValidator(_valid_host)]
_Address = Annotated[str, AfterValidator(_valid_address)]
Port = Annotated[int, Field(ge=1, le=65535, strict=True)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_MetricsPort = Annotated[int, Field(ge=0, le=65535, strict=True)]
Days = Annotated[int, Field(ge=1, le=7300, strict=True)]


class ServerSettings(Section):
    """Hold the coordinator's addresses, of which only ``port`` is for sites."""

    hosts: tuple[Host, ...] = Field(
        description="names and addresses in the server's certificate; sites connect to the first"
    )
    port: Port = Field(8443, description="nginx with TLS: the sites' Fleet API and nothing else")
    address: _Address = Field(
        "0.0.0.0", description="address that nginx listens on; 0.0.0.0 is every IPv4 address, :: also IPv6"
    )
    admin_address: _Address = Field(
        LOOPBACK, description="address of the SuperLink itself (Control and Runtime API): never a public one"
    )
    admin_port: Port = Field(9091, description="the SuperLink's own port on admin-address")
    metrics_port: _MetricsPort = Field(9092, description="Prometheus /metrics on admin-address; 0: none")

    @model_validator(mode="after")
    def _closed(self) -> Self:
        if not self.hosts:
            raise ValueError('hosts is empty: name the machine that sites connect to, as ["fl.example.org"]')
        # Whoever reaches the Control API can start runs, register nodes and stop everything.
        if ipaddress.ip_address(self.admin_address).is_unspecified:
            raise ValueError(
                f"admin-address = {self.admin_address!r} would open the Control API, which has no login, to "
                "everyone: give 127.0.0.1 or the address of a network that only administrators reach"
            )
        _distinct_ports(self, "port", "admin_port", "metrics_port")
        return self

    @property
    def host(self) -> str:
        """Return the host that sites connect to."""
        return self.hosts[0]

    @property
    def public_address(self) -> str:
        """Return HOST:PORT of nginx, for ``flower-supernode --superlink``."""
        return join_address(self.host, self.port)

    @property
    def superlink_address(self) -> str:
        """Return HOST:PORT of the SuperLink itself, for nginx, SuperExec and ``flwr``."""
        return join_address(self.admin_address, self.admin_port)

    @property
    def certificate_hosts(self) -> tuple[str, ...]:
        """Return the hosts that the server's certificate must carry.

        They are ``hosts`` and the addresses by which the server is administered.
        """
        return tuple(dict.fromkeys((*self.hosts, self.admin_address, LOOPBACK, "localhost")))


class SitePorts(Section):
    """Hold the ports that a site's processes open on its own loopback.

    No port of a site is reached from outside.
    """

    runtime_port: Port = Field(9094, description="the SuperNode's Runtime API, on 127.0.0.1")
    metrics_port: _MetricsPort = Field(9095, description="Prometheus /metrics, on metrics-address; 0: none")
    metrics_address: _Address = Field(LOOPBACK, description="address that /metrics is served on")

    @model_validator(mode="after")
    def _apart(self) -> Self:
        _distinct_ports(self, "runtime_port", "metrics_port")
        return self


class _SiteSettings(SitePorts):
    """Hold the settings of one site of consortium.toml."""

    public_key: str = Field(
        "", description="the site's node.pub, relative to consortium.toml; empty: add it later"
    )


class _ValiditySettings(Section):
    """Hold the days that certificates are valid."""

    authority_days: Days = 3650
    certificate_days: Days = CERTIFICATE_DAYS


class ConsortiumSettings(Section):
    """Hold the settings of consortium.toml."""

    name: Name = Field(description="the consortium's name")
    server: ServerSettings
    sites: dict[_SiteName, _SiteSettings] = Field(default_factory=dict)
    validity: _ValiditySettings = _ValiditySettings()

    @model_validator(mode="after")
    def _site_names_differ(self) -> Self:
        first: dict[str, str] = {}
        for name in self.sites:
            if (other := first.setdefault(name.lower(), name)) != name:
                raise ValueError(f"sites {other!r} and {name!r} differ only in capitals: name one otherwise")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read ``consortium.toml``.

        Raises:
            UserError: the file is missing.
            ConfigError: not TOML (a site named twice, say), or faulty keys; every one is named.
        """
        require_file(path, "the consortium's settings", "docs/quickstart.md shows one to begin with.")
        return validated(cls, read_toml(path), path)


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _distinct_ports(section: Section, *fields: str) -> None:
    """Raise a ValueError where two of the named fields hold one port."""
    first: dict[int, str] = {}
    for field in fields:
        port, name = getattr(section, field), field.replace("_", "-")
        if (other := first.setdefault(port, name)) != name:
            raise ValueError(f"{other} and {name} are both {port}: every port needs its own number")
