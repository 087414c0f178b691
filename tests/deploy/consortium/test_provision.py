"""`fedbags provision` and `site keygen`: what is in the kits, that keys stay, and one clear error per "
"mistake."""

import hashlib
import importlib
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import get_fab_metadata, load_certificate_in_connection
from flwr.cli.flower_config import read_superlink_connection
from flwr.proto.control_pb2 import StartRunRequest, StartRunResponse
from pydantic import BaseModel, ConfigDict, Field

from client.site import SiteConfig, SitePolicy
from common.errors import UserError
from common.pki import read_node_key
from deploy.cli import main
from deploy.consortium.app import build_bundle
from deploy.consortium.authority import Authority
from deploy.consortium.checks import check_coordinator_kit, check_site_kit
from deploy.consortium.kit import CoordinatorKit, SiteKit
from deploy.consortium.kits import Kits, make_node_key
from deploy.consortium.pki import (
    certified_hosts,
    check_certificate,
    read_certificate,
    read_public_key,
    write_public_key,
)
from deploy.consortium.provision import provision
from deploy.consortium.settings import SitePorts

ROOT = Path(__file__).parents[3]
SETTINGS = """
name = "lesions-2026"
[server]
hosts = ["fl.example.org", "10.0.0.5"]
[sites.charite]
[sites.north]
runtime-port = 9194
metrics-port = 9195
"""
SECRETS = {"ca.key", "server.key", "node.key", "superexec.secret"}

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
"""Flower's build still names its patterns as pathspec deprecates."""


@pytest.fixture(scope="session")
def bundle() -> bytes:
    return build_bundle()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product's files, without an environment beside them: Flower resolves every file that it finds."""
    folder = tmp_path_factory.mktemp("checkout") / "fedbags"
    folder.mkdir()
    for name in ("client", "common", "server", "deploy"):
        shutil.copytree(ROOT / name, folder / name)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "consortium.toml"
    path.write_text(SETTINGS, encoding="utf-8")
    return path


@pytest.fixture
def kits(settings: Path, tmp_path: Path) -> Path:
    """Kits of a coordinator and two sites, without keys of the sites."""
    provision(settings, tmp_path / "KITS")
    return tmp_path / "KITS"


@pytest.fixture
def trial(settings: Path, tmp_path: Path) -> Path:
    """The same with the sites' keys made here."""
    provision(settings, tmp_path / "KITS", keys_here=True)
    return tmp_path / "KITS"


def public_key(folder: Path, name: str = "node.pub") -> Path:
    write_public_key(folder / name, ec.generate_private_key(ec.SECP384R1()).public_key(), "x")
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of the command line."""
    monkeypatch.setattr(sys, "argv", ["fedbags", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        main.main()
    return int(status.value.code or 0)


def test_the_kits_have_everything_and_no_site_key(kits: Path) -> None:
    found = set(contents(kits))
    common = {"kit.toml", "ca.crt", "app/fedbags.fab", "compose.yaml", "README.md"}
    coordinator = common | {
        "server.crt",
        "server.key",
        "superexec.secret",
        "flower/config.toml",
        "nginx.conf",
    }
    site = common | {"site.toml", "run.sh", "fedbags-site.service"}
    assert found == (
        {f"authority/{name}" for name in ("ca.key", "ca.crt", "issued.json")}
        | {f"coordinator/{name}" for name in coordinator | {"systemd/fedbags-coordinator.service"}}
        | {f"sites/{name}/{file}" for name in ("charite", "north") for file in site}
    )
    assert (kits / "coordinator" / "nodes").is_dir()


def test_the_kits_say_what_the_settings_say(kits: Path) -> None:
    coordinator, north = CoordinatorKit.load(kits / "coordinator"), SiteKit.load(kits / "sites" / "north")
    assert coordinator.sites == ("charite", "north")
    assert coordinator.registered_sites == ()
    assert north.server_address == coordinator.server.public_address == "fl.example.org:8443"
    assert (north.site, north.ports) == ("north", SitePorts(runtime_port=9194, metrics_port=9195))
    assert north.app_hash == coordinator.app_hash == hashlib.sha256(coordinator.app.read_bytes()).hexdigest()
    certificate = read_certificate(coordinator.server_certificate)
    assert certified_hosts(certificate) == {"fl.example.org", "10.0.0.5", "127.0.0.1", "localhost"}
    check_coordinator_kit(coordinator)


def test_a_trial_is_complete_and_says_that_it_is_one(trial: Path) -> None:
    coordinator = CoordinatorKit.load(trial / "coordinator")
    assert coordinator.registered_sites == ("charite", "north")
    check_coordinator_kit(coordinator)
    for name in coordinator.sites:
        kit = SiteKit.load(trial / "sites" / name)
        check_site_kit(kit)
        assert read_public_key(coordinator.node_public_key(name)) == read_node_key(kit.node_key).public_key()
        assert "For trials only" in (kit.folder / "README.md").read_text(encoding="utf-8")


def test_secrets_are_the_owners_alone_even_with_an_open_umask(settings: Path, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        provision(settings, tmp_path / "KITS", keys_here=True)
    finally:
        os.umask(before)
    seen = set()
    for path in (tmp_path / "KITS").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.name in SECRETS:
            assert mode == 0o600, path
            seen.add(path.name)
        elif path.is_file():
            assert mode == (0o755 if path.name == "run.sh" else 0o644), path
    assert seen == SECRETS
    for folder in ("authority", "coordinator", "sites/north"):
        assert stat.S_IMODE((tmp_path / "KITS" / folder).stat().st_mode) == 0o700


def test_no_secret_is_in_another_file(trial: Path) -> None:
    files = contents(trial)
    secrets = {
        line
        for name, content in files.items()
        if Path(name).name in SECRETS
        for line in content.splitlines()
        if len(line) > 40 and b"-----" not in line
    }
    assert len(secrets) > 10
    for name, content in files.items():
        if Path(name).name not in SECRETS:
            assert not [line for line in secrets if line in content], name


def test_no_path_of_this_machine_is_in_a_kit_but_flowers_own(trial: Path) -> None:
    for name, content in contents(trial).items():
        if name.endswith(".fab"):
            continue
        for path in (trial.parent, ROOT, Path.home(), Path(sys.prefix)):
            if name != "coordinator/flower/config.toml" or path != trial.parent:
                assert str(path).encode() not in content or path == Path("/"), name


def test_a_second_run_changes_nothing(settings: Path, trial: Path) -> None:
    before = contents(trial)
    changes = provision(settings, trial)
    assert changes.written == []
    assert contents(trial) == before


def test_a_later_run_adds_what_is_missing_and_nothing_else(settings: Path, trial: Path) -> None:
    before = contents(trial)
    for name in ("coordinator/README.md", "sites/north/compose.yaml", "coordinator/superexec.secret"):
        (trial / name).unlink()
    settings.write_text(SETTINGS + "[sites.south]\n", encoding="utf-8")
    changes = provision(settings, trial)
    after = contents(trial)
    new = {name for name in after if name.startswith("sites/south/")}
    assert new
    assert {path.relative_to(trial).as_posix() for path in changes.written} == new | {
        "coordinator/README.md",
        "sites/north/compose.yaml",
        "coordinator/superexec.secret",
        "coordinator/kit.toml",
    }
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"coordinator/superexec.secret", "coordinator/kit.toml"}
    assert changes.waiting == ("south",)
    assert CoordinatorKit.load(trial / "coordinator").sites == ("charite", "north", "south")


def test_changed_settings_are_refused_and_taken_over_when_asked(settings: Path, trial: Path) -> None:
    kit = SiteKit.load(trial / "sites" / "north")
    kit.model_copy(update={"data_path": "/srv/data"}).at(kit.folder).save()
    before = contents(trial)
    settings.write_text(SETTINGS.replace('"10.0.0.5"]', '"10.0.0.6"]\nport = 9443'), encoding="utf-8")
    with pytest.raises(UserError, match=r"server.port was 8443 and is 9443"):
        provision(settings, trial)
    assert contents(trial) == before
    provision(settings, trial, update=True)
    after, coordinator = contents(trial), CoordinatorKit.load(trial / "coordinator")
    north = SiteKit.load(kit.folder)
    assert (north.port, north.data_path) == (9443, "/srv/data")
    assert "9443" in after["coordinator/nginx.conf"].decode()
    assert "10.0.0.6" in certified_hosts(read_certificate(coordinator.server_certificate))
    check_coordinator_kit(coordinator)
    for name in before:
        if Path(name).name in SECRETS or name.endswith((".pub", ".fab")):
            assert after[name] == before[name], name


def test_public_keys_of_the_settings_are_registered(settings: Path, tmp_path: Path) -> None:
    public_key(tmp_path, "charite.pub")
    settings.write_text(
        SETTINGS.replace("[sites.charite]", '[sites.charite]\npublic-key = "charite.pub"'), encoding="utf-8"
    )
    changes = provision(settings, tmp_path / "KITS")
    assert changes.waiting == ("north",)
    kit = CoordinatorKit.load(tmp_path / "KITS" / "coordinator")
    assert kit.registered_sites == ("charite",)
    check_coordinator_kit(kit)


def test_one_key_for_two_sites_is_refused_before_anything_is_written(settings: Path, tmp_path: Path) -> None:
    public_key(tmp_path, "a.pub")
    text = SETTINGS.replace("[sites.charite]", '[sites.charite]\npublic-key = "a.pub"')
    settings.write_text(
        text.replace("[sites.north]", '[sites.north]\npublic-key = "a.pub"'), encoding="utf-8"
    )
    with pytest.raises(UserError, match="'charite' and 'north' have one key"):
        provision(settings, tmp_path / "KITS")
    assert not (tmp_path / "KITS").exists()


def test_a_site_joins_leaves_and_comes_back_with_a_new_key(kits: Path, tmp_path: Path) -> None:
    first, second = public_key(tmp_path, "1.pub"), public_key(tmp_path, "2.pub")
    Kits.open(kits).add_site("south", SitePorts())
    Kits.open(kits).add_key("south", first)
    kit = CoordinatorKit.load(kits / "coordinator")
    assert kit.registered_sites == ("south",)
    check_certificate(
        read_certificate(kit.node_certificate("south")), read_certificate(kit.ca_certificate), "it"
    )
    with pytest.raises(UserError, match="has another key already"):
        Kits.open(kits).add_key("south", second)
    assert Kits.open(kits).add_key("south", first).written == []

    assert Kits.open(kits).revoke("south").waiting == ("charite", "north")
    kit = CoordinatorKit.load(kits / "coordinator")
    assert (kit.registered_sites, kit.sites) == ((), ("charite", "north"))
    assert not list(kit.nodes.iterdir())
    assert Authority.open(kits / "authority").issued()[-1].revoked is not None
    with pytest.raises(UserError, match="was revoked on"):
        Kits.open(kits).add_key("south", first)

    Kits.open(kits).add_key("south", second)
    assert CoordinatorKit.load(kits / "coordinator").registered_sites == ("south",)


def test_renewal_keeps_the_keys_and_moves_the_end(trial: Path) -> None:
    kit = CoordinatorKit.load(trial / "coordinator")
    paths = [kit.server_certificate, kit.node_certificate("charite"), kit.node_certificate("north")]
    before = [read_certificate(path) for path in paths]
    Kits.open(trial).renew(days=700)
    after = [read_certificate(path) for path in paths]
    for old, new in zip(before, after, strict=True):
        assert new.public_key() == old.public_key()
        assert (new.not_valid_after_utc - old.not_valid_after_utc).days in (301, 302)
        assert new.serial_number != old.serial_number
    check_coordinator_kit(kit)
    assert Kits.open(trial).renew(["north"], 10).written == [paths[2]]
    assert read_certificate(paths[1]) == after[1]


def test_a_certificate_holds_as_long_as_the_settings_say_whoever_issues_it(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a key comes later and when certificates are renewed, and unless --days says otherwise."""
    settings.write_text(settings.read_text() + "[validity]\ncertificate-days = 30\n")
    out = tmp_path / "KITS"
    provision(settings, out)
    kit = CoordinatorKit.load(out / "coordinator")

    def days(path: Path) -> int:
        found = read_certificate(path)
        return (found.not_valid_after_utc - found.not_valid_before_utc).days

    assert days(kit.server_certificate) == 30
    assert run(monkeypatch, "provision", "add-key", out, "charite", public_key(tmp_path)) == 0
    assert days(kit.node_certificate("charite")) == 30
    kit.server_certificate.unlink()
    kit.server_key.unlink()
    provision(settings, out)
    assert run(monkeypatch, "provision", "renew", out) == 0
    assert (days(kit.server_certificate), days(kit.node_certificate("charite"))) == (30, 30)
    assert run(monkeypatch, "provision", "renew", out, "server", "--days", 5) == 0
    assert days(kit.server_certificate) == 5


def test_a_coordinators_kit_of_0_1_certifies_as_it_did(kits: Path, tmp_path: Path) -> None:
    """It does not say how long."""
    path = kits / "coordinator" / "kit.toml"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "certificate" not in line))
    Kits.open(kits).add_key("charite", public_key(tmp_path))
    kit = CoordinatorKit.load(kits / "coordinator")
    found = read_certificate(kit.node_certificate("charite"))
    assert (found.not_valid_after_utc - found.not_valid_before_utc).days == 398


def test_an_expired_certificate_stops_a_start_and_not_its_renewal(
    trial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deploy.consortium import pki

    kit = CoordinatorKit.load(trial / "coordinator")
    real = pki.utc_now

    def last_year() -> pki.datetime:
        return real() - pki.timedelta(days=300)

    monkeypatch.setattr(pki, "utc_now", last_year)
    Kits.open(trial).renew(days=200)
    monkeypatch.setattr(pki, "utc_now", real)
    with pytest.raises(UserError, match="expired on"):
        check_coordinator_kit(kit)
    Kits.open(trial).renew()
    check_coordinator_kit(kit)


MISTAKES: dict[str, Callable[[Kits, Path], object]] = {
    "has no site 'chartie'; did you mean 'charite'?": lambda kits, key: kits.add_key("chartie", key),
    "holds a private key": lambda kits, _: kits.add_key("charite", kits.coordinator.server_key),
    "have one key": lambda kits, key: kits.add_key("charite", key),
    "has no key yet": lambda kits, _: kits.renew(["north", "charite"]),
    "has a site 'Charite' already": lambda kits, _: kits.add_site("Charite", SitePorts()),
    "site name '../x'": lambda kits, _: kits.add_site("../x", SitePorts()),
    "site name 'server'": lambda kits, _: kits.add_site("server", SitePorts()),
    "has no site 'south'": lambda kits, _: kits.revoke("south"),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_each_mistake_of_the_coordinator_is_one_clear_error(kits: Path, tmp_path: Path, says: str) -> None:
    key = public_key(tmp_path)
    Kits.open(kits).add_key("north", key)
    before, opened = contents(kits), Kits.open(kits)
    with pytest.raises(UserError, match=re.escape(says)):
        MISTAKES[says](opened, key)
    assert contents(kits) == before


def _damage(kits: Path, what: str) -> None:
    coordinator = kits / "coordinator"
    match what:
        case "authority":
            shutil.rmtree(kits / "authority")
        case "ca.key":
            (kits / "authority" / "ca.key").unlink()
        case "mode":
            (coordinator / "server.key").chmod(0o640)
        case "app":
            (coordinator / "app" / "fedbags.fab").write_bytes(b"other")
        case "server.key":
            (coordinator / "server.key").unlink()
        case "server.crt":
            shutil.copy(coordinator / "nodes" / "north.crt", coordinator / "server.crt")
        case "node":
            shutil.copy(coordinator / "nodes" / "north.pub", coordinator / "nodes" / "charite.pub")
        case "mixed":
            other = Authority.create(kits.parent / "other", "lesions-2026", 10).folder
            shutil.copy(other / "ca.crt", kits / "sites" / "north" / "ca.crt")
        case "site":
            path = kits / "sites" / "north" / "kit.toml"
            path.write_text(path.read_text(encoding="utf-8").replace("lesions", "other"), encoding="utf-8")
        case _:
            path = coordinator / "kit.toml"
            path.write_text(path.read_text(encoding="utf-8").replace("version = 1", "version = 0"), "utf-8")


DAMAGE = {
    "authority": "is not empty and has no authority folder",
    "ca.key": "authority is incomplete",
    "mode": r"server.key can be read by others \(mode 0640\)",
    "app": "is not the app that kit.toml names",
    "server.key": "the private key not found",
    "server.crt": "is not the key of server.crt",
    "node": "is not the key in charite.crt",
    "mixed": "is not this authority's certificate",
    "site": "is a kit of another consortium",
    "version": "the kit is older",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_half_changed_folder_is_refused_and_left_alone(settings: Path, trial: Path, what: str) -> None:
    _damage(trial, what)
    before = contents(trial)
    with pytest.raises(UserError, match=DAMAGE[what]):
        provision(settings, trial, keys_here=True)
    assert contents(trial) == before


def test_another_consortium_or_a_folder_of_something_else_is_refused(settings: Path, kits: Path) -> None:
    settings.write_text(SETTINGS.replace("lesions-2026", "other"), encoding="utf-8")
    with pytest.raises(UserError, match="has the kits of consortium 'lesions-2026'"):
        provision(settings, kits)
    with pytest.raises(UserError, match="is not empty"):
        provision(settings, kits.parent)


def test_a_site_makes_its_key_once(kits: Path) -> None:
    kit = SiteKit.load(kits / "sites" / "north")
    with pytest.raises(UserError, match="fedbags site keygen"):
        check_site_kit(kit)
    assert make_node_key(kit) == kit.node_public_key
    check_site_kit(kit)
    before = contents(kit.folder)
    with pytest.raises(UserError, match="never overwritten"):
        make_node_key(kit)
    assert contents(kit.folder) == before


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("ca.crt", "the consortium's CA certificate not found"),
        ("node.key", "this site's key not found"),
        ("superexec.secret", "the secret between SuperExec and its runtime not found"),
    ],
)
def test_what_a_site_lacks_is_named(trial: Path, what: str, says: str) -> None:
    kit = SiteKit.load(trial / "sites" / "north")
    (kit.folder / what).unlink()
    with pytest.raises(UserError, match=says):
        check_site_kit(kit)


@pytest.mark.parametrize("what", ["node.key", "superexec.secret"])
def test_a_secret_that_others_can_read_stops_a_site(trial: Path, what: str) -> None:
    kit = SiteKit.load(trial / "sites" / "north")
    (kit.folder / what).chmod(0o644)
    with pytest.raises(UserError, match=f"{what} can be read by others"):
        check_site_kit(kit)


def test_the_app_is_what_flower_makes_of_a_checkout_and_of_the_unpacked_file(
    bundle: bytes, checkout: Path, tmp_path: Path
) -> None:
    assert build_fab_from_disk(checkout) == bundle
    zipfile.ZipFile(io.BytesIO(bundle)).extractall(tmp_path / "app")
    for path in (tmp_path / "app").rglob("*"):
        os.utime(path, (0, 0))
    assert build_fab_from_disk(tmp_path / "app") == bundle
    assert get_fab_metadata(bundle) == ("fedbags/fedbags", "0.1.0")


def test_the_app_holds_the_three_packages_alone(bundle: bytes) -> None:
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert {name.split("/")[0] for name in names} == {"pyproject.toml", "common", "client", "server", ".info"}
    assert "server/app.py" in names


def test_a_new_app_changes_the_coordinators_pin_and_no_sites(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SiteKit.load(kits / "sites" / "north")
    monkeypatch.setattr("deploy.consortium.kits.build_bundle", lambda added: b"another app")
    changes = Kits.open(kits).update_app()
    kit = CoordinatorKit.load(kits / "coordinator")
    assert kit.app.read_bytes() == b"another app"
    assert changes.app_hash == kit.app_hash == hashlib.sha256(b"another app").hexdigest()
    assert SiteKit.load(kits / "sites" / "north") == before
    Kits.open(kits)


def test_an_installed_wheel_makes_the_same_kits(bundle: bytes, tmp_path: Path) -> None:
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", build, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    installed = tmp_path / "installed"
    with zipfile.ZipFile(tmp_path / made.stdout.strip()) as wheel:
        wheel.extractall(installed)
    (tmp_path / "consortium.toml").write_text(SETTINGS, encoding="utf-8")
    command = "import deploy; from deploy.cli.main import main; print(deploy.__file__, flush=True); main()"
    result = subprocess.run(
        [sys.executable, "-c", command, "provision", "consortium.toml", "--out", "KITS"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(installed))
    assert (tmp_path / "KITS/coordinator/app/fedbags.fab").read_bytes() == bundle
    assert (tmp_path / "KITS/sites/north/run.sh").exists()


def test_flower_reads_the_connection(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = CoordinatorKit.load(kits / "coordinator")
    monkeypatch.setenv("FLWR_HOME", str(kit.flower_home))
    connection = read_superlink_connection(kit.connection)
    assert connection.address == "127.0.0.1:9091"
    assert load_certificate_in_connection(connection) == kit.ca_certificate.read_bytes()
    assert read_superlink_connection(None).name == "lesions-2026"


def test_flwr_run_sends_the_approved_app(
    kits: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`flwr run` with the kit's connection, up to the request that it would send."""
    kit = CoordinatorKit.load(kits / "coordinator")
    zipfile.ZipFile(kit.app).extractall(tmp_path / "app")
    monkeypatch.setenv("FLWR_HOME", str(kit.flower_home))
    sent: list[StartRunRequest] = []

    class Control:
        def StartRun(self, request: StartRunRequest) -> StartRunResponse:  # noqa: N802 (Flower's name)
            sent.append(request)
            return StartRunResponse(run_id=1)

        def close(self) -> None:
            pass

    module = importlib.import_module("flwr.cli.run.run")
    monkeypatch.setattr(module, "init_http_client_from_connection", lambda _: Control())
    for app in (tmp_path / "app", checkout):
        module.run(str(app), kit.connection)
    assert len(sent) == 2
    for request in sent:
        assert request.fab.hash_str == kit.app_hash
        assert hashlib.sha256(request.fab.content).hexdigest() == kit.app_hash


def test_the_site_template_is_a_site_file_with_the_default_policy(kits: Path) -> None:
    config = SiteConfig.load(kits / "sites" / "north")
    assert config.name == "north"
    assert config.policy == SitePolicy()


class Strict(BaseModel):
    """What the compose specification says of the keys that our files use; any other key is an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Bind(Strict):
    type: Literal["bind"]
    source: str = Field(pattern=r"^(\.|/|\$\{[A-Z_]+:\?[^}]+\}$)")
    target: str = Field(pattern="^/")


class Service(Strict):
    image: str
    command: list[str]
    working_dir: str = Field(pattern="^/")
    user: str
    environment: dict[str, str]
    volumes: list[Bind]
    tmpfs: list[Annotated[str, Field(pattern="^/")]]
    ports: list[Annotated[str, Field(pattern=r"^\d+:\d+$")]] = []
    network_mode: Literal["host"] | None = None
    read_only: Literal[True]
    cap_drop: list[Literal["ALL"]]
    security_opt: list[Literal["no-new-privileges:true"]]
    init: bool
    restart: Literal["unless-stopped"]
    stop_grace_period: str = Field(pattern=r"^\d+s$")


class Compose(Strict):
    name: str = Field(pattern="^[a-z0-9][a-z0-9_-]*$")
    services: dict[str, Service]


def test_the_compose_files_are_valid_and_open_one_port(settings: Path, kits: Path) -> None:
    def read(folder: str) -> Service:
        text = (kits / folder / "compose.yaml").read_text(encoding="utf-8")
        (service,) = Compose.model_validate(yaml.safe_load(text)).services.values()
        return service

    coordinator, site = read("coordinator"), read("sites/north")
    assert coordinator.ports == ["8443:8443"]
    assert coordinator.command == ["fedbags", "server", "up", "/kit"]
    assert (site.ports, site.network_mode) == ([], None)
    assert site.command == ["fedbags", "site", "up", "/kit"]
    settings.write_text(
        SETTINGS.replace("[sites.charite]", 'admin-address = "10.0.0.5"\n[sites.charite]'), "utf-8"
    )
    provision(settings, kits, update=True)
    assert (read("coordinator").ports, read("coordinator").network_mode) == ([], "host")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(kits: Path, tmp_path: Path) -> None:
    def verify(unit: Path) -> str:
        environment = {**os.environ, "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
        result = subprocess.run(
            ["systemd-analyze", "--user", "verify", unit],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return f"{result.returncode} {result.stderr}".strip()

    units = sorted(kits.rglob("*.service"))
    assert len(units) == 3
    for unit in units:
        assert verify(unit) == "0"
    wrong = units[0].with_name("wrong.service")
    wrong.write_text(
        units[0].read_text(encoding="utf-8").replace("Restart=on-failure", "Restart=often"), "utf-8"
    )
    assert "Failed to parse" in verify(wrong)


def test_the_run_script_starts_its_own_kit_from_anywhere(kits: Path, tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "fedbags"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    moved = tmp_path / "a folder"
    shutil.move(kits / "sites" / "north", moved)
    result = subprocess.run(
        [moved / "run.sh", "--verbose"],
        cwd="/",
        env={"PATH": f"{fake.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == ["site", "up", str(moved), "--verbose"]


def test_the_commands_of_the_page_work_and_print_no_secret(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kits, password = tmp_path / "KITS", tmp_path / "password"
    password.write_text("correct horse\n", encoding="utf-8")
    guarded = ["--password-file", password]
    assert run(monkeypatch, "provision", settings, "--out", kits, *guarded) == 0
    assert run(monkeypatch, "site", "keygen", kits / "sites/north") == 0
    fingerprint = re.findall("fingerprint of north: ([0-9a-f]{64})", capfd.readouterr().out)
    assert len(fingerprint) == 1
    node = kits / "sites/north/node.pub"
    assert run(monkeypatch, "provision", "add-key", kits, "north", node, *guarded) == 0
    out = capfd.readouterr().out
    assert fingerprint[0] in out
    assert "waiting for node.pub of: charite" in out
    assert run(monkeypatch, "provision", "add-site", kits, "south", *guarded) == 0
    assert run(monkeypatch, "provision", "renew", kits, "server", *guarded) == 0
    assert run(monkeypatch, "provision", "update-app", kits, *guarded) == 0
    assert run(monkeypatch, "provision", "revoke", kits, "north", *guarded) == 0
    assert run(monkeypatch, "provision", "revoke", kits, "north") == 2
    assert run(monkeypatch, "provision", kits / "none.toml", "--out", kits) == 2
    assert run(monkeypatch, "provision", "--out", kits, kits / "none.toml") == 2
    assert run(monkeypatch, "site", "keygen", kits / "sites/north") == 2
    text = "".join(capfd.readouterr())
    assert "Traceback" not in text
    assert "horse" not in text
    for name, content in contents(kits).items():
        if Path(name).name in SECRETS:
            assert not [line for line in content.decode().splitlines() if len(line) > 40 and line in text]


def test_an_empty_password_file_is_a_mistake(
    settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").touch()
    arguments = ["--out", tmp_path / "KITS", "--password-file", tmp_path / "password"]
    assert run(monkeypatch, "provision", settings, *arguments) == 2
    assert not (tmp_path / "KITS").exists()
