"""The sites' door with Debian's nginx: what it passes on, what it refuses, and what it writes down.

Behind it stands a small TLS server that answers with what reached it.
"""

import http.client
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode import fleet_http_client

from common.errors import UserError
from deploy.consortium import checks
from deploy.consortium.foreground import port_answers
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.provision import provision
from deploy.flower import internals
from deploy.flower.processes import free_port

SITES_NEED = {
    "/v1/fleet/activate-node", "/v1/fleet/deactivate-node", "/v1/fleet/send-node-heartbeat",
    "/v1/fleet/pull-messages", "/v1/fleet/push-messages", "/v1/fleet/get-run", "/v1/fleet/get-fab",
    "/v1/fleet/push-object", "/v1/fleet/pull-object", "/v1/fleet/confirm-message-received",
}  # fmt: skip
NOT_WITH_NODE_KEYS = {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}


class Echo(BaseHTTPRequestHandler):
    """Answers with the path that it was asked for and the length of the body."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        text = f"{self.path} {len(body)}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


class Door:
    """nginx from a kit, and the server behind it."""

    def __init__(self, kit: CoordinatorKit) -> None:
        self.kit = kit
        self._context = ssl.create_default_context(cafile=str(kit.ca_certificate))

    def connection(self) -> http.client.HTTPSConnection:
        server = self.kit.server
        return http.client.HTTPSConnection(server.host, server.port, timeout=10, context=self._context)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, str, dict[str, str]]:
        connection = self.connection()
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorKit:
    folder = tmp_path_factory.mktemp("door")
    (folder / "consortium.toml").write_text(f"""
name = "door"
[server]
hosts = ["127.0.0.1"]
address = "127.0.0.1"
port = {free_port()}
admin-port = {free_port()}
metrics-port = {free_port()}
[sites.a]
""")
    provision(folder / "consortium.toml", folder / "KITS")
    return CoordinatorKit.load(folder / "KITS" / "coordinator")


@pytest.fixture(scope="module")
def door(kit: CoordinatorKit) -> Iterator[Door]:
    try:
        nginx = checks.nginx_program()
    except UserError as error:
        pytest.skip(str(error))
    server = ThreadingHTTPServer((kit.server.admin_address, kit.server.admin_port), Echo)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit.server_certificate, kit.server_key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (kit.state / "nginx").mkdir(parents=True)
    kit.logs.mkdir()
    command = [nginx, "-p", f"{kit.folder}/", "-c", "nginx.conf", "-e", "stderr"]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    with (kit.logs / "nginx.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        ready = port_answers(kit.server.host, kit.server.port)
        until = time.monotonic() + 10
        while not ready("") and time.monotonic() < until:
            time.sleep(0.05)
        yield Door(kit)
        process.terminate()
        process.wait(10)
    server.shutdown()
    server.server_close()


def test_the_paths_are_those_of_flowers_supernode(kit: CoordinatorKit) -> None:
    source = Path(fleet_http_client.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'path="(/v1/fleet/[a-z-]+)"', source))
    assert used - NOT_WITH_NODE_KEYS == SITES_NEED
    passed = set(re.findall(r"location = (/\S+) ", (kit.folder / "nginx.conf").read_text(encoding="utf-8")))
    assert passed == SITES_NEED


def test_a_piece_of_an_update_fits_through(kit: CoordinatorKit) -> None:
    text = (kit.folder / "nginx.conf").read_text(encoding="utf-8")
    limit = re.search(r"fleet/push-object \{.*?client_max_body_size (\d+)m", text, re.DOTALL)
    assert limit is not None
    assert int(limit[1]) * 2**20 >= FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 64 * 1024


@pytest.mark.parametrize("path", sorted(SITES_NEED))
def test_what_a_site_needs_is_passed_on(door: Door, path: str) -> None:
    status, text, headers = door.ask("POST", path, b"hello")
    assert (status, text) == (200, f"{path} 5")
    assert headers.get("Server", "nginx") == "nginx"


@pytest.mark.parametrize(
    "path",
    sorted(
        {path for _, path in PROTOBUF_REQUEST_TYPES} - SITES_NEED
        | {"/", "/health", "/docs", "/openapi.json", "/v1", "/v1/fleet", "/v1/fleet/", "/v2/fleet/get-run"}
        | {"/v1/fleet/pull-messages/", "/v1/fleet/pull-messages/x", "/V1/FLEET/PULL-MESSAGES"}
        | {"//v1//control//start-run", "/v1/fleet/../control/start-run", "/v1/fleet/%2e%2e/control/start-run"}
        | {"/v1/fleet/pull-messages;/../../control/start-run", "/v1/fleet/pull-messages%00"}
    ),
)
def test_everything_else_is_refused(door: Door, path: str) -> None:
    for method in ("POST", "GET"):
        status, text, _ = door.ask(method, path, b"x" if method == "POST" else None)
        assert status in (400, 403, 404), (method, path, text)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/../fleet/get-run",
        "/v1//fleet/get-run",
        "/v1/fleet/get%2drun",
        "http://other/v1/fleet/get-run",
    ],
)
def test_another_spelling_reaches_the_same_path_and_no_other(door: Door, path: str) -> None:
    status, text, _ = door.ask("POST", path, b"")
    assert (status, text) == (200, "/v1/fleet/get-run 0")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT"])
def test_other_methods_are_refused(door: Door, method: str) -> None:
    assert door.ask(method, "/v1/fleet/get-run")[0] in (400, 403, 405)


def test_long_bodies_are_refused(door: Door) -> None:
    piece = bytes(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 64 * 1024)
    assert door.ask("POST", "/v1/fleet/push-object", piece)[:2] == (
        200,
        f"/v1/fleet/push-object {len(piece)}",
    )
    for path, size in (("/v1/fleet/get-run", 70_000), ("/v1/fleet/push-object", 7 * 2**20)):
        connection = door.connection()
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


def test_old_tls_and_plain_http_are_refused(door: Door) -> None:
    server = door.kit.server
    with socket.create_connection((server.host, server.port), timeout=5) as plain:
        plain.sendall(b"POST /v1/fleet/get-run HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
        assert plain.recv(4096).startswith(b"HTTP/1.1 400")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(door.kit.ca_certificate)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    old.set_ciphers("DEFAULT:@SECLEVEL=0")
    with (
        socket.create_connection((server.host, server.port), timeout=5) as plain,
        pytest.raises(ssl.SSLError),
    ):
        old.wrap_socket(plain, server_hostname=server.host)


def test_one_address_cannot_take_all_connections(door: Door) -> None:
    held = [door.connection() for _ in range(140)]
    try:
        for connection in held:
            connection.putrequest("POST", "/v1/fleet/get-run")
            connection.putheader("Content-Length", "5")
            connection.endheaders(b"1")  # the rest of the body never comes
        time.sleep(0.3)
        refused = 0
        for connection in held:
            connection.sock.settimeout(0.05)  # type: ignore[union-attr]
            try:
                refused += b" 503 " in connection.sock.recv(64)  # type: ignore[union-attr]
            except TimeoutError:
                continue
        assert refused == 140 - 128
    finally:
        for connection in held:
            connection.close()
    time.sleep(0.3)
    assert door.ask("POST", "/v1/fleet/get-run", b"")[0] == 200


def test_the_log_names_nobody(door: Door) -> None:
    door.ask("POST", "/v1/fleet/get-run?patient=7", b"")
    door.ask("POST", "/a-secret-path", b"")
    time.sleep(0.2)
    text = (door.kit.logs / "access.log").read_text(encoding="utf-8")
    assert text.count("\n") > 10
    assert not re.search(r"127\.0\.0\.1|patient|secret|/", text)
    assert not list((door.kit.state / "nginx").rglob("*/*"))


def test_questions_for_work_do_not_fill_the_disk(door: Door) -> None:
    log = door.kit.logs / "access.log"

    def lines() -> int:
        time.sleep(0.2)
        return log.read_text(encoding="utf-8").count("\n")

    before = lines()
    assert door.ask("POST", "/v1/fleet/pull-messages", b"")[0] == 200
    assert lines() == before
    assert door.ask("GET", "/v1/fleet/pull-messages")[0] == 403
    assert door.ask("POST", "/v1/fleet/push-messages", b"")[0] == 200
    assert lines() == before + 2


def test_fifty_sites_behind_one_address_ask_for_work_well_within_the_limit(kit: CoordinatorKit) -> None:
    limit = re.search(r"rate=(\d+)r/s", (kit.folder / "nginx.conf").read_text(encoding="utf-8"))
    assert limit is not None
    assert int(limit[1]) / 4 >= 50 / internals._SHORTEST_PAUSE


def test_a_missing_nginx_is_an_error_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(UserError, match="apt-get install nginx-light"):
        checks.nginx_program()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"port {port} on 127\.0\.0\.1 \(port, for the sites\) is in use"
        ):
            checks.require_ports([("port, for the sites", "127.0.0.1", port)])
    with pytest.raises(UserError, match=r"192\.0\.2\.1 is not an address of this machine"):
        checks.require_ports([("port", "192.0.2.1", 8443)])
