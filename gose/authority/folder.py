"""The folder of the authority, and all that it holds: made once, whole or not at all; read by ``gose serve`` and by an
administrator's commands.

    ca.key, ca.pem                    the CA
    token.key                         the token authority (RSA-2048: PS256, or P-256: ES256)
    containers.key, containers.pem    the container authority (RSA-2048)
    service-provider.pem              TLS of the service provider (P-256), key and certificate
    openid-provider.pem               TLS of the OpenID provider's endpoint (P-256), key and certificate
    user-tokens.key, user-tokens.pem  the authority of users' tokens (RSA-2048), key and public key; made when first needed

A server's key and certificate are one file, so that they never differ. All is PEM, keys are PKCS#8. What holds a key has mode 0600,
the folder 0700.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gose.authority.certificate_authority import CertificateAuthority, new_authority_key
from gose.authority.errors import AuthorityDamagedError, AuthorityExistsError, AuthorityMissingError, IssuanceError
from gose.authority.ledger import Action, AuthorityRecord, Ledger
from gose.authority.token_authority import TokenAuthority
from gose.authority.user_tokens import UserTokenAuthority
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.identity import Holder, IdentityError, Role, der_of, load_certificate, pem_of, thumbprint
from secfunet.service.files import private_folder, read_secret, sync_folder, write_atomically
from secfunet.vm_auth_token import TokenPublicKey

DAY: Final = 86400.0
SERVER_VALIDITY: Final = 825 * DAY
CONTAINER_AUTHORITY_VALIDITY: Final = 3652 * DAY

SERVICE_PROVIDER: Final = "service-provider"
OPENID_PROVIDER: Final = "openid-provider"

_BEGIN_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"


class AuthorityFolder:
    """An authority that exists. Files are read when they are first needed, so that ``gose serve`` need not read the CA's key.

    Reading raises AuthorityDamagedError, and UnsafeFileError for a key that others can read.
    """

    def __init__(self, path: Path) -> None:
        if not (path / "ca.pem").is_file():
            raise AuthorityMissingError(path)
        self.path = path
        self.ledger = Ledger(path.parent)

    # --- what a running grid needs

    @property
    def ca_path(self) -> Path:
        """The CA's certificate, PEM: what clients trust."""
        return self.path / "ca.pem"

    @cached_property
    def ca_certificate(self) -> x509.Certificate:
        """The CA's certificate."""
        return self._certificate("ca.pem")

    @cached_property
    def token_issuer(self) -> str:
        """``iss`` of this grid's tokens: a name that no other grid has."""
        return f"urn:secfunet:grid:{thumbprint(der_of(self.ca_certificate))}"

    @cached_property
    def token_keys(self) -> Mapping[str, TokenPublicKey]:
        """The public keys of the token authority by ``kid``, for a TokenVerifier."""
        return self.token_authority.public_keys

    @cached_property
    def container_certificate(self) -> x509.Certificate:
        """The container authority's certificate."""
        return self._certificate("containers.pem")

    @cached_property
    def container_key(self) -> rsa.RSAPrivateKey:
        """The container authority's key."""
        key = self._key("containers.key")
        if not isinstance(key, rsa.RSAPrivateKey):
            raise AuthorityDamagedError(self.path / "containers.key", "holds a key of another kind")
        return key

    def container_sealer(
        self,
        recipient: rsa.RSAPublicKey,
        profile: ContainerProfile = ContainerProfile.OAEP_PSS_SHA256,
        *,
        max_containers: int = 1000,
        max_age: float = 300.0,
    ) -> ContainerSealer:
        """Makes containers for a hypervisor, signed by the container authority."""
        return ContainerSealer(recipient, self.container_key, profile, max_containers=max_containers, max_age=max_age)

    def server_file(self, server: str) -> Path:
        """Key and certificate of SERVICE_PROVIDER or OPENID_PROVIDER in one PEM file, for ``ssl.SSLContext.load_cert_chain``."""
        return self.path / f"{server}.pem"

    def read_server(self, server: str) -> tuple[bytes, bytes]:
        """Key and certificate of SERVICE_PROVIDER or OPENID_PROVIDER, PEM, in the order of ``grpc.ssl_server_credentials``."""
        path = self.server_file(server)
        try:
            key, begin, certificate = read_secret(path).partition(_BEGIN_CERTIFICATE)
        except FileNotFoundError:
            raise AuthorityDamagedError(path, "is missing (gose renew-servers makes a new one)") from None
        if not begin or b"PRIVATE KEY" not in key:
            raise AuthorityDamagedError(
                path, "does not hold a key and its certificate (gose renew-servers makes a new one)"
            )
        return key, begin + certificate

    # --- what an administrator's commands need

    @cached_property
    def certificate_authority(self) -> CertificateAuthority:
        """The CA with its key."""
        key = self._key("ca.key")
        try:
            return CertificateAuthority(key, self.ca_certificate, record=self.ledger.record)
        except IssuanceError:
            raise AuthorityDamagedError(self.path / "ca.key", "is not the key of ca.pem") from None

    @cached_property
    def token_authority(self) -> TokenAuthority:
        """The token authority with its key."""
        return TokenAuthority(self._key("token.key"), issuer=self.token_issuer, record=self.ledger.record)

    @property
    def user_tokens_path(self) -> Path:
        """The public key of the authority of users' tokens, PEM; made with it."""
        return self.path / "user-tokens.pem"

    @cached_property
    def user_token_authority(self) -> UserTokenAuthority:
        """The authority of users' tokens with its key. The first to ask makes them: folders of before have none."""
        with _locked(self.path):
            key_path, public_path = self.path / "user-tokens.key", self.user_tokens_path
            if not key_path.exists():
                self.ledger.record(AuthorityRecord(Action.USER_TOKEN_AUTHORITY, "permitted"))
                _write_key(key_path, rsa.generate_private_key(65537, 2048))
            key = self._key(key_path.name)
            if not isinstance(key, rsa.RSAPrivateKey):
                raise AuthorityDamagedError(key_path, "holds a key of another kind")
            public = key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
            if not public_path.exists() or public_path.read_bytes() != public:
                write_atomically(public_path, public, mode=0o644)
        return UserTokenAuthority(key, self.ca_certificate, record=self.ledger.record)

    def renew_servers(self, names: Sequence[str], *, now: float) -> tuple[x509.Certificate, ...]:
        """New keys and certificates for the two servers, under these DNS names and IP addresses.

        A running grid uses them when it reads its settings again (SIGHUP).
        """
        with _locked(self.path):
            return tuple(
                _make_server(self.path, self.certificate_authority, server, names, now)
                for server in (SERVICE_PROVIDER, OPENID_PROVIDER)
            )

    def _certificate(self, name: str) -> x509.Certificate:
        path = self.path / name
        try:
            return load_certificate(path.read_bytes())
        except IdentityError as error:
            raise AuthorityDamagedError(path, "holds no certificate") from error
        except FileNotFoundError:
            raise AuthorityDamagedError(path, "is missing") from None

    def _key(self, name: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
        path = self.path / name
        try:
            key = serialization.load_pem_private_key(read_secret(path), password=None)
        except FileNotFoundError:
            raise AuthorityDamagedError(path, "is missing") from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            # Not chained: a parser's message may quote what it read.
            raise AuthorityDamagedError(path, "holds no private key") from None
        if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
            raise AuthorityDamagedError(path, "holds a key of another kind")
        return key


def create_authority(
    path: Path, names: Sequence[str], *, now: float, ca_key: str = "p-384", tokens: str = "rsa-2048"
) -> AuthorityFolder:
    """Makes the authority in the folder ``path``: all of it, or (the process dies, the disk is full) nothing.

    ``names`` are the DNS names and IP addresses of the servers; ``ca_key`` is p-384 or rsa-3072, ``tokens`` rsa-2048 or p-256.
    Raises AuthorityExistsError, IssuanceError, AuditError.
    """
    with _locked(private_folder(path.parent)):
        if path.exists():
            raise AuthorityExistsError(path)
        draft = path.with_name(f".{path.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)  # of a run that died
        private_folder(draft)
        try:
            ca = _fill(draft, names, now, ca_key, tokens)
            Ledger(path.parent).record(
                AuthorityRecord(
                    Action.INIT,
                    "permitted",
                    thumbprint=thumbprint(der_of(ca)),
                    until=int(ca.not_valid_after_utc.timestamp()),
                    detail=", ".join(names),
                )
            )
            draft.rename(path)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        sync_folder(path.parent)
    return AuthorityFolder(path)


def _fill(folder: Path, names: Sequence[str], now: float, ca_key: str, tokens: str) -> x509.Certificate:
    """The CA's certificate."""
    key = new_authority_key(ca_key)
    authority = CertificateAuthority.create(f"SecFuNet grid {os.urandom(4).hex()}", key, now=now)
    _write_key(folder / "ca.key", key)
    _write_certificate(folder / "ca.pem", authority.certificate)
    _write_key(folder / "token.key", _new_token_key(tokens))
    containers = rsa.generate_private_key(65537, 2048)
    _write_key(folder / "containers.key", containers)
    _write_certificate(
        folder / "containers.pem",
        authority.issue_container_authority(containers.public_key(), now=now, valid=CONTAINER_AUTHORITY_VALIDITY),
    )
    for server in (SERVICE_PROVIDER, OPENID_PROVIDER):
        _make_server(folder, authority, server, names, now)
    return authority.certificate


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_server(
    folder: Path, authority: CertificateAuthority, server: str, names: Sequence[str], now: float
) -> x509.Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = authority.issue(
        Holder(Role.SERVER, server), key.public_key(), now=now, valid=SERVER_VALIDITY, server_names=names
    )
    write_atomically(folder / f"{server}.pem", _pem_of_key(key) + pem_of(der_of(certificate)), mode=0o600)
    return certificate


def _new_token_key(algorithm: str) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    if algorithm == "rsa-2048":
        return rsa.generate_private_key(65537, 2048)
    if algorithm == "p-256":
        return ec.generate_private_key(ec.SECP256R1())
    raise IssuanceError("a token authority's key is rsa-2048 or p-256")


def _pem_of_key(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_key(path: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    write_atomically(path, _pem_of_key(key), mode=0o600)


def _write_certificate(path: Path, certificate: x509.Certificate) -> None:
    write_atomically(path, pem_of(der_of(certificate)), mode=0o644)
