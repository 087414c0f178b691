"""Decide whether a site may run an app, and record the app that it approves.

A site runs the one app whose SHA-256 stands in its kit.toml, and no other. The module decides over the bytes
of an app (a Flower App Bundle, FAB) and knows nothing of processes or of Flower. ``gate`` asks here before
anything of an app is unpacked.
"""

import hashlib
import hmac
from pathlib import Path

from common.errors import RunError
from common.files import write_bytes
from deploy.consortium.kit import SiteKit

REFUSED_APP = "refused.fab"
"""The app refused last, in the kit's state/, for `fedbags site approve` to show; it is never unpacked."""


class AppNotApproved(RunError):  # noqa: N818 (a refusal is an answer, not a fault)
    """Report that an app is not the one that this site approved.

    The text is fixed, because it is sent to the server.
    """

    def __init__(self) -> None:
        super().__init__("this site runs only the app that it approved, and this is another one")


def app_hash(content: bytes) -> str:
    """Return the SHA-256 of an app's bytes as 64 hexadecimal digits, the form of ``app-hash`` in kit.toml."""
    return hashlib.sha256(content).hexdigest()


def admit(content: bytes, approved: str) -> None:
    """Refuse every app but the approved one.

    Args:
        content: the bytes that would be unpacked.
        approved: the kit's ``app-hash``; empty refuses everything.

    Raises:
        AppNotApproved: any other app.
    """
    # The hash of these very bytes: a server could state the approved hash and send another app with it.
    if not hmac.compare_digest(app_hash(content), approved):
        raise AppNotApproved


def keep_refused(content: bytes, state: Path) -> Path:
    """Keep the bytes of a refused app for the site to inspect, in place of those refused before.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written.
    """
    state.mkdir(parents=True, exist_ok=True)
    write_bytes(state / REFUSED_APP, content, 0o600)
    return state / REFUSED_APP


def pin(kit: SiteKit, content: bytes) -> SiteKit:
    """Approve an app by storing its bytes in the kit's app/ and its hash in kit.toml.

    A running executor reads kit.toml before each task, so the approval holds from the next one.

    Returns:
        The kit as it is now.

    Raises:
        OSError: the kit cannot be written; it pins what it pinned before.
    """
    # The bytes go first. If the second step fails, kit.toml still pins the hash that it pinned before.
    kit.app.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kit.app, content, 0o600)
    pinned = kit.model_copy(update={"app_hash": app_hash(content)}).at(kit.folder)
    pinned.save()
    return pinned
