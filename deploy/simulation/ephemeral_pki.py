"""Make the ephemeral PKI of a simulation: an authority, and a kit with key and certificate for each site.

No real site uses it. All simulated sites live on one machine, so there is nobody to hide from; but the
protocol that a real deployment runs is then run too, certificates and signatures included. The authority's
key is kept with the certificates, unprotected.
"""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.secure_aggregation import (
    CA_FILE,
    CERTIFICATE_FILE,
    EPHEMERAL,
    KEY_FILE,
)
from client.site import SiteConfig, site_folders
from common.config import RunConfig
from common.files import write_bytes

_VALID = timedelta(days=3650)


def make_ephemeral_pki(config: RunConfig) -> None:
    """Make the kits that the sites of a simulation need for secure aggregation, in its run folder."""
    for folder in site_folders(Path(config.sites_dir)):
        ephemeral_kit(Path(config.run_dir), SiteConfig.load(folder).name)


def ephemeral_kit(run: Path, site: str) -> Path:
    """Return the kit folder of a simulated site with node.key, node.crt and ca.crt, made if it is missing.

    Args:
        run: the run folder, which all simulated sites share.
        site: the site's name.
    """
    root = run / EPHEMERAL
    kit = root / site
    if not (root / CA_FILE).exists():
        root.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP384R1())
        write_bytes(root / "ca.key", _private_pem(key), 0o600)
        write_bytes(root / CA_FILE, _issue("throw-away authority", key.public_key(), key, None), 0o600)
    if not (kit / CERTIFICATE_FILE).exists():
        kit.mkdir(exist_ok=True)
        authority = (root / CA_FILE).read_bytes()
        signer = serialization.load_pem_private_key((root / "ca.key").read_bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        key = ec.generate_private_key(ec.SECP384R1())
        write_bytes(kit / KEY_FILE, _private_pem(key), 0o600)
        write_bytes(kit / CA_FILE, authority, 0o600)
        write_bytes(kit / CERTIFICATE_FILE, _issue(site, key.public_key(), signer, authority), 0o600)
    return kit


def _issue(
    name: str, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, authority: bytes | None
) -> bytes:
    """Issue a certificate in PEM for a site, or for the authority itself if ``authority`` is None."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = subject if authority is None else x509.load_pem_x509_certificate(authority).subject
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer, subject, key, x509.random_serial_number(), now - timedelta(hours=1), now + _VALID
    )
    constraints = x509.BasicConstraints(ca=authority is None, path_length=None)
    certificate = builder.add_extension(constraints, critical=True).sign(signer, hashes.SHA384())
    return certificate.public_bytes(serialization.Encoding.PEM)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Encode a private key in PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
