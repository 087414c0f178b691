"""Run a site's programs, the SuperNode and the executor.

The SuperNode fetches the coordinator's messages and the executor answers them. Nothing listens on an address
that others reach: the SuperNode calls the coordinator, and its Runtime API is on this machine's loopback.
"""

import json
import subprocess
import sys

from client.site import SITE_FILE
from common.errors import UserError
from deploy.consortium import exporter
from deploy.consortium.foreground import COMMAND, Diagnosis, Exit, Program, diagnose, logs_text, run
from deploy.consortium.kit import SiteKit
from deploy.consortium.kit_check import check_site
from deploy.consortium.preflight import reach_server, require_ports
from deploy.consortium.settings import LOOPBACK
from deploy.flower.processes import SUPERNODE_CONNECTION

SUPERNODE, EXECUTOR = "supernode", "executor"
SUPERNODE_COMMAND = (
    sys.executable, "-P", "-c", "from deploy.flower.internals import run_supernode; run_supernode()"
)  # fmt: skip
"""Flower's SuperNode, asking more often while messages come. It takes the arguments of flower-supernode."""
EXECUTOR_MISTAKE = 2
NODE_ID_TEXT = "SuperNode ID:"
"""What Flower's SuperNode logs once the SuperLink has let it in."""


def check(kit: SiteKit) -> str:
    """Check that everything is there to start from, but for the data.

    Returns:
        Empty, or why the coordinator cannot be reached just now.

    Raises:
        UserError: a fault of the kit, a port in use, a foreign or expired server certificate, or clocks that
            differ; nothing was started.
    """
    check_site(kit)
    node_config(kit)
    runtime = ("runtime-port, for the SuperNode", LOOPBACK, kit.ports.runtime_port)
    require_ports([runtime, *exporter.ports(kit)])
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


def programs(kit: SiteKit) -> list[Program]:
    """Return the programs of a site in the order of starting."""
    secret = ("--superexec-auth-secret-file", str(kit.superexec_secret))
    return [
        Program(
            SUPERNODE,
            (
                *SUPERNODE_COMMAND,
                "--superlink", kit.server_address,
                "--root-certificates", str(kit.ca_certificate),
                "--auth-supernode-private-key", str(kit.node_key),
                "--isolation", "process", *secret,
                "--host", LOOPBACK, "--port", str(kit.ports.runtime_port),
                "--node-config", node_config(kit),
            ),
            ready=logs_text(NODE_ID_TEXT),
            diagnose=diagnose_supernode,
        ),
        Program(
            EXECUTOR,
            (
                sys.executable, "-P", "-m", "deploy.consortium.executor", "--kit", str(kit.folder),
                "--runtime-api-address", kit.runtime_address, *secret,
            ),
            after=(SUPERNODE,),
            diagnose=diagnose_executor,
        ),
        *exporter.programs(kit),
    ]  # fmt: skip


def node_config(kit: SiteKit) -> str:
    """Return ``site``, ``data-path`` and ``kit`` as TOML values for the ClientApp's node configuration.

    Raises:
        UserError: a path has a character in it that Flower cannot pass on.
    """
    values = {"site": kit.site, "data-path": str(kit.data), "kit": str(kit.folder)}
    for value in values.values():
        if set(value) & set('"\\\n'):
            raise UserError(f'{value!r} cannot be passed on by Flower: rename the folder without " and \\')
    return " ".join(f'{key}="{value}"' for key, value in values.items())


def serve(kit: SiteKit) -> None:
    """Run everything until SIGTERM or SIGINT, or until one of the programs ends.

    Raises:
        UserError: they run already, or one ended by a mistake that starting again does not mend.
        RunError: one of them ended.
    """
    run(kit, programs(kit))


def diagnose_executor(end: Exit) -> Diagnosis | None:
    """Return the meaning of the executor's end, whose status 2 names a mistake to mend."""
    if end.status == EXECUTOR_MISTAKE:
        return Diagnosis(end.tail.strip()[-1000:] or "see its log", mistake=True)
    return diagnose(end)


def diagnose_supernode(end: Exit) -> Diagnosis | None:
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
