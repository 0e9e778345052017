"""The UDP door: whose packet it is, whether it was answered before, and what it is answered."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from ipaddress import IPv4Network, IPv6Network
from types import TracebackType
from typing import Any, Self

from prometheus_client import Counter, Gauge

from gose.errors import GoseError
from gose.metrics import Metrics
from gose.radius.dialogue import Dialogues, rejection
from gose.radius.packets import (
    AccessRequest,
    RadiusDiscard,
    Reply,
    ReplyTooLongError,
    encode_reply,
    parse_request,
)
from gose.settings import Limits, RadiusSettings
from secfunet.radius.wire import MIN_SECRET, Code
from secfunet.service.addresses import canonical_address, canonical_network, text_of_address
from secfunet.service.files import read_secret
from secfunet.service.flood_log import FloodLog

log = logging.getLogger(__name__)

ANSWERS_KEPT = 1024
ANSWERS_LIFETIME = 10.0  # seconds in which the same packet gets the same answer (RFC 5080, 2.2.2)

Client = tuple[IPv4Network | IPv6Network, bytes]
Peer = tuple[Any, ...]


class RadiusStartError(GoseError):
    """The door cannot open; the message says why."""


class RadiusServer(asyncio.DatagramProtocol):
    """Entering the context opens the door, leaving it closes it and gives the cards back.

    Raises RadiusStartError, UnsafeFileError, OSError.
    """

    def __init__(self, settings: RadiusSettings, dialogues: Dialogues, limits: Limits, metrics: Metrics) -> None:
        self._settings = settings
        self._dialogues = dialogues
        self._limits = limits
        self._outcomes = Counter(
            "gose_radius_packets", "RADIUS packets by outcome", ["outcome"], registry=metrics.registry
        )
        Gauge("gose_radius_dialogues", "Authentications in work", registry=metrics.registry).set_function(
            dialogues.__len__
        )
        self._secrets: list[Client] = []
        self._answers: OrderedDict[tuple[object, ...], tuple[float, bytes | None]] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = FloodLog(log)
        self._transport: asyncio.DatagramTransport | None = None

    async def __aenter__(self) -> Self:
        self._secrets = self.read_clients(self._settings)
        try:
            await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: self, local_addr=(self._settings.listen.host, self._settings.listen.port)
            )
        except OSError as error:
            raise RadiusStartError(f"RADIUS cannot listen on {self._settings.listen}: {error.strerror}") from None
        return self

    @staticmethod
    def read_clients(settings: RadiusSettings) -> list[Client]:
        """Who may ask, by these settings. Raises RadiusStartError, UnsafeFileError, OSError."""
        clients = [
            (canonical_network(client.address), read_secret(client.secret_file).strip()) for client in settings.clients
        ]
        for client, (_, secret) in zip(settings.clients, clients, strict=True):
            if len(secret) < MIN_SECRET:
                raise RadiusStartError(f"{client.secret_file}: a RADIUS secret has at least {MIN_SECRET} bytes")
        return clients

    def change_clients(self, clients: list[Client]) -> bool:
        """From the next packet on these may ask; False: they are the same."""
        before, self._secrets = self._secrets, clients
        return clients != before

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transport is not None:
            self._transport.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._limits.shutdown_timeout)
        await self._dialogues.close()

    # asyncio.DatagramProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a datagram endpoint has a datagram transport

    def datagram_received(self, data: bytes, addr: Peer) -> None:
        try:
            request = parse_request(data, self._secret_of(addr))
        except RadiusDiscard as discard:
            self._discard(discard, addr)
            return
        key = (addr[:2], *request.key)
        now = asyncio.get_running_loop().time()
        known = self._answers.get(key)
        if known is not None and known[0] > now:
            self._outcomes.labels("repeated").inc()
            if known[1] is not None:
                self._send(known[1], addr)
            return
        if len(self._tasks) >= 2 * self._limits.handshakes:
            self._log.warning("busy", "too many packets are in work", {"client": text_of_address(str(addr[0]))})
            self._reply(key, request, rejection(request), addr)
            return
        self._keep(key, None)
        task = asyncio.create_task(self._answer(key, request, addr))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def error_received(self, exc: Exception) -> None:
        log.debug("an answer did not arrive", extra={"cause": str(exc)})

    async def _answer(self, key: tuple[object, ...], request: AccessRequest, addr: Peer) -> None:
        try:
            reply = await self._dialogues.answer(text_of_address(str(addr[0])), request)
        except Exception:  # noqa: BLE001  # whatever went wrong, the client is to hear of it
            self._log.exception("fault", "an authentication failed")
            reply = rejection(request)
        self._reply(key, request, reply, addr)

    def _reply(self, key: tuple[object, ...], request: AccessRequest, reply: Reply, addr: Peer) -> None:
        try:
            encoded = encode_reply(request, reply)
        except ReplyTooLongError as error:
            self._log.warning("too_long", "an answer is replaced by a rejection", {"cause": str(error)})
            reply = rejection(request)
            encoded = encode_reply(request, reply)
        is_status = request.code is Code.STATUS_SERVER
        self._outcomes.labels("status" if is_status else reply.code.name.lower()).inc()
        self._keep(key, encoded)
        self._send(encoded, addr)

    def _keep(self, key: tuple[object, ...], answer: bytes | None) -> None:
        self._answers.pop(key, None)
        self._answers[key] = (asyncio.get_running_loop().time() + ANSWERS_LIFETIME, answer)
        while len(self._answers) > ANSWERS_KEPT:
            self._answers.popitem(last=False)

    def _send(self, packet: bytes, addr: Peer) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(packet, addr)

    def _secret_of(self, addr: Peer) -> bytes:
        address = canonical_address(str(addr[0]))
        for network, secret in self._secrets:
            if address in network:
                return secret
        raise RadiusDiscard("unknown_client", "no RADIUS client has this address")

    def _discard(self, discard: RadiusDiscard, addr: Peer) -> None:
        self._outcomes.labels(discard.reason).inc()
        client = text_of_address(str(addr[0]))
        self._log.warning(discard.reason, "packets discarded", {"client": client, "cause": str(discard)})
