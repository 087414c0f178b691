"""Verify site certificates of the consortium's authority, and make and check node signatures.

A site trusts one file, its kit's ``ca.crt``. Everything else about another site, its name and its public
key, comes from a certificate that no relaying party can forge. This module knows nothing of Flower, and of
what is signed; the issuing side is ``deploy.consortium.authority``.

Revocation is not checked here, because a site has no list of revoked certificates. The server drops a
revoked site, and a certificate's validity bounds how long one that is not dropped could be used.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import IdentityError, UserError, require_file

_PUBLIC_BITS = 384
"""Size of a node key's curve (NIST P-384)."""
_SCHEME = ec.ECDSA(hashes.SHA384())


@dataclass(frozen=True)
class _SiteIdentity:
    """Hold the site name and public key that a valid certificate certifies."""

    site: str
    public_key: ec.EllipticCurvePublicKey


def read_private_key(path: Path, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """Read a P-384 private key, in OpenSSH's form or PEM.

    Raises:
        UserError: a password that is not given or wrong, a damaged file, or another type of key. The text
            holds nothing of the key.
    """
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
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.key_size != _PUBLIC_BITS:
        raise UserError(
            f"{path} is not an elliptic-curve P-384 key. `fedbags site keygen` makes the right kind."
        )
    return key


def read_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a site's private key, which has no password, as the SuperNode does.

    Raises:
        UserError: missing, or as ``read_private_key``; a password-protected key is one.
    """
    require_file(path, "this site's key", "`fedbags site keygen KIT` makes it, here at the site.")
    try:
        return read_private_key(path)
    except UserError as error:
        if "protected by a password" not in str(error):
            raise UserError(f"{error} A node key is made with `fedbags site keygen KIT`.") from None
        raise UserError(
            f"{path} is protected by a password, and the SuperNode starts without anyone to type it. "
            "Use the key that `fedbags site keygen KIT` makes: it has none and only its owner can read it."
        ) from None


def verify_certificate(certificate: str, authority: str, at: datetime) -> _SiteIdentity:
    """Check a site's certificate against the authority that the reader trusts.

    Args:
        certificate: PEM of one certificate; its common name is the site's name.
        authority: PEM of the consortium's CA certificate.
        at: the time to check at, with a time zone.

    Raises:
        IdentityError: unreadable, of another authority, outside its validity, a CA's own, without exactly
            one name, or without a P-384 key.
    """
    try:
        issuer = x509.load_pem_x509_certificate(authority.encode())
    except ValueError as error:
        raise IdentityError("the consortium's CA certificate cannot be read") from error
    owner = read_identity(certificate, at)
    site, subject = owner.site, x509.load_pem_x509_certificate(certificate.encode())
    try:
        subject.verify_directly_issued_by(issuer)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise IdentityError(f"the certificate of {site!r} is not of this consortium's authority") from error
    _check_validity("of the authority", issuer, at)
    # The authority's own certificate is self-signed, so it passes the check above; it is no site's.
    if _is_authority(subject) or not _is_authority(issuer):
        raise IdentityError(f"the certificate of {site!r} is not one of a site, issued by a CA")
    return owner


def read_identity(certificate: str, at: datetime) -> _SiteIdentity:
    """Return the site name and key that a certificate states, whoever issued it.

    Args:
        certificate: PEM of one certificate; its common name is the site's name.
        at: the time to check at, with a time zone.

    Raises:
        IdentityError: unreadable, outside its validity, without exactly one name, or without a P-384 key.
    """
    try:
        subject = x509.load_pem_x509_certificate(certificate.encode())
        names = subject.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        public_key = subject.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError("a site's certificate cannot be read") from error
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise IdentityError("a site's certificate must carry exactly one common name")
    site = names[0].value
    _check_validity(f"of {site!r}", subject, at)
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or public_key.key_size != _PUBLIC_BITS:
        raise IdentityError(f"the certificate of {site!r} holds no NIST P-{_PUBLIC_BITS} key")
    return _SiteIdentity(site, public_key)


def sign(key: ec.EllipticCurvePrivateKey, purpose: str, payload: bytes) -> bytes:
    """Sign a payload for one purpose with ECDSA over SHA-384."""
    return key.sign(_bound(purpose, payload), _SCHEME)


def verify(key: ec.EllipticCurvePublicKey, purpose: str, payload: bytes, signature: bytes) -> None:
    """Check a signature that ``sign`` made.

    Raises:
        IdentityError: it is not this key's signature of this payload for this purpose.
    """
    try:
        key.verify(signature, _bound(purpose, payload), _SCHEME)
    except InvalidSignature as error:
        raise IdentityError(f"a signature for {purpose!r} is not valid") from error


def _check_validity(owner: str, certificate: x509.Certificate, at: datetime) -> None:
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not first <= at <= last:
        raise IdentityError(
            f"the certificate {owner} is valid from {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M} UTC, "
            f"and it is {at:%Y-%m-%d %H:%M} here"
        )


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def _bound(purpose: str, payload: bytes) -> bytes:
    # The purpose is part of what is signed, so that a signature for one use is none for another. Its length
    # comes first, so that no other split into purpose and payload gives the same bytes.
    name = f"fedbags/{purpose}".encode()
    return len(name).to_bytes(4, "big") + name + payload
