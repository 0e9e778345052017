"""The multiplexer: two peers in memory, and peers that do not keep to the protocol."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.xen.errors import MultiplexError
from secfunet.xen.multiplex import (
    CREDIT,
    MAX_PAYLOAD,
    MAX_STREAMS,
    Credited,
    Ended,
    Event,
    FrameType,
    Multiplexer,
    Opened,
    Ponged,
    Received,
    Reset,
    ResetReason,
    WentAway,
)

HELLO = bytes([1, 0, 0, 5, 0, 0, 0, 0]) + b"SFXM\x01"


def peers() -> tuple[Multiplexer, Multiplexer]:
    """Guest and host that have greeted each other."""
    guest, host = Multiplexer(is_host=False), Multiplexer(is_host=True)
    assert host.receive(guest.data_to_send()) == []
    assert guest.receive(host.data_to_send()) == []
    return guest, host


def frame(kind: int, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">BBHI", kind, 0, len(payload), stream) + payload


def greeted_host() -> Multiplexer:
    host = Multiplexer(is_host=True)
    host.receive(HELLO)
    host.data_to_send()
    return host


def test_the_first_frame_is_as_documented() -> None:
    assert Multiplexer(is_host=True).data_to_send() == HELLO
    assert Multiplexer(is_host=False).data_to_send() == HELLO


def test_a_stream_carries_both_ways_and_ends() -> None:
    guest, host = peers()
    stream = guest.open("enrol")
    guest.send(stream, b"question")
    guest.end(stream)
    assert host.receive(guest.data_to_send()) == [Opened(1, "enrol"), Received(1, b"question"), Ended(1)]
    host.send(1, b"answer")
    host.end(1)
    assert guest.receive(host.data_to_send()) == [Received(1, b"answer"), Ended(1)]
    assert guest.streams == host.streams == 0


def test_credit_stops_one_stream_and_is_renewed() -> None:
    guest, host = peers()
    slow, quick = guest.open("agent"), guest.open("agent")
    guest.send(slow, bytes(CREDIT))
    assert guest.credit(slow) == 0
    assert guest.credit(quick) == CREDIT
    with pytest.raises(ValueError, match="credit"):
        guest.send(slow, b"x")
    received = [event for event in host.receive(guest.data_to_send()) if isinstance(event, Received)]
    assert sum(len(event.data) for event in received) == CREDIT
    assert all(len(event.data) <= MAX_PAYLOAD for event in received)
    host.consumed(slow, CREDIT // 4)
    assert guest.receive(host.data_to_send()) == [Credited(slow)]
    assert guest.credit(slow) == CREDIT // 4


def test_ping_and_going_away() -> None:
    guest, host = peers()
    host.ping(b"alive")
    host.go_away()
    assert guest.receive(host.data_to_send()) == [WentAway()]
    assert host.receive(guest.data_to_send()) == [Ponged(b"alive")]


def test_a_reset_is_over_both_ways_and_late_data_is_dropped() -> None:
    guest, host = peers()
    stream = guest.open("agent")
    host.receive(guest.data_to_send())
    host.reset(stream, ResetReason.REFUSED)
    guest.send(stream, b"on its way already")
    assert host.receive(guest.data_to_send()) == []
    assert guest.receive(host.data_to_send()) == [Reset(stream, ResetReason.REFUSED)]
    assert guest.credit(stream) == 0


def test_the_number_of_streams_is_bounded_at_both_ends() -> None:
    guest, host = peers()
    for _ in range(MAX_STREAMS):
        guest.open("agent")
    with pytest.raises(MultiplexError):
        guest.open("agent")
    host.receive(guest.data_to_send())
    assert host.receive(frame(FrameType.OPEN, MAX_STREAMS + 1, b"agent")) == []
    assert host.streams == MAX_STREAMS
    assert frame(FrameType.RESET, MAX_STREAMS + 1, bytes([ResetReason.REFUSED])) in host.data_to_send()


@pytest.mark.parametrize(
    "untrusted",
    [
        pytest.param(b"PRI * HTTP/2.0\r\n", id="another protocol"),
        pytest.param(frame(FrameType.PING), id="no greeting"),
        pytest.param(HELLO[:-1] + b"\x02", id="another version"),
        pytest.param(HELLO + HELLO, id="a second greeting"),
        pytest.param(HELLO + frame(99), id="an unknown type"),
        pytest.param(HELLO + b"\x07\x01\x00\x00\x00\x00\x00\x00", id="a reserved byte"),
        pytest.param(HELLO + frame(FrameType.DATA, 1, b"x"), id="data of no stream"),
        pytest.param(HELLO + frame(FrameType.OPEN, 2, b"agent"), id="a number left out"),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b""), id="no name"),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b"\xff"), id="a name that is no text"),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b"a" * 33), id="a long name"),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b"a") * 2, id="a number again"),
        pytest.param(HELLO + frame(FrameType.PING, 1), id="a ping of a stream"),
        pytest.param(HELLO + frame(FrameType.PING, 0, bytes(9)), id="a long ping"),
        pytest.param(
            HELLO + frame(FrameType.OPEN, 1, b"a") + frame(FrameType.CREDIT, 1, b"\0\0\0\1"), id="too much credit"
        ),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b"a") + frame(FrameType.CREDIT, 1, b"\0"), id="half a credit"),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b"a") + frame(FrameType.RESET, 1), id="a reset without a reason"),
        pytest.param(HELLO + frame(FrameType.OPEN, 1, b"a") + frame(FrameType.END, 1, b"x"), id="an end with data"),
        pytest.param(
            HELLO + frame(FrameType.OPEN, 1, b"a") + frame(FrameType.END, 1) + frame(FrameType.DATA, 1, b"x"),
            id="data after the end",
        ),
        pytest.param(
            HELLO + frame(FrameType.OPEN, 1, b"a") + frame(FrameType.DATA, 1, bytes(MAX_PAYLOAD)) * 9,
            id="beyond the credit",
        ),
        pytest.param(HELLO + struct.pack(">BBHI", 3, 0, MAX_PAYLOAD + 1, 1), id="a frame that is too large"),
    ],
)
def test_a_peer_that_does_not_keep_to_the_protocol(untrusted: bytes) -> None:
    with pytest.raises(MultiplexError):
        Multiplexer(is_host=True).receive(untrusted)


def test_a_peer_that_never_reads_its_answers() -> None:
    host = greeted_host()
    with pytest.raises(MultiplexError, match="does not read"):
        host.receive(frame(FrameType.PING, 0, b"12345678") * 5000)


@given(st.lists(st.binary(max_size=200), max_size=20))
@settings(max_examples=300)
def test_any_bytes_give_events_or_the_documented_error(chunks: list[bytes]) -> None:
    host = Multiplexer(is_host=True)
    try:
        for chunk in chunks:
            host.receive(chunk)
    except MultiplexError:
        pass


frames = st.builds(frame, st.integers(0, 10), st.integers(0, 4), st.binary(max_size=40))


@given(st.lists(frames, max_size=40))
@settings(max_examples=300)
def test_any_frames_give_events_or_the_documented_error(many: list[bytes]) -> None:
    host = greeted_host()
    try:
        for one in many:
            host.receive(one)
            assert host.streams <= MAX_STREAMS
    except MultiplexError:
        pass


@given(st.binary(min_size=1, max_size=3 * MAX_PAYLOAD), st.lists(st.integers(1, 5000), min_size=1, max_size=30))
@settings(max_examples=100)
def test_data_arrives_however_it_is_cut(data: bytes, cuts: list[int]) -> None:
    guest, host = peers()
    guest.send(guest.open("agent"), data)
    wire = guest.data_to_send()
    events: list[Event] = []
    for cut in [*cuts, len(wire)]:
        events += host.receive(wire[:cut])
        wire = wire[cut:]
    assert b"".join(event.data for event in events if isinstance(event, Received)) == data
