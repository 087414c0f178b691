"""Issue and revoke the certificates of a consortium's server and sites.

A site's certificate states which public key belongs to it. Sites check it when they exchange keys, so the
server that relays it need not be trusted. The authority's folder (ca.key, ca.crt, issued.json) stays with the
coordinator, offline if it can. Nothing here knows of kits or of Flower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from common.errors import UserError, require_file
from common.files import new_folder, write_json
from deploy.consortium.pki import (
    KeyForm,
    certificate_builder,
    check_certificate,
    distinguished_name,
    fingerprint,
    general_name,
    make_private_key,
    organisation,
    read_certificate,
    read_private_key,
    sign_certificate,
    utc_now,
    write_certificate,
)

_KEY_FILE, CERTIFICATE_FILE, _ISSUED_FILE = "ca.key", "ca.crt", "issued.json"
_SERVER = "(server)"
"""The subject of the server's own records in issued.json; no site can have this name."""


class _Issued(BaseModel):
    """Record one issued certificate, and whether it was revoked, as a line of issued.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str
    serial: str
    public_key: str
    """SHA-256 of the key, hexadecimal."""
    not_before: datetime
    not_after: datetime
    revoked: datetime | None = None


_RECORDS = TypeAdapter(list[_Issued])


@dataclass(frozen=True)
class Authority:
    """Hold an opened authority with its certificate and its private key in memory."""

    folder: Path
    certificate: x509.Certificate
    _key: ec.EllipticCurvePrivateKey = field(repr=False)

    @classmethod
    def create(cls, folder: Path, consortium: str, days: int, password: bytes | None = None) -> Self:
        """Make a new authority in a folder that does not exist yet.

        The folder appears complete or not at all.

        Args:
            folder: where to put it.
            consortium: becomes the certificate's organisation.
            days: how long it holds.
            password: encrypts ca.key, if given.

        Raises:
            UserError: the folder exists.
        """
        if folder.exists():
            raise UserError(f"{folder} exists: an authority is never overwritten")
        # Built under another name and renamed at the end, so that a failure leaves no half of an authority.
        with new_folder(folder, 0o700) as work:
            key = make_private_key(work / _KEY_FILE, KeyForm.PKCS8, password)
            name = distinguished_name(consortium, f"{consortium} authority")
            builder = certificate_builder(name, key.public_key(), days)
            certificate = sign_certificate(builder, key, authority=True)
            write_certificate(work / CERTIFICATE_FILE, certificate)
            write_json(work / _ISSUED_FILE, [], mode=0o644)
        return cls(folder, certificate, key)

    @classmethod
    def open(cls, folder: Path, password: bytes | None = None) -> Self:
        """Open an authority to issue or revoke certificates.

        Raises:
            UserError: a file is missing or readable by others, the password is wrong, key and certificate do
                not belong together, or the certificate does not hold now.
        """
        for name in (CERTIFICATE_FILE, _KEY_FILE, _ISSUED_FILE):
            require_file(
                folder / name,
                "the consortium's authority is incomplete: a file",
                "Bring back the authority folder from where you keep it. Without ca.key nothing can be "
                "issued: then provision a new consortium into an empty folder.",
            )
        certificate = read_certificate(folder / CERTIFICATE_FILE)
        key = read_private_key(folder / _KEY_FILE, password)
        if key.public_key() != certificate.public_key():
            raise UserError(
                f"{folder}: ca.key is not the key of ca.crt. Bring back the pair that belongs together."
            )
        # An authority signs its own certificate, so it is checked against itself.
        check_certificate(certificate, certificate, "the authority's certificate")
        return cls(folder, certificate, key)

    @property
    def consortium(self) -> str:
        """Return the consortium's name."""
        return organisation(self.certificate)

    def issue_server(
        self, key: ec.EllipticCurvePublicKey, hosts: Sequence[str], days: int
    ) -> x509.Certificate:
        """Issue a TLS certificate for ``hosts`` (DNS names and IP addresses) and record it in issued.json."""
        names = x509.SubjectAlternativeName([general_name(host) for host in hosts])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        name = distinguished_name(self.consortium, hosts[0])
        return self._issue(_SERVER, certificate_builder(name, key, days, self.certificate), names, usage)

    def issue_site(self, site: str, key: ec.EllipticCurvePublicKey, days: int) -> x509.Certificate:
        """Issue a certificate that ``key`` belongs to ``site`` (its CN) and record it in issued.json.

        Raises:
            UserError: another site has this key, or it was revoked.
        """
        for record in self.issued():
            if record.public_key != fingerprint(key):
                continue
            # Whoever holds one key under two names could act as both sites.
            if record.subject != site:
                raise UserError(
                    f"sites {record.subject!r} and {site!r} have one key: each site makes its own with "
                    "`fedbags site keygen`, so ask which of them it belongs to"
                )
            # A revoked key may be in other hands, so only a new key brings the site back.
            if record.revoked:
                raise UserError(
                    f"this key of site {site!r} was revoked on {record.revoked:%Y-%m-%d}: let the site make "
                    "a new one (move node.key away, then `fedbags site keygen`)"
                )
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        name = distinguished_name(self.consortium, site)
        return self._issue(site, certificate_builder(name, key, days, self.certificate), usage)

    def revoke(self, subject: str) -> int:
        """Mark every certificate of a site as revoked and return how many were changed."""
        now = utc_now()
        records = self.issued()
        changed = [record for record in records if record.subject == subject and not record.revoked]
        self._save(
            [
                record.model_copy(update={"revoked": now}) if record in changed else record
                for record in records
            ]
        )
        return len(changed)

    def issued(self) -> list[_Issued]:
        """Return every certificate ever issued, oldest first.

        Raises:
            UserError: issued.json is damaged.
        """
        path = self.folder / _ISSUED_FILE
        try:
            return _RECORDS.validate_json(path.read_bytes())
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged: bring it back from a backup of the authority folder"
            ) from error

    def _issue(
        self, subject: str, builder: x509.CertificateBuilder, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        certificate = sign_certificate(builder, self._key, authority=False)
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        # Recorded before it is handed out, so that issued.json lists every certificate issued here.
        record = _Issued(
            subject=subject,
            serial=f"{certificate.serial_number:x}",
            public_key=fingerprint(key),
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )
        self._save([*self.issued(), record])
        return certificate

    def _save(self, records: Sequence[_Issued]) -> None:
        rows = [record.model_dump(mode="json") for record in records]
        write_json(self.folder / _ISSUED_FILE, rows, mode=0o644)
