"""Keys and certificates: ours hold; the foreign, late, early, damaged or readable ones are refused."""

import ipaddress
import os
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from flwr.cli.supernode.register import try_load_public_key
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.pki import read_node_key
from deploy.consortium.authority import Authority
from deploy.consortium.pki import (
    _CLOCK_TOLERANCE,
    KeyForm,
    _write_secret,
    certified_hosts,
    check_certificate,
    fingerprint,
    make_private_key,
    read_certificate,
    read_public_key,
    write_certificate,
    write_public_key,
)

PASSWORD = b"correct horse"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "authority", "lesions", 3650)


def new_key() -> ec.EllipticCurvePublicKey:
    return ec.generate_private_key(ec.SECP384R1()).public_key()


def openssh(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )


def test_a_site_certificate_names_the_site_and_its_key(authority: Authority) -> None:
    key = new_key()
    certificate = authority.issue_site("charite", key, 398)
    (name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == "charite"
    assert certificate.public_key() == key
    assert isinstance(certificate.signature_hash_algorithm, hashes.SHA384)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    check_certificate(certificate, authority.certificate, "it")
    (record,) = authority.issued()
    assert (record.subject, record.public_key) == ("charite", fingerprint(key))


def test_the_authority_may_sign_certificates_but_no_further_authority(authority: Authority) -> None:
    constraints = authority.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    check_certificate(authority.certificate, authority.certificate, "it")


hosts = st.lists(
    st.one_of(
        st.from_regex(
            r"[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z]([a-z0-9-]{0,10}[a-z0-9])?){0,3}", fullmatch=True
        ),
        st.ip_addresses().map(str),
    ),
    min_size=1,
    max_size=5,
    unique=True,
)


@settings(max_examples=25, deadline=None)
@given(hosts, st.integers(1, 7300))
def test_a_server_certificate_is_for_its_hosts_and_ends_with_its_authority(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], days: int
) -> None:
    folder = tmp_path_factory.mktemp("authority") / "authority"
    authority = Authority.create(folder, "lesions", 400)
    certificate = authority.issue_server(new_key(), names, days)
    assert certified_hosts(certificate) == set(names)
    ends = certificate.not_valid_after_utc
    assert ends <= authority.certificate.not_valid_after_utc
    if days < 400:
        assert timedelta(days=days) == ends - certificate.not_valid_before_utc - _CLOCK_TOLERANCE


def test_openssl_and_python_accept_the_chain(authority: Authority, tmp_path: Path) -> None:
    key = make_private_key(tmp_path / "server.key", KeyForm.PKCS8)
    write_certificate(tmp_path / "server.crt", authority.issue_server(key.public_key(), ["a.example"], 30))
    ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
        tmp_path / "server.crt", tmp_path / "server.key"
    )
    verified = subprocess.run(
        [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            "sslserver",
            "-verify_hostname",
            "a.example",
            "-CAfile",
            authority.folder / "ca.crt",
            tmp_path / "server.crt",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr


def test_a_foreign_certificate_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "lesions", 3650)
    certificate = other.issue_site("charite", new_key(), 398)
    with pytest.raises(UserError, match="was not issued by the authority of consortium 'lesions'"):
        check_certificate(certificate, authority.certificate, "the certificate of site 'charite'")


def test_the_clock_decides_whether_a_certificate_holds(authority: Authority) -> None:
    certificate = authority.issue_site("charite", new_key(), 10)
    now = datetime.now(UTC)
    check_certificate(certificate, authority.certificate, "it", now - _CLOCK_TOLERANCE / 2)
    check_certificate(certificate, authority.certificate, "it", now + timedelta(days=9.9))
    with pytest.raises(UserError, match=r"is valid from .* this machine's clock says .* set the clock"):
        check_certificate(certificate, authority.certificate, "it", now - 2 * _CLOCK_TOLERANCE)
    with pytest.raises(UserError, match=r"expired on .* provision renew"):
        check_certificate(certificate, authority.certificate, "it", now + timedelta(days=10.1))


def test_an_expired_authority_is_not_said_to_be_renewable(authority: Authority) -> None:
    later = datetime.now(UTC) + timedelta(days=3651)
    with pytest.raises(UserError, match="an authority is not renewed"):
        check_certificate(authority.certificate, authority.certificate, "it", later)


def test_two_sites_cannot_have_one_key(authority: Authority) -> None:
    key = new_key()
    authority.issue_site("charite", key, 398)
    authority.issue_site("charite", key, 398)
    with pytest.raises(UserError, match="sites 'charite' and 'north' have one key"):
        authority.issue_site("north", key, 398)


def test_a_revoked_key_is_never_certified_again(authority: Authority) -> None:
    key = new_key()
    authority.issue_site("charite", key, 398)
    authority.issue_site("north", new_key(), 398)
    assert authority.revoke("charite") == 1
    assert authority.revoke("charite") == 0
    assert [(record.subject, record.revoked is None) for record in authority.issued()] == [
        ("charite", False),
        ("north", True),
    ]
    with pytest.raises(UserError, match="was revoked on"):
        authority.issue_site("charite", key, 398)
    with pytest.raises(UserError, match="have one key"):
        authority.issue_site("north", key, 398)
    authority.issue_site("charite", new_key(), 398)


def test_an_opened_authority_goes_on_where_the_last_one_stopped(authority: Authority) -> None:
    authority.issue_site("charite", new_key(), 398)
    opened = Authority.open(authority.folder)
    opened.issue_site("north", new_key(), 398)
    assert [record.subject for record in Authority.open(authority.folder).issued()] == ["charite", "north"]


def test_an_authority_is_never_overwritten(authority: Authority) -> None:
    before = (authority.folder / "ca.key").read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        Authority.create(authority.folder, "lesions", 10)
    assert (authority.folder / "ca.key").read_bytes() == before


def test_a_password_guards_the_authority(tmp_path: Path) -> None:
    folder = Authority.create(tmp_path / "authority", "lesions", 10, PASSWORD).folder
    assert b"ENCRYPTED" in (folder / "ca.key").read_bytes()
    assert Authority.open(folder, PASSWORD).consortium == "lesions"
    with pytest.raises(UserError, match="protected by a password"):
        Authority.open(folder)
    with pytest.raises(UserError, match="the password is wrong") as error:
        Authority.open(folder, b"wrong horse")
    assert "horse" not in str(error.value)


def test_a_password_that_nothing_asks_for_is_said(authority: Authority) -> None:
    with pytest.raises(UserError, match="has no password"):
        Authority.open(authority.folder, PASSWORD)


@pytest.mark.parametrize("name", ["ca.key", "ca.crt", "issued.json"])
def test_a_missing_file_of_the_authority_is_named(authority: Authority, name: str) -> None:
    (authority.folder / name).unlink()
    with pytest.raises(UserError, match=f"incomplete.*{name}"):
        Authority.open(authority.folder)


def test_the_halves_of_two_authorities_are_refused(authority: Authority, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "lesions", 10)
    (other.folder / "ca.key").replace(authority.folder / "ca.key")
    with pytest.raises(UserError, match="not the key of"):
        Authority.open(authority.folder)


def test_a_damaged_list_is_refused(authority: Authority) -> None:
    (authority.folder / "issued.json").write_text('[{"subject": 1}]', encoding="utf-8")
    with pytest.raises(UserError, match="is damaged"):
        Authority.open(authority.folder).issued()


def test_private_keys_are_the_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = Authority.create(tmp_path / "authority", "lesions", 10).folder
        make_private_key(tmp_path / "node.key", KeyForm.OPENSSH)
    finally:
        os.umask(before)
    for path in (folder / "ca.key", tmp_path / "node.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_key_that_others_can_read_is_refused(authority: Authority, mode: int) -> None:
    (authority.folder / "ca.key").chmod(mode)
    with pytest.raises(UserError, match=f"can be read by others \\(mode {mode:04o}\\)"):
        Authority.open(authority.folder)


def test_a_secret_is_never_overwritten_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    make_private_key(path, KeyForm.OPENSSH)
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists and is never overwritten"):
        make_private_key(path, KeyForm.OPENSSH)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["node.key"]


def test_flower_reads_the_node_keys(tmp_path: Path) -> None:
    key = make_private_key(tmp_path / "node.key", KeyForm.OPENSSH)
    write_public_key(tmp_path / "node.pub", key.public_key(), "charite")
    loaded = serialization.load_ssh_private_key((tmp_path / "node.key").read_bytes(), None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    assert loaded.public_key() == key.public_key()
    assert b"BEGIN PUBLIC KEY" in try_load_public_key(tmp_path / "node.pub")
    assert fingerprint(read_public_key(tmp_path / "node.pub")) == fingerprint(key.public_key())
    assert read_node_key(tmp_path / "node.key").public_key() == key.public_key()


PRIVATE = {
    "wrong curve": openssh(ec.generate_private_key(ec.SECP256R1())),
    "ed25519": openssh(ed25519.Ed25519PrivateKey.generate()),
    "rsa": openssh(rsa.generate_private_key(65537, 2048)),
}


@pytest.mark.parametrize("kind", PRIVATE)
def test_a_private_key_of_the_wrong_type_is_refused(tmp_path: Path, kind: str) -> None:
    _write_secret(tmp_path / "node.key", PRIVATE[kind])
    with pytest.raises(UserError, match="is not an elliptic-curve P-384 key"):
        read_node_key(tmp_path / "node.key")


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_node_key_with_a_password_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", PASSWORD.decode(), "-f", str(path)]
    subprocess.run(command, check=True)
    with pytest.raises(UserError, match="the SuperNode starts without anyone to type it"):
        read_node_key(path)


def test_a_damaged_key_is_refused_without_showing_it(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    make_private_key(path, KeyForm.OPENSSH)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], *lines[3:]]))
    with pytest.raises(UserError) as error:
        read_node_key(path)
    assert lines[1].decode() not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIC2xkEdOPvDHBnnHBt2oNYYe0jGjQ0Xb4IgMGZ2tJqtH", "wrong type"),
        (b"ecdsa-sha2-nistp384 AAAA", "is not a public key in OpenSSH form"),
        (b"", "is not a public key in OpenSSH form"),
        (PRIVATE["rsa"], "holds a private key"),
    ],
)
def test_what_is_not_a_sites_public_key_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "node.pub").write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_public_key(tmp_path / "node.pub")


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match="not a certificate in PEM form"):
        read_certificate(tmp_path / "ca.crt")
    with pytest.raises(UserError, match="the certificate not found"):
        read_certificate(tmp_path / "none.crt")


def test_ip_addresses_are_certified_as_addresses(authority: Authority) -> None:
    certificate = authority.issue_server(new_key(), ["10.0.0.5"], 5)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("10.0.0.5")]
