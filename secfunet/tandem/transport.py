"""An :class:`asyncio.Transport` over a TLS-Tandem connection.

Before the handshake is over it feeds the core and wakes the task that asks the card (:mod:`.aio`); afterwards it is a plain transport for a
protocol that need not know about TLS. Whatever the peer does wrong reaches the protocol as ``connection_lost(error)``; in particular a
stream that ends without close_notify ends with TruncatedStreamError, never with ``eof_received``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from secfunet.errors import SecFuNetError
from secfunet.tandem.connection import TandemConnection, TandemState
from secfunet.tandem.wire import Wire
from secfunet.tandem.write_queue import CHUNK, Data, WriteQueue
from secfunet.tls.cipher_suites import TLS_1_3
from secfunet.tls.errors import PeerAlertError, TlsError, TlsProtocolError, TruncatedStreamError

_log = logging.getLogger(__name__)

_HIGH_WATER = 512 * 1024
_LOW_WATER = 128 * 1024
MAX_DROPPED = 1 << 20
"""Bytes that still come and are dropped behind our alert, before the socket is closed all the same."""
CLOSE_TIMEOUT = 2.0
"""Seconds that a closed connection waits for the peer's close_notify before the socket is closed."""


class TandemTransport(asyncio.Transport):
    """Made by :mod:`.aio` only. Beside "peername", "sockname" and "socket", ``get_extra_info`` knows "peercert" (DER of the
    leaf), "peer_certificates" (DER, leaf first), "cipher" (name), "tls_version" (0x0303, 0x0304), "alpn", "resumed"."""

    def __init__(self, core: TandemConnection, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self.core = core
        self._loop = loop
        self._wire = Wire(self)
        self._socket: asyncio.Transport | None = None
        self._protocol: asyncio.BaseProtocol | None = None
        self._has_spoken = False
        self._drops = False
        self._handshake_wake = asyncio.Event()
        self._handshake_error: Exception | None = None
        self._giving_up: asyncio.Timeout | None = None
        self._tickets_wake: asyncio.Event | None = None
        self._pending = WriteQueue()
        self._protocol_paused = False
        self._reading_paused = False
        self._delivering = False
        self._closing = False
        self._eof_due = False
        self._eof_told = False
        self._close_timer: asyncio.TimerHandle | None = None
        self._error: Exception | None = None
        self._lost = False
        self._closed: asyncio.Future[None] = loop.create_future()

    def __repr__(self) -> str:
        return f"<TandemTransport {self.core.role} {self.core.state.name} closing={self._closing}>"

    # ---- the handshake, used by the task that asks the card

    @property
    def wire(self) -> Wire:
        """The protocol of the socket below."""
        return self._wire

    @property
    def closed(self) -> asyncio.Future[None]:
        """Done when the socket is closed and the protocol knows it."""
        return self._closed

    def flush_core(self) -> None:
        """Send what the core has for the peer."""
        output = self.core.take_output()
        if output and self._socket is not None and not self._socket.is_closing():
            self._socket.write(output)
            self._has_spoken = True

    async def wait_for_peer(self) -> None:
        """Wait until the core has been fed something. Raises what went wrong meanwhile."""
        if self._handshake_error is None:
            await self._handshake_wake.wait()
        self._handshake_wake.clear()
        self.check_handshake()

    def check_handshake(self) -> None:
        """Raise what ended the handshake, if something did."""
        if self._handshake_error is not None:
            raise self._handshake_error

    @contextlib.asynccontextmanager
    async def giving_up(self) -> AsyncIterator[None]:
        """Cut short what is waited for inside, as soon as the peer is gone. Raises what ended the handshake."""
        self.check_handshake()
        try:
            async with asyncio.timeout(None) as self._giving_up:
                yield
        except TimeoutError:
            self.check_handshake()
            raise
        finally:
            self._giving_up = None

    def open(self, protocol: asyncio.BaseProtocol) -> None:
        """Give the connection, whose handshake is over, to its protocol."""
        if self._lost or self._handshake_error is not None:
            raise self._handshake_error or ConnectionResetError("the connection was lost in the handshake")
        self._protocol = protocol
        protocol.connection_made(self)
        self._loop.call_soon(self._deliver)

    def abort_handshake(self) -> None:
        """Send the core's alert, if it has one, and close."""
        self.flush_core()
        self._closing = True
        if self._has_spoken:
            self._close_behind_alert()
        else:
            self._close_socket()

    async def wait_for_tickets(self) -> bytes:
        """Wait for the records of the tickets that come first; empty when data came instead, or the connection ended."""
        self._tickets_wake = asyncio.Event()
        try:
            tickets = self.core.stream.take_tickets()
            if tickets or self._lost or self._closing or not self.core.stream.may_get_tickets:
                return tickets
            await self._tickets_wake.wait()
            return self.core.stream.take_tickets()
        finally:
            self._tickets_wake = None

    # ---- asyncio.BaseTransport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """See the class."""
        core = self.core
        match name:
            case "peercert":
                return core.peer_certificates[0] if core.peer_certificates else default
            case "peer_certificates":
                return core.peer_certificates
            case "cipher":
                return default if core.suite is None else core.suite.name
            case "tls_version" | "alpn" | "resumed":
                if core.negotiated is None:
                    return default
                negotiated = core.negotiated
                return {"tls_version": negotiated.version, "alpn": negotiated.alpn, "resumed": negotiated.resumed}[name]
            case _:
                return default if self._socket is None else self._socket.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Whether the connection is closed or about to be."""
        return self._closing or self._lost

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Give the connection another protocol."""
        self._protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol that the connection has."""
        if self._protocol is None:
            raise RuntimeError("the connection has no protocol before its handshake is over")
        return self._protocol

    def close(self) -> None:
        """Send what is buffered, then close_notify; ``connection_lost(None)`` follows when the peer has closed too, at most 2 s later."""
        if self._closing or self._lost:
            return
        self._closing = True
        self._wake()
        self._wire.apply_reading()
        self._pump()

    def abort(self) -> None:
        """Close at once. What is buffered is lost, and the peer sees a truncated stream."""
        self._closing = True
        self._wake()
        self._pending.clear()
        if self._socket is not None:
            self._socket.abort()

    # ---- asyncio.ReadTransport

    def is_reading(self) -> bool:
        """Whether data is delivered."""
        return not self._reading_paused and not self.is_closing()

    def pause_reading(self) -> None:
        """Deliver no data until resume_reading()."""
        if not self._reading_paused:
            self._reading_paused = True
            self._wire.apply_reading()

    def resume_reading(self) -> None:
        """Deliver data again."""
        if self._reading_paused:
            self._reading_paused = False
            self._wire.apply_reading()
            self._loop.call_soon(self._deliver)

    @property
    def is_wire_reading_paused(self) -> bool:
        """Whether the socket need not be read. A closed connection is read on, until the peer's end."""
        return self._reading_paused and not self._closing

    # ---- asyncio.WriteTransport

    def write(self, data: Data) -> None:
        """Protect and send, or buffer. The socket is written in pieces of up to 16 records."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes-like, not {type(data).__name__}")
        if self._eof_due:
            raise RuntimeError("cannot write after write_eof()")
        if self.is_closing():
            _log.debug("data written to a closed TLS-Tandem connection is dropped")
            return
        if isinstance(data, memoryview) and (data.itemsize, data.ndim, data.c_contiguous) != (1, 1, True):
            data = bytes(data)
        if not data:
            return
        if not self._pending and not self._wire.is_write_paused and len(data) <= CHUNK:
            # The usual case: nothing waits, nothing is copied.
            self._seal_and_send(data)
            return
        self._pending.append(data)
        self._pump()

    def writelines(self, list_of_data: Iterable[Data]) -> None:
        """As write() of all joined."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """True in TLS 1.3, where each direction is closed on its own (RFC 8446, 6.1)."""
        return self.core.negotiated is not None and self.core.negotiated.version == TLS_1_3

    def write_eof(self) -> None:
        """Send close_notify behind what is buffered, and go on reading. TLS 1.3 only."""
        if not self.can_write_eof():
            raise NotImplementedError("TLS 1.2 closes both directions at once")
        if self._eof_due or self.is_closing():
            return
        self._eof_due = True
        self._pump()

    def get_write_buffer_size(self) -> int:
        """Bytes that have not left yet."""
        below = 0 if self._socket is None else self._socket.get_write_buffer_size()
        return len(self._pending) + below

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Low and high water."""
        return (0, 0) if self._socket is None else self._socket.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set high and low water for the protocol's pause_writing() and resume_writing()."""
        if self._socket is not None:
            self._socket.set_write_buffer_limits(high, low)

    def update_key(self, *, request_peer: bool = False) -> None:
        """Change our write key now, and have the peer change its own with ``request_peer`` (TLS 1.3)."""
        self.core.stream.update_key(request_peer=request_peer)
        self._flush_stream()

    # ---- events of the wire

    def wire_made(self, transport: asyncio.Transport) -> None:
        """The socket is connected."""
        self._socket = transport
        transport.set_write_buffer_limits(_HIGH_WATER, _LOW_WATER)

    def wire_received(self) -> None:
        """The core's buffer has more bytes."""
        if self._protocol is not None:
            if not self._reading_paused or self._closing:
                self._deliver()
        elif self.core.state is not TandemState.OPEN:
            self._wake()

    def wire_eof(self) -> bool:
        """The peer has closed its direction of the socket. Returns whether ours stays open."""
        if self._drops:
            self._close_socket()
            return True
        if self._protocol is None and self.core.state is not TandemState.OPEN:
            self._during_handshake(self.core.received_eof)
            return True
        # What came before this end must be delivered first, when the protocol wants it.
        self.core.has_ended = True
        if self._closing:
            self._close_socket()
        else:
            self._deliver()
        return True

    def wire_full(self) -> None:
        """The core's buffer has no room."""
        if self._protocol is None:
            self._during_handshake(self.core.received_too_much)

    def wire_dropped_enough(self) -> None:
        """The peer sends and sends behind our alert."""
        self._close_socket()

    def wire_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        if self._lost:
            return
        self._lost = True
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._pending.clear()
        error = self._error
        if error is None and not self._closing and not (self._eof_told and exc is None):
            error = exc or TruncatedStreamError("in the middle of the stream")
        if self._protocol is None:
            self._end_handshake(exc or TruncatedStreamError("in the handshake"))
        self._closing = True
        self._wake()
        if self._protocol is not None:
            self._loop.call_soon(self._tell_lost, self._protocol, error)
        elif not self._closed.done():
            self._closed.set_result(None)

    def wire_write_paused(self) -> None:
        """The socket's buffer is above high water."""
        if self._protocol is not None and not self._protocol_paused:
            self._protocol_paused = True
            self._guarded(self._protocol.pause_writing)

    def wire_write_resumed(self) -> None:
        """The socket's buffer is below low water."""
        self._pump()
        if self._protocol is not None and self._protocol_paused and not self._wire.is_write_paused:
            self._protocol_paused = False
            self._guarded(self._protocol.resume_writing)

    # ---- inside

    def _during_handshake(self, step: Callable[[], None]) -> None:
        try:
            step()
        except SecFuNetError as error:
            self._end_handshake(error)
        self._wake()

    def _end_handshake(self, error: Exception) -> None:
        """It is raised in the task that does the handshake."""
        if self._handshake_error is None:
            self._handshake_error = error
        if self._giving_up is not None:
            self._giving_up.reschedule(self._loop.time())

    def _wake(self) -> None:
        self._handshake_wake.set()
        if self._tickets_wake is not None:
            self._tickets_wake.set()

    def _tell_lost(self, protocol: asyncio.BaseProtocol, error: Exception | None) -> None:
        try:
            self._guarded(protocol.connection_lost, error)
        finally:
            if not self._closed.done():
                self._closed.set_result(None)

    def _guarded(self, callback: Any, *arguments: Any) -> Any:
        """Call the protocol; its own faults are reported as asyncio reports them, and end the connection."""
        try:
            return callback(*arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - a protocol's fault must not reach the event loop's reader
            self._loop.call_exception_handler(
                {"message": "a protocol over TLS-Tandem failed", "exception": error, "transport": self}
            )
            self._error = error if isinstance(error, Exception) else None
            self.abort()
            return None

    def _deliver(self) -> None:
        """Open what has come, and hand it to the protocol."""
        if self._delivering or self._lost or self._protocol is None:
            return
        self._delivering = True
        try:
            self._deliver_all()
            if self.core.has_ended and not self._reading_paused and not self._closing and not self._eof_told:
                self.core.stream.receive_eof()
        except TlsError as error:
            self._fail(error)
        finally:
            self._delivering = False
        self._wire.check_room()

    def _deliver_all(self) -> None:
        stream = self.core.stream
        while self._closing or not self._reading_paused:
            data = stream.receive()
            self._flush_stream()
            if self._tickets_wake is not None and (data or stream.is_read_closed or stream.has_tickets):
                self._tickets_wake.set()
            if not data:
                break
            if not self._closing:
                self._hand_up(data)
        if stream.is_read_closed:
            stream.drop_incoming()
            if not self._eof_told:
                self._eof_told = True
                self._tell_eof()

    def _hand_up(self, data: bytearray) -> None:
        protocol = self._protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            view = memoryview(data)
            while view and not self._lost:
                buffer = self._guarded(protocol.get_buffer, len(view))
                if buffer is None:
                    return
                room = memoryview(buffer).cast("B")
                count = min(len(room), len(view))
                if not count:
                    self._fail_protocol("get_buffer() returned an empty buffer")
                    return
                room[:count] = view[:count]
                view = view[count:]
                self._guarded(protocol.buffer_updated, count)
        elif isinstance(protocol, asyncio.Protocol):
            self._guarded(protocol.data_received, bytes(data))

    def _fail_protocol(self, message: str) -> None:
        self._error = RuntimeError(message)
        self.abort()

    def _tell_eof(self) -> None:
        if self._closing:
            self._close_socket()
            return
        keep_open = False
        if isinstance(self._protocol, (asyncio.Protocol, asyncio.BufferedProtocol)):
            keep_open = bool(self._guarded(self._protocol.eof_received))
        if not (keep_open and self.can_write_eof()):
            # TLS 1.2 answers a close_notify at once (RFC 5246, 7.2.1).
            self.close()
        elif self.core.stream.is_write_closed:
            self.close()

    def _fail(self, error: TlsError) -> None:
        """The peer broke the protocol, or ended it: tell it, and tell the protocol."""
        if self._lost or self._error is not None:
            return
        self._error = error
        self._pending.clear()
        was_closing = self._closing
        self._closing = True
        if was_closing and isinstance(error, (PeerAlertError, TruncatedStreamError)):
            self._error = None
        if isinstance(error, TlsProtocolError):
            self.core.stream.fatal_alert(error.alert)
            self._flush_stream()
            self._wake()
            self._close_behind_alert()
            return
        self._wake()
        self._close_socket()

    def _seal_and_send(self, data: Data) -> None:
        try:
            records = self.core.stream.seal(data)
        except TlsError as error:
            self._fail(error)
            return
        if self._socket is not None:
            self._socket.write(records)

    def _flush_stream(self) -> None:
        stream = self.core.stream
        if stream.has_output and self._socket is not None and not self._socket.is_closing():
            self._socket.write(stream.take_output())

    def _pump(self) -> None:
        """Protect and send what waits, as long as the socket takes it; then the end, if it is due."""
        while self._pending and not self._wire.is_write_paused and not self._lost:
            self._seal_and_send(self._pending.take())
        if self._pending or self._lost:
            return
        if (self._eof_due or self._closing) and self.core.state is TandemState.OPEN:
            self.core.stream.close_notify()
            self._flush_stream()
        if self._closing:
            self._begin_close()

    def _begin_close(self) -> None:
        """Our close_notify is on its way: wait for the peer's, so that nothing in flight is reset away."""
        if self._socket is None or self._socket.is_closing() or self._drops:
            return
        if self._eof_told or self.core.has_ended or self._error is not None:
            # Not at once: asyncio closes a transport twice that is closed while it says that its buffer is empty.
            self._loop.call_soon(self._close_socket)
            return
        if self._close_timer is None:
            try:
                self._socket.write_eof()
            except OSError:
                # The peer has reset the connection, and the event loop has not seen it yet.
                self._close_socket()
                return
            self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self._close_socket)

    def _close_behind_alert(self) -> None:
        """End our direction, and drop what still comes, to the peer's end: within CLOSE_TIMEOUT and MAX_DROPPED."""
        if self._socket is None or self._socket.is_closing() or self._drops:
            return
        if self.core.has_ended:
            self._close_socket()
            return
        try:
            self._socket.write_eof()
        except OSError:
            self._close_socket()
            return
        self._drops = True
        self._wire.drop(MAX_DROPPED)
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self._close_socket)

    def _close_socket(self) -> None:
        if self._socket is not None and not self._socket.is_closing():
            self._socket.close()
            # A peer that reads nothing must not keep the socket for ever.
            if self._close_timer is not None:
                self._close_timer.cancel()
            self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self._socket.abort)
