"""Frames, items, TLS parameters, certificates, profiles: round trips, and any bytes."""

from __future__ import annotations

import contextlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.card.client import pad_pin
from secfunet.card.errors import CardFormatError
from secfunet.card.parameters import (
    NegotiatedTls,
    TlsParameters,
    decode_certificates,
    encode_certificates,
)
from secfunet.card.profile import CardProfile
from secfunet.card.tlv import decode_tlv, encode_tlv
from secfunet.card.vpcd import MAX_BODY, Control, FrameDecoder, encode_control, encode_frame

text = st.text(string.ascii_letters + string.digits + ".-/ ", max_size=255)
number = st.integers(0, 0xFFFF)
versions = st.lists(st.integers(0x0301, 0x0304), min_size=2, max_size=2).map(sorted)
der_like = st.binary(max_size=300).map(lambda value: b"\x30\x82" + len(value).to_bytes(2) + value)

parameters = st.builds(
    lambda role, name, alpn, low_high, suites, groups, resume, mtu, port, report: TlsParameters(
        role, name, tuple(alpn), low_high[0], low_high[1], tuple(suites), tuple(groups), resume, mtu, port, report
    ),
    st.sampled_from(["client", "server"]),
    text,
    st.lists(text.filter(bool), max_size=16),
    versions,
    st.lists(number, max_size=64),
    st.lists(number, max_size=16),
    st.booleans(),
    st.none() | st.integers(60, 0xFFFF),
    number,
    st.booleans(),
)
negotiated = st.builds(
    NegotiatedTls,
    number,
    number,
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    text,
    st.none() | st.integers(0, 2**32 - 1),
    st.none() | st.sampled_from([0, 512, 1024, 2048, 4096]),
)


@given(st.lists(st.binary(min_size=1, max_size=300), max_size=10), st.integers(1, 50))
def test_frames_survive_any_cutting(bodies: list[bytes], size: int) -> None:
    stream = b"".join(encode_frame(body) for body in bodies)
    decoder = FrameDecoder()
    assert [body for at in range(0, len(stream), size) for body in decoder.feed(stream[at : at + size])] == bodies


@given(st.lists(st.binary(max_size=100), max_size=20))
def test_any_stream_is_frames_or_the_error_and_bounded(chunks: list[bytes]) -> None:
    decoder = FrameDecoder()
    with contextlib.suppress(CardFormatError):
        for chunk in chunks:
            for body in decoder.feed(chunk):
                assert 0 < len(body) <= MAX_BODY


def test_frames_as_vpcd_has_them() -> None:
    assert encode_control(Control.GET_ATR) == b"\0\1\4"
    assert encode_frame(b"\x90\0") == b"\0\2\x90\0"
    for body in (b"", bytes(MAX_BODY + 1)):
        with pytest.raises(CardFormatError):
            encode_frame(body)
    with pytest.raises(CardFormatError):
        FrameDecoder().feed(b"\0\0")


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=100)), max_size=50))
def test_items_round_trip(items: list[tuple[int, bytes]]) -> None:
    assert decode_tlv(encode_tlv(items)) == items


@given(st.binary(max_size=200))
def test_any_bytes_are_items_or_the_error(untrusted: bytes) -> None:
    with contextlib.suppress(CardFormatError):
        assert encode_tlv(decode_tlv(untrusted)) == untrusted


def test_items_are_bounded() -> None:
    with pytest.raises(CardFormatError):
        decode_tlv(b"\1\0\0" * 257)


@given(parameters)
def test_parameters_round_trip(value: TlsParameters) -> None:
    assert TlsParameters.decode(value.encode()) == value


@given(negotiated)
def test_negotiated_round_trip(value: NegotiatedTls) -> None:
    assert NegotiatedTls.decode(value.encode()) == value


@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(st.tuples(st.integers(0, 9), st.binary(max_size=9)), max_size=9).map(encode_tlv),
    )
)
def test_any_bytes_are_parameters_or_the_error(untrusted: bytes) -> None:
    with contextlib.suppress(CardFormatError):
        value = TlsParameters.decode(untrusted)
        assert TlsParameters.decode(value.encode()) == value
    with contextlib.suppress(CardFormatError):
        outcome = NegotiatedTls.decode(untrusted)
        assert NegotiatedTls.decode(outcome.encode()) == outcome


def test_parameters_that_are_refused() -> None:
    good = TlsParameters().encode()
    for untrusted in (
        good + encode_tlv([(4, b"\3\3")]),  # repeated
        encode_tlv([(9, b"")]),  # unknown
        encode_tlv([(1, b"\2")]),
        encode_tlv([(7, b"\xff")]),
        encode_tlv([(4, b"\3\4"), (5, b"\3\3")]),
        encode_tlv([(2, "é".encode())]),
        encode_tlv([(3, b"")]),
        encode_tlv([(6, b"\0")]),
    ):
        with pytest.raises(CardFormatError):
            TlsParameters.decode(untrusted)
    assert TlsParameters.decode(b"") == TlsParameters()


@given(st.lists(st.binary(max_size=50), max_size=16))
def test_certificates_round_trip(chain: list[bytes]) -> None:
    assert decode_certificates(encode_certificates(tuple(chain))) == tuple(chain)


@given(st.binary(max_size=80))
def test_any_bytes_are_certificates_or_the_error(untrusted: bytes) -> None:
    with contextlib.suppress(CardFormatError):
        assert encode_certificates(decode_certificates(untrusted)) == untrusted


@given(st.binary(max_size=253), st.lists(der_like, max_size=3), st.lists(der_like, max_size=3))
def test_profile_round_trip(eap_id: bytes, certificates: list[bytes], authorities: list[bytes]) -> None:
    profile = CardProfile(eap_id, tuple(certificates), tuple(authorities))
    assert CardProfile.decode(profile.encode()) == profile


@given(st.binary(max_size=80))
def test_any_bytes_are_a_profile_or_the_error(untrusted: bytes) -> None:
    with contextlib.suppress(CardFormatError):
        CardProfile.decode(untrusted)


def test_profile_begins_as_the_draft_has_it() -> None:
    certificate = b"\x30\x82\x01\x00" + bytes(256)
    encoded = CardProfile(b"12345", (certificate,)).encode()
    assert encoded[:2] == b"\x30\x82"
    assert encoded[4:17] == bytes.fromhex("0405313233343502010D020101")
    # With the SSIDs of the draft's example, which a card of ours does not have:
    ssids = bytes.fromhex("A00E040561626364650405666768696A")
    fields = bytes.fromhex("0405313233343502010D020101") + b"\x30" + bytes((len(ssids),)) + ssids
    assert CardProfile.decode(b"\x30" + bytes((len(fields),)) + fields) == CardProfile(b"12345")


def test_pins_are_filled_up() -> None:
    assert pad_pin(b"0000") == bytes.fromhex("30303030FFFFFFFF")
    for pin in (b"", b"123", b"123456789", b"1234\xff"):
        with pytest.raises(CardFormatError):
            pad_pin(pin)
