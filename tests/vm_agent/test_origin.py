"""A call is found by its id, from the agent's line to what dom0 is told; a failure says the id; a wrong clock is called one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from secfunet.agent.v1 import local_pb2
from secfunet.gose.v1 import operation_pb2
from secfunet.middleware.v1 import agent_pb2
from secfunet.operation import MAX_AGE
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import MiddlewareDouble
from tests.vm_agent.test_service import SIGN, running
from vm_agent.errors import UNREACHABLE, UnavailableError, from_rpc_error
from vm_agent.local_socket import Caller, executable_of
from vm_agent.options import AgentOptions
from vm_agent.origin import LINES_AT_ONCE, Origin, bounded_lines
from vm_agent.server import AgentService

EXECUTABLE = str(Path(sys.executable).resolve())


def lines(caplog: pytest.LogCaptureFixture, asked: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if getattr(record, "asked", "") == asked]


async def test_each_call_has_an_id_that_leads_to_its_program(
    middleware: MiddlewareDouble, options: AgentOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(options) as (_, stub):
        await asyncio.gather(*(stub.Sign(SIGN, timeout=10) for _ in range(4)))

        async def requests():  # type: ignore[no-untyped-def] # of what the stub takes
            for number in range(3):
                yield local_pb2.OperateRequest(id=number, sign=SIGN.sign)

        assert len([answer async for answer in stub.Operate(requests(), timeout=10)]) == 3
    told = [origin for batch in middleware.batches for origin in batch.origins]
    asked = [one for batch in middleware.batches for one in batch.operations]
    assert len(told) == len(asked) == 7
    assert len({one.correlation_id for one in told}) == 7
    assert {(one.uid, one.pid) for one in told} == {(os.getuid(), os.getpid())}
    assert {one.executable for one in told} == {EXECUTABLE}
    written = lines(caplog, "sign")
    assert {record.correlation for record in written} == {one.correlation_id for one in told}  # type: ignore[attr-defined]
    assert {(record.uid, record.pid) for record in written} == {(os.getuid(), os.getpid())}  # type: ignore[attr-defined]


async def test_a_failure_says_the_id_that_the_agents_line_has(
    middleware: MiddlewareDouble, options: AgentOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bad = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=SIGN.sign.scheme, digest=b"short"))
    async with running(options) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(bad, timeout=10)
    found = re.fullmatch(r".+ \(id ([0-9a-f]{16})\)", str(error.value.details()))
    assert found is not None
    (line,) = lines(caplog, "sign")
    assert line.correlation == found[1]  # type: ignore[attr-defined] # from extra
    assert line.reason == "OPERATION_INVALID"  # type: ignore[attr-defined] # likewise


async def test_the_id_of_dom0_is_passed_on_alone(
    middleware: MiddlewareDouble, options: AgentOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def refuse(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        failures = [
            operation_pb2.OperationFailure(
                request_id=one.request_id,
                code=7,
                reason="POLICY_DENIED",
                domain="middleware.secfunet",
                message="no (id 0123456789abcdef-1)",
            )
            for one in request.operations
        ]
        return [agent_pb2.OperateResponse(batch_id=request.batch_id, failures=failures)]

    middleware.answer = refuse
    async with running(options) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(SIGN, timeout=10)
    assert error.value.details() == "no (id 0123456789abcdef-1)"
    (line,) = lines(caplog, "sign")
    assert "0123456789abcdef-1" in line.getMessage()
    assert line.correlation == middleware.batches[0].origins[0].correlation_id  # type: ignore[attr-defined] # from extra


@pytest.mark.parametrize(("ahead", "words"), [(180, "1[78][0-9] s ago"), (-180, "1[78][0-9] s in the future")])
async def test_a_wrong_clock_is_called_one(
    middleware: MiddlewareDouble, options: AgentOptions, ahead: float, words: str
) -> None:
    async with AgentService(options, clock=lambda: time.time() + ahead) as service:
        await eventually(lambda: service.status().connected)
        channel = grpc.aio.insecure_channel(f"unix:{options.socket}", [("grpc.use_local_subchannel_pool", 1)])
        async with channel:
            call = channel.unary_unary(
                "/secfunet.agent.v1.LocalService/Sign",
                request_serializer=local_pb2.SignRequest.SerializeToString,
                response_deserializer=local_pb2.SignResponse.FromString,
            )
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(SIGN, timeout=10)
    assert re.search(words, str(error.value.details()))
    assert "clock" in str(error.value.details())
    assert f"{MAX_AGE:.0f} s are allowed" in str(error.value.details())


@pytest.mark.parametrize(
    ("details", "words"),
    [("...CERTIFICATE_VERIFY_FAILED: certificate is not yet valid", "is not yet valid"), ("connection refused", "")],
)
def test_a_certificate_of_another_time_is_told_as_that(details: str, words: str) -> None:
    error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    told = from_rpc_error(error)
    assert isinstance(told, UnavailableError)
    assert (str(told) == UNREACHABLE) == (not words)
    assert words in str(told)
    assert details not in str(told)


def test_what_a_process_runs() -> None:
    with subprocess.Popen(["/bin/sleep", "30"]) as process:
        deadline = time.monotonic() + 5
        while "sleep" not in executable_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = executable_of(process.pid)
        process.kill()
    assert "sleep" in seen or "coreutils" in seen
    assert executable_of(process.pid) == ""


def test_one_users_lines_are_bounded_and_not_anothers() -> None:
    may_write = bounded_lines()
    loud, quiet = Origin("a", Caller(1, 1000, 100)), Origin("b", Caller(2, 1001, 100))
    assert sum(may_write(loud) for _ in range(5000)) < LINES_AT_ONCE + 50
    assert may_write(quiet)
