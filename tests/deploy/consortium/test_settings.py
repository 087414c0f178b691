"""consortium.toml and kit.toml: what is accepted, what is refused and how; both survive being written."""

import ipaddress
import stat
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, UserError
from common.files import write_text
from deploy.consortium.kit import _KIT_VERSION, CoordinatorKit, SiteKit, read_kit
from deploy.consortium.settings import (
    ConsortiumSettings,
    ServerSettings,
    SitePorts,
    _valid_host,
    _valid_name,
    valid_site,
)

GOOD = """
name = "lesions-2026"
[server]
hosts = ["fl.example.org", "10.0.0.5"]
port = 8443
admin-port = 9091
[sites.charite]
public-key = "keys/charite.pub"
[sites.north]
runtime-port = 9194
"""
HASH = "a" * 64


def load(folder: Path, text: str) -> ConsortiumSettings:
    path = folder / "consortium.toml"
    path.write_text(text, encoding="utf-8")
    return ConsortiumSettings.load(path)


def site_kit(folder: Path) -> SiteKit:
    return SiteKit(consortium="c", app_hash=HASH, site="north", server="fl.example.org", port=8443).at(folder)


def test_settings_are_read_with_their_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path, GOOD)
    assert settings.server.public_address == "fl.example.org:8443"
    assert settings.server.superlink_address == "127.0.0.1:9091"
    assert settings.sites["charite"].public_key == "keys/charite.pub"
    assert (settings.sites["north"].runtime_port, settings.sites["charite"].runtime_port) == (9194, 9094)
    assert settings.server.certificate_hosts == ("fl.example.org", "10.0.0.5", "127.0.0.1", "localhost")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("port = 8443", "port = 70000", "server.port = 70000"),
        ("port = 8443", "port = 0", "server.port = 0"),
        ("port = 8443", 'port = "8443"', "server.port = '8443'"),
        ("port = 8443", "port = 9091", "port and admin-port are both 9091"),
        ("port = 8443", "prot = 8443", "unknown key 'server.prot'; did you mean 'server.port'?"),
        ("port = 8443", "insecure = true", "unknown key 'server.insecure'"),
        ("port = 8443", 'admin-address = "0.0.0.0"', "would open the Control API"),
        ("port = 8443", 'admin-address = "fl.example.org"', "give an IP address"),
        ('["fl.example.org", "10.0.0.5"]', "[]", "hosts is empty"),
        ('"10.0.0.5"', '"https://fl.example.org"', "server.hosts.1 = 'https://fl.example.org'"),
        ('"10.0.0.5"', '"10.0.0.500"', "server.hosts.1 = '10.0.0.500'"),
        ("[sites.north]", '[sites."../north"]', "a name has 1 to 63 letters"),
        ("[sites.north]", '[sites."no rth"]', "a name has 1 to 63 letters"),
        ("[sites.north]", "[sites.server]", "a site cannot be called 'server'"),
        ("[sites.north]", "[sites.charite]", "cannot be read as TOML"),
        ("[sites.north]", "[sites.Charite]", "differ only in capitals"),
        ("runtime-port = 9194", "runtime-port = 9095", "runtime-port and metrics-port are both 9095"),
        ('name = "lesions-2026"', "", "key 'name' is missing"),
        ('name = "lesions-2026"', 'name = "l 2026"', "name = 'l 2026'"),
    ],
)
def test_each_mistake_is_one_clear_error(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert says in str(error.value)
    assert "consortium.toml" in str(error.value)


def test_missing_settings_are_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        ConsortiumSettings.load(tmp_path / "consortium.toml")


@given(st.text(max_size=70))
def test_an_accepted_name_is_safe_as_a_folder_and_a_certificates_name(name: str) -> None:
    try:
        accepted = _valid_name(name)
    except ValueError:
        return
    assert accepted == name
    assert Path(name).name == name
    assert name.isascii()
    assert not set(name) & set(" ./\\\"'$`\n,=")
    assert 1 <= len(name) <= 63


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,20}[A-Za-z0-9])?", fullmatch=True))
def test_usual_names_are_accepted(name: str) -> None:
    assert _valid_name(name) == name


@given(st.ip_addresses())
def test_every_ip_address_is_a_host(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert _valid_host(str(address)) == str(address)


@pytest.mark.parametrize(
    "host", ["a:8443", "a/b", "", "-a", "a..b", "*.example.org", "a b", "1.2.3", "a" * 64]
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="a host is"):
        _valid_host(host)


def test_sites_cannot_have_the_coordinators_names() -> None:
    for name in ("server", "Coordinator"):
        with pytest.raises(ValueError, match="cannot be called"):
            valid_site(name)


ports = st.integers(1, 65535)
names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@hypothesis.settings(max_examples=25, deadline=None)  # each kit is synced to the disk
@given(names, names, ports, st.text(max_size=30), st.lists(ports, min_size=2, max_size=2, unique=True))
def test_a_site_kit_survives_being_written(
    tmp_path_factory: pytest.TempPathFactory, consortium: str, site: str, port: int, data: str, own: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("kit")
    kit = SiteKit(
        consortium=consortium,
        app_hash=HASH,
        site=site,
        server="::1",
        port=port,
        data_path=data.replace("\r", ""),
        ports=SitePorts(runtime_port=own[0], metrics_port=own[1]),
    ).at(folder)
    kit.save()
    assert SiteKit.load(folder) == kit
    assert SiteKit.load(folder).server_address == f"[::1]:{port}"


def test_a_coordinator_kit_survives_being_written(tmp_path: Path) -> None:
    server = ServerSettings(hosts=("a", "10.0.0.1"), port=443, admin_address="10.0.0.1", admin_port=1)
    kit = CoordinatorKit(consortium="c", app_hash=HASH, sites=("x", "y"), server=server).at(tmp_path)
    kit.save()
    found = read_kit(tmp_path)
    assert found == kit
    assert isinstance(found, CoordinatorKit)
    assert found.folder == tmp_path
    assert found.server_key == tmp_path / "server.key"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"kit-version = {_KIT_VERSION - 1}", "the kit is older"),
        (f"kit-version = {_KIT_VERSION + 1}", "the kit is newer"),
        ("", "has no kit-version"),
    ],
)
def test_a_kit_of_another_version_is_refused(tmp_path: Path, line: str, says: str) -> None:
    text = site_kit(tmp_path).to_toml().replace(f"kit-version = {_KIT_VERSION}", line)
    (tmp_path / "kit.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        SiteKit.load(tmp_path)


def test_the_other_partys_kit_is_refused(tmp_path: Path) -> None:
    site_kit(tmp_path).save()
    with pytest.raises(UserError, match="role 'site'"):
        CoordinatorKit.load(tmp_path)
    with pytest.raises(UserError, match="the kit not found"):
        SiteKit.load(tmp_path / "elsewhere")


def test_the_data_folder_must_be_filled_in_and_be_a_site(tmp_path: Path) -> None:
    kit = site_kit(tmp_path / "kit")
    with pytest.raises(UserError, match="data-path is empty"):
        _ = kit.data
    filled = kit.model_copy(update={"data_path": "../data"})
    with pytest.raises(UserError, match="the site file not found"):
        _ = filled.data
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "site.toml").touch()
    assert filled.data == tmp_path / "data"


def test_a_file_is_written_whole_with_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("old", encoding="utf-8")
    write_text(path, "new", 0o600)
    assert path.read_text(encoding="utf-8") == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text(encoding="utf-8") == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]
