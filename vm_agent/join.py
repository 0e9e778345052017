"""The join information: what dom0 handed to this domain, and to no other, so that its agent can enrol.

A JSON object (file of mode 0600): ``uuid`` of the domain, ``join_secret`` (base64url, 32 bytes, good for one key), ``guest_authority``
(PEM), the addresses ``enrol`` and ``agent`` and ``server_name``, which the middleware's certificate carries. An address is ``unix:PATH`` (a
relative path is relative to the file's folder), ``tcp:ADDRESS:PORT`` (an IP address, IPv6 in brackets) or ``vchan:SERVICE``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from uuid import UUID

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.service.files import UnsafeFileError, read_secret, sync_folder
from secfunet.service.unix_socket import SocketPathError, unix_target
from vm_agent.errors import JoinError
from vm_agent.options import MAX_UNIX_PATH

UNIX, TCP, VCHAN = "unix", "tcp", "vchan"
SERVICES = ("enrol", "agent")  # what a vchan leads to
MAX_JOIN_BYTES = 16384
SECRET_BYTES = 32
_SERVER_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class JoinInformation:
    """Parsed join information."""

    uuid: str
    secret: bytes = field(repr=False)
    guest_authority: bytes  # X.509, DER
    enrol: str  # an address: see ``transport``
    agent: str
    server_name: str

    @property
    def digest(self) -> str:
        """SHA-256 of the secret, hex: names this invitation without telling it."""
        return hashlib.sha256(b"secfunet join secret\0" + self.secret).hexdigest()

    def fields(self) -> dict[str, str]:
        """The members of the JSON object. A secret."""
        return {
            "uuid": self.uuid,
            "join_secret": base64.urlsafe_b64encode(self.secret).decode(),
            "guest_authority": x509.load_der_x509_certificate(self.guest_authority).public_bytes(Encoding.PEM).decode(),
            "enrol": self.enrol,
            "agent": self.agent,
            "server_name": self.server_name,
        }


def parse_join(untrusted: bytes, folder: Path) -> JoinInformation:
    """Raises JoinError, and nothing else, for whatever is no join information."""
    if len(untrusted) > MAX_JOIN_BYTES:
        raise JoinError(f"the join information is larger than {MAX_JOIN_BYTES} bytes")
    try:
        fields = json.loads(untrusted)
    except (ValueError, RecursionError):
        raise JoinError("the join information is no JSON") from None
    return join_of(fields, folder)


def join_of(fields: object, folder: Path) -> JoinInformation:
    """Of a JSON value: see ``parse_join``."""
    if not isinstance(fields, dict):
        raise JoinError("the join information is no JSON object")
    server_name = _text(fields, "server_name")
    if not _SERVER_NAME.fullmatch(server_name):
        raise JoinError("'server_name' in the join information is no host name")
    return JoinInformation(
        uuid=_uuid(_text(fields, "uuid")),
        secret=_secret(_text(fields, "join_secret")),
        guest_authority=_certificate(_text(fields, "guest_authority")),
        enrol=address(_text(fields, "enrol"), folder),
        agent=address(_text(fields, "agent"), folder),
        server_name=server_name,
    )


def read_join(path: Path) -> JoinInformation | None:
    """The join information at ``path``; None if there is none. Raises JoinError if it cannot be used."""
    try:
        untrusted = read_secret(path, limit=MAX_JOIN_BYTES)
    except FileNotFoundError:
        return None
    except UnsafeFileError as error:
        raise JoinError(str(error)) from error
    except OSError as error:
        raise JoinError(f"{path} cannot be read: {error.strerror}") from error
    return parse_join(untrusted, path.parent)


def erase_join(path: Path) -> bool:
    """Removes used join information; False where the agent may not (a read-only image): the secret is worth nothing any more."""
    try:
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def address(untrusted: str, folder: Path) -> str:
    """The address in one form: a Unix socket's path is absolute. Raises JoinError for what is none."""
    scheme, _, rest = untrusted.partition(":")
    if scheme == VCHAN and rest in SERVICES:
        return untrusted
    if scheme == TCP:
        return f"{TCP}:{_endpoint(rest)}"
    if scheme != UNIX or not rest or "\0" in rest:
        raise JoinError("an address in the join information is none of unix:PATH, tcp:ADDRESS:PORT and vchan:SERVICE")
    path = (folder / rest.removeprefix("//")).absolute()
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise JoinError(f"a Unix socket's path has at most {MAX_UNIX_PATH} bytes: {path}")
    try:
        unix_target(path)
    except SocketPathError as error:
        raise JoinError(str(error)) from None
    return f"unix:{path}"


def _endpoint(untrusted: str) -> str:
    host, _, port = untrusted.rpartition(":")
    try:
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError
        if host.startswith("[") and host.endswith("]"):
            return f"[{IPv6Address(host[1:-1])}]:{int(port)}"
        return f"{IPv4Address(host)}:{int(port)}"
    except ValueError:
        raise JoinError("a TCP address in the join information is not of the form ADDRESS:PORT") from None


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.isascii():
        raise JoinError(f"'{name}' is missing in the join information, or is no text")
    return value


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        raise JoinError("'uuid' in the join information is no UUID") from None


def _secret(text: str) -> bytes:
    try:
        secret = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise JoinError("'join_secret' in the join information is no base64url") from None
    if len(secret) != SECRET_BYTES:
        raise JoinError(f"'join_secret' in the join information has not {SECRET_BYTES} bytes")
    return secret


def _certificate(pem: str) -> bytes:
    try:
        return x509.load_pem_x509_certificate(pem.encode()).public_bytes(Encoding.DER)
    except (ValueError, x509.InvalidVersion):
        raise JoinError("'guest_authority' in the join information is no PEM certificate") from None
