"""How a program or a person in the VM reaches the agent: LocalService over its Unix socket, with errors that say what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from vm_agent.errors import AgentError, facts_of

Answer = TypeVar("Answer")


class NoAgentError(AgentError):
    """Nobody serves at the socket."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NO_AGENT"


class NotAllowedError(AgentError):
    """This user may not open the socket."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "SOCKET_PERMISSION"


class AgentCallError(AgentError):
    """The agent refused or failed; ``code``, ``reason`` and ``retry_after`` are what it said."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, retry_after: float) -> None:
        wait = f" (try again in {retry_after:g} s)" if retry_after else ""
        super().__init__(f"{message or code.name}{wait}")
        self.code = code
        self.reason = reason
        self.retry_after = retry_after


class LocalClient:
    """A blocking client; a context manager. ``timeout`` in seconds for each call."""

    def __init__(self, path: Path, *, timeout: float = 20.0) -> None:
        check_reachable(path)
        self._timeout = timeout
        self._channel = grpc.insecure_channel(f"unix:{path.absolute()}", options=[("grpc.enable_http_proxy", 0)])
        self._stub = local_pb2_grpc.LocalServiceStub(self._channel)

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def identity(self) -> local_pb2.GetIdentityResponse:
        """Who this VM is."""
        return self._call(lambda: self._stub.GetIdentity(local_pb2.GetIdentityRequest(), timeout=self._timeout))

    def status(self) -> local_pb2.GetStatusResponse:
        """How the agent is."""
        return self._call(lambda: self._stub.GetStatus(local_pb2.GetStatusRequest(), timeout=self._timeout))

    def sign(self, scheme: operation_pb2.SignatureScheme, digest: bytes) -> bytes:
        """A signature over a digest that is as long as the scheme's hash."""
        request = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=scheme, digest=digest))
        return self._call(lambda: self._stub.Sign(request, timeout=self._timeout)).signature

    def decrypt(self, scheme: operation_pb2.EncryptionScheme, ciphertext: bytes) -> bytes:
        """The plaintext of an RSA ciphertext."""
        operation = operation_pb2.DecryptOperation(scheme=scheme, ciphertext=ciphertext)
        request = local_pb2.DecryptRequest(decrypt=operation)
        return self._call(lambda: self._stub.Decrypt(request, timeout=self._timeout)).plaintext

    def encrypt(self, scheme: operation_pb2.EncryptionScheme, plaintext: bytes) -> bytes:
        """A short message encrypted to the VM's own key."""
        operation = operation_pb2.EncryptOperation(scheme=scheme, plaintext=plaintext)
        request = local_pb2.EncryptRequest(encrypt=operation)
        return self._call(lambda: self._stub.Encrypt(request, timeout=self._timeout)).ciphertext

    @staticmethod
    def _call(call: Callable[[], Answer]) -> Answer:
        try:
            return call()
        except grpc.RpcError as error:
            raise _call_error(error) from error


def check_reachable(path: Path) -> None:
    """Raises NoAgentError or NotAllowedError, with a sentence that says what to do, if the socket cannot be connected to."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path.absolute()))
        except FileNotFoundError:
            raise NoAgentError(
                f"there is no agent at {path}: start it ('vm-agent serve', or 'systemctl start vm-agent'), or name its socket with --socket"
            ) from None
        except ConnectionRefusedError:
            raise NoAgentError(
                f"the agent at {path} is dead: start it again ('vm-agent serve', or 'systemctl restart vm-agent'), and see its log"
            ) from None
        except PermissionError:
            raise NotAllowedError(
                f"you may not open {path}: become a member of the group that owns it (ls -l {path}), and log in again"
            ) from None
        except OSError as error:
            raise NoAgentError(f"{path} cannot be connected to: {error.strerror or error}") from error


def _call_error(error: grpc.RpcError) -> AgentCallError:
    rpc: Any = error  # every call error of grpc is also a grpc.Call
    metadata = rpc.trailing_metadata() or ()
    facts = facts_of(next((bytes(value) for key, value in metadata if key == "grpc-status-details-bin"), None))
    message = rpc.details() or ""
    if rpc.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not facts.reason:
        message = "the agent gave no answer in time"
    return AgentCallError(rpc.code(), facts.reason or rpc.code().name, message, facts.retry_after)
