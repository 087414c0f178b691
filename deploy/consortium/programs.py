"""Check and run the programs of a coordinator and of a site.

The coordinator's are nginx, the SuperLink, its SuperExec and the registration of sites. The SuperLink listens
on the admin address only; sites reach nginx, which passes the paths that a site needs. A site's are the
SuperNode, which fetches the coordinator's messages, and the executor, which answers them. Nothing of a site
listens on an address that others reach: the SuperNode calls the coordinator, and its Runtime API is on this
machine's loopback. Either may serve its figures to Prometheus besides.
"""

import json
import subprocess
import sys

from client.site import SITE_FILE
from common.errors import UserError
from deploy.consortium.checks import (
    check_coordinator_kit,
    check_site_kit,
    nginx_program,
    reach_server,
    require_ports,
)
from deploy.consortium.foreground import (
    COMMAND,
    Diagnosis,
    Exit,
    Program,
    diagnose,
    logs_text,
    port_answers,
    run,
)
from deploy.consortium.kit import CoordinatorKit, SiteKit
from deploy.consortium.settings import LOOPBACK
from deploy.flower.processes import SUPERNODE_CONNECTION, program

NODES_LOGGED = "keeping the registered nodes equal to"
"""What the registration logs once the nodes are equal to the kit's keys."""

_NODE_ID_LOGGED = "SuperNode ID:"
"""What Flower's SuperNode logs once the SuperLink has let it in."""

_SUPERNODE_COMMAND = (
    sys.executable, "-P", "-c", "from deploy.flower.internals import run_supernode; run_supernode()"
)  # fmt: skip
"""Flower's SuperNode, asking more often while messages come. It takes the arguments of flower-supernode."""

_SUPERLINK, _SUPEREXEC, _NGINX, _REGISTRATION = "superlink", "superexec", "nginx", "registration"
_SUPERNODE, _EXECUTOR, _METRICS = "supernode", "executor", "metrics"
_EXECUTOR_MISTAKE = 2


def check_server_start(kit: CoordinatorKit) -> None:
    """Check that everything is there to start a coordinator from.

    Raises:
        UserError: a fault of the kit, a port in use, or nginx or Flower missing; nothing was started.
    """
    check_coordinator_kit(kit)
    nginx_program()
    program("flower-superlink")
    server = kit.server
    require_ports(
        [
            ("port, for the sites", server.address, server.port),
            ("admin-port, for the SuperLink", server.admin_address, server.admin_port),
            *_metrics_ports(kit),
        ]
    )


def check_site_start(kit: SiteKit) -> str:
    """Check that everything is there to start a site from, but for the data.

    Returns:
        Empty, or why the coordinator cannot be reached just now.

    Raises:
        UserError: a fault of the kit, a port in use, a foreign or expired server certificate, or clocks that
            differ; nothing was started.
    """
    check_site_kit(kit)
    _node_config(kit)
    runtime = ("runtime-port, for the SuperNode", LOOPBACK, kit.ports.runtime_port)
    require_ports([runtime, *_metrics_ports(kit)])
    return reach_server(kit)


def check_data(kit: SiteKit) -> list[str]:
    """Check the site's data as ``fedbags site check`` does, in a process of its own.

    The check needs much memory, which the process gives back at its end.

    Returns:
        The metrics that may leave and go beyond the default policy.

    Raises:
        UserError: the message of that check, or the data are another site's.
    """
    done = subprocess.run(
        [*COMMAND, "site", "check", str(kit.data), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(
            done.stderr.strip().removeprefix("error: ") or f"`fedbags site check {kit.data}` failed"
        )
    found = json.loads(done.stdout)
    # The server knows a site by the name in its site.toml: other data would answer in another's name.
    if (name := found["site"]) != kit.site:
        raise UserError(
            f"{kit.data / SITE_FILE} has name = {name!r}, but this kit is site {kit.site!r}'s: write that "
            "name there, or set data-path in kit.toml to the folder of this site"
        )
    return list(found["leaves"]["beyond_default"])


def run_coordinator(kit: CoordinatorKit) -> None:
    """Run everything until SIGTERM or SIGINT, or until one of the programs ends.

    Raises:
        UserError: they run already, or one ended by a mistake that starting again does not mend.
        RunError: one of them ended.
    """
    (kit.state / "nginx").mkdir(parents=True, exist_ok=True)
    server = kit.server
    secret = ("--superexec-auth-secret-file", str(kit.superexec_secret))
    superlink = Program(
        _SUPERLINK,
        (
            program("flower-superlink"),
            "--host", server.admin_address, "--port", str(server.admin_port),
            "--ssl-ca-certfile", str(kit.ca_certificate),
            "--ssl-certfile", str(kit.server_certificate),
            "--ssl-keyfile", str(kit.server_key),
            # Without node authentication any machine that reaches nginx could take part.
            "--enable-supernode-auth",
            "--isolation", "process", *secret,
            "--database", str(kit.database),
        ),
        ready=port_answers(server.admin_address, server.admin_port),
    )  # fmt: skip
    registration = Program(
        _REGISTRATION,
        (sys.executable, "-P", "-m", "deploy.consortium.control", str(kit.folder)),
        ready=logs_text(NODES_LOGGED),
        after=(_SUPERLINK,),
    )
    superexec = Program(
        _SUPEREXEC,
        (
            program("flower-superexec"),
            "--runtime-api-address", server.superlink_address,
            "--root-certificates", str(kit.ca_certificate), *secret,
        ),
        after=(_SUPERLINK,),
    )  # fmt: skip
    own = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.address, server.address)
    nginx = Program(
        _NGINX,
        (nginx_program(), "-p", f"{kit.folder}/", "-c", "nginx.conf", "-e", "stderr"),
        ready=port_answers(own, server.port),
        # Opened last: until its key is registered, every site that calls is refused.
        after=(_SUPERLINK, _REGISTRATION),
    )
    run(kit, [superlink, registration, superexec, nginx, *_metrics(kit)])


def run_site(kit: SiteKit) -> None:
    """Run everything until SIGTERM or SIGINT, or until one of the programs ends.

    Raises:
        UserError: they run already, or one ended by a mistake that starting again does not mend.
        RunError: one of them ended.
    """
    secret = ("--superexec-auth-secret-file", str(kit.superexec_secret))
    supernode = Program(
        _SUPERNODE,
        (
            *_SUPERNODE_COMMAND,
            "--superlink", kit.server_address,
            "--root-certificates", str(kit.ca_certificate),
            "--auth-supernode-private-key", str(kit.node_key),
            "--isolation", "process", *secret,
            "--host", LOOPBACK, "--port", str(kit.ports.runtime_port),
            "--node-config", _node_config(kit),
        ),
        ready=logs_text(_NODE_ID_LOGGED),
        diagnose=_diagnose_supernode,
    )  # fmt: skip
    executor = Program(
        _EXECUTOR,
        (
            sys.executable, "-P", "-m", "deploy.consortium.executor", "--kit", str(kit.folder),
            "--runtime-api-address", kit.runtime_address, *secret,
        ),
        after=(_SUPERNODE,),
        diagnose=_diagnose_executor,
    )  # fmt: skip
    run(kit, [supernode, executor, *_metrics(kit)])


def _node_config(kit: SiteKit) -> str:
    """Return ``site``, ``data-path`` and ``kit`` as TOML values for the ClientApp's node configuration.

    Raises:
        UserError: a path has a character in it that Flower cannot pass on.
    """
    values = {"site": kit.site, "data-path": str(kit.data), "kit": str(kit.folder)}
    for value in values.values():
        if set(value) & set('"\\\n'):
            raise UserError(f'{value!r} cannot be passed on by Flower: rename the folder without " and \\')
    return " ".join(f'{key}="{value}"' for key, value in values.items())


def _diagnose_executor(end: Exit) -> Diagnosis | None:
    """Return the meaning of the executor's end, whose status 2 names a mistake to mend."""
    if end.status == _EXECUTOR_MISTAKE:
        return Diagnosis(end.tail.strip()[-1000:] or "see its log", mistake=True)
    return diagnose(end)


def _diagnose_supernode(end: Exit) -> Diagnosis | None:
    """Return the meaning of a SuperNode's end, where exit code 305 has more than one cause."""
    if end.code != SUPERNODE_CONNECTION:
        return diagnose(end)
    # Flower ends with this one code for several causes, and only the text of its log tells them apart.
    if "401 Unauthorized" in end.tail:
        return Diagnosis(
            "the coordinator refuses this node's signature: the two clocks differ by more than five minutes "
            "(`timedatectl set-ntp true`)"
        )
    if "403 Forbidden" in end.tail:
        return Diagnosis("the coordinator's nginx refuses this SuperNode: do both sides run the same Flower?")
    return Diagnosis(
        "this node is not registered at the coordinator: send node.pub to the coordinator "
        "(`fedbags provision add-key KITS SITE node.pub`), or it was revoked. After a crash the coordinator "
        "also refuses it while it believes in the node's last connection, for up to 60 s: start it again."
    )


def _metrics_ports(kit: CoordinatorKit | SiteKit) -> list[tuple[str, str, int]]:
    return [("metrics-port, for Prometheus", *kit.metrics_endpoint)] if kit.metrics_endpoint else []


def _metrics(kit: CoordinatorKit | SiteKit) -> list[Program]:
    if kit.metrics_endpoint is None:
        return []
    address, port = kit.metrics_endpoint
    command = (*COMMAND, "metrics", str(kit.folder), "--address", address, "--port", str(port))
    return [Program(_METRICS, command, ready=port_answers(address, port))]
