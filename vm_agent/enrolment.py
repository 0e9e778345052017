"""Enrolment: a join secret becomes a certificate for the agent's own key, and is kept across restarts.

What is kept is one file, replaced as a whole, so that key and certificate always belong together. It also remembers which invitation it
came from: join information that could not be erased is not presented a second time.

dom0 takes a join secret for the first key that comes with it, and no other. So the attempt is kept before it is made, with its key: whether
the answer is lost or the agent is killed, it asks again with the same.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import grpc.aio
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc
from secfunet.rpc.reasons import Reason
from secfunet.service.files import UnsafeFileError, read_secret, write_atomically
from vm_agent.errors import (
    AgentError,
    EnrolmentRefusedError,
    JoinError,
    NotEnrolledError,
    UnavailableError,
    from_rpc_error,
)
from vm_agent.identity import VmIdentity, parse_identity
from vm_agent.join import JoinInformation, join_of
from vm_agent.keys import AgentKey
from vm_agent.transport import options_for

log = logging.getLogger(__name__)

MAX_KEPT_BYTES = 32768
CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.max_receive_message_length", 1 << 20),
    ("grpc.max_metadata_size", 16384),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 20_000),  # in truth how long a connection with its handshake may take
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True, slots=True)
class Enrolment:
    """The agent's place at the middleware: its key, its certificate, and where to go with them."""

    uuid: str
    key: AgentKey = field(repr=False)
    certificate: x509.Certificate
    guest_authority: bytes  # X.509, DER
    agent: str  # an address: see ``transport``
    server_name: str
    join_digest: str  # which invitation it came from
    enrol: str = ""  # an address, where a certificate that has ended is renewed; "" in what earlier versions kept

    @property
    def expires_at(self) -> float:
        """UTC seconds."""
        return self.certificate.not_valid_after_utc.timestamp()

    @property
    def renew_at(self) -> float:
        """UTC seconds: two thirds of the certificate's life."""
        begin = self.certificate.not_valid_before_utc.timestamp()
        return begin + (self.expires_at - begin) * 2 / 3

    def credentials(self) -> grpc.ChannelCredentials:
        """Mutual TLS with the middleware: its certificate must come from the guest authority."""
        return grpc.ssl_channel_credentials(
            root_certificates=_pem(self.guest_authority),
            private_key=self.key.pem(),
            certificate_chain=self.certificate.public_bytes(Encoding.PEM),
        )

    def renewed(self, untrusted_certificate: bytes, now: float) -> Enrolment:
        """This enrolment with the next certificate for the same key. Raises EnrolmentRefusedError if that is not what it should be."""
        certificate = check_certificate(untrusted_certificate, self.key, self.guest_authority, self.uuid, now)
        return replace(self, certificate=certificate)

    def to_json(self) -> bytes:
        """What the kept file holds. A secret: the key is in it."""
        kept = {
            "uuid": self.uuid,
            "key": self.key.pem().decode(),
            "certificate": self.certificate.public_bytes(Encoding.PEM).decode(),
            "guest_authority": base64.b64encode(self.guest_authority).decode(),
            "agent": self.agent,
            "enrol": self.enrol,
            "server_name": self.server_name,
            "join_digest": self.join_digest,
        }
        return json.dumps(kept, indent=1).encode()

    @classmethod
    def from_json(cls, untrusted: bytes) -> Enrolment:
        """Raises NotEnrolledError, and nothing else, if this is no kept enrolment."""
        try:
            kept = json.loads(untrusted)
            values = {name: kept[name] for name in ("uuid", "agent", "server_name", "join_digest")}
            if not all(isinstance(value, str) for value in values.values()):
                raise ValueError("not a string")
            enrol = kept.get("enrol", "")
            if not isinstance(enrol, str):
                raise ValueError("not a string")
            key = AgentKey.from_pem(kept["key"].encode())
            certificate = x509.load_pem_x509_certificate(kept["certificate"].encode())
            authority = base64.b64decode(kept["guest_authority"], validate=True)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, x509.InvalidVersion):
            raise NotEnrolledError("the kept enrolment cannot be read") from None
        if not key.fits(certificate):
            raise NotEnrolledError("the kept certificate is not for the kept key")
        return cls(key=key, certificate=certificate, guest_authority=authority, enrol=enrol, **values)


@dataclass(frozen=True, slots=True)
class EnrolmentAttempt:
    """An invitation, and the key that it is for."""

    join: JoinInformation
    key: AgentKey = field(repr=False)

    def to_json(self) -> bytes:
        """What the kept file holds. A secret."""
        return json.dumps({"join": self.join.fields(), "key": self.key.pem().decode()}, indent=1).encode()

    @classmethod
    def from_json(cls, untrusted: bytes, folder: Path) -> EnrolmentAttempt:
        """Raises JoinError or NotEnrolledError, and nothing else, if this is no kept attempt."""
        try:
            kept = json.loads(untrusted)
            return cls(join_of(kept["join"], folder), AgentKey.from_pem(kept["key"].encode()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise NotEnrolledError("the kept attempt to enrol cannot be read") from None


class EnrolmentStore:
    """The kept enrolment, and the attempt that is not over yet: files of mode 0600 in the agent's state folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "enrolment.json"
        self._attempt_path = folder / "enrolling.json"

    def load(self) -> Enrolment | None:
        """What is kept; None if nothing is. Raises NotEnrolledError if it cannot be used."""
        try:
            kept = _read(self._path)
        except UnsafeFileError as error:
            raise NotEnrolledError(str(error)) from error
        return None if kept is None else Enrolment.from_json(kept)

    def save(self, enrolment: Enrolment) -> None:
        """Raises NotEnrolledError if it cannot be kept."""
        _write(self._path, enrolment.to_json())

    def load_attempt(self) -> EnrolmentAttempt | None:
        """The attempt that is not over; None if there is none, or if what is kept is none: then it is removed.

        Raises NotEnrolledError if it cannot be read now: another time it may, and its key cannot be made again.
        """
        kept = None
        try:
            kept = _read(self._attempt_path)
        except UnsafeFileError as error:
            log.warning("an attempt to enrol is forgotten: %s", error)
            self.forget_attempt()
        try:
            return None if kept is None else EnrolmentAttempt.from_json(kept, self._folder)
        except (JoinError, NotEnrolledError) as error:
            log.warning("an attempt to enrol is forgotten: %s", error)
            self.forget_attempt()
            return None

    def begin_attempt(self, join: JoinInformation) -> EnrolmentAttempt:
        """The attempt that was begun with this invitation, else a new one, kept. Raises NotEnrolledError if it cannot be."""
        begun = self.load_attempt()
        if begun is None or begun.join.digest != join.digest:
            begun = EnrolmentAttempt(join, AgentKey.generate())
            _write(self._attempt_path, begun.to_json())
        return begun

    def forget_attempt(self) -> None:
        """It is over, one way or the other."""
        with contextlib.suppress(OSError):  # it is told from a new one by its invitation
            self._attempt_path.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    try:
        return read_secret(path, limit=MAX_KEPT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotEnrolledError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise NotEnrolledError(f"{path} cannot be written: {error.strerror}") from error


async def enrol(
    attempt: EnrolmentAttempt, *, target: str, now: float, timeout: float
) -> tuple[Enrolment, VmIdentity | None]:
    """Presents the join secret, over TLS to whoever holds the guest authority's certificate for ``server_name``.

    ``target``: what ``join.enrol`` is for gRPC.

    Returns the enrolment and, if the answer already tells it, who the VM is. Raises EnrolmentRefusedError (this secret will never do) or
    another AgentError (try again, with the same attempt).
    """
    join, key = attempt.join, attempt.key
    credentials = grpc.ssl_channel_credentials(root_certificates=_pem(join.guest_authority))
    async with grpc.aio.secure_channel(target, credentials, channel_options(join.server_name, target)) as channel:
        stub = agent_pb2_grpc.EnrolmentServiceStub(channel)
        request = agent_pb2.EnrolRequest(join_secret=join.secret, certificate_signing_request=key.signing_request())
        try:
            response = await stub.Enrol(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            failed = from_rpc_error(error)
            if failed.code in _FINAL and failed.reason not in _PASSING:
                raise EnrolmentRefusedError(f"the Secure Middleware refused the join secret: {failed}") from error
            raise failed from error
    if response.guest_authority and response.guest_authority != join.guest_authority:
        raise EnrolmentRefusedError("the middleware speaks of another guest authority than the join information")
    certificate = check_certificate(response.certificate, key, join.guest_authority, join.uuid, now)
    enrolment = Enrolment(
        uuid=join.uuid,
        key=key,
        certificate=certificate,
        guest_authority=join.guest_authority,
        agent=join.agent,
        enrol=join.enrol,
        server_name=join.server_name,
        join_digest=join.digest,
    )
    try:
        return enrolment, parse_identity(response.identity)
    except AgentError:
        return enrolment, None  # a VM without an identity is enrolled all the same; WatchIdentity tells it later


async def renew_ended(enrolment: Enrolment, *, target: str, now: float, timeout: float) -> Enrolment:
    """The enrolment with a fresh certificate, although the one that it has may have ended, or counts as ended in dom0.

    ``target``: what ``enrolment.enrol`` is for gRPC. Raises EnrolmentRefusedError (dom0 does not renew it any more: only a new join secret
    helps) or another AgentError (try again).
    """
    credentials = grpc.ssl_channel_credentials(root_certificates=_pem(enrolment.guest_authority))
    async with grpc.aio.secure_channel(target, credentials, channel_options(enrolment.server_name, target)) as channel:
        request = agent_pb2.RenewEndedRequest(
            public_key=enrolment.key.public_der(), certificate_signing_request=enrolment.key.signing_request()
        )
        try:
            response = await agent_pb2_grpc.EnrolmentServiceStub(channel).RenewEnded(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            failed = from_rpc_error(error)
            if failed.code in _FINAL and failed.reason not in _PASSING:
                raise EnrolmentRefusedError(
                    f"the Secure Middleware does not renew the certificate: {failed}"
                ) from error
            raise failed from error
    try:
        return enrolment.renewed(response.certificate, now)
    except EnrolmentRefusedError as error:
        # Not dom0's last word: the clock of this VM may be wrong, and set right later.
        raise UnavailableError(str(error)) from error


def certificate_ended(cause: AgentError) -> NotEnrolledError:
    """What programs are told, and a person has to do."""
    return NotEnrolledError(
        f"the agent's certificate has ended, and only a new join secret helps ('secure-middleware vm invite' in dom0): {cause}"
    )


_PASSING = frozenset({Reason.DOMAIN_NOT_RUNNING, Reason.RATE_LIMITED})
"""Reasons that say nothing of the secret: it was not looked at. A domain that is paused, or whose migration just failed, goes on later."""

_FINAL = frozenset(
    {
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ALREADY_EXISTS,
    }
)


def check_certificate(
    untrusted: bytes, key: AgentKey, guest_authority: bytes, uuid: str, now: float
) -> x509.Certificate:
    """A certificate for our key and this domain, issued by the guest authority, not yet ended. Raises EnrolmentRefusedError."""
    try:
        certificate = x509.load_der_x509_certificate(untrusted)
        authority = x509.load_der_x509_certificate(guest_authority)
        certificate.verify_directly_issued_by(authority)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (
        ValueError,
        TypeError,
        InvalidSignature,
        UnsupportedAlgorithm,
        x509.ExtensionNotFound,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ):
        raise EnrolmentRefusedError("the middleware's answer is no certificate of the guest authority") from None
    if not key.fits(certificate):
        raise EnrolmentRefusedError("the middleware's certificate is not for this agent's key")
    if f"urn:uuid:{uuid}" not in [uri.lower() for uri in uris]:
        raise EnrolmentRefusedError("the middleware's certificate is for another domain")
    if certificate.not_valid_after_utc.timestamp() <= now:
        raise EnrolmentRefusedError("the middleware's certificate has already ended: compare the clocks of VM and dom0")
    return certificate


def channel_options(server_name: str, target: str) -> list[tuple[str, str | int]]:
    """Options of every channel to the middleware; its certificate must carry ``server_name``."""
    if not server_name:
        raise JoinError("no server name to check the middleware's certificate against")
    return [
        *CHANNEL_OPTIONS,
        *options_for(target),
        ("grpc.ssl_target_name_override", server_name),
        ("grpc.default_authority", server_name),
    ]


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
