"""The agent's own TLS key: made in the guest, EC P-256, worth what its certificate is worth (an hour, this domain).

It is not the VM's key: that one never leaves its secure element.
"""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from vm_agent.errors import NotEnrolledError


class AgentKey:
    """A P-256 private key that shows itself neither in logs nor in exceptions."""

    __slots__ = ("_key",)

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "AgentKey(<hidden>)"

    @classmethod
    def generate(cls) -> AgentKey:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def from_pem(cls, untrusted_pem: bytes) -> AgentKey:
        """Raises NotEnrolledError if this is no unencrypted P-256 key (PKCS#8, RFC 5958)."""
        try:
            key = serialization.load_pem_private_key(untrusted_pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise NotEnrolledError("the kept private key cannot be read") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise NotEnrolledError("the kept private key is no P-256 key")
        return cls(key)

    def pem(self) -> bytes:
        """PKCS#8 without encryption, for a file of mode 0600 and for gRPC's TLS. A secret."""
        return self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def public_der(self) -> bytes:
        """SubjectPublicKeyInfo (RFC 5280, 4.1.2.7), DER."""
        return self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    def signing_request(self) -> bytes:
        """PKCS#10 (RFC 2986), DER. Its subject says nothing: dom0 knows who calls."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vm-agent")])
        request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(self._key, hashes.SHA256())
        return request.public_bytes(serialization.Encoding.DER)

    def fits(self, certificate: x509.Certificate) -> bool:
        """Whether the certificate is for this key (a comparison of public keys, no verification)."""
        public = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        try:
            return certificate.public_key().public_bytes(*public) == self._key.public_key().public_bytes(*public)
        except (ValueError, UnsupportedAlgorithm):
            return False
