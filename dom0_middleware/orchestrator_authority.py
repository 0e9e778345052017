"""The orchestrator authority: who may create, start and revoke VMs, by the name in a client certificate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dom0_middleware.authority import Authority, private_key_pem, uri_names
from dom0_middleware.errors import Reason, Refused
from secfunet.identity import IdentityError, load_certificate
from secfunet.service.files import private_folder, write_atomically

ORCHESTRATOR_LIFETIME = 365 * 86400.0  # seconds
_URN = "urn:secfunet:orchestrator:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class OrchestratorAuthority:
    """Issues orchestrators' certificates into ``folder``/orchestrators/NAME.{key,pem}."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self._authority = authority
        self._folder = folder

    @classmethod
    def load(cls, folder: Path, *, clock: Callable[[], float]) -> OrchestratorAuthority:
        return cls(Authority.load(folder / "orchestrator-authority", clock=clock), folder)

    @classmethod
    def create(cls, folder: Path, *, clock: Callable[[], float]) -> OrchestratorAuthority:
        stem = folder / "orchestrator-authority"
        return cls(Authority.create(stem, "SecFuNet orchestrator authority", clock=clock), folder)

    @property
    def certificate_pem(self) -> bytes:
        return self._authority.certificate_pem

    def add(self, name: str) -> Path:
        """Makes NAME's key (0600) and certificate; the path of the certificate. Raises Refused (REQUEST_INVALID)."""
        if not _NAME.fullmatch(name):
            raise Refused(Reason.REQUEST_INVALID, "an orchestrator's name is 1 to 64 characters of [A-Za-z0-9._-]")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._authority.issue(
            key.public_key(),
            common_name=name,
            names=[x509.UniformResourceIdentifier(_URN + name)],
            server=False,
            lifetime=ORCHESTRATOR_LIFETIME,
        )
        certificate_path, key_path = credential_paths(self._folder, name)
        private_folder(key_path.parent)
        write_atomically(key_path, private_key_pem(key))
        write_atomically(certificate_path, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        return certificate_path

    def server_pair(self, server_name: str) -> tuple[bytes, bytes]:
        return self._authority.server_pair(server_name)


def credential_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Certificate and key of the orchestrator ``name``."""
    return folder / "orchestrators" / f"{name}.pem", folder / "orchestrators" / f"{name}.key"


def orchestrator_name(untrusted_pem: bytes) -> str:
    """The name in the certificate of a TLS peer. Raises Refused (ORCHESTRATOR_NOT_ALLOWED) if there is none of the right form."""
    try:
        (name,) = uri_names(load_certificate(untrusted_pem))
    except (ValueError, IdentityError):
        name = ""
    if not name.startswith(_URN) or not _NAME.fullmatch(name.removeprefix(_URN)):
        raise Refused(Reason.ORCHESTRATOR_NOT_ALLOWED, "the certificate names no orchestrator")
    return name.removeprefix(_URN)
