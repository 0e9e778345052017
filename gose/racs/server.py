"""The node's door: TLS connections, bounded in number and time, each a session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

from gose.errors import GoseError
from gose.metrics import MetricsServer
from gose.racs.access import Access, AccessDeniedError
from gose.racs.conversation import Conversation
from gose.racs.hosted import HostedCard
from gose.racs.metrics import NodeMetrics
from gose.racs.session import Session
from gose.racs.settings import NodeSettings
from gose.racs.tls import server_side
from secfunet.card.place import connect_card
from secfunet.identity import load_certificate
from secfunet.service.tcp import watch_peer

log = logging.getLogger(__name__)

_PIECE = 65536
_BACKLOG = 64
_ACCEPT_PAUSE = 0.2  # seconds after an accept that failed (too many descriptors, say)
_TLS_CLOSE_TIMEOUT = 1.0


class NodeStartError(GoseError):
    """The node cannot start; the message says why."""


class NodeService:
    """Entering the context opens the door, leaving it ends every session and gives the cards back.

    Raises NodeStartError, TlsFilesError, UnsafeFileError, IdentityError and OSError when it cannot start. A card that is not there is no
    reason not to start: whoever asks for it is told.
    """

    def __init__(self, settings: NodeSettings, *, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.metrics = NodeMetrics()
        self._clock = clock
        self._connections: set[asyncio.Task[None]] = set()
        self._sessions: Counter[str] = Counter()
        self._stack = AsyncExitStack()
        limits = settings.limits
        self.cards = {
            element.seid: HostedCard(
                element.seid,
                partial(
                    connect_card,
                    element.place,
                    timeout=limits.card_connect_timeout,
                    answer_timeout=limits.apdu_timeout + 1.0,
                ),
                self.metrics,
                apdu_timeout=limits.apdu_timeout,
                sen=element.sen,
            )
            for element in settings.secure_elements
        }

    async def __aenter__(self) -> Self:
        settings = self.settings
        self._context = server_side(settings.key, settings.certificate, settings.authority)
        self._access = Access(settings, load_certificate(settings.authority.read_bytes()))
        async with AsyncExitStack() as stack:
            stack.enter_context(MetricsServer(self.metrics.registry, settings.metrics_port))
            listener = await self._listen()
            stack.callback(listener.close)
            stack.push_async_callback(self._end_sessions)
            accepting = asyncio.create_task(self._accept(listener), name="racs door")
            stack.push_async_callback(_cancelled, accepting)
            self.address: tuple[str, int] = listener.getsockname()[:2]
            self._stack = stack.pop_all()
        log.info("the node is ready", extra={"address": self.address, "cards": list(self.cards)})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log.info("the node shuts down")
        await self._stack.aclose()

    async def _listen(self) -> socket.socket:
        host, port = self.settings.listen
        try:
            ((family, _, _, _, address), *_) = await asyncio.get_running_loop().getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        except OSError as error:
            raise NodeStartError(
                f"the node cannot listen on {self.settings.listen}: {error.strerror or error}"
            ) from None
        listener.setblocking(False)
        return listener

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("no connection can be accepted now", extra={"cause": str(error)})
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            if len(self._connections) >= self.settings.limits.connections:
                connection.close()
                self._refuse("too many connections", str(address[0]))
                continue
            task = asyncio.create_task(self._serve(connection, str(address[0])), name=f"racs {address[0]}")
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket, peer: str) -> None:
        loop = asyncio.get_running_loop()
        limits = self.settings.limits
        reader = asyncio.StreamReader(limit=_PIECE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            watch_peer(connection, limits.dead_peer_timeout)
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=limits.handshake_timeout,
                ssl_shutdown_timeout=_TLS_CLOSE_TIMEOUT,
            )
        except (OSError, ssl.SSLError) as error:  # TimeoutError is an OSError
            connection.close()
            self._refuse("tls", peer, str(error))
            return
        except BaseException:
            connection.close()
            raise
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await self._admit(reader, writer, peer)
        except (OSError, asyncio.IncompleteReadError) as error:
            log.info("a session was cut", extra={"peer": peer, "cause": str(error)})
        except Exception:
            log.exception("a session failed", extra={"peer": peer})
        finally:
            # What was written is sent if that is possible at once; nobody waits for a peer that does not read.
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                async with asyncio.timeout(_TLS_CLOSE_TIMEOUT):
                    await writer.wait_closed()
            transport.abort()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, peer: str) -> None:
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        try:
            user = self._access.user_of(certificate or b"", self._clock())
        except AccessDeniedError as error:
            self._refuse("no user", peer, str(error))
            return
        if self._sessions[user.label] >= self.settings.limits.sessions_per_user:
            self._refuse("too many sessions", peer, user.label)
            return
        session = Session(user, self.cards, self.metrics)
        self._sessions[user.label] += 1
        self.metrics.sessions.inc()
        log.info("session opened", extra={"user": user.label, "peer": peer})
        try:
            await Conversation(session, reader, writer, self.settings.limits, self._clock, self.metrics).run()
        finally:
            self._sessions[user.label] -= 1
            self.metrics.sessions.dec()
            await session.close()
            log.info("session closed", extra={"user": user.label, "peer": peer})

    def _refuse(self, reason: str, peer: str, cause: str = "") -> None:
        self.metrics.refused.labels(reason).inc()
        log.warning("connection refused", extra={"reason": reason, "peer": peer, "cause": cause})

    async def _end_sessions(self) -> None:
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=self.settings.limits.shutdown_timeout)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
