"""The guard stands before handlers of all four kinds, refuses each before it runs, and passes each error to ``refuse``."""

import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from secfunet.rpc.facts import Facts, abort, from_error
from secfunet.rpc.guard import Context, Guard, Method
from secfunet.rpc.reasons import Domain, Reason

RAW: dict[str, Any] = {"request_deserializer": bytes, "response_serializer": bytes}


class Door:
    """What a server is; ``open``: whether it admits."""

    def __init__(self) -> None:
        self.open = True
        self.inside = 0
        self.ran: list[str] = []
        self.refused: list[tuple[str, bool, bool]] = []

    @contextlib.contextmanager
    def admit(self, context: Context, method: Method) -> Iterator[None]:
        if not self.open:
            raise PermissionError("closed")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def refuse(self, context: Context, method: Method, error: Exception, *, admitted: bool) -> None:
        self.refused.append((method.name, method.is_unary, admitted))
        await abort(context, Facts.of(Domain.GRID, Reason.INTERNAL))

    async def one(self, request: bytes, context: Context) -> bytes:
        self.ran.append("one")
        if request == b"fail":
            raise ValueError
        return request

    async def many(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
        self.ran.append("many")
        yield request
        if request == b"fail":
            raise ValueError
        yield request

    async def collect(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        self.ran.append("collect")
        return b"".join([one async for one in requests])

    async def echo(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Of the style that reads and writes by itself."""
        self.ran.append("echo")
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(request)


@contextlib.asynccontextmanager
async def serving(door: Door, folder: Path) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(interceptors=[Guard(door.admit, door.refuse)])
    handlers = {
        "One": grpc.unary_unary_rpc_method_handler(door.one, **RAW),
        "Many": grpc.unary_stream_rpc_method_handler(door.many, **RAW),
        "Collect": grpc.stream_unary_rpc_method_handler(door.collect, **RAW),
        "Echo": grpc.stream_stream_rpc_method_handler(door.echo, **RAW),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", handlers),))
    server.add_insecure_port(f"unix:{folder}/s")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{folder}/s", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield channel
    finally:
        await server.stop(0)


async def _all(channel: grpc.aio.Channel, request: bytes) -> dict[str, Any]:
    """The outcome of one call of each kind: bytes, a list of them, or the error."""
    outcomes: dict[str, Any] = {}

    async def note(name: str, call: Any) -> None:
        try:
            outcomes[name] = [one async for one in call] if hasattr(call, "__aiter__") else await call
        except grpc.aio.AioRpcError as error:
            outcomes[name] = error

    await note("One", channel.unary_unary("/test.Service/One")(request, timeout=5))
    await note("Many", channel.unary_stream("/test.Service/Many")(request, timeout=5))
    await note("Collect", channel.stream_unary("/test.Service/Collect")(iter([request, request]), timeout=5))
    await note("Echo", channel.stream_stream("/test.Service/Echo")(iter([request, request]), timeout=5))
    return outcomes


async def test_handlers_of_all_kinds_run_inside(tmp_path: Path) -> None:
    door = Door()
    async with serving(door, tmp_path) as channel:
        assert await _all(channel, b"x") == {"One": b"x", "Many": [b"x", b"x"], "Collect": b"xx", "Echo": [b"x", b"x"]}
    assert (door.inside, door.refused) == (0, [])


async def test_a_closed_door_refuses_all_kinds_before_they_run(tmp_path: Path) -> None:
    door = Door()
    door.open = False
    async with serving(door, tmp_path) as channel:
        outcomes = await _all(channel, b"x")
    assert door.ran == []
    for name, error in outcomes.items():
        if name in ("Collect", "Echo") and error.details() == "Internal error from Core":
            continue  # grpc.aio's client was still writing when the refusal came, and lost it
        facts = from_error(error, Domain.GRID)
        assert facts is not None
        assert facts.reason == "INTERNAL"
    assert door.refused == [
        ("One", True, False),
        ("Many", False, False),
        ("Collect", True, False),
        ("Echo", False, False),
    ]


async def test_an_error_of_a_handler_is_told_apart_from_a_refusal(tmp_path: Path) -> None:
    door = Door()
    async with serving(door, tmp_path) as channel:
        outcomes = await _all(channel, b"fail")
    assert isinstance(outcomes["One"], grpc.aio.AioRpcError)
    assert isinstance(outcomes["Many"], grpc.aio.AioRpcError)
    assert door.refused == [("One", True, True), ("Many", False, True)]
    assert door.inside == 0


async def test_an_unknown_method_is_unknown_and_not_kept(tmp_path: Path) -> None:
    door = Door()
    async with serving(door, tmp_path) as channel:
        for number in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await channel.unary_unary(f"/test.Service/Nothing{number}")(b"", timeout=5)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_handler_of_an_unknown_kind_is_not_served() -> None:
    class Handler:
        request_deserializer = response_serializer = None
        unary_unary = unary_stream = stream_unary = stream_stream = None

    door = Door()
    with pytest.raises(TypeError, match="unguarded"):
        Guard(door.admit, door.refuse)._wrap(Handler(), "/test.Service/New")  # type: ignore[arg-type]
