"""What the command line uses to talk to a running daemon: mutual TLS over its Unix socket, and refusals as errors with exit codes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import grpc
import grpc.aio

from dom0_middleware.authority import SERVER_NAME
from dom0_middleware.orchestrator_authority import credential_paths
from dom0_middleware.settings import MiddlewareSettings
from secfunet.errors import SecFuNetError
from secfunet.middleware.v1 import orchestrator_pb2_grpc
from secfunet.rpc.facts import from_error
from secfunet.rpc.reasons import Domain
from secfunet.service.files import read_secret
from secfunet.service.unix_socket import unix_target


class CallError(SecFuNetError):
    """The daemon answered with an error; ``reason`` is that of its ErrorInfo ("" if it gave none)."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(f"{message} ({reason})" if reason else message)
        self.reason = reason


class CallRefused(CallError):
    """Not permitted."""


class CallInvalid(CallError):
    """What was sent is not what it should be."""


class DaemonUnavailable(CallError):
    """No answer, or not now."""


class NoCredentials(SecFuNetError):
    """There is no key for this orchestrator."""

    def __init__(self, name: str, path: Path) -> None:
        super().__init__(f"{path} is missing: run 'secure-middleware orchestrator add {name}'")
        self.name = name


_KINDS: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.PERMISSION_DENIED: CallRefused,
    grpc.StatusCode.UNAUTHENTICATED: CallRefused,
    grpc.StatusCode.INVALID_ARGUMENT: CallInvalid,
    grpc.StatusCode.UNAVAILABLE: DaemonUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DaemonUnavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: DaemonUnavailable,
}


@contextlib.asynccontextmanager
async def orchestrator_stub(
    settings: MiddlewareSettings, name: str
) -> AsyncGenerator[orchestrator_pb2_grpc.OrchestratorServiceAsyncStub, None]:
    """A stub that calls as ``name``. Raises NoCredentials, and CallError for what a call in the context is answered."""
    certificate_path, key_path = credential_paths(settings.state, name)
    try:
        credentials = grpc.ssl_channel_credentials(
            (settings.state / "orchestrator-authority.pem").read_bytes(),
            read_secret(key_path),
            certificate_path.read_bytes(),
        )
    except FileNotFoundError as error:
        raise NoCredentials(name, Path(str(error.filename))) from None
    options = (("grpc.ssl_target_name_override", SERVER_NAME),)
    address = unix_target(settings.orchestrator_socket)
    try:
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            yield orchestrator_pb2_grpc.OrchestratorServiceStub(channel)
    except grpc.aio.AioRpcError as error:
        raise _call_error(error) from None


def _call_error(error: grpc.aio.AioRpcError) -> CallError:
    facts = from_error(error, Domain.MIDDLEWARE, Domain.GRID)
    reason = facts.reason if facts is not None else ""
    kind = _KINDS.get(error.code(), CallError)
    if kind is DaemonUnavailable and not reason:
        return kind("the daemon does not answer: is 'secure-middleware serve' running?", "")
    return kind(error.details() or error.code().name, reason)
