"""The orchestrator authority: who may create, start and revoke VMs, by the name in a client certificate.

A name has one certificate, the one on file: what was issued before it, or for a name that was removed, is worth nothing from the moment
on at which the file is another or gone, although its own time has not come.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from dom0_middleware.authority import Authority, private_key_pem, uri_names
from dom0_middleware.errors import Reason, Refused
from secfunet.identity import MAX_CERTIFICATE_SIZE, NAME_PATTERN, IdentityError, der_of, load_certificate, thumbprint
from secfunet.service.files import private_folder, sync_folder, write_atomically

log = logging.getLogger(__name__)

ORCHESTRATOR_LIFETIME = 365 * 86400.0  # seconds
SEEN_EVERY: Final = 60.0  # seconds between two writes of when an orchestrator was last here
_URN = "urn:secfunet:orchestrator:"
_NAME = re.compile(NAME_PATTERN, re.ASCII)


@dataclass(frozen=True)
class OrchestratorCertificate:
    """The certificate that ``name`` has now. ``thumbprint``: x5t#S256; times in UTC seconds, ``last_seen`` None: it was never used."""

    name: str
    thumbprint: str
    serial: int
    not_after: float
    last_seen: float | None = None


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
        """Makes NAME's key (0600) and certificate; the path of the certificate. Raises Refused (REQUEST_INVALID) if there is one."""
        certificate_path, key_path = credential_paths(self._folder, _checked(name))
        for path in (certificate_path, key_path):
            if path.exists():
                raise Refused(
                    Reason.REQUEST_INVALID,
                    f"the orchestrator '{name}' has a certificate already ({path}):"
                    f" 'orchestrator rotate {name}' makes another one and ends that, 'orchestrator remove {name}' only ends it",
                )
        return self._issue(name)

    def rotate(self, name: str) -> Path:
        """The same for a name that has a certificate, which ends. Raises Refused (REQUEST_INVALID) if it has none."""
        self._require(name)
        return self._issue(name)

    def remove(self, name: str) -> None:
        """Ends NAME's certificate, and removes it with its key. Raises Refused (REQUEST_INVALID) if there is none."""
        self._require(name)
        # The certificate first: without it the key is worth nothing.
        for path in (*credential_paths(self._folder, name), _seen_path(self._folder, name)):
            path.unlink(missing_ok=True)
        sync_folder(self._folder / "orchestrators")

    def list(self) -> tuple[OrchestratorCertificate, ...]:
        """All, by name."""
        return Orchestrators(self._folder).list()

    def server_pair(self, server_name: str) -> tuple[bytes, bytes]:
        return self._authority.server_pair(server_name)

    def _require(self, name: str) -> None:
        if not any(path.exists() for path in credential_paths(self._folder, _checked(name))):
            raise Refused(Reason.REQUEST_INVALID, f"there is no orchestrator '{name}' ('orchestrator list' shows them)")

    def _issue(self, name: str) -> Path:
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


class Orchestrators:
    """Which certificate each orchestrator has now, as its file says at each call; ``folder`` is the state folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # By name: what the file was when it was read (device, inode, size, time of change), and what it held.
        self._read: dict[str, tuple[tuple[int, ...], OrchestratorCertificate]] = {}
        self._seen: dict[str, tuple[str, float]] = {}

    def current(self, name: str) -> OrchestratorCertificate | None:
        """None if there is none, or none that can be read."""
        path, _ = credential_paths(self._folder, name)
        try:
            found = path.stat()
            version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            known = self._read.get(name)
            if known is not None and known[0] == version:
                return known[1]
            with path.open("rb") as file:
                certificate = load_certificate(file.read(MAX_CERTIFICATE_SIZE * 2))
        except FileNotFoundError:
            self._read.pop(name, None)
            return None
        except (OSError, IdentityError) as error:
            log.warning("an orchestrator's certificate cannot be read: %s", error, extra={"file": str(path)})
            return None
        read = OrchestratorCertificate(
            name,
            thumbprint(der_of(certificate)),
            certificate.serial_number,
            certificate.not_valid_after_utc.timestamp(),
        )
        self._read[name] = (version, read)
        return read

    def require_current(self, name: str, shown: str, *, now: float) -> None:
        """``shown`` is the thumbprint of ``name``'s certificate, and its time is not over. Raises Refused (ORCHESTRATOR_NOT_ALLOWED)."""
        current = self.current(name)
        if current is None or current.thumbprint != shown:
            what = "was removed" if current is None else "was replaced by another one"
        elif now > current.not_after:
            what = "has ended"
        else:
            return
        raise Refused(
            Reason.ORCHESTRATOR_NOT_ALLOWED,
            f"the certificate of this orchestrator {what}",
            detail=f"certificate {shown} of '{name}'",
        )

    def saw(self, name: str, shown: str, *, now: float) -> None:
        """It was admitted with that certificate. On file about once a minute; that it cannot be written is no reason to refuse."""
        last = self._seen.get(name)
        if last is not None and last[0] == shown and 0 <= now - last[1] < SEEN_EVERY:
            return
        self._seen[name] = (shown, now)
        with contextlib.suppress(OSError):
            content = json.dumps({"certificate": shown, "time": round(now)})
            _seen_path(self._folder, name).write_text(content + "\n", encoding="ascii")

    def list(self) -> tuple[OrchestratorCertificate, ...]:
        """All, by name."""
        found = []
        for path in sorted((self._folder / "orchestrators").glob("*.pem")):
            current = self.current(path.stem) if _NAME.fullmatch(path.stem) else None
            if current is not None:
                last = self._last_seen(current)
                found.append(OrchestratorCertificate(**{**vars(current), "last_seen": last}))
        return tuple(found)

    def _last_seen(self, certificate: OrchestratorCertificate) -> float | None:
        try:
            said = json.loads(_seen_path(self._folder, certificate.name).read_text(encoding="ascii"))
            return float(said["time"]) if said["certificate"] == certificate.thumbprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def credential_paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Certificate and key of the orchestrator ``name``."""
    return folder / "orchestrators" / f"{name}.pem", folder / "orchestrators" / f"{name}.key"


def _seen_path(folder: Path, name: str) -> Path:
    return folder / "orchestrators" / f"{name}.seen"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise Refused(
            Reason.REQUEST_INVALID,
            "an orchestrator's name is 1 to 64 characters of [A-Za-z0-9._-], the first one a letter or digit",
        )
    return name


def shown_by(untrusted_pem: bytes) -> tuple[str, str]:
    """Name and thumbprint of the certificate of a TLS peer. Raises Refused (ORCHESTRATOR_NOT_ALLOWED) if there is no name of ours in it."""
    try:
        certificate = x509.load_pem_x509_certificate(untrusted_pem)
        (name,) = uri_names(certificate)
    except ValueError:
        raise Refused(Reason.ORCHESTRATOR_NOT_ALLOWED, "the certificate names no orchestrator") from None
    if not name.startswith(_URN) or not _NAME.fullmatch(name.removeprefix(_URN)):
        raise Refused(Reason.ORCHESTRATOR_NOT_ALLOWED, "the certificate names no orchestrator")
    return name.removeprefix(_URN), thumbprint(der_of(certificate))
