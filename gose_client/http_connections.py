"""HTTP/1.1 over whatever connects: connections by origin, reused while they live. Everything is bounded; redirects are the caller's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import h11

from gose_client.errors import GridUnavailableError, ProtocolViolationError
from secfunet.errors import SecFuNetError
from secfunet.openid.realm import WebUrl

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[], Awaitable[Streams]]

MAX_HEAD = 32768
MAX_BODY = 131072
_PIECE = 65536
_MAX_INTERIM = 8  # 1xx answers before the true one


@dataclass(frozen=True)
class HttpAnswer:
    """Status, headers (names in lower case, in their order) and body."""

    status: int
    headers: Sequence[tuple[str, str]]
    body: bytes = field(repr=False)

    def header(self, name: str) -> str:
        """The first of that name, or ""."""
        return next((value for key, value in self.headers if key == name), "")

    def all(self, name: str) -> list[str]:
        """Every one of that name."""
        return [value for key, value in self.headers if key == name]


class _LostError(Exception):
    """The connection broke; ``answered`` says whether a byte of the answer had come."""

    def __init__(self, cause: BaseException, answered: bool) -> None:
        super().__init__(str(cause) or type(cause).__name__)
        self.answered = answered


class _Connection:
    """One connection, one exchange at a time."""

    def __init__(self, streams: Streams) -> None:
        self._reader, self._writer = streams
        self._protocol = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
        self.idle_since = 0.0
        self.is_used = False

    @property
    def is_reusable(self) -> bool:
        return (
            self._protocol.our_state is h11.IDLE
            and self._protocol.their_state is h11.IDLE
            and not self._reader.at_eof()
            and self._reader.exception() is None
            and not self._writer.is_closing()
        )

    async def exchange(self, request: h11.Request, body: bytes) -> HttpAnswer:
        answered = False
        self.is_used = True
        try:
            data = self._protocol.send(request)
            if body:
                data = (data or b"") + (self._protocol.send(h11.Data(data=body)) or b"")
            data = (data or b"") + (self._protocol.send(h11.EndOfMessage()) or b"")
            self._writer.write(data)
            await self._writer.drain()
            response: h11.Response | None = None
            received = bytearray()
            interim = 0
            while True:
                event = self._protocol.next_event()
                if event is h11.NEED_DATA:
                    piece = await self._reader.read(_PIECE)
                    answered = answered or bool(piece)
                    self._protocol.receive_data(piece)
                elif isinstance(event, h11.InformationalResponse):
                    interim += 1
                    if interim > _MAX_INTERIM:
                        raise ProtocolViolationError("the grid answers with 1xx without end")
                elif isinstance(event, h11.Response):
                    response = event
                elif isinstance(event, h11.Data):
                    received += event.data
                    if len(received) > MAX_BODY:
                        raise ProtocolViolationError(f"an answer of the grid is longer than {MAX_BODY} bytes")
                elif isinstance(event, h11.EndOfMessage) and response is not None:
                    break
                else:
                    raise ConnectionResetError("the connection was closed")
        except h11.RemoteProtocolError as error:
            if answered and not self._reader.at_eof():
                raise ProtocolViolationError(f"the grid does not speak HTTP: {error}") from error
            raise _LostError(error, answered) from error
        except (OSError, EOFError) as error:
            raise _LostError(error, answered) from error
        except ProtocolViolationError:
            raise
        except SecFuNetError as error:
            # What TLS-Tandem says of a connection that breaks.
            raise _LostError(error, answered) from error
        with contextlib.suppress(h11.LocalProtocolError):
            self._protocol.start_next_cycle()
        headers = [(name.decode("ascii"), value.decode("latin-1")) for name, value in response.headers]
        return HttpAnswer(response.status_code, headers, bytes(received))

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError, SecFuNetError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        self._writer.transport.abort()


class HttpConnections:
    """Connections to the origins of a table, and to no other."""

    def __init__(
        self, connectors: Mapping[str, Connect], *, limit: int, idle_timeout: float, answer_timeout: float
    ) -> None:
        self._connectors = dict(connectors)
        self._places = {origin: asyncio.Semaphore(limit) for origin in connectors}
        self._idle: dict[str, list[_Connection]] = {origin: [] for origin in connectors}
        self._idle_timeout = idle_timeout
        self._answer_timeout = answer_timeout
        self._closing: set[asyncio.Task[None]] = set()

    async def request(
        self, method: str, url: WebUrl, *, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> HttpAnswer:
        """One exchange; a reused connection that turns out to be dead is replaced once.

        Raises ProtocolViolationError for an origin that is not in the table and for answers out of bounds, GridUnavailableError when the
        connection breaks, and what the connector raises.
        """
        if url.origin not in self._connectors:
            raise ProtocolViolationError(f"{url.origin} is no place of this grid")
        head = h11.Request(
            method=method,
            target=url.path + (f"?{url.query}" if url.query else ""),
            headers=[
                ("host", url.origin.partition("://")[2]),
                ("content-length", str(len(body))),
                *(headers or {}).items(),
            ],
        )
        async with self._places[url.origin]:
            while True:
                async with self._lend(url.origin) as connection:
                    was_used = connection.is_used
                    try:
                        async with asyncio.timeout(self._answer_timeout) as patience:
                            return await connection.exchange(head, body)
                    except TimeoutError as error:
                        if not patience.expired():
                            raise
                        silent = f"{url.origin} was silent for {self._answer_timeout:g} s"
                        raise GridUnavailableError(silent) from error
                    except _LostError as error:
                        # The server may close an idle connection just when it is used again: nothing has happened then.
                        if not was_used or error.answered:
                            raise GridUnavailableError(f"the connection to {url.origin} broke: {error}") from error
                        self.drop_idle(url.origin)

    def drop_idle(self, origin: str) -> None:
        """The next request to ``origin`` opens a connection of its own."""
        for connection in self._idle[origin]:
            self._close_later(connection)
        self._idle[origin].clear()

    async def close(self) -> None:
        """Closes what is idle; nothing may be under way."""
        for origin in self._idle:
            self.drop_idle(origin)
        if self._closing:
            await asyncio.wait(self._closing)

    @contextlib.asynccontextmanager
    async def _lend(self, origin: str) -> AsyncIterator[_Connection]:
        now = asyncio.get_running_loop().time()
        idle = self._idle[origin]
        connection: _Connection | None = None
        while idle and connection is None:
            candidate = idle.pop()
            if candidate.is_reusable and now - candidate.idle_since < self._idle_timeout:
                connection = candidate
            else:
                self._close_later(candidate)
        if connection is None:
            connection = _Connection(await self._connectors[origin]())
        try:
            yield connection
        except BaseException:
            # Half an exchange may be in it.
            connection.abort()
            raise
        if connection.is_reusable:
            connection.idle_since = asyncio.get_running_loop().time()
            idle.append(connection)
        else:
            self._close_later(connection)

    def _close_later(self, connection: _Connection) -> None:
        task = asyncio.get_running_loop().create_task(connection.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
