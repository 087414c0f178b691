"""Run the coordinator's programs, and keep the registered nodes equal to the keys of its kit.

The programs are nginx, the SuperLink, its SuperExec and the registration of sites. The SuperLink listens on
the admin address only. Sites reach nginx, which passes the paths that a site needs. The module is itself the
program of the registration, started as::

    python -P -m deploy.consortium.coordinator KIT
"""

import logging
import sys
import time
from pathlib import Path

from common.errors import FedbagsError, RunError, UserError
from deploy.consortium import exporter
from deploy.consortium.control import Control, control, flower_key
from deploy.consortium.foreground import Program, answers, logs_text, run
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.kit_check import check_coordinator
from deploy.consortium.preflight import nginx_program, require_ports
from deploy.flower.processes import program

log = logging.getLogger("fedbags.coordinator")

SUPERLINK, SUPEREXEC, NGINX, REGISTRATION = "superlink", "superexec", "nginx", "registration"
WATCHING = "keeping the registered nodes equal to"
_POLL, _AGAIN = 1.0, 30.0


def check(kit: CoordinatorKit) -> None:
    """Check that everything is there to start from.

    Raises:
        UserError: a fault of the kit, a port in use, or nginx or Flower missing; nothing was started.
    """
    check_coordinator(kit)
    nginx_program()
    program("flower-superlink")
    server = kit.server
    require_ports(
        [
            ("port, for the sites", server.address, server.port),
            ("admin-port, for the SuperLink", server.admin_address, server.admin_port),
            *exporter.ports(kit),
        ]
    )


def programs(kit: CoordinatorKit) -> list[Program]:
    """Return the programs of the coordinator in the order of starting."""
    server = kit.server
    secret = ("--superexec-auth-secret-file", str(kit.superexec_secret))
    return [
        Program(
            SUPERLINK,
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
            ready=answers(server.admin_address, server.admin_port),
        ),
        Program(
            REGISTRATION,
            (sys.executable, "-P", "-m", "deploy.consortium.coordinator", str(kit.folder)),
            ready=logs_text(WATCHING),
            after=(SUPERLINK,),
        ),
        Program(
            SUPEREXEC,
            (
                program("flower-superexec"),
                "--runtime-api-address", server.superlink_address,
                "--root-certificates", str(kit.ca_certificate), *secret,
            ),
            after=(SUPERLINK,),
        ),
        Program(
            NGINX,
            (nginx_program(), "-p", f"{kit.folder}/", "-c", "nginx.conf", "-e", "stderr"),
            ready=answers(_local(server.address), server.port),
            # Opened last: until its key is registered, every site that calls is refused.
            after=(SUPERLINK, REGISTRATION),
        ),
        *exporter.programs(kit),
    ]  # fmt: skip


def serve(kit: CoordinatorKit) -> None:
    """Run everything until SIGTERM or SIGINT, or until one of the programs ends.

    Raises:
        UserError: they run already, or one ended by a mistake that starting again does not mend.
        RunError: one of them ended.
    """
    (kit.state / "nginx").mkdir(parents=True, exist_ok=True)
    run(kit, programs(kit))


def synchronise(kit: CoordinatorKit, api: Control) -> None:
    """Register the keys in nodes/ that are not registered, and unregister nodes whose key is not there.

    A site whose key changed is unregistered with its old key and registered with the new one.

    Raises:
        RunError: the SuperLink refuses or does not answer.
    """
    wanted = {site: flower_key(kit.node_public_key(site)) for site in kit.registered_sites}
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


def watch(kit: CoordinatorKit) -> None:
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
                    synchronise(kit, api)
                seen, done_at = now, time.monotonic()
            # Logged only: nodes that are registered already go on, and the loop tries again.
            except (RunError, UserError) as error:
                log.warning("%s", error)
            else:
                if first:
                    log.info("%s %s", WATCHING, kit.nodes)
        time.sleep(_POLL)


def _local(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")
    try:
        watch(CoordinatorKit.load(Path(sys.argv[1])))
    except FedbagsError as failure:
        sys.exit(str(failure))
