"""Run the coordinator's programs: nginx, the SuperLink, its SuperExec and the registration of sites.

The SuperLink listens on the admin address only. Sites reach nginx, which passes the paths that a site needs.
"""

import sys

from deploy.consortium import exporter
from deploy.consortium.foreground import Program, answers, logs_text, run
from deploy.consortium.kit import CoordinatorKit
from deploy.consortium.kit_check import check_coordinator
from deploy.consortium.preflight import nginx_program, require_ports
from deploy.flower.processes import program

SUPERLINK, SUPEREXEC, NGINX, REGISTRATION = "superlink", "superexec", "nginx", "registration"
WATCHING = "keeping the registered nodes equal to"
"""What the registration logs once it has made them equal."""


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
            (sys.executable, "-P", "-m", "deploy.consortium.control", str(kit.folder)),
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


def _local(address: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
