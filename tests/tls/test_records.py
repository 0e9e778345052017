"""Records, alerts and handshake messages: round trips, bounds, and any bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.tls.alerts import Alert, AlertDescription
from secfunet.tls.errors import RecordError, TlsProtocolError
from secfunet.tls.handshake import (
    MAX_MESSAGE,
    HandshakeReader,
    check_client_hello,
    parse_server_hello,
)
from secfunet.tls.records import (
    MAX_CIPHERTEXT_TLS12,
    MAX_CIPHERTEXT_TLS13,
    ContentType,
    Record,
    RecordBuffer,
    encode_record,
    parse_alert,
    split_records,
)

records = st.lists(
    st.tuples(st.sampled_from([int(kind) for kind in ContentType]), st.binary(max_size=600)), min_size=1, max_size=12
)


def drain(buffer: RecordBuffer) -> list[Record]:
    got = []
    while (record := buffer.take(MAX_CIPHERTEXT_TLS12)) is not None:
        got.append(record)
    return got


@given(records, st.data())
def test_records_survive_any_chunking(contents: list[tuple[int, bytes]], data: st.DataObject) -> None:
    wire = b"".join(encode_record(*content) for content in contents)
    assert [(record.kind, record.fragment) for record in split_records(wire)] == contents
    buffer = RecordBuffer()
    got, offset = [], 0
    while offset < len(wire):
        size = data.draw(st.integers(1, max(1, len(wire) - offset)))
        assert buffer.feed(wire[offset : offset + size]) == size
        offset += size
        got += drain(buffer)
    assert [(record.kind, record.fragment) for record in got] == contents
    assert len(buffer) == 0


def test_the_buffer_is_bounded_and_moves_what_is_left() -> None:
    buffer = RecordBuffer(capacity=1)
    record = encode_record(23, bytes(16000))
    for _ in range(50):
        assert buffer.feed(record) == len(record)
        assert buffer.feed(record[:100]) == 100
        assert buffer.take(MAX_CIPHERTEXT_TLS12) is not None
        assert buffer.feed(record[100:]) == len(record) - 100
        assert drain(buffer)[0].raw == record
    while buffer.feed(record):
        pass
    assert len(buffer) == buffer.capacity


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_an_error(untrusted: bytes) -> None:
    with contextlib.suppress(RecordError):
        assert b"".join(record.raw for record in split_records(untrusted)) == untrusted
    buffer = RecordBuffer()
    buffer.feed(untrusted)
    with contextlib.suppress(RecordError):
        rest = drain(buffer)
        assert sum(len(record.raw) for record in rest) + len(buffer) == len(untrusted)


@pytest.mark.parametrize(
    ("header", "limit", "alert"),
    [
        (b"\x18\x03\x03\x00\x01", MAX_CIPHERTEXT_TLS13, AlertDescription.UNEXPECTED_MESSAGE),
        (b"\x17\x02\x03\x00\x01", MAX_CIPHERTEXT_TLS13, AlertDescription.PROTOCOL_VERSION),
        (b"\x17\x03\x03\x41\x01", MAX_CIPHERTEXT_TLS13, AlertDescription.RECORD_OVERFLOW),
        (b"\x17\x03\x03\x48\x01", MAX_CIPHERTEXT_TLS12, AlertDescription.RECORD_OVERFLOW),
    ],
)
def test_a_bad_header_is_refused_before_the_rest_is_there(header: bytes, limit: int, alert: AlertDescription) -> None:
    buffer = RecordBuffer()
    buffer.feed(header)
    with pytest.raises(RecordError) as caught:
        buffer.peek(limit)
    assert caught.value.alert is alert


@given(st.integers(1, 2), st.integers(0, 255))
def test_alerts_survive(level: int, description: int) -> None:
    alert = Alert(level, description)
    assert parse_alert(alert.encode(), is_tls13=False) == alert
    assert AlertDescription.name_of(description)


@given(st.binary(max_size=5))
def test_any_bytes_are_an_alert_or_an_error(untrusted: bytes) -> None:
    for is_tls13 in (False, True):
        try:
            assert parse_alert(untrusted, is_tls13=is_tls13).encode()[is_tls13:] == untrusted[is_tls13:]
        except TlsProtocolError as error:
            expected = AlertDescription.DECODE_ERROR if untrusted else AlertDescription.UNEXPECTED_MESSAGE
            if len(untrusted) == 2:
                assert not is_tls13
                expected = AlertDescription.ILLEGAL_PARAMETER
            assert error.alert is expected  # noqa: PT017


def test_the_level_of_an_alert_of_tls13_says_nothing() -> None:
    """RFC 8446, 6: what the description says holds."""
    for level in (0, 1, 2, 3, 255):
        assert not parse_alert(bytes((level, 0))).is_fatal
        assert not parse_alert(bytes((level, AlertDescription.USER_CANCELED))).is_fatal
        assert parse_alert(bytes((level, AlertDescription.BAD_RECORD_MAC))).is_fatal
        assert parse_alert(bytes((level, 250))).is_fatal, "one that nobody knows"


@given(st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), min_size=1, max_size=8), st.data())
def test_handshake_messages_survive_any_fragmentation(messages: list[tuple[int, bytes]], data: st.DataObject) -> None:
    wire = b"".join(bytes((kind,)) + len(body).to_bytes(3, "big") + body for kind, body in messages)
    reader = HandshakeReader()
    got, offset = [], 0
    while offset < len(wire):
        size = data.draw(st.integers(1, len(wire) - offset))
        got += reader.feed(wire[offset : offset + size])
        offset += size
    assert got == messages
    assert reader.is_between_messages


def test_handshake_messages_are_bounded_and_never_empty() -> None:
    with pytest.raises(TlsProtocolError):
        HandshakeReader().feed(b"\x0b" + (MAX_MESSAGE + 1).to_bytes(3, "big"))
    with pytest.raises(TlsProtocolError) as caught:
        HandshakeReader().feed(b"")
    assert caught.value.alert is AlertDescription.UNEXPECTED_MESSAGE


@settings(max_examples=300)
@given(st.binary(max_size=120))
def test_any_bytes_are_a_hello_or_an_error(untrusted: bytes) -> None:
    for parse in (parse_server_hello, check_client_hello):
        try:
            parse(untrusted)
        except TlsProtocolError as error:
            assert error.alert in (AlertDescription.DECODE_ERROR, AlertDescription.ILLEGAL_PARAMETER)  # noqa: PT017


def client_hello(*, compression: bytes = b"\x00", extensions: bytes = b"") -> bytes:
    body = b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + bytes((len(compression),)) + compression
    return body + len(extensions).to_bytes(2, "big") + extensions


def test_compression_is_refused_and_early_data_is_noted() -> None:
    assert not check_client_hello(client_hello()).announces_early_data
    assert check_client_hello(client_hello(extensions=b"\x00\x2a\x00\x00")).announces_early_data
    with pytest.raises(TlsProtocolError) as caught:
        check_client_hello(client_hello(compression=b"\x01"))
    assert caught.value.alert is AlertDescription.ILLEGAL_PARAMETER
    hello = b"\x03\x03" + bytes(32) + b"\x00" + b"\xc0\x2f"
    assert parse_server_hello(hello + b"\x00").suite == 0xC02F
    with pytest.raises(TlsProtocolError) as caught:
        parse_server_hello(hello + b"\x01")
    assert caught.value.alert is AlertDescription.ILLEGAL_PARAMETER
