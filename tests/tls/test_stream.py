"""Connections after the handshake: two streams in memory, and a peer that misbehaves."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.tls.alerts import Alert, AlertDescription
from secfunet.tls.cipher_suites import SUITES, Cipher
from secfunet.tls.errors import (
    BadRecordMacError,
    KeyUsageLimitError,
    PeerAlertError,
    TlsError,
    TlsProtocolError,
    TruncatedStreamError,
)
from secfunet.tls.protection import MAX_EXPANSION
from secfunet.tls.records import ContentType
from secfunet.tls.stream import GCM_RECORD_LIMIT, HandOver, ProtectedStream

TLS13, TLS12, CBC = 0x1301, 0xC02F, 0xC013


def pair(number: int, *, record_limit: int | None = None, etm: bool = False) -> tuple[ProtectedStream, ProtectedStream]:
    suite = SUITES[number]
    length = 2 * suite.hash_length if suite.version == 0x0304 else suite.key_block_length
    first = 0 if suite.version == 0x0304 else 1
    hand_over = HandOver(suite, os.urandom(length), first, first, etm)
    return (
        ProtectedStream("client", hand_over, record_limit=record_limit),
        ProtectedStream("server", hand_over, record_limit=record_limit),
    )


def raw(stream: ProtectedStream, kind: int, content: bytes) -> bytes:
    """A record that the stream itself would never send."""
    out = bytearray(len(content) + MAX_EXPANSION)
    with memoryview(out) as view:
        length = stream._sealer.seal_into(kind, content, view)
    return bytes(out[:length])


def feed(stream: ProtectedStream, data: bytes | bytearray) -> bytes:
    got = bytearray()
    rest = memoryview(data)
    while True:
        rest = rest[stream.incoming.feed(rest) :]
        while piece := stream.receive():
            got += piece
        if not rest or stream.is_read_closed:
            return bytes(got)


@pytest.mark.parametrize("number", SUITES, ids=lambda number: SUITES[number].name)
def test_data_both_ways(number: int) -> None:
    for etm in (False, True) if SUITES[number].cipher is Cipher.AES_CBC else (False,):
        client, server = pair(number, etm=etm)
        for length in (1, 100, 1 << 14, (1 << 14) + 1, 100_000):
            data = os.urandom(length)
            assert feed(server, client.seal(data)) == data
            assert feed(client, server.seal(data)) == data
        client.close_notify()
        feed(server, client.take_output())
        assert server.is_read_closed
        server.receive_eof()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([TLS13, 0x1303, TLS12, 0xCCA8, CBC]), st.data())
def test_any_order_of_acts_in_any_chunks(number: int, data: st.DataObject) -> None:
    ends = pair(
        number, record_limit=data.draw(st.sampled_from([None, 2, 5])) if SUITES[number].version == 0x0304 else None
    )
    wires = [bytearray(), bytearray()]
    sent: list[bytearray] = [bytearray(), bytearray()]
    got: list[bytearray] = [bytearray(), bytearray()]
    acts = st.sampled_from(["send", "send", "deliver", "deliver", "update"])
    for _ in range(data.draw(st.integers(1, 40))):
        me = data.draw(st.integers(0, 1))
        act = data.draw(acts)
        if act == "send":
            content = data.draw(st.binary(min_size=1, max_size=200)) * data.draw(st.sampled_from([1, 1, 200]))
            wires[me] += ends[me].seal(content)
            sent[me] += content
        elif act == "update" and ends[me].is_tls13:
            ends[me].update_key(request_peer=data.draw(st.booleans()))
            wires[me] += ends[me].take_output()
        else:
            size = data.draw(st.integers(0, len(wires[me])))
            piece = bytes(wires[me][:size])
            del wires[me][:size]
            got[1 - me] += feed(ends[1 - me], piece)
    for me in (0, 1):
        ends[me].close_notify()
        wires[me] += ends[me].take_output()
        got[1 - me] += feed(ends[1 - me], wires[me])
        assert got[1 - me] == sent[me]
        assert ends[1 - me].is_read_closed


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([TLS13, TLS12, CBC]), st.binary(min_size=1, max_size=300))
def test_any_bytes_are_waited_for_or_refused(number: int, untrusted: bytes) -> None:
    client, _ = pair(number)
    try:
        assert feed(client, untrusted) == b""
    except TlsProtocolError:
        with pytest.raises(TlsProtocolError):
            client.receive()


def test_data_before_an_error_is_delivered_first() -> None:
    client, server = pair(TLS13)
    client.incoming.feed(server.seal(b"before") + b"\x17\x03\x03\x00\x20" + bytes(32))
    assert client.receive() == b"before"
    for _ in range(2):
        with pytest.raises(BadRecordMacError):
            client.receive()
    client.fatal_alert(AlertDescription.BAD_RECORD_MAC)
    with pytest.raises(PeerAlertError) as caught:
        feed(server, client.take_output())
    assert caught.value.description is AlertDescription.BAD_RECORD_MAC


@pytest.mark.parametrize("number", [TLS13, TLS12, CBC])
def test_truncation_is_an_error_and_close_notify_is_not(number: int) -> None:
    client, server = pair(number)
    feed(client, server.seal(b"half"))
    with pytest.raises(TruncatedStreamError):
        client.receive_eof()
    server.close_notify()
    server.close_notify()
    with pytest.raises(TlsError):
        server.seal(b"late")
    feed(client, server.take_output() + b"whatever comes behind is ignored")
    client.receive_eof()


def test_key_updates_by_limit() -> None:
    client, server = pair(TLS13, record_limit=3)
    data = os.urandom(20 << 14)
    assert feed(server, client.seal(data)) == data
    # 20 records of data and the KeyUpdates themselves: a key protects three records, then its own end.
    assert client.key_updates_sent == server.key_updates_received == 6
    assert server.key_updates_sent == 0
    aes = pair(TLS13)[0]
    aes._sealer.sequence = GCM_RECORD_LIMIT - 1
    aes.seal(b"the last")
    assert aes.key_updates_sent == 0
    aes.seal(b"the next")
    assert aes.key_updates_sent == 1
    old, _ = pair(TLS12, record_limit=3)
    old.seal(bytes(2 << 14))
    with pytest.raises(KeyUsageLimitError):
        old.seal(b"x")


def test_many_requests_get_one_answer() -> None:
    client, server = pair(TLS13)
    for _ in range(5):
        server.update_key(request_peer=True)
    feed(client, server.take_output())
    assert client.has_output
    assert feed(server, client.seal(b"answered")) == b"answered"
    assert (client.key_updates_sent, server.key_updates_received) == (1, 1)


def test_floods_are_bounded() -> None:
    def endless(make):
        client, server = pair(TLS13)
        feed(client, b"".join(make(server) for _ in range(32)))
        feed(client, server.seal(b"data in between"))
        feed(client, b"".join(make(server) for _ in range(32)))
        with pytest.raises(TlsProtocolError):
            feed(client, make(server))

    def update(server: ProtectedStream) -> bytes:
        server.update_key(request_peer=False)
        return bytes(server.take_output())

    endless(lambda server: raw(server, ContentType.APPLICATION_DATA, b""))
    endless(update)
    client, server = pair(TLS12)
    warning = Alert.warning(AlertDescription.UNRECOGNIZED_NAME).encode()
    feed(client, b"".join(raw(server, ContentType.ALERT, warning) for _ in range(4)))
    with pytest.raises(TlsProtocolError):
        feed(client, raw(server, ContentType.ALERT, warning))


def test_any_number_of_tickets_may_come_and_few_are_kept_for_the_card() -> None:
    """RFC 8446 sets no number: dropping one costs nothing."""
    client, server = pair(TLS13)
    ticket = b"\x04\x00\x03\xe8" + bytes(1000)
    for _ in range(500):
        assert feed(client, raw(server, ContentType.HANDSHAKE, ticket)) == b""
    assert feed(client, server.seal(b"at last")) == b"at last"
    kept = client.take_tickets()
    assert 4 * 1026 < len(kept) <= 1 << 15
    assert len(kept) % 1026 == 0, "whole records, from the first on"


@pytest.mark.parametrize(
    ("kind", "content", "alert"),
    [
        (22, b"\x18\x00\x00\x01\x02", AlertDescription.ILLEGAL_PARAMETER),
        (22, b"\x18\x00\x00\x02\x00\x00", AlertDescription.DECODE_ERROR),
        (22, b"\x18\x00\x00\x01\x00\x04", AlertDescription.UNEXPECTED_MESSAGE),  # the next message under the old key
        (22, b"\x18\x00\x00\x01\x00\x18\x00\x00\x01\x00", AlertDescription.UNEXPECTED_MESSAGE),
        (22, b"\x0d\x00\x00\x00", AlertDescription.UNEXPECTED_MESSAGE),  # CertificateRequest: never offered
        (22, b"\x14\x00\x00\x00", AlertDescription.UNEXPECTED_MESSAGE),
        (22, b"\x04\x01\x00\x01", AlertDescription.DECODE_ERROR),
        (22, b"", AlertDescription.UNEXPECTED_MESSAGE),
        (20, b"\x01", AlertDescription.UNEXPECTED_MESSAGE),
        (21, b"\x02", AlertDescription.DECODE_ERROR),
        (21, b"", AlertDescription.UNEXPECTED_MESSAGE),
        (99, b"x", AlertDescription.UNEXPECTED_MESSAGE),
    ],
)
def test_what_a_tls13_peer_may_not_send(kind: int, content: bytes, alert: AlertDescription) -> None:
    client, server = pair(TLS13)
    with pytest.raises(TlsProtocolError) as caught:
        feed(client, raw(server, kind, content))
    assert caught.value.alert is alert


def test_messages_and_data_do_not_mix() -> None:
    for between in (raw_data, raw_alert):
        client, server = pair(TLS13)
        feed(client, raw(server, 22, b"\x04\x00\x00\x02\x00"))
        with pytest.raises(TlsProtocolError):
            feed(client, between(server))


def raw_data(server: ProtectedStream) -> bytes:
    return raw(server, 23, b"data")


def raw_alert(server: ProtectedStream) -> bytes:
    return raw(server, 21, b"\x01\x00")


def test_a_server_takes_no_tickets_and_a_record_in_clear_is_refused() -> None:
    client, server = pair(TLS13)
    with pytest.raises(TlsProtocolError):
        feed(server, raw(client, 22, b"\x04\x00\x00\x01\x00"))
    client, server = pair(TLS13)
    with pytest.raises(TlsProtocolError):
        feed(server, b"\x15\x03\x03\x00\x02\x02\x28")


def test_alerts_of_tls13_are_fatal_whatever_their_level() -> None:
    client, server = pair(TLS13)
    assert feed(client, raw(server, 21, Alert.warning(AlertDescription.USER_CANCELED).encode())) == b""
    with pytest.raises(PeerAlertError) as caught:
        feed(client, raw(server, 21, Alert.warning(AlertDescription.CERTIFICATE_EXPIRED).encode()))
    assert caught.value.description is AlertDescription.CERTIFICATE_EXPIRED
    client, server = pair(TLS12)
    with pytest.raises(PeerAlertError, match="alert 200"):
        feed(client, raw(server, 21, b"\x02\xc8"))


def test_renegotiation_is_refused_politely_and_a_few_times_only() -> None:
    client, server = pair(TLS12)
    for _ in range(4):
        feed(client, raw(server, 22, b"\x00\x00\x00\x00"))
        answer = client.take_output()
        server.incoming.feed(answer)
        server.receive()
    assert feed(client, server.seal(b"goes on")) == b"goes on"
    assert feed(server, client.seal(b"this way, too")) == b"this way, too"
    for _ in range(4):
        feed(server, raw(client, 22, b"\x01\x00\x00\x00"))
    with pytest.raises(TlsProtocolError):
        feed(server, raw(client, 22, b"\x01\x00\x00\x00"))


def test_only_the_first_tickets_are_for_the_card() -> None:
    client, server = pair(TLS13)
    first, second = (raw(server, 22, bytes((4, 0, 0, 1, index))) for index in (1, 2))
    feed(client, first + second)
    assert client.take_tickets() == first + second
    feed(client, server.seal(b"data") + raw(server, 22, b"\x04\x00\x00\x01\x03"))
    assert client.take_tickets() == b""
    # A ticket in two records, or behind a key change, is none of the card's.
    client, server = pair(TLS13)
    server.update_key(request_peer=False)
    feed(client, server.take_output() + raw(server, 22, b"\x04\x00\x00\x01\x03"))
    assert client.take_tickets() == b""


def test_keys_do_not_show() -> None:
    hand_over = HandOver(SUITES[TLS13], b"Sesame" * 10 + b"Open", 0, 0)
    stream = ProtectedStream("client", hand_over)
    for thing in (hand_over, stream, stream._write_keys, stream._sealer):
        assert "Sesame" not in repr(thing)
