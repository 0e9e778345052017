"""One stream against a gRPC server that answers late, never, out of order or not at all; and what a status means."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # googleapis-common-protos has no types
from hypothesis import given
from hypothesis import strategies as st

from gose_client.channel import refusal_of
from gose_client.errors import GridRefusedError, GridUnavailableError
from gose_client.stream import OperationStream
from secfunet.gose.v1 import service_provider_pb2 as pb
from secfunet.gose.v1 import service_provider_pb2_grpc as pb_grpc
from tests.gose.grid import sign_operation


class Server(pb_grpc.ServiceProviderServiceServicer):
    """Keeps what it was asked; answers batches when the test says so."""

    def __init__(self) -> None:
        self.asked: list[pb.ExecuteStreamRequest] = []
        self.context: Any = None
        self._news = asyncio.Event()

    async def ExecuteStream(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802 - gRPC's name, its other kind of handler
        self.context = context
        async for request in request_iterator:
            self.asked.append(request)
            self._news.set()

    async def answer(self, *numbers: int) -> None:
        for number in numbers:
            await self.context.write(pb.ExecuteStreamResponse(batch_id=number, containers=[b"%d" % number]))

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.asked) < count:
                self._news.clear()
                await self._news.wait()


def explain(error: grpc.aio.AioRpcError) -> GridUnavailableError | GridRefusedError:
    return refusal_of(error) or GridUnavailableError(str(error.details()))


@contextlib.asynccontextmanager
async def stream(**options: Any) -> AsyncIterator[tuple[Server, OperationStream, grpc.aio.Server]]:
    with TemporaryDirectory(prefix="gs-") as folder:
        servicer, server = Server(), grpc.aio.server()
        pb_grpc.add_ServiceProviderServiceServicer_to_server(servicer, server)
        address = f"unix:{Path(folder) / 's'}"
        server.add_insecure_port(address)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            call = pb_grpc.ServiceProviderServiceStub(channel).ExecuteStream()
            one = OperationStream(call, explain, **{"in_flight": 4, "stall_timeout": 30.0, **options})
            yield servicer, one, server
            await one.close()
        await server.stop(0)


async def test_answers_find_their_batches_in_any_order() -> None:
    async with stream() as (server, one, _):
        tasks = [asyncio.create_task(one.execute([sign_operation()], f"c{number}")) for number in range(4)]
        await server.wait_for(4)
        await server.answer(3, 99, 1, 4, 2)
        assert [(await task).containers[0] for task in tasks] == [b"1", b"2", b"3", b"4"]
        assert [request.correlation_id for request in server.asked] == ["c0", "c1", "c2", "c3"]


async def test_no_more_batches_in_flight_than_allowed() -> None:
    async with stream() as (server, one, _):
        tasks = [asyncio.create_task(one.execute([sign_operation()])) for _ in range(6)]
        await server.wait_for(4)
        await asyncio.sleep(0.1)
        assert len(server.asked) == 4
        await server.answer(1)
        await server.wait_for(5)
        await server.answer(2, 3, 4, 5)
        await server.wait_for(6)
        await server.answer(6)
        await asyncio.gather(*tasks)


async def test_a_batch_that_nobody_waits_for_keeps_its_place_until_it_is_answered() -> None:
    async with stream(in_flight=1) as (server, one, _):
        given_up = asyncio.create_task(one.execute([sign_operation()]))
        await server.wait_for(1)
        given_up.cancel()
        waiting = asyncio.create_task(one.execute([sign_operation()]))
        await asyncio.sleep(0.1)
        assert len(server.asked) == 1
        await server.answer(1)
        await server.wait_for(2)
        await server.answer(2)
        assert (await waiting).batch_id == 2
        assert one.is_open


async def test_a_silent_server_is_given_up_but_not_an_idle_one() -> None:
    async with stream(stall_timeout=0.4) as (server, one, _):
        await asyncio.sleep(0.8)
        assert one.is_open, "nothing was asked"
        begun = time.monotonic()
        with pytest.raises(GridUnavailableError, match="silent"):
            await one.execute([sign_operation()])
        assert 0.3 < time.monotonic() - begun < 1.5
        assert not one.is_open
        with pytest.raises(GridUnavailableError):
            await one.execute([sign_operation()])
        assert len(server.asked) == 1


async def test_a_server_that_goes_away_is_told_to_all_who_wait() -> None:
    async with stream(in_flight=2) as (server, one, process):
        tasks = [asyncio.create_task(one.execute([sign_operation()])) for _ in range(5)]
        await server.wait_for(2)
        await process.stop(0)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, GridUnavailableError)


class Ended(grpc.aio.AioRpcError):
    """The end of a call with these details."""

    def __init__(self, details: bytes, code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED) -> None:
        metadata = grpc.aio.Metadata(("grpc-status-details-bin", details))
        super().__init__(code, grpc.aio.Metadata(), metadata)


def details(*, domain: str) -> bytes:
    status = status_pb2.Status(code=8, message="busy")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="SLOT_BUSY", domain=domain))
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    status.details.add().Pack(retry)
    return bytes(status.SerializeToString())


def test_a_refusal_carries_the_grids_reason_and_its_advice() -> None:
    refusal = refusal_of(Ended(details(domain="gose.secfunet")))
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after, refusal.code.name, str(refusal)) == (
        "SLOT_BUSY",
        1.5,
        "RESOURCE_EXHAUSTED",
        "busy",
    )
    assert refusal_of(Ended(details(domain="somebody.else"))) is None


@given(st.binary(max_size=100))
def test_any_details_are_a_refusal_or_none(untrusted: bytes) -> None:
    assert refusal_of(Ended(untrusted)) is None
