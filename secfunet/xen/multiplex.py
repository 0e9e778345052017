"""Many byte streams over one channel: a sans-IO protocol, bytes in, bytes and events out.

A frame is a header of 8 bytes, big-endian, and a payload::

    type (1) | reserved, zero (1) | payload's length (2) | stream (4)

Each end begins with HELLO. Only the guest opens streams, and names the service that it wants; its numbers are 1, 2, 3, … and never
come again on one channel. DATA counts against a credit of 64 KiB a stream and direction, which the receiver renews as it passes data
on: a stream that nobody reads stops itself and no other. PING is answered by PONG with the same payload. GOAWAY: the sender is about
to close the channel.

Any input gives events, or raises MultiplexError; then the channel is to be closed. Memory is bounded: MAX_STREAMS times the credit,
each way. What a peer may have this end do in time is bounded by a ``Budget``: dom0 has one for each guest, a guest has none for dom0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from secfunet.xen.budget import Budget
from secfunet.xen.errors import MultiplexError

VERSION: Final = 1
MAGIC: Final = b"SFXM"
MAX_STREAMS: Final = 32
"""Open at the same time; at dom0's end, with those that are over and not yet cleared away."""
CREDIT: Final = 65536
"""Bytes of a stream, each way, that may be on their way."""
MAX_PAYLOAD: Final = 8192
MAX_SERVICE: Final = 32
MAX_UNSENT_CONTROL: Final = 65536
"""Bytes of answers that a peer may leave unread before it is given up."""

_HEADER: Final = struct.Struct(">BBHI")
_NUMBER: Final = struct.Struct(">I")


class FrameType(IntEnum):
    HELLO = 1
    OPEN = 2
    DATA = 3
    CREDIT = 4
    END = 5
    RESET = 6
    PING = 7
    PONG = 8
    GOAWAY = 9


class ResetReason(IntEnum):
    REFUSED = 1  # there is no such service, or too many streams
    CANCELLED = 2  # whoever used the stream is gone


@dataclass(frozen=True)
class Opened:
    """The guest wants ``service``."""

    stream: int
    service: str


@dataclass(frozen=True)
class Received:
    stream: int
    data: bytes


@dataclass(frozen=True)
class Credited:
    """More may be sent on this stream."""

    stream: int


@dataclass(frozen=True)
class Ended:
    """The peer sends no more on this stream."""

    stream: int


@dataclass(frozen=True)
class Reset:
    """The stream is over, both ways."""

    stream: int
    reason: int


@dataclass(frozen=True)
class Ponged:
    payload: bytes


@dataclass(frozen=True)
class WentAway:
    """The peer closes the channel now."""


Event = Opened | Received | Credited | Ended | Reset | Ponged | WentAway


@dataclass
class _Stream:
    send_credit: int = CREDIT
    receive_credit: int = CREDIT
    unrenewed: int = 0
    ended_here: bool = False
    ended_there: bool = False


class Multiplexer:
    """One end. ``is_host``: dom0's, which accepts streams; the guest's opens them. ``budget``: what the peer may have done for it."""

    def __init__(self, *, is_host: bool, budget: Budget | None = None) -> None:
        self._is_host = is_host
        self._budget = budget
        self._input = bytearray()
        self._output = bytearray()
        self._control = 0
        self._streams: dict[int, _Stream] = {}
        self._held: set[int] = set()
        self._last_stream = 0
        self._greeted = False
        self._pings = 0
        self._frames = self._opens = self._bytes = 0
        self._more = False
        self._frame(FrameType.HELLO, 0, MAGIC + bytes([VERSION]))

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    @property
    def greeted(self) -> bool:
        """The peer has said HELLO."""
        return self._greeted

    @property
    def more(self) -> bool:
        """``receive`` stopped at its bound: frames that came wait to be looked at."""
        return self._more

    @property
    def unsent(self) -> int:
        """Bytes that wait for ``data_to_send``."""
        return len(self._output)

    def data_to_send(self) -> bytes:
        """What the channel is to carry now; it is forgotten here."""
        data = bytes(self._output)
        self._output.clear()
        self._control = 0
        return data

    def receive(self, untrusted: bytes, *, most: int | None = None) -> list[Event]:
        """What these bytes mean, and those that waited. With ``most`` frames at once; see ``more``. Raises MultiplexError."""
        self._input += untrusted
        self._bytes += len(untrusted)
        self._more = False
        events: list[Event] = []
        taken = 0
        while len(self._input) >= _HEADER.size:
            kind, reserved, length, stream = _HEADER.unpack_from(self._input)
            if reserved or length > MAX_PAYLOAD:
                raise MultiplexError("a frame of the channel has no sound header")
            if len(self._input) < _HEADER.size + length:
                break
            if taken == most:
                self._more = True
                break
            taken += 1
            payload = bytes(self._input[_HEADER.size : _HEADER.size + length])
            del self._input[: _HEADER.size + length]
            event = self._take(kind, stream, payload)
            if event is not None:
                events.append(event)
        self._frames += taken
        if self._control > MAX_UNSENT_CONTROL:
            raise MultiplexError("the channel's peer asks for answers and does not read them")
        return events

    def pause(self) -> float:
        """Seconds to wait before more is read, so that the peer keeps to its budget."""
        if self._budget is None:
            return 0.0
        frames, opens, size = self._frames, self._opens, self._bytes
        self._frames = self._opens = self._bytes = 0
        return self._budget.spend(frames, opens, size)

    def open(self, service: str) -> int:
        """A new stream to ``service``; its number. Raises MultiplexError beyond MAX_STREAMS."""
        if self._is_host:
            raise MultiplexError("dom0 opens no streams")
        if len(self._streams) >= MAX_STREAMS:
            raise MultiplexError(f"a channel carries at most {MAX_STREAMS} streams")
        self._last_stream += 1
        self._streams[self._last_stream] = _Stream()
        self._frame(FrameType.OPEN, self._last_stream, service.encode("ascii"))
        return self._last_stream

    def credit(self, stream: int) -> int:
        """Bytes that may be sent now; none on a stream that is over."""
        state = self._streams.get(stream)
        return state.send_credit if state is not None and not state.ended_here else 0

    def is_open(self, stream: int) -> bool:
        return stream in self._streams

    def send(self, stream: int, data: bytes) -> None:
        """Within the credit. Raises ValueError beyond it, which is a fault of the caller's."""
        if len(data) > self.credit(stream):
            raise ValueError("more data than the stream has credit for")
        self._streams[stream].send_credit -= len(data)
        for begin in range(0, len(data), MAX_PAYLOAD):
            self._frame(FrameType.DATA, stream, data[begin : begin + MAX_PAYLOAD])

    def consumed(self, stream: int, count: int) -> None:
        """``count`` bytes that came were passed on: the peer may send as many more."""
        state = self._streams.get(stream)
        if state is None or state.ended_there:
            return
        state.unrenewed += count
        # Not for every few bytes: a credit is a frame of its own.
        if state.unrenewed >= CREDIT // 4:
            state.receive_credit += state.unrenewed
            self._frame(FrameType.CREDIT, stream, _NUMBER.pack(state.unrenewed))
            state.unrenewed = 0

    def end(self, stream: int) -> None:
        """Nothing more is sent on this stream; it may still receive."""
        state = self._streams.get(stream)
        if state is not None and not state.ended_here:
            state.ended_here = True
            self._frame(FrameType.END, stream)
            self._forget_if_over(stream)

    def reset(self, stream: int, reason: ResetReason = ResetReason.CANCELLED) -> None:
        """The stream is over, both ways; does nothing if it is already."""
        if self._streams.pop(stream, None) is not None:
            self._frame(FrameType.RESET, stream, bytes([reason]))

    def release(self, stream: int) -> None:
        """Of dom0's end: nothing is done or held for this stream any more. Its place is free once it is over, too."""
        self._held.discard(stream)

    def refuse(self, stream: int) -> None:
        """Of dom0's end: what the guest asked for is not there. Raises BudgetError if it does nothing else."""
        self.reset(stream, ResetReason.REFUSED)
        self._note_idle()

    def ping(self, payload: bytes) -> None:
        """At most 8 bytes, which come back."""
        self._pings += 1
        self._frame(FrameType.PING, 0, payload[:8])

    def go_away(self) -> None:
        self._frame(FrameType.GOAWAY, 0)

    def _take(self, kind: int, stream: int, payload: bytes) -> Event | None:
        if not self._greeted:
            if kind != FrameType.HELLO or stream or payload[:4] != MAGIC or len(payload) != 5:
                raise MultiplexError("the channel's peer does not speak this protocol")
            if payload[4] != VERSION:
                raise MultiplexError(f"the channel's peer speaks version {payload[4]}, not {VERSION}")
            self._greeted = True
            return None
        if kind in (FrameType.PING, FrameType.PONG, FrameType.GOAWAY):
            if stream or len(payload) > 8:
                raise MultiplexError("a frame about the channel itself is malformed")
            return self._take_control(kind, payload)
        if kind == FrameType.OPEN:
            return self._take_open(stream, payload)
        if kind not in (FrameType.DATA, FrameType.CREDIT, FrameType.END, FrameType.RESET):
            raise MultiplexError("a frame of the channel is of no known type")
        if not 0 < stream <= self._last_stream:
            raise MultiplexError("a frame is for a stream that was never opened")
        state = self._streams.get(stream)
        if state is None:
            self._note_idle()
            return None
        return self._take_of_stream(kind, stream, state, payload)

    def _take_control(self, kind: int, payload: bytes) -> Event | None:
        if kind == FrameType.GOAWAY:
            return WentAway()
        if kind == FrameType.PING:
            # It is answered, and changes nothing: the peer needs one in some seconds.
            self._note_idle()
            self._frame(FrameType.PONG, 0, payload)
            return None
        if not self._pings:
            self._note_idle()
            return None
        self._pings -= 1
        return Ponged(payload)

    def _take_open(self, stream: int, payload: bytes) -> Event | None:
        if not self._is_host or stream != self._last_stream + 1:
            raise MultiplexError("a stream is opened that must not be")
        if not 0 < len(payload) <= MAX_SERVICE or not payload.isascii():
            raise MultiplexError("a stream is opened to something that is no service's name")
        self._last_stream = stream
        if len(self._held | self._streams.keys()) >= MAX_STREAMS:
            self._note_idle()
            self._frame(FrameType.RESET, stream, bytes([ResetReason.REFUSED]))
            return None
        self._opens += 1
        self._streams[stream] = _Stream()
        self._held.add(stream)
        return Opened(stream, payload.decode("ascii"))

    def _take_of_stream(self, kind: int, stream: int, state: _Stream, payload: bytes) -> Event | None:
        """Of a stream that is over here but not yet there, frames may still come: ``_take`` drops and counts them."""
        if kind == FrameType.RESET:
            if len(payload) != 1:
                raise MultiplexError("a reset of a stream is malformed")
            if self._budget is not None:
                self._budget.reset()
            del self._streams[stream]
            return Reset(stream, payload[0])
        if kind == FrameType.CREDIT:
            if len(payload) != _NUMBER.size:
                raise MultiplexError("a credit is malformed")
            credit = int(_NUMBER.unpack(payload)[0])
            if state.send_credit + credit > CREDIT:
                raise MultiplexError("a stream is given more credit than it had")
            if not credit or state.ended_here:
                self._note_idle()
                return None
            state.send_credit += credit
            return Credited(stream)
        if state.ended_there:
            raise MultiplexError("data came on a stream that had ended")
        if kind == FrameType.END:
            if payload:
                raise MultiplexError("the end of a stream is malformed")
            state.ended_there = True
            self._forget_if_over(stream)
            return Ended(stream)
        if len(payload) > state.receive_credit:
            raise MultiplexError("more data came than the stream had credit for")
        if not payload:
            self._note_idle()
            return None
        state.receive_credit -= len(payload)
        return Received(stream, payload)

    def _note_idle(self) -> None:
        if self._budget is not None:
            self._budget.idle()

    def _forget_if_over(self, stream: int) -> None:
        state = self._streams[stream]
        if state.ended_here and state.ended_there:
            del self._streams[stream]

    def _frame(self, kind: FrameType, stream: int, payload: bytes = b"") -> None:
        frame = _HEADER.pack(kind, 0, len(payload), stream) + payload
        if kind is not FrameType.DATA:
            self._control += len(frame)
        self._output += frame
