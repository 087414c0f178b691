"""Call the SuperLink's Control API for the nodes and runs of a consortium.

This is the only module that uses Flower's Control client and its messages. Flower's own commands would not
do: a run must send the very bytes of an approved app, and the caller must see which node has which key. The
API has no login; it is reached on the coordinator's admin address only.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from common.config import Scalar
from common.errors import RunError
from deploy.consortium.kit import CoordinatorKit
from deploy.flower.processes import without_proxy

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

UNREGISTERED = "unregistered"
_RUNNING_MEANS = "is `fedbags server up` running?"


@dataclass(frozen=True)
class Node:
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

    def __init__(self, client: "ControlHttpClient", address: str) -> None:
        self._client, self._address = client, address

    def nodes(self) -> list[Node]:
        """Return every node that is registered now."""
        from flwr.proto.control_pb2 import ListNodesRequest

        with self._errors("the nodes cannot be listed"):
            answer = self._client.ListNodes(ListNodesRequest())
        return [
            Node(node.node_id, node.name, node.status, node.public_key)
            for node in answer.nodes_info
            if node.status != UNREGISTERED
        ]

    def register(self, site: str, public_key: Path) -> int:
        """Let the holder of a key connect, and return the node's id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        with self._errors(f"site {site} cannot be registered"):
            answer = self._client.RegisterNode(
                RegisterNodeRequest(public_key=flower_key(public_key), name=site)
            )
        return int(answer.node_id)

    def unregister(self, node: Node) -> None:
        """Shut out the holder of a key at once."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        with self._errors(f"site {node.site} cannot be unregistered"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.id))

    def start_run(self, app: bytes, config: Mapping[str, Scalar]) -> int:
        """Start a run of these very bytes and return its id.

        Args:
            app: a Flower App Bundle.
            config: flat keys that override the app's own.
        """
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        # Not `flwr run`, which would bundle a folder anew: sites run only the bytes whose hash they approved.
        fab = Fab(hashlib.sha256(app).hexdigest(), app, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(config)))
        with self._errors("the run cannot be started"):
            answer = self._client.StartRun(request)
        # A refused run is an answer without an id and no error of the connection.
        if not answer.HasField("run_id"):
            raise RunError(f"the run cannot be started: {answer.note or 'the SuperLink gave no reason'}")
        return int(answer.run_id)

    def run_status(self, run_id: int) -> RunStatus:
        """Return the present state of a run."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._errors(f"run {run_id} cannot be looked at"):
            answer = self._client.ListRuns(ListRunsRequest(run_id=run_id))
        if run_id not in answer.run_dict:
            raise RunError(f"the SuperLink knows no run {run_id}: was its database removed?")
        status = answer.run_dict[run_id].status
        return RunStatus(status.status == "finished", status.sub_status, status.details)

    def stop_run(self, run_id: int) -> None:
        """End a run."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._errors(f"run {run_id} cannot be stopped"):
            answer = self._client.StopRun(StopRunRequest(run_id=run_id))
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
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

    # Flower's client reads the proxies of the environment when it is made.
    os.environ.update(without_proxy(os.environ, kit.server.admin_address))
    with ControlHttpClient.from_server_address(
        kit.server.superlink_address,
        False,
        str(kit.ca_certificate),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    ) as client:
        yield Control(client, kit.server.superlink_address)


def flower_key(path: Path) -> bytes:
    """Read a public key file (OpenSSH form) as the bytes that Flower sends and keeps."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    from deploy.consortium.keys import read_public_key

    return public_key_to_bytes(read_public_key(path))
