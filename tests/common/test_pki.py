"""Certificates and signatures: what is genuine passes, and everything else is refused."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from common.errors import IdentityError, UserError
from common.pki import read_node_key, sign, verify, verify_certificate
from tests.certificates import issue

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def ca() -> tuple[ec.EllipticCurvePrivateKey, str]:
    key = ec.generate_private_key(ec.SECP384R1())
    return key, issue("authority", key.public_key(), key, None).decode()


@pytest.fixture(scope="module")
def site() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def test_a_genuine_certificate_names_site_and_key(
    ca: tuple[ec.EllipticCurvePrivateKey, str], site: ec.EllipticCurvePrivateKey
) -> None:
    certificate = issue("charite", site.public_key(), ca[0], ca[1].encode()).decode()
    found = verify_certificate(certificate, ca[1], NOW)
    assert found.site == "charite"
    assert found.public_key == site.public_key()


def test_other_certificates_are_refused(
    ca: tuple[ec.EllipticCurvePrivateKey, str], site: ec.EllipticCurvePrivateKey
) -> None:
    key, authority = ca
    good = issue("charite", site.public_key(), key, authority.encode()).decode()
    other = ec.generate_private_key(ec.SECP384R1())
    # The same authority name, another authority key.
    foreign = issue("charite", site.public_key(), other, issue("authority", other.public_key(), other, None))
    small = ec.generate_private_key(ec.SECP256R1()).public_key()
    cases = [
        (foreign.decode(), authority, NOW, "not of this consortium"),
        (good, authority, NOW + timedelta(days=4000), "valid from"),
        (good, authority, NOW - timedelta(days=1), "valid from"),
        (authority, authority, NOW, "not one of a site"),
        (issue("charite", small, key, authority.encode()).decode(), authority, NOW, "P-384"),
        ("no certificate", authority, NOW, "cannot be read"),
        (good, "no certificate", NOW, "cannot be read"),
        (good, issue("x", other.public_key(), site, good.encode()).decode(), NOW, "not of this"),
    ]
    for certificate, trusted, at, reason in cases:
        with pytest.raises(IdentityError, match=reason):
            verify_certificate(certificate, trusted, at)


def test_a_site_cannot_issue_for_another(
    ca: tuple[ec.EllipticCurvePrivateKey, str], site: ec.EllipticCurvePrivateKey
) -> None:
    own = issue("charite", site.public_key(), ca[0], ca[1].encode())
    below = issue("lmu", site.public_key(), site, own).decode()
    with pytest.raises(IdentityError, match="not of this consortium"):
        verify_certificate(below, ca[1], NOW)
    with pytest.raises(IdentityError, match="issued by a CA"):
        verify_certificate(below, own.decode(), NOW)


def test_two_names_in_one_certificate_are_refused(
    ca: tuple[ec.EllipticCurvePrivateKey, str], site: ec.EllipticCurvePrivateKey
) -> None:
    issuer = x509.load_pem_x509_certificate(ca[1].encode()).subject
    names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("charite", "lmu")])
    built = x509.CertificateBuilder(
        issuer, names, site.public_key(), 1, NOW - timedelta(hours=1), NOW + timedelta(hours=1)
    ).sign(ca[0], hashes.SHA384())
    with pytest.raises(IdentityError, match="exactly one common name"):
        verify_certificate(built.public_bytes(serialization.Encoding.PEM).decode(), ca[1], NOW)


def test_a_signature_is_bound_to_key_purpose_and_payload(site: ec.EllipticCurvePrivateKey) -> None:
    signature = sign(site, "keys", b"payload")
    verify(site.public_key(), "keys", b"payload", signature)
    other = ec.generate_private_key(ec.SECP384R1()).public_key()
    for key, purpose, payload, given in (
        (other, "keys", b"payload", signature),
        (site.public_key(), "key", b"spayload", signature),
        (site.public_key(), "keys", b"payloae", signature),
        (site.public_key(), "keys", b"payload", signature[:-1]),
        (site.public_key(), "keys", b"payload", b""),
    ):
        with pytest.raises(IdentityError):
            verify(key, purpose, payload, given)


def test_node_keys_are_read_in_both_formats(tmp_path: Path, site: ec.EllipticCurvePrivateKey) -> None:
    none = serialization.NoEncryption()
    for name, form in (
        ("pem", serialization.PrivateFormat.PKCS8),
        ("openssh", serialization.PrivateFormat.OpenSSH),
    ):
        content = site.private_bytes(serialization.Encoding.PEM, form, none)
        (tmp_path / name).write_bytes(content)
    for name in ("pem", "openssh"):
        assert read_node_key(tmp_path / name).public_key() == site.public_key()


def test_other_key_files_are_refused_without_their_content(tmp_path: Path) -> None:
    password = serialization.BestAvailableEncryption(b"secret-word")
    key = ec.generate_private_key(ec.SECP384R1())
    formats = (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.OpenSSH)
    none = serialization.NoEncryption()
    pem = serialization.Encoding.PEM
    files = {
        "password-pem": key.private_bytes(pem, formats[0], password),
        "p256": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, formats[0], none),
        "ed25519": ed25519.Ed25519PrivateKey.generate().private_bytes(pem, formats[1], none),
        "public": key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo),
        "empty": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="keygen") as caught:
            read_node_key(tmp_path / name)
        assert "BEGIN" not in str(caught.value)
    with pytest.raises(UserError, match="not found"):
        read_node_key(tmp_path / "missing")


def test_what_the_consortiums_authority_issues_is_accepted(
    tmp_path: Path, site: ec.EllipticCurvePrivateKey
) -> None:
    from deploy.consortium.authority import Authority

    authority = Authority.create(tmp_path / "authority", "lesions", 365)
    certificate = authority.issue_site("charite", site.public_key(), 90)
    pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
    found = verify_certificate(
        pem, (tmp_path / "authority" / "ca.crt").read_text(), NOW + timedelta(minutes=1)
    )
    assert (found.site, found.public_key) == ("charite", site.public_key())
