"""Write a kit's plain files from the package's templates, which start it and explain it.

No key, certificate or hash is made here. Files name each other relative to the kit, so that it can be moved.
"""

from importlib.metadata import version
from pathlib import Path

import jinja2
import tomli_w

from common.files import write_text
from deploy.consortium.kit import CoordinatorKit, Kit, SiteKit

COORDINATOR_FILES = {
    "nginx.conf": "nginx.conf.j2",
    "compose.yaml": "coordinator-compose.yaml.j2",
    "systemd/fedbags-coordinator.service": "coordinator.service.j2",
    "README.md": "coordinator-README.md.j2",
}
SITE_FILES = {
    "run.sh": "run.sh.j2",
    "site.toml": "site.toml.j2",
    "compose.yaml": "site-compose.yaml.j2",
    "fedbags-site.service": "site.service.j2",
    "README.md": "site-README.md.j2",
}
"""Path in the kit -> template."""


def render_kit(kit: Kit, *, keys_here: bool = False, update: bool = False) -> list[Path]:
    """Write the files of a kit that are not there yet.

    Args:
        kit: what the files are about.
        keys_here: the site's key was made by the coordinator, and the site's README says so.
        update: write the others again too, whatever was changed in them by hand.

    Returns:
        The files written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deploy.consortium"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # The templates are configuration files, scripts and Markdown, in which HTML entities would be faults.
        autoescape=False,
    )
    values = {"kit": kit, "version": version("fedbags"), "keys_here": keys_here}
    written = []
    for name, template in (SITE_FILES if isinstance(kit, SiteKit) else COORDINATOR_FILES).items():
        path = kit.folder / name
        if path.exists() and not update:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        text = environment.get_template(template).render(values)
        write_text(path, text, 0o755 if path.suffix == ".sh" else 0o644)
        written.append(path)
    return written


def write_flower_connection(kit: CoordinatorKit) -> Path:
    """Write flower/config.toml with the connection named as the consortium, for ``flwr run``.

    Flower finds it with FLWR_HOME=KIT/flower. It takes only an absolute path of the CA certificate, so a kit
    that was moved needs this again.
    """
    connection = {"address": kit.server.superlink_address, "root-certificates": str(kit.ca_certificate)}
    path = kit.flower_home / "config.toml"
    path.parent.mkdir(exist_ok=True)
    text = tomli_w.dumps({"superlink": {"default": kit.connection, kit.connection: connection}})
    write_text(path, text, 0o644)
    return path
