"""What a site, or an outsider there, reaches of the coordinator: one port, the Fleet API, with a known key.

The coordinator and the sites have network namespaces of their own, joined by one cable.
"""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from common.errors import UserError
from deploy.consortium.checks import reach_server
from deploy.consortium.kit import SiteKit
from deploy.flower.processes import free_port
from tests.deployment.conftest import Consortium, write_data

pytestmark = pytest.mark.slow

SERVER, SITE = "10.213.7.1", "10.213.7.2"
REGISTERED, UNREGISTERED = "hospital-1", "hospital-2"
NOT_FOR_SITES = ("register-node", "unregister-node")
SCAN = f"""
import errno, json, socket
from concurrent.futures import ThreadPoolExecutor
def look(port):
    with socket.socket() as s:
        s.settimeout(3)
        return s.connect_ex(({SERVER!r}, port))
with ThreadPoolExecutor(64) as pool:
    found = dict(zip(range(1, 65536), pool.map(look, range(1, 65536))))
print(json.dumps([port for port, code in found.items() if code != errno.ECONNREFUSED]))
"""
ASK = """
import http.client, json, ssl, sys
ca, host, port, paths = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.load(sys.stdin)
context = ssl.create_default_context(cafile=ca)
found = {}
for path in paths:
    for method in ("POST", "GET"):
        connection = http.client.HTTPSConnection(host, port, timeout=20, context=context)
        connection.request(method, path, b"", {"Content-Type": sys.argv[4]})
        found[f"{method} {path}"] = connection.getresponse().status
        connection.close()
print(json.dumps(found))
"""


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            f"network namespaces are not permitted here: ip {' '.join(arguments)}: {done.stderr.strip()}"
        )


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """Two machines, one cable: (the coordinator's, the sites')."""
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not installed (apt-get install iproute2)")
    tag = f"fb{os.getpid()}"
    made = []
    try:
        for name in (f"{tag}s", f"{tag}h"):
            ip("netns", "add", name)
            made.append(name)
        server, site = made
        ip(
            "link",
            "add",
            f"{tag}a",
            "netns",
            server,
            "type",
            "veth",
            "peer",
            "name",
            f"{tag}b",
            "netns",
            site,
        )
        for name, link, address in ((server, f"{tag}a", SERVER), (site, f"{tag}b", SITE)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield server, site
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture(scope="module")
def apart(
    tmp_path_factory: pytest.TempPathFactory, nginx: str, namespaces: tuple[str, str]
) -> Iterator[Consortium]:
    """A coordinator on its own machine, one registered site and one that nobody registered."""
    server, site = (("ip", "netns", "exec", name) for name in namespaces)
    found = Consortium(
        tmp_path_factory.mktemp("apart"),
        [REGISTERED, UNREGISTERED],
        SERVER,
        server_prefix=server,
        site_prefix=site,
    )
    found.provision(lambda data: write_data(data, 2), admit=[REGISTERED])
    found.admit(UNREGISTERED, register=False)
    try:
        found.server_up()
        yield found
    finally:
        found.down()
        assert not found.left_over()


def at_a_site(apart: Consortium, code: str, *arguments: object, text: str = "") -> object:
    """What a program that runs on the sites' machine prints, from JSON."""
    done = subprocess.run(
        [*apart.site_prefix, sys.executable, "-c", code, *map(str, arguments)],
        input=text, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_one_port_is_open(apart: Consortium) -> None:
    server = apart.coordinator.server
    assert at_a_site(apart, SCAN) == [server.port]
    assert server.admin_address == "127.0.0.1"


def test_only_the_fleet_api_answers_and_only_to_known_keys(apart: Consortium) -> None:
    flower = {path for _, path in PROTOBUF_REQUEST_TYPES}
    fleet = {path for path in flower if path.startswith("/v1/fleet/") and not path.endswith(NOT_FOR_SITES)}
    assert len(fleet) == 10
    assert any("/v1/control/" in path for path in flower)
    assert any("/v1/runtime/" in path for path in flower)
    other = flower - fleet | {"/", "/health", "/docs", "/openapi.json", "/v1/fleet/../control/list-runs"}
    kit = apart.site(REGISTERED)
    found = at_a_site(
        apart,
        ASK,
        kit.ca_certificate,
        kit.server,
        kit.port,
        PROTOBUF_MEDIA_TYPE,
        text=json.dumps(sorted(fleet | other)),
    )
    assert isinstance(found, dict)
    assert {found[f"POST {path}"] for path in fleet} == {401}
    assert {found[f"GET {path}"] for path in fleet} == {403}
    assert {found[f"{method} {path}"] for method in ("POST", "GET") for path in other} == {403}


def test_a_registered_site_connects_and_one_that_is_not_is_refused(apart: Consortium) -> None:
    apart.site_up(REGISTERED)
    folder = apart.site(UNREGISTERED).folder
    refused = apart.fedbags("site", "up", folder, "--skip-data", prefix=apart.site_prefix, status=1)
    assert "this node is not registered at the coordinator" in refused.stderr
    assert apart.status()["sites"] == {REGISTERED: "online"}
    assert "this node is not registered" in apart.program("supernode", UNREGISTERED)["reason"]
    apart.fedbags("provision", "add-key", apart.kits, UNREGISTERED, folder / "node.pub")
    apart.site_up(UNREGISTERED)


def test_a_server_of_another_authority_is_refused(apart: Consortium, tmp_path: Path) -> None:
    settings = (apart.root / "consortium.toml").read_text()
    settings = re.sub(r"(runtime|metrics)-port = \d+", lambda m: f"{m[1]}-port = {free_port()}", settings)
    (tmp_path / "consortium.toml").write_text(settings)
    apart.fedbags("provision", tmp_path / "consortium.toml", "--out", tmp_path / "OTHER")
    other = tmp_path / "OTHER" / "sites" / REGISTERED
    apart.fedbags("site", "keygen", other)
    text = (other / "kit.toml").read_text()
    (other / "kit.toml").write_text(
        text.replace('data-path = ""', f'data-path = "{apart.data / REGISTERED}"')
    )
    refused = apart.fedbags("site", "up", other, "--skip-data", prefix=apart.site_prefix, status=2)
    assert "does not show a certificate of consortium 'trial'" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture
def expired(apart: Consortium, tmp_path: Path) -> Path:
    """The coordinator's kit with a server certificate that ended yesterday."""
    folder = tmp_path / "coordinator"
    shutil.copytree(apart.coordinator.folder, folder, ignore=shutil.ignore_patterns("state", "logs"))
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    key = serialization.load_pem_private_key((apart.kits / "authority" / "ca.key").read_bytes(), None)
    good = x509.load_pem_x509_certificate((folder / "server.crt").read_bytes())
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.subject)
        .issuer_name(authority.subject)
        .public_key(good.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in good.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    old = builder.sign(key, hashes.SHA384())  # type: ignore[arg-type]
    (folder / "server.crt").write_bytes(old.public_bytes(serialization.Encoding.PEM))
    return folder


def test_an_expired_certificate_is_refused_on_both_sides(apart: Consortium, expired: Path) -> None:
    refused = apart.fedbags("server", "up", expired, status=2)
    assert "expired on" in refused.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(expired / "server.crt", expired / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            plain, _ = listener.accept()
            with plain, pytest.raises(ssl.SSLError):
                context.wrap_socket(plain, server_side=True).recv(1)

        thread = threading.Thread(target=answer)
        thread.start()
        kit = SiteKit.load(apart.site(REGISTERED).folder)
        there = kit.model_copy(update={"server": "127.0.0.1", "port": listener.getsockname()[1]}).at(
            kit.folder
        )
        with pytest.raises(UserError, match="certificate has expired"):
            reach_server(there)
        thread.join(10)
