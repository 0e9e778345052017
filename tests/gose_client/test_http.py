"""HTTP and cookies: reuse, bounds, and servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gose_client.cookies import MAX_COOKIES, CookieJar
from gose_client.errors import GoseClientError, GridUnavailableError, ProtocolViolationError
from gose_client.http_connections import MAX_BODY, MAX_HEAD, HttpConnections, Streams
from secfunet.openid.realm import parse_url

ORIGIN = "https://grid.test"
URL = parse_url(f"{ORIGIN}/path?x=1")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Place:
    """A server and the connections that were made to it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.connected = 0

    async def connect(self) -> Streams:
        self.connected += 1
        return await asyncio.open_connection("127.0.0.1", self._port)

    def http(self, *, limit: int = 4, idle_timeout: float = 10.0, answer_timeout: float = 10.0) -> HttpConnections:
        return HttpConnections(
            {ORIGIN: self.connect}, limit=limit, idle_timeout=idle_timeout, answer_timeout=answer_timeout
        )


@contextlib.asynccontextmanager
async def place(serve: Serve) -> AsyncIterator[Place]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield Place(server.sockets[0].getsockname()[1])


def answering(*answers: bytes, then_close: bool = False) -> Serve:
    """One answer for each request of a connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        if not then_close:
            await reader.read()

    return serve


async def test_a_connection_serves_one_request_after_the_other() -> None:
    async with place(answering(*[OK] * 5)) as server:
        http = server.http()
        for _ in range(5):
            answer = await http.request("GET", URL, headers={"accept": "x"})
            assert (answer.status, answer.body) == (200, b"hi")
        assert server.connected == 1
        await http.close()


async def test_an_idle_connection_that_the_server_closed_is_replaced_without_a_word() -> None:
    async with place(answering(OK, then_close=True)) as server:
        http = server.http()
        for number in range(3):
            assert (await http.request("GET", URL)).status == 200
            assert server.connected == number + 1
        await http.close()


async def test_a_server_that_closes_without_an_answer_is_not_asked_for_ever() -> None:
    async with place(answering(then_close=True)) as server:
        http = server.http()
        with pytest.raises(GridUnavailableError):
            await http.request("GET", URL)
        assert server.connected == 1
        await http.close()


async def test_an_old_connection_is_not_used_again() -> None:
    async with place(answering(*[OK] * 3)) as server:
        http = server.http(idle_timeout=0.0)
        for _ in range(3):
            await http.request("GET", URL)
        assert server.connected == 3
        await http.close()


async def test_no_more_connections_than_allowed() -> None:
    now = most = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        while True:
            await reader.readuntil(b"\r\n\r\n")
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.02)
            now -= 1
            writer.write(OK)

    async with place(serve) as server:
        http = server.http(limit=3)
        await asyncio.gather(*(http.request("GET", URL) for _ in range(20)))
        assert most == 3
        assert server.connected == 3
        await http.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (8 * MAX_HEAD),
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_BODY + 1) + b"x" * (MAX_BODY + 1),
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_answers_out_of_bounds(answer: bytes) -> None:
    async with place(answering(answer)) as server:
        http = server.http()
        with pytest.raises(ProtocolViolationError):
            await http.request("GET", URL)
        await http.close()


@pytest.mark.parametrize(
    "answer", [OK[:-1], b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n", b"HTTP"]
)
async def test_half_an_answer_is_none(answer: bytes) -> None:
    async with place(answering(answer, then_close=True)) as server:
        http = server.http()
        with pytest.raises(GridUnavailableError):
            await http.request("GET", URL)
        await http.close()


async def test_another_origin_is_never_connected() -> None:
    async with place(answering(OK)) as server:
        http = server.http()
        for url in ("https://grid.test:444/", "http://grid.test/", "https://evil.test/"):
            with pytest.raises(ProtocolViolationError):
                await http.request("GET", parse_url(url))
        assert server.connected == 0


async def test_a_caller_that_gives_up_leaves_no_half_exchange_behind() -> None:
    async with place(answering(b"HTTP/1.1 200 OK\r\n")) as server:
        http = server.http()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await http.request("GET", URL)
        assert not http._idle[ORIGIN]
        await http.close()


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_an_error_of_ours(untrusted: bytes) -> None:
    async def ask() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"HTTP/1.1 " + untrusted)
        reader.feed_eof()
        to_server, from_client = await asyncio.open_connection(sock=socket_pair[0])
        http = HttpConnections(
            {ORIGIN: lambda: asyncio.sleep(0, (reader, from_client))}, limit=1, idle_timeout=1, answer_timeout=5
        )
        with contextlib.suppress(GoseClientError):
            assert isinstance((await http.request("GET", URL)).status, int)
        from_client.close()
        await http.close()
        del to_server

    import socket

    socket_pair = socket.socketpair()
    try:
        asyncio.run(ask())
    finally:
        socket_pair[1].close()


# Cookies


def test_cookies_belong_to_their_host_and_path_and_end() -> None:
    now = time.time()
    jar = CookieJar(lambda: now)
    jar.take("a.test", "sid=1; Path=/; Secure; HttpOnly")
    jar.take("a.test", "deep=2; Path=/x; Max-Age=10")
    jar.take("b.test", "other=3")
    assert jar.header("a.test", "/") == "sid=1"
    assert jar.header("a.test", "/x/y") == "sid=1; deep=2"
    assert jar.header("a.test", "/xy") == "sid=1"
    assert jar.header("b.test", "/") == "other=3"
    assert jar.header("c.test", "/") == ""
    now += 11
    assert jar.header("a.test", "/x") == "sid=1"
    jar.take("a.test", "sid=; Max-Age=0")
    assert jar.header("a.test", "/") == ""


def test_a_copy_of_a_jar_is_its_own() -> None:
    jar = CookieJar()
    jar.take("a.test", "sid=1")
    copy = jar.copy()
    copy.take("a.test", "sid=2")
    assert jar.header("a.test", "/") == "sid=1"
    jar.update(copy)
    assert jar.header("a.test", "/") == "sid=2"


@pytest.mark.parametrize(
    "untrusted", ["", "=", "a b=1", "sid=1\r\nx: y", "sid=a;b=\x00", "sid=1; Domain=.test", "sid=" + "x" * 3000]
)
def test_cookies_that_are_not_kept(untrusted: str) -> None:
    jar = CookieJar()
    jar.take("a.test", untrusted)
    assert "\r" not in jar.header("a.test", "/")
    assert "1" not in jar.header("a.test", "/")
    assert len(jar.header("a.test", "/")) < 10


@given(st.lists(st.text(max_size=60), max_size=50))
def test_any_text_is_a_cookie_or_none_and_a_jar_is_bounded(untrusted: list[str]) -> None:
    jar = CookieJar()
    for number, text in enumerate(untrusted):
        jar.take("a.test", text)
        jar.take("a.test", f"name{number}={number}")
    header = jar.header("a.test", "/")
    assert header.isascii()
    assert "\n" not in header
    assert len(header.split("; ")) <= MAX_COOKIES


async def test_a_server_that_says_nothing_is_given_up_and_its_connection_too() -> None:
    async with place(answering(OK)) as grid:
        http = grid.http(answer_timeout=0.3)
        assert (await http.request("GET", URL)).status == 200
        with pytest.raises(GridUnavailableError, match=r"silent for 0\.3 s"):
            await http.request("GET", URL)
        assert (await http.request("GET", URL)).status == 200
        assert grid.connected == 2
        await http.close()
