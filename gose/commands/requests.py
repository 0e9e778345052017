"""Certificate signing requests that cards elsewhere made, as an administrator brings them: a file (PKCS#10, PEM)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gose.authority import AuthorityFolder
from gose.authority.certificate_authority import check_request
from gose.authority.errors import IssuanceError
from gose.authority.ledger import Action, AuthorityRecord
from gose.settings import GoseSettings
from secfunet.identity import Holder, der_of, pem_of, thumbprint
from secfunet.service.results import write_result

MAX_FILE = 65536  # bytes


def read_request(path: Path) -> bytes:
    """The request, DER; not yet looked into. Raises IssuanceError, OSError."""
    with path.open("rb") as file:
        untrusted = file.read(MAX_FILE)
    try:
        return x509.load_pem_x509_csr(untrusted).public_bytes(Encoding.DER)
    except ValueError as error:
        raise IssuanceError(f"{path} is no PKCS#10 request: {error}") from None


def certify(
    settings: GoseSettings, holder: Holder, request: Path, out: Path, *, valid: float, server_names: Sequence[str] = ()
) -> str:
    """Certifies a holder who is not in the registry, and writes the certificate (PEM); its thumbprint.

    Raises what ``read_request``, ``check_request`` and the authority raise; nothing is written then.
    """
    authority = AuthorityFolder(settings.authority)
    role, name = holder
    with authority.ledger.attempt(AuthorityRecord(Action.CERTIFICATE, "failed", role=role, name=name)):
        key = check_request(read_request(request), holder)
        certificate = authority.certificate_authority.issue(
            holder, key, now=time.time(), valid=valid, server_names=tuple(server_names)
        )
    issued = der_of(certificate)
    write_result(pem_of(issued), out, mode=0o644)
    return thumbprint(issued)
