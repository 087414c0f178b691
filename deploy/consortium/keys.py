"""Make, read and write elliptic-curve P-384 keys in files.

A private key is made once, and only its owner can read it. Node keys have the OpenSSH form that Flower's
SuperNode reads, keys of certificates are PKCS #8 PEM. No text of a key is in an error or a log line. Nothing
here knows of certificates or kits.
"""

import os
import secrets
import stat
from enum import StrEnum
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import UserError, require_file
from common.files import write_text

CURVE = ec.SECP384R1
SECRET_BYTES = 32
_OWNER_ONLY = 0o600


class KeyForm(StrEnum):
    """Name the forms in which a private key is written down."""

    OPENSSH = "openssh"
    """What ``flower-supernode --auth-supernode-private-key`` reads."""
    PKCS8 = "pkcs8"
    """What servers of TLS read."""


def make_private_key(path: Path, form: KeyForm, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Make a P-384 key and write it (0600) to a path where nothing is yet.

    Raises:
        UserError: there is a file already; it is left as it is.
    """
    key = ec.generate_private_key(CURVE())
    text = key.private_bytes(
        Encoding.PEM,
        serialization.PrivateFormat.OpenSSH if form is KeyForm.OPENSSH else serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
    )
    write_secret(path, text)
    return key


def make_secret(path: Path) -> None:
    """Write a fresh random secret (0600, 64 hex digits) to a path where nothing is yet.

    Raises:
        UserError: there is a file already.
    """
    write_secret(path, secrets.token_hex(SECRET_BYTES).encode())


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read.

    A file that exists is never touched.

    Raises:
        UserError: there is a file already.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Created with mode 0600, not changed to it later: others can never read it, whatever the umask.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OWNER_ONLY)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        # A link fails where there is a file. A rename would replace the old key, which nothing restores.
        os.link(temporary, path)
    except FileExistsError:
        raise UserError(
            f"{path} exists and is never overwritten. Move it away first if you want a new one."
        ) from None
    finally:
        temporary.unlink()


def read_private_key(path: Path, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Read a P-384 private key in either form.

    Raises:
        UserError: missing, readable by others, with a password that is not given or wrong, or another type of
            key.
    """
    require_file(path, "the private key", "It is made once and cannot be restored from anything else.")
    require_private(path)
    content = path.read_bytes()
    openssh = b"OPENSSH PRIVATE KEY" in content
    load = serialization.load_ssh_private_key if openssh else serialization.load_pem_private_key
    try:
        key = load(content, password)
    # ``from None`` keeps the library's own error, and whatever it quotes of the key, out of a traceback.
    except TypeError:
        raise UserError(
            f"{path} has no password, and one was given: leave the password out."
            if password
            else f"{path} is protected by a password: give it with --password-file."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(
            f"{path} cannot be opened: the password is wrong, or the file is damaged."
            if password
            else f"{path} is not a private key that can be read (PEM or OpenSSH form, P-384)."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, CURVE):
        raise UserError(
            f"{path} is not an elliptic-curve P-384 key. `fedbags site keygen` makes the right kind."
        )
    return key


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a site's private key as the SuperNode does, in OpenSSH form and without a password.

    Raises:
        UserError: as ``read_private_key``; a password-protected key is one.
    """
    require_file(path, "this site's key", "`fedbags site keygen KIT` makes it, here at the site.")
    try:
        return read_private_key(path)
    except UserError as error:
        if "protected by a password" not in str(error):
            raise
        raise UserError(
            f"{path} is protected by a password, and the SuperNode starts without anyone to type it. "
            "Use the key that `fedbags site keygen KIT` makes: it has none and only its owner can read it."
        ) from None


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """Read a site's public key (OpenSSH form, P-384), as ``fedbags site keygen`` writes it.

    Raises:
        UserError: missing, a private key, or another type of key.
    """
    require_file(
        path, "the public key", "It is the file node.pub that the site's `fedbags site keygen` wrote."
    )
    content = path.read_bytes()
    # A site that sent node.key by mistake must be told that others may have this key now.
    if b"PRIVATE KEY" in content:
        raise UserError(
            f"{path} holds a private key. Only node.pub may leave a site: delete this file, and let the site "
            "make a new key pair if it came over a network."
        )
    advice = (
        "Ask the site for the node.pub that `fedbags site keygen` wrote (a line `ecdsa-sha2-nistp384 ...`)."
    )
    try:
        key = serialization.load_ssh_public_key(content.strip())
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"{path} is not a public key in OpenSSH form. {advice}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVE):
        raise UserError(f"{path} is a public key of the wrong type: it must be ECDSA P-384. {advice}")
    return key


def write_public_key(path: Path, key: ec.EllipticCurvePublicKey, comment: str) -> None:
    """Write a public key in OpenSSH form, with the site's name as its comment."""
    line = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    write_text(path, f"{line} {comment}\n", 0o644)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of the key (DER SubjectPublicKeyInfo), hexadecimal.

    A key has the same fingerprint in whatever form it is written down.
    """
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()


def require_private(path: Path) -> None:
    """Check that nobody but its owner can read a file.

    Raises:
        UserError: others can; says how to mend it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise UserError(
            f"{path} can be read by others (mode {mode:04o}): whoever has it can act in its owner's name. "
            f"Run `chmod 600 {path.name}` in its folder, and make a new key if others use this machine."
        )
