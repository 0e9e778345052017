"""The batcher against a stream in memory: coalescing, bounds, deadlines, loss, refusal, disorder, renewal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from itertools import count

import grpc
import pytest

from secfunet.rpc.facts import Facts
from tests.vm_agent.conftest import eventually
from vm_agent.batching import Batcher, Ticket
from vm_agent.errors import AgentError, DeadlineError, OperationFailedError, OverloadedError, UnavailableError


class MemoryStream:
    """Keeps what was sent; answers when the test says so."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, list[bytes]]] = []
        self.answers: asyncio.Queue[tuple[int, list[bytes]] | AgentError] = asyncio.Queue()
        self.finished = False
        self.aborted = False
        self.automatic = False

    async def send(self, batch_id: int, requests: Sequence[bytes], timeout: float) -> None:
        self.sent.append((batch_id, list(requests)))
        if self.automatic:
            self.answers.put_nowait((batch_id, list(requests)))

    async def receive(self) -> tuple[int, list[bytes]]:
        answer = await self.answers.get()
        if isinstance(answer, AgentError):
            raise answer
        return answer

    async def finish(self) -> None:
        self.finished = True

    def abort(self) -> None:
        self.aborted = True
        self.answers.put_nowait(UnavailableError("aborted"))

    def reply(self, position: int) -> None:
        self.answers.put_nowait(self.sent[position])


class Streams:
    def __init__(self, *, automatic: bool = False) -> None:
        self.opened: list[MemoryStream] = []
        self.automatic = automatic
        self.refusals: list[AgentError] = []

    async def open(self) -> MemoryStream:
        if self.refusals:
            raise self.refusals.pop(0)
        stream = MemoryStream()
        stream.automatic = self.automatic
        self.opened.append(stream)
        return stream


def settle(tickets: Sequence[Ticket[bytes]], answer: list[bytes]) -> Mapping[bytes, object | AgentError]:
    return {ticket.request_id: b"done " + ticket.request for ticket in tickets}


_numbers = count()


def ticket(request: bytes = b"x") -> Ticket[bytes]:
    return Ticket(next(_numbers).to_bytes(16), request)


async def test_an_idle_caller_is_sent_at_once_and_alone() -> None:
    streams = Streams(automatic=True)
    batcher = Batcher(streams.open, settle)
    assert await batcher.submit(ticket(b"a"), timeout=1) == b"done a"
    assert await batcher.submit(ticket(b"b"), timeout=1) == b"done b"
    assert [len(requests) for _, requests in streams.opened[0].sent] == [1, 1]
    assert len(streams.opened) == 1
    await batcher.close()


async def test_callers_gather_while_batches_are_under_way() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle, max_batch=64, max_in_flight=2)
    first = asyncio.create_task(batcher.submit(ticket(), timeout=5))
    await eventually(lambda: bool(streams.opened) and len(streams.opened[0].sent) == 1)
    second = asyncio.create_task(batcher.submit(ticket(), timeout=5))
    stream = streams.opened[0]
    await eventually(lambda: len(stream.sent) == 2)
    rest = [asyncio.create_task(batcher.submit(ticket(), timeout=5)) for _ in range(150)]
    await asyncio.sleep(0.05)
    assert len(stream.sent) == 2
    assert batcher.in_flight == 2
    for position in range(5):
        await eventually(lambda position=position: len(stream.sent) > position)  # type: ignore[misc] # mypy cannot infer a default's type
        stream.reply(position)
    await asyncio.gather(first, second, *rest)
    assert [len(requests) for _, requests in stream.sent] == [1, 1, 64, 64, 22]
    await batcher.close()


async def test_answers_in_any_order_twice_and_for_nobody() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    first = asyncio.create_task(batcher.submit(ticket(b"first"), timeout=5))
    await eventually(lambda: bool(streams.opened) and len(streams.opened[0].sent) == 1)
    second = asyncio.create_task(batcher.submit(ticket(b"second"), timeout=5))
    stream = streams.opened[0]
    await eventually(lambda: len(stream.sent) == 2)
    stream.answers.put_nowait((4711, []))
    stream.reply(1)
    stream.reply(1)
    assert await second == b"done second"
    assert not first.done()
    stream.reply(0)
    assert await first == b"done first"
    assert batcher.counters.unexpected_answers == 2
    await batcher.close()


async def test_a_lost_stream_sends_the_unanswered_again_with_the_same_ids() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    callers = [asyncio.create_task(batcher.submit(ticket(b"%d" % n), timeout=5)) for n in range(3)]
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    streams.automatic = True
    streams.opened[0].answers.put_nowait(UnavailableError("lost"))
    assert await asyncio.gather(*callers) == [b"done 0", b"done 1", b"done 2"]
    assert streams.opened[1].sent[0][1] == [b"0", b"1", b"2"]
    assert batcher.counters.resent == 3
    await batcher.close()


async def test_a_refused_stream_fails_its_callers_and_only_them() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    caller = asyncio.create_task(batcher.submit(ticket(), timeout=5))
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    streams.automatic = True
    streams.opened[0].answers.put_nowait(
        OperationFailedError(Facts(grpc.StatusCode.PERMISSION_DENIED, "middleware.secfunet", "NOT_PERMITTED", "no"))
    )
    with pytest.raises(OperationFailedError) as refused:
        await caller
    assert refused.value.reason == "NOT_PERMITTED"
    assert await batcher.submit(ticket(b"next"), timeout=5) == b"done next"
    await batcher.close()


async def test_each_caller_has_its_own_deadline() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    short = asyncio.create_task(batcher.submit(ticket(b"short"), timeout=0.05))
    long = asyncio.create_task(batcher.submit(ticket(b"long"), timeout=5))
    with pytest.raises(DeadlineError):
        await short
    streams.opened[0].reply(0)
    assert await long == b"done long"
    assert batcher.waiting == 0
    await batcher.close()


async def test_a_caller_that_goes_before_its_turn_is_never_sent() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle, max_in_flight=1)
    first = asyncio.create_task(batcher.submit(ticket(b"first"), timeout=5))
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    second = asyncio.create_task(batcher.submit(ticket(b"second"), timeout=5))
    third = asyncio.create_task(batcher.submit(ticket(b"third"), timeout=5))
    await asyncio.sleep(0)
    second.cancel()
    stream = streams.opened[0]
    stream.reply(0)
    await first
    await eventually(lambda: len(stream.sent) == 2)
    assert stream.sent[1][1] == [b"third"]
    stream.reply(1)
    await third
    await batcher.close()


async def test_a_stream_that_never_answers_is_given_up_and_the_next_one_serves() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    with pytest.raises(DeadlineError):
        await batcher.submit(ticket(), timeout=0.05)
    await eventually(lambda: streams.opened[0].aborted, timeout=3)
    streams.automatic = True
    assert await batcher.submit(ticket(b"later"), timeout=5) == b"done later"
    assert batcher.in_flight == 0
    await batcher.close()


async def test_too_many_waiting() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle, max_waiting=2)
    callers = [asyncio.create_task(batcher.submit(ticket(), timeout=5)) for _ in range(2)]
    await asyncio.sleep(0.02)
    with pytest.raises(OverloadedError):
        await batcher.submit(ticket(), timeout=5)
    streams.opened[0].reply(0)
    await asyncio.gather(*callers)
    await batcher.close()


async def test_streams_are_opened_again_at_growing_intervals_until_the_deadline() -> None:
    streams = Streams(automatic=True)
    streams.refusals = [UnavailableError("away")] * 4
    batcher = Batcher(streams.open, settle)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    assert await batcher.submit(ticket(b"a"), timeout=10) == b"done a"
    assert loop.time() - begin > 0.3
    streams.refusals = [UnavailableError("away: no such file")] * 1000
    batcher.renew()
    with pytest.raises(UnavailableError, match="no such file"):
        await batcher.submit(ticket(b"b"), timeout=0.3)
    assert len(streams.refusals) > 990
    await batcher.close()


async def test_renewal_drains_the_old_stream_and_uses_a_new_one() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    old = asyncio.create_task(batcher.submit(ticket(b"old"), timeout=5))
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    batcher.renew()
    new = asyncio.create_task(batcher.submit(ticket(b"new"), timeout=5))
    await eventually(lambda: len(streams.opened) == 2 and bool(streams.opened[1].sent))
    assert streams.opened[0].finished
    assert not streams.opened[0].aborted
    streams.opened[0].reply(0)
    assert await old == b"done old"
    await eventually(lambda: streams.opened[0].aborted)
    streams.opened[1].reply(0)
    assert await new == b"done new"
    await batcher.close()


async def test_what_an_old_stream_is_refused_goes_over_the_new_one() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    caller = asyncio.create_task(batcher.submit(ticket(b"moved"), timeout=5))
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    batcher.renew()
    streams.automatic = True
    streams.opened[0].answers.put_nowait(
        OperationFailedError(
            Facts(grpc.StatusCode.UNAUTHENTICATED, "middleware.secfunet", "CERTIFICATE_SUPERSEDED", "")
        )
    )
    assert await caller == b"done moved"
    await batcher.close()


async def test_close_tells_whoever_waits() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle, max_in_flight=1)
    callers = [asyncio.create_task(batcher.submit(ticket(), timeout=5)) for _ in range(3)]
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    callers.append(asyncio.create_task(batcher.submit(ticket(), timeout=5)))
    await asyncio.sleep(0)
    await batcher.close()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
    with pytest.raises(UnavailableError):
        await batcher.submit(ticket(), timeout=1)


async def test_a_smaller_batch_waits_a_moment_for_more_while_one_is_under_way() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    first = [asyncio.create_task(batcher.submit(ticket(), timeout=5)) for _ in range(8)]
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    stream = streams.opened[0]
    second = []
    for _ in range(8):  # they trickle in, as on a stream
        second.append(asyncio.create_task(batcher.submit(ticket(), timeout=5)))
        await asyncio.sleep(0)
    await eventually(lambda: len(stream.sent) == 2)
    assert [len(requests) for _, requests in stream.sent] == [8, 8]
    stream.reply(0)
    stream.reply(1)
    await asyncio.gather(*first, *second)
    await batcher.close()


async def test_callers_who_were_just_answered_are_waited_for_but_not_for_long() -> None:
    streams = Streams()
    batcher = Batcher(streams.open, settle)
    callers = [asyncio.create_task(batcher.submit(ticket(), timeout=5)) for _ in range(8)]
    await eventually(lambda: bool(streams.opened) and bool(streams.opened[0].sent))
    stream = streams.opened[0]
    stream.reply(0)
    await asyncio.gather(*callers)
    again = []
    for _ in range(4):  # half of them are an even share of two batches
        again.append(asyncio.create_task(batcher.submit(ticket(), timeout=5)))
        await asyncio.sleep(0)
    await eventually(lambda: len(stream.sent) == 2)
    assert len(stream.sent[1][1]) == 4
    stream.reply(1)
    await asyncio.gather(*again)
    alone = asyncio.create_task(batcher.submit(ticket(b"alone"), timeout=5))
    await eventually(lambda: len(stream.sent) == 3)
    stream.reply(2)
    assert await alone == b"done alone"
    await batcher.close()
