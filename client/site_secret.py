"""Keep the secret of one site, and derive from it values that nobody else can guess.

The secret is random bytes that never leave the site. Knows nothing of what is derived. Losing the file costs
nothing but continuity: what was derived from it before cannot be derived again.
"""

import hmac
import os
import tempfile
from pathlib import Path

from common.errors import UserError

SECRET_FILE = "site.secret"
"""The file's name in the folder of a site."""
SECRET_BYTES = 32


def derive(folder: Path, purpose: str, content: bytes) -> bytes:
    """Derive 32 bytes from a site's secret, drawing the secret when it is first needed.

    HMAC-SHA256 (RFC 2104) under the secret: without it nobody can compute or check the result, however
    few contents are possible.

    Args:
        folder: the site folder.
        purpose: what the bytes are for; different purposes give unrelated bytes.
        content: what they are derived from.

    Raises:
        UserError: the secret cannot be read or made, or is damaged.
    """
    # The zero byte parts purpose and content: else one purpose could be continued into another by its
    # content.
    return hmac.digest(_read(folder), purpose.encode() + b"\0" + content, "sha256")


def _read(folder: Path) -> bytes:
    path = folder / SECRET_FILE
    try:
        if not path.exists():
            _create(path)
        secret = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"the site's secret {path} cannot be read or made: {error.strerror or error}\n"
            "Give whoever runs the site the right to read and write in the site folder."
        ) from error
    if len(secret) != SECRET_BYTES:
        raise UserError(
            f"the site's secret {path} is damaged: {len(secret)} bytes, {SECRET_BYTES} expected\n"
            "Put back the copy of your backup; without one, delete the file and a new one is drawn."
        )
    return secret


def _create(path: Path) -> None:
    """Write a fresh secret in one step, or keep the one of a process that was faster."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")  # readable by its owner alone
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(os.urandom(SECRET_BYTES))
            stream.flush()
            # The content must be on the disk before its name is: a file cut short by a power cut would be
            # refused as damaged.
            os.fsync(stream.fileno())
        try:
            os.link(name, path)  # unlike a rename, this never replaces a file
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        Path(name).unlink(missing_ok=True)
