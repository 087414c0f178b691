"""Call the SuperLink's Control API, and keep the registered nodes equal to the keys of a kit.

This is the only module that uses Flower's Control client and its messages. Flower's own commands would not
do: a run must send the very bytes of an approved app, and the caller must see which node has which key. The
API has no login; it is reached on the coordinator's admin address only. The module is itself the program of
the registration, started as::

    python -P -m deploy.consortium.control KIT
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto import control_pb2 as messages
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from common.config import Scalar
from common.errors import FedbagsError, RunError, UserError
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.pki import read_public_key
from deploy.consortium.programs import NODES_LOGGED
from deploy.flower.processes import without_proxy

log = logging.getLogger("fedbags.coordinator")

_UNREGISTERED = "unregistered"
_POLL, _AGAIN = 1.0, 30.0
_RUNNING_MEANS = "is `fedbags server up` running?"


@dataclass(frozen=True)
class _Node:
    """Describe a registered node."""

    id: int
    site: str
    status: str
    """registered (never seen), online, or offline."""
    public_key: bytes
    """PEM, as Flower keeps it."""


@dataclass(frozen=True)
class RunStatus:
    """Describe the state of a run.

    A ``finished`` run has the ``outcome`` completed, failed or stopped. Any other is on its way.
    """

    finished: bool
    outcome: str
    details: str


class Control:
    """Call the Control API of one SuperLink.

    Every method raises RunError when the SuperLink does not answer or refuses.
    """

    def __init__(self, client: ControlHttpClient, address: str) -> None:
        self._client, self._address = client, address

    def nodes(self) -> list[_Node]:
        """Return every node that is registered now."""
        with self._errors("the nodes cannot be listed"):
            answer = self._client.ListNodes(messages.ListNodesRequest())
        return [
            _Node(node.node_id, node.name, node.status, node.public_key)
            for node in answer.nodes_info
            if node.status != _UNREGISTERED
        ]

    def register(self, site: str, public_key: Path) -> int:
        """Let the holder of a key connect, and return the node's id."""
        with self._errors(f"site {site} cannot be registered"):
            answer = self._client.RegisterNode(
                messages.RegisterNodeRequest(public_key=_flower_key(public_key), name=site)
            )
        return int(answer.node_id)

    def unregister(self, node: _Node) -> None:
        """Shut out the holder of a key at once."""
        with self._errors(f"site {node.site} cannot be unregistered"):
            self._client.UnregisterNode(messages.UnregisterNodeRequest(node_id=node.id))

    def start_run(self, app: bytes, config: Mapping[str, Scalar]) -> int:
        """Start a run of these very bytes and return its id.

        Args:
            app: a Flower App Bundle.
            config: flat keys that override the app's own.
        """
        # Not `flwr run`, which would bundle a folder anew: sites run only the bytes whose hash they approved.
        fab = Fab(hashlib.sha256(app).hexdigest(), app, {})
        overrides = user_config_to_proto(dict(config))
        request = messages.StartRunRequest(fab=fab_to_proto(fab), override_config=overrides)
        with self._errors("the run cannot be started"):
            answer = self._client.StartRun(request)
        # A refused run is an answer without an id and no error of the connection.
        if not answer.HasField("run_id"):
            raise RunError(f"the run cannot be started: {answer.note or 'the SuperLink gave no reason'}")
        return int(answer.run_id)

    def run_status(self, run_id: int) -> RunStatus:
        """Return the present state of a run."""
        with self._errors(f"the state of run {run_id} cannot be read"):
            answer = self._client.ListRuns(messages.ListRunsRequest(run_id=run_id))
        if run_id not in answer.run_dict:
            raise RunError(f"the SuperLink knows no run {run_id}: was its database removed?")
        status = answer.run_dict[run_id].status
        return RunStatus(status.status == "finished", status.sub_status, status.details)

    def stop_run(self, run_id: int) -> None:
        """End a run."""
        with self._errors(f"run {run_id} cannot be stopped"):
            answer = self._client.StopRun(messages.StopRunRequest(run_id=run_id))
        if not answer.success:
            raise RunError(f"run {run_id} cannot be stopped: it has probably ended")

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            raise RunError(f"{what}: the SuperLink says {error.response.text.strip()[:500]}") from error
        except httpx.HTTPError as error:
            raise RunError(f"{what}: {self._address} does not answer ({error}); {_RUNNING_MEANS}") from error


@contextmanager
def control(kit: CoordinatorKit) -> Iterator[Control]:
    """Open the Control API of a kit's SuperLink, over TLS with the kit's CA."""
    # Flower's client reads the proxies of the environment when it is made.
    os.environ.update(without_proxy(os.environ, kit.server.admin_address))
    with ControlHttpClient.from_server_address(
        kit.server.superlink_address,
        False,
        str(kit.ca_certificate),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    ) as client:
        yield Control(client, kit.server.superlink_address)


def _synchronise(kit: CoordinatorKit, api: Control) -> None:
    """Register the keys in nodes/ that are not registered, and unregister nodes whose key is not there.

    A site whose key changed is unregistered with its old key and registered with the new one.

    Raises:
        RunError: the SuperLink refuses or does not answer.
    """
    wanted = {site: _flower_key(kit.node_public_key(site)) for site in kit.registered_sites}
    present = {node.public_key: node for node in api.nodes()}
    # Compared by key and not by name, so that a node under a site's name but with another key is shut out.
    for key, node in present.items():
        if key not in wanted.values():
            api.unregister(node)
            log.info("unregistered site %s", node.site or node.id)
    for site, key in wanted.items():
        if key not in present:
            api.register(site, kit.node_public_key(site))
            log.info("registered site %s", site)


def _keep_registered(kit: CoordinatorKit) -> None:
    """Synchronise the registered nodes at once, at every change in nodes/, and every 30 seconds."""
    seen: object = None
    done_at = 0.0
    while True:
        now = sorted((path.name, path.stat().st_mtime_ns) for path in kit.nodes.glob("*.pub"))
        # The SuperLink's list may change without nodes/, as with a new database, hence the repetition.
        if now != seen or time.monotonic() - done_at > _AGAIN:
            first = seen is None
            try:
                with control(kit) as api:
                    _synchronise(kit, api)
                seen, done_at = now, time.monotonic()
            # Logged only: nodes that are registered already go on, and the loop tries again.
            except (RunError, UserError) as error:
                log.warning("%s", error)
            else:
                if first:
                    log.info("%s %s", NODES_LOGGED, kit.nodes)
        time.sleep(_POLL)


def _flower_key(path: Path) -> bytes:
    """Read a public key file (OpenSSH form) as the bytes that Flower sends and keeps."""
    return public_key_to_bytes(read_public_key(path))


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    try:
        _keep_registered(CoordinatorKit.load(Path(sys.argv[1])))
    except FedbagsError as failure:
        sys.exit(str(failure))
