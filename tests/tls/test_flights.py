"""Where flights end: what goes to the card, and what waits for the host."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.errors import PeerAlertError, TlsError, TlsProtocolError, UnsupportedSuiteError
from secfunet.tls.flights import FlightDetector
from secfunet.tls.handshake import HELLO_RETRY_RANDOM
from secfunet.tls.records import RecordBuffer, encode_record

CCS = encode_record(20, b"\x01")


def message(kind: int, body: bytes = b"body") -> bytes:
    return bytes((kind,)) + len(body).to_bytes(3, "big") + body


def server_hello(suite: int, *, tls13: bool = False, retry: bool = False) -> bytes:
    body = b"\x03\x03" + (HELLO_RETRY_RANDOM if retry else bytes(32)) + b"\x00" + suite.to_bytes(2, "big") + b"\x00"
    extensions = b"\x00\x2b\x00\x02\x03\x04" if tls13 else b""
    return message(2, body + len(extensions).to_bytes(2, "big") + extensions)


CLIENT_HELLO = message(1, b"\x03\x03" + bytes(32) + b"\x00" + b"\x00\x02\x13\x01" + b"\x01\x00" + b"\x00\x00")
HELLO12 = encode_record(22, server_hello(0xC02F))
HELLO13 = encode_record(22, server_hello(0x1301, tls13=True))
RETRY = encode_record(22, server_hello(0x1301, tls13=True, retry=True))


def encrypted(length: int) -> bytes:
    return encode_record(23, bytes(length))


FINISHED = encrypted(53)
VERIFY = encrypted(281)
CERTIFICATE = encrypted(900)
EXTENSIONS = encrypted(40)


def hs(*kinds: int) -> bytes:
    return b"".join(encode_record(22, message(kind)) for kind in kinds)


class Script:
    """A detector and its buffer."""

    def __init__(self, role: str) -> None:
        self.detector = FlightDetector(role)  # type: ignore[arg-type]
        self.buffer = RecordBuffer()

    def __call__(self, data: bytes = b"", *, at_eof: bool = False) -> bytes | None:
        self.buffer.feed(data)
        return self.detector.next_flight(self.buffer, at_eof=at_eof)


def test_a_servers_full_handshake_of_tls12() -> None:
    take = Script("client")
    first = HELLO12 + hs(11, 12, 13, 14)
    last = hs(4) + CCS + encode_record(22, bytes(40))
    assert take(first[:-1]) is None
    assert take(first[-1:] + last) == first
    assert not take.detector.is_certain
    assert take(b"") == last
    assert take.detector.is_certain
    take.buffer.feed(b"application data")
    assert len(take.buffer) == 16


def test_a_servers_resumed_handshake_of_tls12() -> None:
    take = Script("client")
    flight = HELLO12 + hs(4) + CCS + encode_record(22, bytes(40))
    assert take(flight) == flight
    assert take.detector.is_certain


def test_messages_in_one_record_and_over_several() -> None:
    take = Script("client")
    content = server_hello(0xC02F) + b"".join(message(kind) for kind in (11, 12, 13, 14))
    for size in (len(content), 7, 50):
        take = Script("client")
        flight = b"".join(encode_record(22, content[i : i + size]) for i in range(0, len(content), size))
        assert take(flight) == flight


def test_a_clients_handshake_of_tls12() -> None:
    take = Script("server")
    hello = encode_record(22, CLIENT_HELLO)
    assert take(hello) == hello
    with pytest.raises(TlsProtocolError):
        take(hello)  # before the answer
    take = Script("server")
    take(hello)
    take.detector.own_flight(HELLO12 + hs(11, 12, 13, 14))
    flight = hs(11, 16, 15) + CCS + encode_record(22, bytes(40))
    assert take(flight + b"\x17\x03\x03") == flight
    assert take.detector.is_certain
    assert len(take.buffer) == 3


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_encrypted_flight_is_one_question_when_its_lengths_tell(role: str) -> None:
    take = opened(role)
    flight = CCS + EXTENSIONS + encrypted(70) + CERTIFICATE + VERIFY + FINISHED
    assert take(flight + encrypted(300)) == flight
    take = opened(role)  # resumed
    assert take(EXTENSIONS + FINISHED + FINISHED) == EXTENSIONS + FINISHED


def opened(role: str) -> Script:
    take = Script(role)
    if role == "client":
        take.buffer.feed(HELLO13)
        assert take() is None
        take.detector._flight.clear()
    else:
        take(encode_record(22, CLIENT_HELLO))
        take.detector.own_flight(HELLO13)
    return take


@pytest.mark.parametrize("role", ["client", "server"])
def test_data_behind_a_joined_flight_is_never_given_to_the_card(role: str) -> None:
    # One record with certificate, verify and Finished; then data, once by chance as long as a Finished.
    for data in (FINISHED, VERIFY, encrypted(2000)):
        take = opened(role)
        assert take(CERTIFICATE + data + data) == CERTIFICATE
        assert len(take.buffer) == 2 * len(data)


def test_an_encrypted_alert_and_an_end_go_to_the_card() -> None:
    take = opened("server")
    assert take(encrypted(19)) == encrypted(19)
    take = opened("client")
    assert take(EXTENSIONS) is None
    assert take(b"", at_eof=True) == EXTENSIONS
    assert take(b"", at_eof=True) is None


def test_a_retry_request_is_a_flight_of_its_own_and_comes_once() -> None:
    take = Script("client")
    assert take(RETRY) == RETRY
    flight = CCS + HELLO13 + EXTENSIONS + FINISHED
    assert take(flight) == flight
    take = Script("client")
    take(RETRY)
    with pytest.raises(TlsProtocolError):
        take(RETRY)
    take = Script("server")
    hello = encode_record(22, CLIENT_HELLO)
    take(hello)
    take.detector.own_flight(RETRY)
    assert take(CCS + hello) == CCS + hello


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (encode_record(21, b"\x02\x28"), PeerAlertError),
        (encode_record(21, b"\x01\x00"), PeerAlertError),
        (encode_record(21, b"\x01\x70") * 5, TlsProtocolError),
        (encode_record(23, b"data"), TlsProtocolError),
        (CCS, TlsProtocolError),
        (hs(11), TlsProtocolError),
        (HELLO12 + hs(14, 14), None),
        (HELLO12 + encode_record(22, message(14) + message(11)), TlsProtocolError),
        (HELLO12 + hs(16), TlsProtocolError),
        (HELLO12 + encode_record(22, message(11)[:5]) + CCS, TlsProtocolError),
        (HELLO12 + encode_record(20, b"\x02"), TlsProtocolError),
        (HELLO12 + CCS + CCS, TlsProtocolError),
        (HELLO13 + hs(8), TlsProtocolError),
        (HELLO13 + encode_record(20, b"\x02") + FINISHED, TlsProtocolError),
        (encode_record(22, server_hello(0x1301, tls13=True) + message(8)), TlsProtocolError),
        (encode_record(22, server_hello(0x0005)), UnsupportedSuiteError),
        (encode_record(22, server_hello(0x1301)), UnsupportedSuiteError),
        (encode_record(22, server_hello(0xC02F).replace(b"\x03\x03", b"\x03\x01", 1)), TlsProtocolError),
        (HELLO12 + hs(11) * 1, None),
        (b"HTTP/1.1 400 Bad Request\r\n", TlsProtocolError),
    ],
)
def test_what_a_server_may_not_send(data: bytes, error: type[Exception] | None) -> None:
    def take_all() -> None:
        take = Script("client")
        take(data)
        take()

    if error is None:
        Script("client")(data)
        return
    with pytest.raises(error):
        take_all()


def test_a_flight_is_bounded() -> None:
    take = Script("client")
    take(HELLO12)

    def endless() -> None:
        for _ in range(20):
            take(encode_record(22, message(11, bytes(15000))))

    with pytest.raises(TlsProtocolError) as caught:
        endless()
    assert caught.value.alert is AlertDescription.RECORD_OVERFLOW


@settings(max_examples=200)
@given(st.sampled_from(["client", "server"]), st.lists(st.sampled_from(
    [HELLO12, HELLO13, RETRY, CCS, hs(11), hs(14), hs(16), FINISHED, VERIFY, encode_record(22, CLIENT_HELLO),
     encode_record(21, b"\x01\x70"), b"\x17", b"\x00", encode_record(22, b"\x0b\x00")]
), max_size=8))  # fmt: skip
def test_anything_is_a_flight_or_waits_or_is_an_error(role: str, pieces: list[bytes]) -> None:
    take = Script(role)
    given_out = b""
    try:
        for piece in pieces:
            given_out += take(piece) or b""
        given_out += take(at_eof=True) or b""
    except TlsError:
        return
    assert len(given_out) <= sum(map(len, pieces))
    assert b"".join(pieces).startswith(given_out) or encode_record(21, b"\x01\x70") in pieces
