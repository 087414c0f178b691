"""Make the ephemeral PKI of a simulation: an authority, and a kit with key and certificate for each site.

No real site uses it. All simulated sites live on one machine, so there is nobody to hide from; but the
protocol that a real deployment runs is then run too, certificates and signatures included. The authority's
key is kept with the certificates, unprotected.
"""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from client.secure_aggregation import CA_FILE, CERTIFICATE_FILE, EPHEMERAL, KEY_FILE
from client.site import SiteConfig, site_folders
from common.config import RunConfig
from common.files import write_bytes
from deploy.consortium.pki import (
    KeyForm,
    certificate_builder,
    distinguished_name,
    make_private_key,
    read_certificate,
    read_private_key,
    sign_certificate,
    write_certificate,
)

_AUTHORITY_KEY = "ca.key"
_CONSORTIUM = "simulation"
_VALID_DAYS = 3650


def make_ephemeral_pki(config: RunConfig) -> None:
    """Make the kits that the sites of a simulation need for secure aggregation, in its run folder."""
    for folder in site_folders(Path(config.sites_dir)):
        _ephemeral_kit(Path(config.run_dir), SiteConfig.load(folder).name)


def _ephemeral_kit(run: Path, site: str) -> Path:
    """Return the kit folder of a simulated site with node.key, node.crt and ca.crt, made if it is missing.

    Args:
        run: the run folder, which all simulated sites share.
        site: the site's name.
    """
    root = run / EPHEMERAL
    kit = root / site
    if not (root / CA_FILE).exists():
        root.mkdir(parents=True, exist_ok=True)
        key = _new_key(root / _AUTHORITY_KEY)
        name = distinguished_name(_CONSORTIUM, "ephemeral authority")
        builder = certificate_builder(name, key.public_key(), _VALID_DAYS)
        write_certificate(root / CA_FILE, sign_certificate(builder, key, authority=True))
    if not (kit / CERTIFICATE_FILE).exists():
        kit.mkdir(exist_ok=True)
        authority, signer = read_certificate(root / CA_FILE), read_private_key(root / _AUTHORITY_KEY)
        key = _new_key(kit / KEY_FILE)
        name = distinguished_name(_CONSORTIUM, site)
        builder = certificate_builder(name, key.public_key(), _VALID_DAYS, authority)
        write_bytes(kit / CA_FILE, (root / CA_FILE).read_bytes(), 0o600)
        write_certificate(kit / CERTIFICATE_FILE, sign_certificate(builder, signer, authority=False))
    return kit


def _new_key(path: Path) -> ec.EllipticCurvePrivateKey:
    # A key whose certificate is missing was left by a run that was killed in between.
    path.unlink(missing_ok=True)
    return make_private_key(path, KeyForm.PKCS8)
