"""How a program or a person in the VM reaches the agent: LocalService over its Unix socket, with errors that say what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.rpc.facts import Facts, from_error
from secfunet.rpc.reasons import Domain, Reason
from secfunet.service.unix_socket import unix_target
from vm_agent.errors import AgentError

Answer = TypeVar("Answer")


class NoAgentError(AgentError):
    """Nobody serves at the socket."""

    code = Reason.NO_AGENT.code
    reason = Reason.NO_AGENT


class NotAllowedError(AgentError):
    """This user may not open the socket."""

    code = Reason.SOCKET_PERMISSION.code
    reason = Reason.SOCKET_PERMISSION


class AgentCallError(AgentError):
    """The agent refused or failed; code, domain, reason and retry time are what it said."""

    def __init__(self, facts: Facts) -> None:
        wait = f" (try again in {facts.retry_after:g} s)" if facts.retry_after else ""
        super().__init__(f"{facts.message or facts.code.name}{wait}")
        self.code = facts.code
        self.domain = facts.domain
        self.reason = facts.reason
        self.retry_after = facts.retry_after


class LocalClient:
    """A blocking client; a context manager. ``timeout`` in seconds for each call."""

    def __init__(self, path: Path, *, timeout: float = 20.0) -> None:
        check_reachable(path)
        self._timeout = timeout
        self._channel = grpc.insecure_channel(unix_target(path.absolute()), options=[("grpc.enable_http_proxy", 0)])
        self._stub = local_pb2_grpc.LocalServiceStub(self._channel)

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def identity(self) -> local_pb2.GetIdentityResponse:
        """Who this VM is."""
        return self._call(lambda: self._stub.GetIdentity(local_pb2.GetIdentityRequest(), timeout=self._timeout))

    def status(self, *, probe: bool = False) -> local_pb2.GetStatusResponse:
        """How the agent is; with ``probe``: and whether an operation would work now."""
        request = local_pb2.GetStatusRequest(probe=probe)
        return self._call(lambda: self._stub.GetStatus(request, timeout=self._timeout))

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
                f"there is no agent at {path}: start it ('systemctl start secfunet-vm-agent', or 'vm-agent serve'), "
                "or name its socket with --socket"
            ) from None
        except ConnectionRefusedError:
            raise NoAgentError(
                f"the agent at {path} is dead: start it again ('systemctl restart secfunet-vm-agent', or 'vm-agent serve'), "
                "and see its log"
            ) from None
        except PermissionError:
            raise NotAllowedError(
                f"you may not open {path}: become a member of the group that owns it (ls -l {path}), and log in again"
            ) from None
        except OSError as error:
            raise NoAgentError(f"{path} cannot be connected to: {error.strerror or error}") from error


def _call_error(error: grpc.RpcError) -> AgentCallError:
    rpc: Any = error  # every call error of grpc is also a grpc.Call
    facts = from_error(error, *Domain)
    if facts is not None:
        return AgentCallError(facts)
    code: grpc.StatusCode = rpc.code()
    late = code is grpc.StatusCode.DEADLINE_EXCEEDED
    message = "the agent gave no answer in time" if late else rpc.details() or ""
    return AgentCallError(Facts(code, Domain.AGENT, code.name, message))
