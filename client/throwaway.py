"""Make a THROW-AWAY kit for each simulated site, the ephemeral PKI of a simulation.

No real site uses it. All simulated sites live on one machine, so there is nobody to hide from; but the
protocol that a real deployment runs is then run too, certificates and signatures included. The authority's
key is kept with the certificates, unprotected.
"""

import fcntl
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

FOLDER = "throw-away-identities"
CA_FILE, KEY_FILE, CERTIFICATE_FILE = "ca.crt", "node.key", "node.crt"
"""The names that these files have in a real site's kit."""
VALID = timedelta(days=3650)


def throwaway_kit(root: Path, site: str) -> Path:
    """Return the kit folder of a simulated site with node.key, node.crt and ca.crt, made on first use.

    Args:
        root: the run folder, which all simulated sites share.
        site: the site's name.
    """
    root = root / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    kit = root / site
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / CA_FILE).exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _write(root / "ca.key", private_pem(key))
            _write(root / CA_FILE, issue("throw-away authority", key.public_key(), key, None))
        if not (kit / CERTIFICATE_FILE).exists():
            kit.mkdir(exist_ok=True)
            authority = (root / CA_FILE).read_bytes()
            signer = serialization.load_pem_private_key((root / "ca.key").read_bytes(), None)
            assert isinstance(signer, ec.EllipticCurvePrivateKey)
            key = ec.generate_private_key(ec.SECP384R1())
            _write(kit / KEY_FILE, private_pem(key))
            _write(kit / CA_FILE, authority)
            _write(kit / CERTIFICATE_FILE, issue(site, key.public_key(), signer, authority))
    return kit


def issue(
    name: str, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, authority: bytes | None
) -> bytes:
    """Issue a certificate in PEM for a site, or for the authority itself if ``authority`` is None."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = subject if authority is None else x509.load_pem_x509_certificate(authority).subject
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - timedelta(hours=1), now + VALID
    )
    constraints = x509.BasicConstraints(ca=authority is None, path_length=None)
    certificate = builder.add_extension(constraints, critical=True).sign(signer, hashes.SHA384())
    return certificate.public_bytes(serialization.Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key in PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        stream.write(content)
    temporary.replace(path)
