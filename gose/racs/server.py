"""The node's door: TLS connections, bounded in number and time, each a session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

from gose.errors import GoseError
from gose.racs.access import Access, AccessDeniedError
from gose.racs.conversation import Conversation
from gose.racs.hosted import HostedCard
from gose.racs.metrics import NodeMetrics
from gose.racs.session import Session
from gose.racs.settings import NodeSettings
from gose.racs.tls import server_side
from secfunet.card.place import connect_card
from secfunet.errors import SecFuNetError
from secfunet.identity import load_certificate
from secfunet.service.doorkeeper import TOO_MANY, DoorBounds, DoorFullError, Doorkeeper, Doorway, Visit
from secfunet.service.flood_log import FloodLog
from secfunet.service.metrics import MetricsServer
from secfunet.service.reload import Reloaded, Rereading, changed_keys
from secfunet.service.tcp import watch_peer

log = logging.getLogger(__name__)

_PIECE = 65536
_TLS_CLOSE_TIMEOUT = 1.0


class NodeStartError(GoseError):
    """The node cannot start; the message says why."""


class NodeService:
    """Entering the context opens the door, leaving it ends every session and gives the cards back.

    Raises NodeStartError, TlsFilesError, UnsafeFileError, IdentityError and OSError when it cannot start. A card that is not there is no
    reason not to start: whoever asks for it is told.
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        read_again: Callable[[], NodeSettings] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._file = Rereading(settings, read_again)
        self.metrics = NodeMetrics()
        self._clock = clock
        self._flood = FloodLog(log)
        self._sessions: Counter[str] = Counter()
        self._stack = AsyncExitStack()
        limits = settings.limits
        self.keeper = Doorkeeper(
            DoorBounds(
                silence=min(DoorBounds.silence, limits.handshake_timeout), handshake=limits.handshake_timeout + 1.0
            )
        )
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

    @property
    def settings(self) -> NodeSettings:
        """Those in force."""
        return self._file.settings

    async def reload(self) -> None:
        """Reads users, certificates and log level again (SIGHUP), for sessions that begin from now on."""
        new = self._file.again()
        if new is None:
            return
        keys = ("key", "certificate", "authority", "users", "log_level")
        try:
            context = server_side(new.key, new.certificate, new.authority)
            # Users of cards that are not here yet see none of them.
            access = Access(new, load_certificate(new.authority.read_bytes()))
        except (SecFuNetError, OSError) as error:
            log.error("the new settings cannot be used, everything stays as it was: %s", error)
            return
        before = self.settings
        self._context, self._access = context, access
        logging.getLogger().setLevel(new.log_level.upper())
        result = Reloaded(changed=[key for key in changed_keys(before, new) if key in keys])
        result.needs_restart = self._file.adopt(new, keys)
        result.say()

    async def __aenter__(self) -> Self:
        settings = self.settings
        self._context = server_side(settings.key, settings.certificate, settings.authority)
        self._access = Access(settings, load_certificate(settings.authority.read_bytes()))
        async with AsyncExitStack() as stack:
            stack.enter_context(MetricsServer(self.metrics.registry, settings.metrics_port))
            door = await self._open_door()
            stack.push_async_callback(self._close_door, door)
            self.address: tuple[str, int] = door.sockets[0].getsockname()[:2]
            self._stack = stack.pop_all()
        log.info("the node is ready", extra={"address": self.address, "cards": list(self.cards)})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        log.info("the node shuts down")
        await self._stack.aclose()

    async def _open_door(self) -> Doorway:
        host, port = self.settings.listen
        try:
            return await self.keeper.open(
                "racs",
                self._serve,
                host,
                port,
                inside=self.settings.limits.connections,
                refused=lambda: self.metrics.refused.labels(TOO_MANY).inc(),
            )
        except OSError as error:
            raise NodeStartError(
                f"the node cannot listen on {self.settings.listen}: {error.strerror or error}"
            ) from None

    async def _close_door(self, door: Doorway) -> None:
        door.close()
        door.end_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.limits.shutdown_timeout):
                await door.wait_closed()

    async def _serve(self, visit: Visit) -> None:
        loop = asyncio.get_running_loop()
        limits = self.settings.limits
        peer = visit.peer
        reader = asyncio.StreamReader(limit=_PIECE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            watch_peer(visit.socket, limits.dead_peer_timeout)
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol,
                visit.take(),
                ssl=self._context,
                ssl_handshake_timeout=limits.handshake_timeout,
                ssl_shutdown_timeout=_TLS_CLOSE_TIMEOUT,
            )
        except (OSError, ssl.SSLError) as error:  # TimeoutError is an OSError
            self._refuse("tls", peer, str(error))
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await self._admit(visit, reader, writer)
        except (OSError, asyncio.IncompleteReadError) as error:
            self._flood.info("cut", "a session was cut", {"peer": peer, "cause": str(error)})
        except DoorFullError:
            raise
        except Exception:  # noqa: BLE001 - one session is not the node
            self._flood.exception("fault", "a session failed", {"peer": peer})
        finally:
            # What was written is sent if that is possible at once; nobody waits for a peer that does not read.
            writer.close()
            with contextlib.suppress(OSError, ssl.SSLError):
                async with asyncio.timeout(_TLS_CLOSE_TIMEOUT):
                    await writer.wait_closed()
            transport.abort()

    async def _admit(self, visit: Visit, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = visit.peer
        certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        try:
            user = self._access.user_of(certificate or b"", self._clock())
        except AccessDeniedError as error:
            self._refuse("no user", peer, str(error))
            return
        if self._sessions[user.label] >= self.settings.limits.sessions_per_user:
            self._refuse("too many sessions", peer, user.label)
            return
        # A session keeps its place: it may hold a card.
        visit.busy = True
        visit.enter(user.label)
        session = Session(user, self.cards, self.metrics)
        self._sessions[user.label] += 1
        self.metrics.sessions.inc()
        self._flood.info(f"opened by {user.label}", "session opened", {"user": user.label, "peer": peer})
        try:
            await Conversation(session, reader, writer, self.settings.limits, self._clock, self.metrics).run()
        finally:
            self._sessions[user.label] -= 1
            self.metrics.sessions.dec()
            await session.close()
            self._flood.info(f"closed by {user.label}", "session closed", {"user": user.label, "peer": peer})

    def _refuse(self, reason: str, peer: str, cause: str = "") -> None:
        self.metrics.refused.labels(reason).inc()
        self._flood.warning(reason, "connection refused", {"peer": peer, "cause": cause})
