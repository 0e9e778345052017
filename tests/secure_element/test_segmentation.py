"""Commands and answers of any length, through any reader: both styles of card, both kinds of client, and anything else."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.apdu import ApduFormatError, CommandApdu, ResponseApdu, StatusError
from secfunet.card import CardClient, Segmentation
from secfunet.card.instructions import Ins
from secure_element.errors import CommandRefusedError
from secure_element.segmentation import AnswerStyle, Segments


class EchoPort:
    """A card that answers each whole command with ``answer``, and counts how often it did so."""

    def __init__(self, style: AnswerStyle, answer: bytes) -> None:
        self.segments = Segments(style)
        self.output = answer
        self.received: list[CommandApdu] = []

    async def transmit(self, command: bytes) -> bytes:
        apdu = CommandApdu.decode(command)
        repeated = self.segments.repeat(apdu)
        if repeated is not None:
            return repeated.encode()
        if apdu.ins in (Ins.FETCH, Ins.GET_RESPONSE):
            return self.segments.fetch(apdu).encode()
        whole = self.segments.join(apdu)
        if whole is None:
            return ResponseApdu().encode()
        self.received.append(whole)
        return self.segments.answer(whole, self.output).encode()

    async def reset(self, *, cold: bool = False) -> bytes:
        return b""

    async def close(self) -> None:
        pass


sizes = st.one_of(st.integers(0, 700), st.sampled_from([255, 256, 257, 512, 4096, 30000]))


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(AnswerStyle),
    st.sampled_from(Segmentation),
    sizes,
    st.one_of(st.integers(1, 700), st.sampled_from([240, 255, 256, 480, 20000, 65000])),
)
async def test_any_length_either_way(style: AnswerStyle, segmentation: Segmentation, out: int, size: int) -> None:
    answer = bytes(index % 251 for index in range(out))
    packet = bytes(index % 241 for index in range(size))
    port = EchoPort(style, answer)
    client = CardClient(port, segmentation=segmentation)
    assert await client.process_eap(packet, 0x3FAA2B6A) == answer
    assert await client.profile() == answer
    parameters = b"x" * size
    await client.load_identity("name", b"", parameters, ())
    received = [apdu.data for apdu in port.received]
    assert received[0] == packet + bytes.fromhex("3FAA2B6A")
    assert received[1] == b""
    assert [apdu.ins for apdu in port.received] == [0x80, 0x1A, 0xDA]  # each executed once, whatever was repeated
    assert parameters in received[2]


async def test_segments_are_small_and_flagged_as_the_draft_has_it() -> None:
    port = EchoPort(AnswerStyle.DRAFT, b"")
    sent: list[bytes] = []
    transmit = port.transmit

    async def spy(command: bytes) -> bytes:
        sent.append(command)
        return await transmit(command)

    port.transmit = spy  # type: ignore[method-assign]  # only watches
    client = CardClient(port, segmentation=Segmentation.DRAFT)
    await client.process_eap(bytes(600))
    assert [command[:5].hex() for command in sent] == ["a0800100f0", "a0800100f0", "a080000078"]
    sent.clear()
    await client.load_identity("n", b"", bytes(300), ())
    assert [command[:4].hex() for command in sent] == ["90da0000", "80da0000"]


def test_long_answers_as_the_trace_has_them() -> None:
    segments = Segments(AnswerStyle.DRAFT)
    assert segments.answer(CommandApdu(0xA0, 0x80, 0, 0, b"x"), bytes(600)) == ResponseApdu(sw=0x9F00)
    fetch = CommandApdu(0xA0, 0x12, 0, 0, le=256)
    assert segments.fetch(fetch) == ResponseApdu(bytes(256), 0x9F00)
    assert segments.fetch(fetch) == ResponseApdu(bytes(256), 0x9F58)
    assert segments.fetch(fetch) == ResponseApdu(sw=0x6C58)
    assert segments.fetch(CommandApdu(0xA0, 0x12, 0, 0, le=0x58)) == ResponseApdu(bytes(0x58), 0x9000)
    with pytest.raises(CommandRefusedError):
        segments.fetch(fetch)
    assert segments.answer(CommandApdu(0xA0, 0x80, 0, 0, b"x"), bytes(256)) == ResponseApdu(sw=0x6100)
    assert segments.answer(CommandApdu(0xA0, 0x80, 0, 0, b"x"), bytes(9)) == ResponseApdu(sw=0x6109)


def test_another_command_ends_an_unfinished_one() -> None:
    segments = Segments(AnswerStyle.DRAFT)
    assert segments.join(CommandApdu(0xA0, 0x80, 1, 0, b"lost")) is None
    assert segments.join(CommandApdu(0xA0, 0x19, 0, 0)) == CommandApdu(0xA0, 0x19, 0, 0)
    assert segments.join(CommandApdu(0xA0, 0x80, 0, 0, b"new")) == CommandApdu(0xA0, 0x80, 0, 0, b"new")


def test_an_endless_command_is_refused() -> None:
    segments = Segments(AnswerStyle.DRAFT)
    segment = CommandApdu(0x90, 0xDA, 0, 0, bytes(255))
    for _ in range(257):
        assert segments.join(segment) is None
    with pytest.raises(CommandRefusedError):
        segments.join(segment)


@given(
    st.sampled_from(AnswerStyle),
    st.lists(st.tuples(st.binary(min_size=4, max_size=20), st.integers(0, 600)), max_size=20),
)
def test_any_commands_give_answers_that_fit(style: AnswerStyle, steps: list[tuple[bytes, int]]) -> None:
    segments = Segments(style)
    for untrusted, size in steps:
        try:
            command = CommandApdu.decode(untrusted)
        except ApduFormatError:
            continue
        try:
            response = segments.fetch(command) if command.ins == 0x12 else segments.answer(command, bytes(size))
        except CommandRefusedError:
            continue
        assert len(response.data) <= (command.le or 256 if command.ins == 0x12 else command.le or 0)


async def test_a_card_that_promises_for_ever_is_left() -> None:
    class Endless:
        async def transmit(self, command: bytes) -> bytes:
            return b"\x61\x00"

        async def reset(self, *, cold: bool = False) -> bytes:
            return b""

        async def close(self) -> None:
            pass

    with pytest.raises(StatusError):
        await CardClient(Endless()).profile()
