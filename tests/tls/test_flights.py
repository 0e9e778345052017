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

    def __init__(self, role: str, *, reports: bool = True) -> None:
        self.detector = FlightDetector(role)  # type: ignore[arg-type]
        self.detector.reports_unused = reports
        self.buffer = RecordBuffer()

    def __call__(self, data: bytes = b"") -> bytes | None:
        self.buffer.feed(data)
        return self.detector.next_flight(self.buffer)


def test_a_servers_full_handshake_of_tls12() -> None:
    take = Script("client")
    first = HELLO12 + hs(11, 12, 13, 14)
    last = CCS + encode_record(22, bytes(40))
    assert take(first[:-1]) is None
    assert take(first[-1:] + last) == first
    assert not take.detector.is_encrypted
    data = encode_record(23, b"application data")
    assert take(data[:-1]) == last
    take.buffer.feed(data[-1:])
    take.detector.finish(take.buffer, 0)
    assert take.buffer.take(100).raw == data  # type: ignore[union-attr]  # it is whole


def test_a_servers_resumed_handshake_of_tls12() -> None:
    """The ServerHello repeats the session id of the ClientHello, and announces a ticket."""
    session, ticket = b"\x04same", b"\x00\x23\x00\x00"
    take = Script("client")
    offer = CLIENT_HELLO.replace(bytes(33), bytes(32) + session, 1)
    take.detector.own_flight(encode_record(22, offer[:3] + bytes((len(offer) - 4,)) + offer[4:]))
    hello = b"\x03\x03" + bytes(32) + session + b"\xc0\x2f\x00" + b"\x00\x04" + ticket
    flight = encode_record(22, message(2, hello)) + hs(4) + CCS + encode_record(22, bytes(40))
    assert take(flight) == flight
    assert take.detector.is_encrypted


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
    assert take.detector.is_encrypted
    take.detector.finish(take.buffer, 0)
    assert len(take.buffer) == 3


def opened(role: str, *, reports: bool = True) -> Script:
    """Behind a ServerHello of TLS 1.3; a client's card has it."""
    take = Script(role, reports=reports)
    if role == "client":
        assert take(HELLO13) == HELLO13
    else:
        take(encode_record(22, CLIENT_HELLO))
        take.detector.own_flight(HELLO13)
    return take


ROLES = pytest.mark.parametrize("role", ["client", "server"])


@ROLES
def test_the_card_gets_what_is_there_and_the_host_keeps_what_it_did_not_use(role: str) -> None:
    take = opened(role)
    flight = CCS + EXTENSIONS + encrypted(70) + CERTIFICATE + VERIFY + FINISHED
    data = encrypted(36) + VERIFY + FINISHED
    assert take(flight + data + data[:7]) == flight + data
    take.buffer.feed(data[7:])
    take.detector.finish(take.buffer, len(data))
    assert bytes(take.buffer.view[take.buffer.start : take.buffer.end]) == data + data


@ROLES
def test_what_the_card_used_is_not_given_again(role: str) -> None:
    take = opened(role)
    assert take(EXTENSIONS + CERTIFICATE) == EXTENSIONS + CERTIFICATE
    assert take() is None  # asked for more
    assert take(FINISHED + VERIFY) == FINISHED + VERIFY
    take.detector.finish(take.buffer, len(VERIFY))
    assert len(take.buffer) == len(VERIFY)


@ROLES
def test_what_comes_before_the_card_is_asked_goes_with_it(role: str) -> None:
    take = opened(role)
    assert take(EXTENSIONS) == EXTENSIONS
    take.buffer.feed(FINISHED + VERIFY[:9])
    assert take.detector.gather(take.buffer) == EXTENSIONS + FINISHED
    assert take(VERIFY[9:]) == VERIFY


@ROLES
@pytest.mark.parametrize("unused", [1, 17, len(FINISHED) - 1, len(FINISHED) + 1, len(VERIFY) + len(FINISHED), 1 << 20])
def test_a_card_that_used_more_or_less_than_records_lies(role: str, unused: int) -> None:
    take = opened(role)
    take(VERIFY + FINISHED)
    with pytest.raises(TlsError, match="did not use"):
        take.detector.finish(take.buffer, unused)


@ROLES
def test_a_card_that_does_not_report_gets_record_by_record(role: str) -> None:
    take = opened(role, reports=False)
    take.buffer.feed(CCS + EXTENSIONS + encrypted(17) + FINISHED + VERIFY)
    assert [take() for _ in range(5)] == [CCS + EXTENSIONS, encrypted(17), FINISHED, VERIFY, None]


@ROLES
def test_a_record_in_clear_or_none_at_all_is_the_cards_to_refuse(role: str) -> None:
    for broken in (hs(8), encode_record(20, b"\x02"), encode_record(21, b"\x02"), encrypted(3)):
        take = opened(role)
        assert take(broken) == broken
    for broken in (b"HTTP/1.1", b"\x17\x03\x03\xff\xff", b"\x99\x03\x03\x00\x01a"):
        take = opened(role)
        assert take(EXTENSIONS + broken) == EXTENSIONS
        assert take() == broken
        with pytest.raises(TlsProtocolError):
            take()  # a card that made nothing of it


@ROLES
def test_an_alert_in_clear_comes_first_or_is_the_cards(role: str) -> None:
    alert = encode_record(21, b"\x02\x28")
    with pytest.raises(PeerAlertError, match="handshake_failure"):
        Script.__call__(opened(role), CCS + alert)
    assert opened(role)(EXTENSIONS + alert) == EXTENSIONS + alert


@ROLES
def test_data_behind_the_finished_does_not_make_a_flight_too_long(role: str) -> None:
    take = opened(role)
    given = take(FINISHED + encrypted(16000) * 15)
    assert given is not None
    assert len(given) < 1 << 17
    take.detector.finish(take.buffer, len(given) - len(FINISHED))
    assert len(take.buffer) == 15 * len(encrypted(16000))


@ROLES
def test_an_encrypted_flight_is_bounded_and_questions_grow(role: str) -> None:
    take = opened(role)
    questions = 0

    def endless() -> None:
        nonlocal questions
        more = b""
        while True:
            more = more or encrypted(18) * 1000
            while fed := take.buffer.feed(more):
                more = more[fed:] or encrypted(18) * 1000
            given = take()
            assert given is not None
            assert len(given) <= 1 << 17
            questions += 1

    with pytest.raises(TlsProtocolError) as caught:
        endless()
    assert caught.value.alert is AlertDescription.RECORD_OVERFLOW
    assert questions < 50


@ROLES
def test_change_cipher_specs_alone_are_no_question(role: str) -> None:
    take = opened(role)
    assert take(CCS * 3) is None
    assert not take.detector.seems_whole(take.buffer)
    assert take(FINISHED) == CCS * 3 + FINISHED
    assert take.detector.seems_whole(take.buffer)


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
        (HELLO12 + hs(14), TlsProtocolError),
        (HELLO12 + hs(11, 12, 12), TlsProtocolError),
        (HELLO12 + CCS, TlsProtocolError),
        (HELLO12 + encode_record(22, message(14) + message(11)), TlsProtocolError),
        (HELLO12 + hs(16), TlsProtocolError),
        (HELLO12 + encode_record(22, message(11)[:5]) + CCS, TlsProtocolError),
        (HELLO12 + encode_record(20, b"\x02"), TlsProtocolError),
        (HELLO12 + CCS + CCS, TlsProtocolError),
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
        certificate = message(11, bytes(131000))
        for index in range(0, len(certificate), 100):
            take(encode_record(22, certificate[index : index + 100]))

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
    except TlsError:
        return
    assert len(given_out) <= sum(map(len, pieces))
    assert b"".join(pieces).startswith(given_out) or encode_record(21, b"\x01\x70") in pieces
