"""What comes from the other process, from settings and from command lines: a value, or the documented error."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.card.errors import CardFormatError, CardGoneError
from secfunet.card.pcsc import connect_pcsc
from secfunet.card.place import PcscPlace, parse_place
from secfunet.pcsc.frames import (
    MAX_BODY,
    Frame,
    FrameDecoder,
    FrameError,
    Kind,
    ReaderSeen,
    choose_reader,
    decode_readers,
    encode_readers,
)
from secfunet.pcsc.reader import ReaderGoneError, for_t0

FRAMES = st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=300))
NAMES = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1, max_size=30)
READERS = st.builds(ReaderSeen, NAMES, st.booleans(), st.booleans(), st.binary(max_size=33))


async def test_without_pyscard_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra: a program without it says so, and works with all other cards."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CardGoneError, match=r"secfunet\[pcsc\]"):
        await connect_pcsc("Any", Path("/nowhere.comm"), timeout=1)


@given(st.lists(FRAMES, max_size=6), st.integers(1, 40))
def test_frames_come_through_in_whatever_pieces(frames: list[Frame], piece: int) -> None:
    stream = b"".join(frame.encode() for frame in frames)
    decoder = FrameDecoder()
    got = []
    for begin in range(0, len(stream), piece):
        got += decoder.feed(stream[begin : begin + piece])
    assert got == frames


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_any_bytes_are_frames_or_refused(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    for piece in pieces:
        try:
            frames = decoder.feed(piece)
        except FrameError:
            return
        assert all(isinstance(frame.kind, Kind) for frame in frames)


@pytest.mark.parametrize("start", ["00000000", "00020002", "FFFFFFFF", "0000000163"])
def test_a_frame_that_cannot_be_is_refused_at_its_head(start: str) -> None:
    with pytest.raises(FrameError):
        FrameDecoder().feed(bytes.fromhex(start))


def test_a_body_has_a_bound() -> None:
    whole = Frame(Kind.TRANSMIT, bytes(MAX_BODY))
    assert FrameDecoder().feed(whole.encode()) == [whole]
    with pytest.raises(FrameError):
        Frame(Kind.TRANSMIT, bytes(MAX_BODY + 1)).encode()


@given(st.lists(READERS, max_size=16).map(tuple))
def test_readers_come_through(readers: tuple[ReaderSeen, ...]) -> None:
    assert decode_readers(encode_readers(readers)) == readers


@given(st.one_of(st.binary(max_size=64), st.from_regex(r'\[\{"name": ?("x"|1|null)(, "card": 1)?\}\]').map(str.encode)))
def test_any_bytes_are_readers_or_refused(untrusted: bytes) -> None:
    with contextlib.suppress(FrameError):
        assert isinstance(decode_readers(untrusted), tuple)


def test_a_deep_list_is_refused() -> None:
    with pytest.raises(FrameError):
        decode_readers(b"[" * 100_000)


@given(st.text(max_size=200))
def test_any_text_is_a_place_or_refused(text: str) -> None:
    try:
        place = parse_place(text)
    except CardFormatError:
        return
    assert isinstance(place, Path | PcscPlace)


@given(
    NAMES.filter(lambda name: "@/" not in name and name.isprintable()), st.sampled_from([None, Path("/run/x y.comm")])
)
def test_a_place_is_read_as_it_is_shown(reader: str, daemon: Path | None) -> None:
    place = PcscPlace(reader, daemon)
    assert parse_place(str(place)) == place


@pytest.mark.parametrize("text", ["", "pcsc:", "pcsc:@/x", "pcsc:a\nb", "a\0b", "pcsc:" + "x" * 128])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(CardFormatError):
        parse_place(text)


TWO = ("ACS ACR39U 00 00", "ACS ACR39U 01 00", "Yubico 00 00")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("ACS ACR39U 01 00", "ACS ACR39U 01 00"),
        ("Yubico", "Yubico 00 00"),
        ("ACS ACR39U", None),  # which of the two?
        ("ACS", None),
        ("", None),
    ],
)
def test_a_reader_is_meant_by_its_name_or_by_what_is_before_its_numbers(wanted: str, found: str | None) -> None:
    assert choose_reader(wanted, TWO) == found


@pytest.mark.parametrize(
    ("command", "sent"),
    [
        ("00A40400", "00A40400"),
        ("00B0000000", "00B0000000"),  # case 2: P3 is Le
        ("00A4040002 3F00", "00A4040002 3F00"),
        ("00A4040002 3F00 00", "00A4040002 3F00"),  # case 4: T=0 has no place for Le
    ],
)
def test_commands_for_t0(command: str, sent: str) -> None:
    assert for_t0(bytes.fromhex(command)) == bytes.fromhex(sent)


def test_t0_has_no_extended_apdus() -> None:
    with pytest.raises(ReaderGoneError, match="draft"):
        for_t0(bytes.fromhex("00A40400 00 0002 3F00 0000"))
