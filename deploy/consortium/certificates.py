"""Read, check and prepare X.509 certificates (ECDSA P-384, SHA-384).

Nothing here holds a private key or knows of kits.
"""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from common.errors import UserError, require_file
from common.files import write_bytes

CLOCK_TOLERANCE = timedelta(hours=1)
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
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
    latest: datetime | None,
) -> x509.CertificateBuilder:
    """Prepare a certificate for ``key``, not signed yet.

    Args:
        subject: whose key it is.
        issuer: who will sign.
        key: the certified key.
        issuer_key: the signer's public key.
        days: how long it holds from now; it begins CLOCK_TOLERANCE earlier.
        latest: it ends no later than this (the issuer's own end), if given.
    """
    now = utc_now()
    ends = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        # A certificate that outlasts its authority's would look valid while every check of it fails.
        .not_valid_after(min(ends, latest) if latest else ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
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
