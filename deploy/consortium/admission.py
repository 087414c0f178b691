"""The gate: a site runs the one app whose SHA-256 its kit pins, and no other.

Pure decisions over the bytes of an app (a Flower App Bundle, FAB). Knows nothing of processes and nothing of
Flower: ``executor`` asks here before anything of an app is unpacked.
"""

import hashlib
import hmac
import tempfile
from pathlib import Path

from common.errors import RunError
from deploy.consortium.kit import SiteKit

REFUSED_APP = "refused.fab"
"""The app refused last, in the kit's state/, for `fedbags site approve` to show; it is never unpacked."""


class AppNotApproved(RunError):  # noqa: N818 (a refusal is an answer, not a fault)
    """The app is not the approved one. The text is fixed: it is sent to the server."""

    def __init__(self) -> None:
        super().__init__("this site runs only the app that it approved, and this is another one")


def app_hash(content: bytes) -> str:
    """The SHA-256 of an app's bytes, as kit.toml's ``app-hash`` holds it: 64 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def admit(content: bytes, approved: str) -> None:
    """Let an app pass, or refuse it.

    Args:
        content: the bytes that would be unpacked. Their hash is computed here; what a server says of it does
            not count.
        approved: the kit's ``app-hash``; empty refuses everything.

    Raises:
        AppNotApproved: any other app.
    """
    if not hmac.compare_digest(app_hash(content), approved):
        raise AppNotApproved


def keep_refused(content: bytes, state: Path) -> Path:
    """Keep a refused app's bytes for the site to look at, in place of the one before.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    _write(state / REFUSED_APP, content)
    return state / REFUSED_APP


def pin(kit: SiteKit, content: bytes) -> SiteKit:
    """Approve an app: its bytes go to the kit's app/, then its hash to kit.toml.

    A running executor reads kit.toml before each task, so the approval holds from the next one.

    Returns:
        The kit as it is now.

    Raises:
        OSError: the kit cannot be written; it pins what it pinned before.
    """
    _write(kit.app, content)
    pinned = kit.model_copy(update={"app_hash": app_hash(content)}).at(kit.folder)
    pinned.save()
    return pinned


def _write(path: Path, content: bytes) -> None:
    """In one step: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(content)
            stream.flush()
        except OSError:
            temporary.unlink()
            raise
    temporary.replace(path)
