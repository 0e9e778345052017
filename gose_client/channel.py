"""The gRPC channel to a grid: gRPC insists on a socket of its own, so a private Unix socket stands between it and TLS-Tandem."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

import grpc
import grpc.aio

from gose_client.connectors import Connectors, explain
from gose_client.errors import GoseClientError, GridRefusedError, GridUnavailableError
from gose_client.settings import GoseClientSettings
from secfunet.gose.v1 import service_provider_pb2_grpc as pb_grpc
from secfunet.rpc.facts import from_error
from secfunet.rpc.reasons import Domain
from secfunet.service.files import private_folder
from secfunet.tandem.relay import Relay, start_relay

SESSION_KEY: Final = "secfunet-session"
MAX_MESSAGE: Final = 4 * 2**20  # bytes of one answer
_numbers = itertools.count()


class OperationsChannel:
    """One channel for all sessions of a client; it connects when it is first used and again when it must."""

    def __init__(self, settings: GoseClientSettings, connectors: Connectors) -> None:
        self._settings = settings
        self._connectors = connectors
        self._temporary: Path | None = None
        self._relay: Relay | None = None
        self._channel: grpc.aio.Channel | None = None

    async def open(self) -> None:
        """Makes the socket; nothing is connected yet. Raises RelayError or OSError."""
        folder = self._settings.relay_folder
        if folder is None:
            folder = self._temporary = Path(tempfile.mkdtemp(prefix="gose-"))
        else:
            private_folder(folder)
        path = folder / f"{os.getpid()}-{next(_numbers)}.sock"
        self._relay = await start_relay(path, self._connectors.operations)
        self._channel = grpc.aio.insecure_channel(
            self._relay.target,
            options=[
                ("grpc.default_authority", self._settings.operations),
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.enable_retries", 0),  # healing is done above, with the same request ids
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", round(self._settings.connect_timeout * 1000)),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ],
        )

    @property
    def stub(self) -> pb_grpc.ServiceProviderServiceAsyncStub:
        """The service provider's operations. Raises RuntimeError when the channel is not open."""
        if self._channel is None:
            raise RuntimeError("the channel is not open")
        return pb_grpc.ServiceProviderServiceStub(self._channel)

    async def close(self) -> None:
        """Ends every call."""
        if self._channel is not None:
            await self._channel.close()
        if self._relay is not None:
            await self._relay.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._channel = self._relay = self._temporary = None

    def explain(self, error: grpc.aio.AioRpcError) -> GoseClientError:
        """What the end of a call means: the grid's own word if there is one, else what became of the connection."""
        refusal = refusal_of(error)
        if refusal is not None:
            return refusal
        below = self._relay.last_error if self._relay is not None else None
        if below is not None:
            return explain(below, self._settings.operations)
        return GridUnavailableError(f"the connection to {self._settings.operations} broke: {error.details()}")

    def connect_anew(self) -> None:
        """The connection is dead without having broken: gRPC would put every new call into it again."""
        if self._relay is not None:
            self._relay.drop_connections()

    def forget_errors(self) -> None:
        """The connection works: what went wrong before explains nothing from now on."""
        if self._relay is not None:
            self._relay.last_error = None


def refusal_of(error: grpc.aio.AioRpcError) -> GridRefusedError | None:
    """The refusal in a google.rpc.Status with an ErrorInfo of the grid's domain; None if the grid did not say it."""
    facts = from_error(error, Domain.GRID)
    if facts is None:
        return None
    return GridRefusedError(facts.reason, facts.message, code=error.code(), retry_after=facts.retry_after)
