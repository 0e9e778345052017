"""An HTTP door of the grid: aiohttp behind bounds on connections, idleness, heads and bodies, over TLS or over TLS-Tandem."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
import ssl
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Protocol

from aiohttp import web

from gose.errors import Reason, Refusal
from gose.metrics import Metrics
from gose.settings import Address, Limits
from gose.state import state_unavailable
from secfunet.rpc.correlation import CORRELATION_KEY, clean_correlation
from secfunet.rpc.facts import whole_seconds
from secfunet.service.doorkeeper import DoorFullError, Doorkeeper, Visit, current_visit
from secfunet.service.flood_log import FloodLog, excerpt

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CORRELATION = web.RequestKey("correlation", str)

_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'",
    # State and sid travel in URLs: they must not go on in a Referer.
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class RunningServer(Protocol):
    """What asyncio's servers and TLS-Tandem's have in common."""

    def close(self) -> None:
        """Listens no longer."""

    async def wait_closed(self) -> None:
        """Until that is so."""


StartServer = Callable[[Callable[[], asyncio.Protocol]], Awaitable[RunningServer]]


class Door:
    """One address where an aiohttp application is served."""

    def __init__(
        self, name: str, routes: list[web.RouteDef], limits: Limits, metrics: Metrics, *, max_age: float | None = None
    ) -> None:
        """``max_age``: seconds after which a connection is closed as soon as it is idle."""
        self.name = name
        self._limits = limits
        self._metrics = metrics
        self._max_age = max_age
        self._flood = FloodLog(log)
        self._connections: dict[asyncio.BaseTransport, _Connection] = {}
        app = web.Application(client_max_size=limits.http_body, middlewares=[self._middleware])
        app.add_routes(routes)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            keepalive_timeout=limits.http_idle,
            shutdown_timeout=limits.shutdown_timeout,
        )
        self._server: RunningServer | None = None

    async def start_tls(self, address: Address, context: ssl.SSLContext, keeper: Doorkeeper) -> None:
        """Listens with TLS. Raises OSError."""
        loop = asyncio.get_running_loop()

        async def serve(visit: Visit) -> None:
            _, connection = await loop.connect_accepted_socket(
                self._make_protocol,
                visit.take(),
                ssl=context,
                ssl_handshake_timeout=self._limits.handshake_timeout,
                ssl_shutdown_timeout=2.0,
            )
            await connection.over()

        async def start(_: Callable[[], asyncio.Protocol]) -> RunningServer:
            return await keeper.open(self.name, serve, address.host, address.port, inside=self._limits.http_connections)

        await self.start(start)

    async def start(self, start_server: StartServer) -> None:
        """Listens by ``start_server``, which is given the protocol factory and calls it in the task of a visit (``doorkeeper``)."""
        await self._runner.setup()
        self._server = await start_server(self._make_protocol)

    async def close(self) -> None:
        """Listens no longer, lets requests in work end, and closes what is open."""
        if self._server is not None:
            self._server.close()
            # Requests in work get the runner's shutdown_timeout; idle connections are closed at once.
            await self._runner.cleanup()
            for transport in list(self._connections):
                with contextlib.suppress(Exception):
                    transport.abort()  # type: ignore[attr-defined] # every stream transport has it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._limits.shutdown_timeout):
                    await self._server.wait_closed()

    def _make_protocol(self) -> _Connection:
        server = self._runner.server
        if server is None:
            raise RuntimeError("the door is not open")
        return _Connection(self, server(), current_visit())

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        # Requests can come a thousand in a packet, and the task of each may run to its end as soon as it is made: others have their turn.
        await asyncio.sleep(0)
        correlation = request[CORRELATION] = clean_correlation(request.headers.get(CORRELATION_KEY, ""))
        connection = self._connections.get(request.transport) if request.transport is not None else None
        if connection is not None:
            connection.request_begins()
        try:
            response = await handler(request)
        except Refusal as refusal:
            response = self._refuse(request, refusal, correlation)
        except sqlite3.Error as error:
            response = self._refuse(request, state_unavailable(error), correlation)
        except web.HTTPException as error:
            response = refusal_response(_refusal_of(error), status=error.status)
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
        except Exception:  # noqa: BLE001 - one request's fault is not the door's
            self._flood.exception("fault", "a handler failed", {"door": self.name, "correlation": correlation})
            response = refusal_response(Refusal(Reason.INTERNAL, "the grid has a fault; see its log"))
        finally:
            if connection is not None:
                connection.request_ends()
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        if connection is not None and connection.is_old:
            response.force_close()
        return response

    def _refuse(self, request: web.Request, refusal: Refusal, correlation: str) -> web.Response:
        self._metrics.refusals.labels(refusal.reason.value).inc()
        self._flood.warning(
            refusal.reason.value,
            "request refused",
            {
                "door": self.name,
                "path": excerpt(request.path),
                "cause": refusal.detail or refusal.message,
                "peer": str(request.remote),
                "correlation": correlation,
            },
        )
        return refusal_response(refusal)

    async def body(self, request: web.Request) -> bytes:
        """The request's body. Raises Refusal when it is too long or too slow.

        Until it is there the request is not in work: a connection that trickles may be ended in favour of another one.
        """
        connection = self._connections.get(request.transport) if request.transport is not None else None
        if connection is not None:
            connection.body_awaited()
        try:
            async with asyncio.timeout(self._limits.http_request_timeout):
                return await request.read()
        except ConnectionError:
            raise Refusal(Reason.REQUEST_INVALID, "the connection ended before the body") from None
        except TimeoutError:
            raise Refusal(Reason.REQUEST_INVALID, "the body did not arrive in time") from None
        except web.HTTPRequestEntityTooLarge:
            raise Refusal(Reason.REQUEST_INVALID, f"a body has at most {self._limits.http_body} bytes") from None
        finally:
            if connection is not None:
                connection.body_over()


class _Connection(asyncio.Protocol):
    """Stands between transport and aiohttp's protocol; counts and times the connection."""

    def __init__(self, door: Door, inner: asyncio.Protocol, visit: Visit | None) -> None:
        self._door = door
        self._inner = inner
        self._visit = visit
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._full: DoorFullError | None = None
        self._requests = 0
        self._timers: list[asyncio.TimerHandle] = []
        self._transport: asyncio.Transport | None = None
        self.is_old = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream: asyncio.Transport = transport  # type: ignore[assignment] # stream servers make stream transports
        self._transport = stream
        if self._visit is not None:
            try:
                # One hypervisor's connections are counted together, from wherever it calls; a stranger's by his address.
                certificate = _certificate_of(stream)
                self._visit.enter(sha256(certificate).hexdigest() if certificate else None)
            except DoorFullError as error:
                self._inner = asyncio.Protocol()
                self._full = error
                stream.abort()
                return
        self._door._connections[transport] = self
        loop = asyncio.get_running_loop()
        # aiohttp times idle connections after their first request only, and never a head that trickles in.
        self._timers.append(loop.call_later(self._door._limits.http_request_timeout, self._first_request_is_late))
        if self._door._max_age is not None:
            self._timers.append(loop.call_later(self._door._max_age, self._grow_old))
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._transport is not None:
            self._door._connections.pop(self._transport, None)
        if not self._over.done():
            self._over.set_result(None)
        self._inner.connection_lost(exc)

    async def over(self) -> None:
        """Until the connection is; cancelled, it is ended at once. Raises DoorFullError."""
        try:
            await self._over
        except asyncio.CancelledError:
            if self._transport is not None:
                self._transport.abort()
            raise
        if self._full is not None:
            raise self._full

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def request_begins(self) -> None:
        """A whole head has arrived."""
        self._requests += 1
        if self._visit is not None:
            self._visit.busy = True
        if self._timers:
            self._timers[0].cancel()

    def body_awaited(self) -> None:
        """The grid can do nothing before its peer does."""
        if self._visit is not None:
            self._visit.busy = False

    def body_over(self) -> None:
        """It has come, or never will."""
        if self._visit is not None:
            self._visit.busy = True

    def request_ends(self) -> None:
        """Its answer is made."""
        self._requests -= 1
        if self._visit is not None:
            self._visit.busy = self._requests > 0
            self._visit.used_at = asyncio.get_running_loop().time()

    def _first_request_is_late(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _grow_old(self) -> None:
        self.is_old = True
        if self._requests == 0 and self._transport is not None:
            self._transport.close()


def _certificate_of(transport: asyncio.Transport) -> bytes | None:
    """DER of the client's certificate: TLS of the library, or TLS-Tandem."""
    tls = transport.get_extra_info("ssl_object")
    certificate = tls.getpeercert(binary_form=True) if tls is not None else transport.get_extra_info("peercert")
    return certificate if isinstance(certificate, bytes) else None


def refusal_response(refusal: Refusal, *, status: int | None = None) -> web.Response:
    """JSON {"code", "reason", "message"}; Retry-After in whole seconds where waiting helps."""
    body = {"code": refusal.code.name, "reason": refusal.reason.value, "message": refusal.message}
    response = web.json_response(body, status=status or refusal.http_status)
    if refusal.retry_after is not None:
        response.headers["Retry-After"] = str(whole_seconds(refusal.retry_after))
    return response


def see_other(url: str) -> web.Response:
    """303: go there with GET."""
    return web.Response(status=303, headers={"Location": url})


def json_object(untrusted: bytes) -> dict[str, object]:
    """A JSON object. Raises Refusal REQUEST_INVALID."""
    try:
        value = json.loads(untrusted)
    except (ValueError, RecursionError):
        raise Refusal(Reason.REQUEST_INVALID, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise Refusal(Reason.REQUEST_INVALID, "the body is no JSON object")
    return value


def _refusal_of(error: web.HTTPException) -> Refusal:
    if error.status in (404, 405):
        return Refusal(Reason.NOT_FOUND, "there is nothing here")
    return Refusal(Reason.REQUEST_INVALID, error.reason)
