"""Make, read and check elliptic-curve P-384 keys and X.509 certificates in files.

A private key is made once, and only its owner can read it. Node keys have the OpenSSH form that Flower's
SuperNode reads, keys of certificates are PKCS #8 PEM. No text of a key is in an error or a log line. Nothing
here knows of kits.
"""

import ipaddress
import secrets
import stat
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from common import pki
from common.errors import UserError, require_file
from common.files import create_bytes, write_bytes, write_text

_CURVE = ec.SECP384R1
_SECRET_BYTES = 32


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
    key = ec.generate_private_key(_CURVE())
    text = key.private_bytes(
        Encoding.PEM,
        serialization.PrivateFormat.OpenSSH if form is KeyForm.OPENSSH else serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption(),
    )
    _write_secret(path, text)
    return key


def make_secret(path: Path) -> None:
    """Write a fresh random secret (0600, 64 hex digits) to a path where nothing is yet.

    Raises:
        UserError: there is a file already.
    """
    _write_secret(path, secrets.token_hex(_SECRET_BYTES).encode())


def _write_secret(path: Path, content: bytes) -> None:
    # A private key is never overwritten, as nothing restores the old one.
    if not create_bytes(path, content):
        raise UserError(f"{path} exists and is never overwritten. Move it away first if you want a new one.")


def read_private_key(path: Path, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Read a P-384 private key that nobody but its owner can read.

    Raises:
        UserError: missing, readable by others, or as ``common.pki.read_private_key``.
    """
    require_file(path, "the private key", "It is made once and cannot be restored from anything else.")
    require_private(path)
    return pki.read_private_key(path, password)


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
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVE):
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


_CLOCK_TOLERANCE = timedelta(hours=1)
"""Certificates begin this long before they are issued, so that a slow clock at a site does no harm."""


def read_certificate(path: Path) -> x509.Certificate:
    """Read one PEM certificate.

    Raises:
        UserError: missing, or not a certificate.
    """
    require_file(path, "the certificate", "`fedbags provision` writes it; take the kit as it came.")
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is not a certificate in PEM form: take the kit's file as it came") from None


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    """Write a certificate as PEM."""
    write_bytes(path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def check_certificate(
    certificate: x509.Certificate, authority: x509.Certificate, what: str, now: datetime | None = None
) -> None:
    """Check that ``authority`` issued a certificate and that it holds now.

    Args:
        certificate: what to check.
        authority: the consortium's CA certificate (itself, for a CA certificate).
        what: names the certificate in messages.
        now: the time (with its zone); the clock's, if None.

    Raises:
        UserError: foreign, not valid yet (a slow clock?), or expired.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise UserError(
            f"{what} was not issued by the authority of consortium {organisation(authority)!r}: it is "
            "from another consortium, or from an earlier authority. Use the files of one kit together."
        ) from None
    now = now or datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begins:
        raise UserError(
            f"{what} is valid from {begins:%Y-%m-%d %H:%M} UTC on, and this machine's clock says "
            f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC: set the clock "
            "(`timedatectl set-ntp true`) and try again."
        )
    if now > ends:
        remedy = (
            "an authority is not renewed: provision the consortium anew, into an empty folder"
            if certificate == authority
            else "the coordinator renews it with `fedbags provision renew KITS`"
        )
        raise UserError(
            f"{what} expired on {ends:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now.astimezone(UTC):%Y-%m-%d %H:%M} UTC. If the clock is right, {remedy}."
        )


def certified_hosts(certificate: x509.Certificate) -> set[str]:
    """Return the DNS names and IP addresses that a server certificate carries."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    return addresses | set(names.get_values_for_type(x509.DNSName))


def utc_now() -> datetime:
    """Return the time in whole seconds, the precision of a certificate."""
    return datetime.now(UTC).replace(microsecond=0)


def distinguished_name(organisation: str, common_name: str) -> x509.Name:
    """Return the name with O = ``organisation`` (the consortium) and CN = ``common_name``."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            # X.509 allows at most 64 characters here.
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def organisation(certificate: x509.Certificate) -> str:
    """Return the consortium that a certificate's subject names."""
    values = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(values[0].value) if values else "?"


def general_name(host: str) -> x509.GeneralName:
    """Return a host in the form of a certificate's alternative name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def certificate_builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int, issuer: x509.Certificate | None = None
) -> x509.CertificateBuilder:
    """Prepare a certificate for ``key``, not signed yet.

    Args:
        subject: whose key it is.
        key: the certified key.
        days: how long it holds from now; it begins ``_CLOCK_TOLERANCE`` earlier, and ends no later than the
            issuer's own certificate.
        issuer: the certificate of who will sign; None: the key signs for itself.
    """
    now = utc_now()
    ends = now + timedelta(days=days)
    issuer_key = key if issuer is None else issuer.public_key()
    assert isinstance(issuer_key, ec.EllipticCurvePublicKey)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_TOLERANCE)
        # A certificate that outlasts its authority's would look valid while every check of it fails.
        .not_valid_after(ends if issuer is None else min(ends, issuer.not_valid_after_utc))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def sign_certificate(
    builder: x509.CertificateBuilder, signer: ec.EllipticCurvePrivateKey, *, authority: bool
) -> x509.Certificate:
    """Sign a certificate of an authority, which may certify keys and nothing else, or of anybody else."""
    return (
        # With path_length 0 an authority may certify keys, but no further authority.
        builder.add_extension(x509.BasicConstraints(authority, 0 if authority else None), critical=True)
        .add_extension(_key_usage(signs_certificates=authority), critical=True)
        .sign(signer, hashes.SHA384())
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """Return what the certified key may sign, either certificates or anything but certificates."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
