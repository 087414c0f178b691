"""Certificates of a test's own authority, made as those of a consortium are."""

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from deploy.consortium.pki import certificate_builder, distinguished_name, sign_certificate


def issue(
    name: str, key: ec.EllipticCurvePublicKey, signer: ec.EllipticCurvePrivateKey, authority: bytes | None
) -> bytes:
    """Return a certificate in PEM for a site, or for the authority itself where ``authority`` is None."""
    issuer = None if authority is None else x509.load_pem_x509_certificate(authority)
    builder = certificate_builder(distinguished_name("tests", name), key, 3650, issuer)
    return sign_certificate(builder, signer, authority=authority is None).public_bytes(Encoding.PEM)
