"""TLS-Tandem over asyncio: open a connection, and listen.

The card is leased as late and given back as early as can be: a client leases it when its socket is connected, a server when a
whole ClientHello has come; both give it back when they have the keys, or when the peer has let it wait for too long. A TLS 1.3 client
keeps it a little longer, in the background, to bring it the server's first tickets: until they or data have come, at most two round
trips.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

from secfunet.apdu import ApduError
from secfunet.card.errors import CardError
from secfunet.card.pool import CardPool
from secfunet.errors import SecFuNetError
from secfunet.service.doorkeeper import BACKLOG, DoorBounds, Doorkeeper, Doorway, Visit
from secfunet.service.flood_log import FloodLog
from secfunet.tandem.card_link import CardLink, EapCardLink
from secfunet.tandem.connection import AskCard, Command, StartCard, TakeKeys, TandemConnection, TandemState
from secfunet.tandem.errors import HandshakeTimeoutError, PeerStalledError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tandem.transport import TandemTransport
from secfunet.tls.alerts import AlertDescription

_log = logging.getLogger(__name__)

_ProtocolT = TypeVar("_ProtocolT", bound=asyncio.BaseProtocol)

DEFAULT_PARAMETERS: Final = TandemParameters()
_MIN_GRACE: Final = 0.02
_MAX_GRACE: Final = 0.5
_SETTLE: Final = 0.02
"""Seconds that a record that is cut short is waited for, before the card is asked without it."""
_GATHER: Final = 0.002
"""Seconds, doubled each time, between questions about one encrypted flight; at most _MAX_GATHER."""
_MAX_GATHER: Final = 0.25
_background: set[asyncio.Task[None]] = set()


async def create_tandem_connection(
    protocol_factory: Callable[[], _ProtocolT],
    pool: CardPool,
    host: str | None = None,
    port: int | None = None,
    *,
    server_name: str,
    parameters: TandemParameters = DEFAULT_PARAMETERS,
    timeout: float,
    sock: socket.socket | None = None,
) -> tuple[TandemTransport, _ProtocolT]:
    """Connect to a TLS server with a card of ``pool`` as the client; ``timeout`` seconds cover all of it.

    ``server_name`` (DNS name or IP address) goes into SNI and must be in the server's certificate (RFC 9525). ``sock`` may be a connected
    socket in place of host and port.

    Raises HandshakeTimeoutError (PeerStalledError), OSError from connecting, CardError and ApduError from the card,
    HandshakeRefusedError when the card does not accept the server, ServerNameError, PeerAlertError, TlsProtocolError,
    TruncatedStreamError.
    """
    loop = asyncio.get_running_loop()
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        port = int(sock.getpeername()[1])
    core = TandemConnection("client", parameters, server_name=server_name, server_port=port or 0)
    transport = TandemTransport(core, loop)
    try:
        async with asyncio.timeout(timeout), AsyncExitStack() as stack:
            if sock is not None:
                await loop.create_connection(lambda: transport.wire, sock=sock)
            elif host is not None and port is not None:
                await loop.create_connection(lambda: transport.wire, host, port)
            else:
                raise ValueError("host and port, or a connected socket, are needed")
            link = await _shake_hands(transport, pool, stack, timeout=timeout)
            protocol = protocol_factory()
            transport.open(protocol)
            if link is not None and parameters.resume and core.stream.may_get_tickets:
                grace = min(max(2 * link.round_trip, _MIN_GRACE), _MAX_GRACE)
                task = loop.create_task(_bring_tickets(transport, link.link, stack.pop_all(), grace))
                _background.add(task)
                task.add_done_callback(_background.discard)
            return transport, protocol
    except TimeoutError as error:
        _give_up(transport)
        if isinstance(error, HandshakeTimeoutError):
            raise
        raise HandshakeTimeoutError(timeout) from None
    except BaseException:
        _give_up(transport)
        raise


async def open_tandem_connection(
    pool: CardPool,
    host: str | None = None,
    port: int | None = None,
    *,
    server_name: str,
    parameters: TandemParameters = DEFAULT_PARAMETERS,
    timeout: float,
    sock: socket.socket | None = None,
    limit: int = 2**16,
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As create_tandem_connection(), with streams. ``limit`` is that of the reader's buffer."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=limit, loop=loop)
    transport, protocol = await create_tandem_connection(
        lambda: asyncio.StreamReaderProtocol(reader, loop=loop),
        pool,
        host,
        port,
        server_name=server_name,
        parameters=parameters,
        timeout=timeout,
        sock=sock,
    )
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def start_tandem_server(
    protocol_factory: Callable[[], asyncio.BaseProtocol],
    pool: CardPool,
    *,
    host: str | None = None,
    port: int | None = None,
    sock: socket.socket | None = None,
    parameters: TandemParameters = DEFAULT_PARAMETERS,
    handshake_timeout: float = 10.0,
    max_handshakes: int = 64,
    max_connections: int | None = None,
    keeper: Doorkeeper | None = None,
) -> TandemServer:
    """Listen for TLS clients with the cards of ``pool`` as the server; every client must have a certificate that the card accepts.

    ``protocol_factory`` is called when a client is authenticated, in the task of its visit (``secfunet.service.doorkeeper``). A connection
    that finds ``max_handshakes`` others in their handshake is closed at once; one that needs more than ``handshake_timeout`` seconds, too.
    ``keeper`` counts the connections of several doors together; None: one for this door alone.
    """
    keeper = keeper or Doorkeeper(
        DoorBounds(talking=4 * max_handshakes, silence=handshake_timeout, handshake=handshake_timeout + 1.0)
    )
    server = TandemServer(protocol_factory, pool, parameters, handshake_timeout, max_handshakes)
    await server.listen(keeper, host, port, sock, max_connections)
    return server


class TandemServer:
    """What start_tandem_server() returns."""

    def __init__(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        pool: CardPool,
        parameters: TandemParameters,
        handshake_timeout: float,
        max_handshakes: int,
    ) -> None:
        self._protocol_factory = protocol_factory
        self._pool = pool
        self._parameters = parameters
        self._timeout = handshake_timeout
        self._max_handshakes = max_handshakes
        self._handshakes: dict[asyncio.Task[None], TandemTransport] = {}
        self._connections: set[TandemTransport] = set()
        self._flood = FloodLog(_log)
        self._doorway: Doorway | None = None
        self.handshakes_done = 0
        self.handshakes_failed = 0
        self.handshakes_refused = 0
        """Connections closed because too many handshakes were under way."""

    async def listen(
        self, keeper: Doorkeeper, host: str | None, port: int | None, sock: socket.socket | None, inside: int | None
    ) -> None:
        """Begin to accept; called once, by start_tandem_server()."""
        if sock is not None:
            sock.listen(BACKLOG)
            self._doorway = keeper.attend("tls-tandem", self._visited, [sock], inside=inside)
        else:
            self._doorway = await keeper.open("tls-tandem", self._visited, host, port or 0, inside=inside)

    @property
    def sockets(self) -> Sequence[Any]:
        """The listening sockets; empty when closed."""
        return () if self._doorway is None else self._doorway.sockets

    @property
    def connections(self) -> frozenset[TandemTransport]:
        """The connections whose handshake is over."""
        return frozenset(self._connections)

    def close(self) -> None:
        """Accept no more, and end the handshakes under way. Open connections stay."""
        if self._doorway is not None:
            self._doorway.close()
        for task in self._handshakes:
            task.cancel()

    def close_connections(self) -> None:
        """Close all open connections in order (close_notify)."""
        for transport in list(self._connections):
            transport.close()

    def abort_connections(self) -> None:
        """Close all open connections at once."""
        for transport in list(self._connections):
            transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the listening sockets, the handshakes and the connections are closed; call close() before."""
        if self._doorway is not None:
            await self._doorway.wait_closed()

    async def __aenter__(self) -> TandemServer:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()
        self.close_connections()
        await self.wait_closed()

    async def _visited(self, visit: Visit) -> None:
        if len(self._handshakes) >= self._max_handshakes:
            self.handshakes_refused += 1
            return
        loop = asyncio.get_running_loop()
        transport = TandemTransport(TandemConnection("server", self._parameters), loop)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - a visit has one
        self._handshakes[task] = transport
        try:
            await loop.connect_accepted_socket(lambda: transport.wire, visit.take())
            await self._serve(transport, visit)
        finally:
            self._handshakes.pop(task, None)
        try:
            await asyncio.shield(transport.closed)
        except asyncio.CancelledError:
            transport.abort()
            raise

    async def _serve(self, transport: TandemTransport, visit: Visit) -> None:
        try:
            async with asyncio.timeout(self._timeout), AsyncExitStack() as stack:
                await _shake_hands(transport, self._pool, stack, timeout=self._timeout)
            self._connections.add(transport)
            transport.closed.add_done_callback(lambda _: self._connections.discard(transport))
            transport.open(self._protocol_factory())
            visit.enter()
            self.handshakes_done += 1
        except asyncio.CancelledError:
            _give_up(transport)
            raise
        except TimeoutError as error:
            self._failed(
                transport, error if isinstance(error, HandshakeTimeoutError) else HandshakeTimeoutError(self._timeout)
            )
        except (SecFuNetError, OSError) as error:
            self._failed(transport, error)
        except Exception as error:  # noqa: BLE001 - one connection's fault must not be the server's
            self._flood.exception("fault", "a TLS-Tandem connection could not be served", error=error)
            self._failed(transport, error)

    def _failed(self, transport: TandemTransport, error: Exception) -> None:
        self.handshakes_failed += 1
        peer = transport.get_extra_info("peername")
        self._flood.info(
            type(error).__name__, "a TLS-Tandem handshake failed", {"peer": str(peer), "cause": str(error)}
        )
        _give_up(transport)


def _give_up(transport: TandemTransport) -> None:
    """Close a connection that did not come to be, with an alert if the core has not made one."""
    if transport.core.state is not TandemState.IDLE:
        transport.core.fail(AlertDescription.INTERNAL_ERROR)
    transport.abort_handshake()


class _LeasedCard:
    """The card of a handshake, and how long it waited for the peer: in all, which is bounded, and for one answer at most, which is a
    measure for how long tickets need."""

    def __init__(self, link: CardLink, patience: float) -> None:
        self.link = link
        self.round_trip = 0.0
        self._patience = patience
        self._waited = 0.0
        self._questions = 0

    async def wait_for(self, transport: TandemTransport) -> None:
        """Wait until the peer has sent something. Raises PeerStalledError when all these waits together take too long."""
        began = self._waited
        async with self._bounded():
            await transport.wait_for_peer()
        self.round_trip = max(self.round_trip, self._waited - began)

    async def gather(self, transport: TandemTransport) -> None:
        """Before a question about an encrypted flight: let what is on its way arrive. Raises as wait_for().

        A question that comes a moment too early costs another one, and a peer that sends byte by byte must not make thousands of them:
        each further question comes later than the one before, and what has come until then goes with it.
        """
        core = transport.core
        least = min(_GATHER * 2**self._questions, _MAX_GATHER) if self._questions else 0.0
        self._questions += 1
        if least == 0.0 and core.seems_whole:
            return
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with self._bounded():
            while not core.has_ended:
                gathered = loop.time() - began
                if gathered >= max(least, _SETTLE) or (gathered >= least and core.seems_whole):
                    break
                left = (least if gathered < least else max(least, _SETTLE)) - gathered
                try:
                    async with asyncio.timeout(left) as pause:
                        await transport.wait_for_peer()
                except TimeoutError:
                    if not pause.expired():
                        raise

    @contextlib.asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(self._patience - self._waited) as bound:
                yield
        except TimeoutError:
            if not bound.expired():
                raise  # the network's own
            raise PeerStalledError(self._patience) from None
        finally:
            self._waited += loop.time() - began


async def _shake_hands(
    transport: TandemTransport, pool: CardPool, stack: AsyncExitStack, *, timeout: float
) -> _LeasedCard | None:
    """Run the core until it is open. The card is leased at its first question, and stays leased in ``stack``.

    The peer's end is looked for before each question: a card is neither leased nor asked for a peer that is gone.
    """
    core = transport.core
    loop = asyncio.get_running_loop()
    started = loop.time()
    core.start()
    card: _LeasedCard | None = None
    while core.state is not TandemState.OPEN:
        transport.check_handshake()
        if core.state is TandemState.WAIT_PEER:
            if card is None:
                await transport.wait_for_peer()
            else:
                await card.wait_for(transport)
            core.received()
            transport.wire.check_room()
            continue
        if card is None:
            # A little less than what is left, so that a busy card is reported as such.
            left = max(0.0, 0.9 * (timeout - (loop.time() - started)))
            async with transport.giving_up():
                client = await stack.enter_async_context(pool.lease(timeout=left))
            card = _LeasedCard(
                EapCardLink(client, core.role, core.parameters, core.server_name, core.server_port),
                core.parameters.patience,
            )
        if core.asks_about_open_flight:
            await card.gather(transport)
        transport.check_handshake()
        command = core.next_command()
        if command is not None:
            await _ask_card(core, card.link, command)
        transport.flush_core()
        transport.wire.check_room()
    return card


async def _ask_card(core: TandemConnection, link: CardLink, command: Command) -> None:
    match command:
        case StartCard():
            flight = await link.start()
            core.card_answered(flight, reports_unused=link.reports_unused)
        case AskCard(flight=flight):
            flight = await link.ask(flight)
            core.card_answered(flight, reports_unused=link.reports_unused)
        case TakeKeys():
            taken = await link.hand_over()
            if taken is None:
                core.card_waits()
            else:
                core.card_keys(*taken)


async def _bring_tickets(transport: TandemTransport, link: CardLink, stack: AsyncExitStack, grace: float) -> None:
    """Give the card the server's first tickets, then give the card back."""
    async with stack:
        try:
            async with asyncio.timeout(grace):
                tickets = await transport.wait_for_tickets()
            if tickets:
                await link.bring_tickets(tickets)
        except TimeoutError:
            pass
        except (CardError, ApduError) as error:
            # Only the next handshake is slower for it.
            _log.info("the card did not take the server's tickets: %s", error)
        finally:
            transport.core.stream.stop_collecting_tickets()


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Close a stream writer and wait for the end; an error of the peer's in the meantime is none of ours."""
    writer.close()
    with contextlib.suppress(OSError, SecFuNetError):
        await writer.wait_closed()
