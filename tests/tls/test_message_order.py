"""TLS 1.2 in clear: what OpenSSL accepts is accepted, and what cannot come next is refused at once, without the card."""

from __future__ import annotations

import itertools

import pytest

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.errors import TlsProtocolError
from secfunet.tls.handshake import HandshakeType as H
from secfunet.tls.handshake import ServerHello
from secfunet.tls.message_order import CHANGE_CIPHER_SPEC as CCS
from secfunet.tls.message_order import MessageOrder
from tests.tls.test_flights import CLIENT_HELLO, HELLO12, Script, encode_record, hs, message

ALL = (
    *(H.CERTIFICATE, H.CERTIFICATE_STATUS, H.SERVER_KEY_EXCHANGE, H.CERTIFICATE_REQUEST, H.SERVER_HELLO_DONE),
    *(H.NEW_SESSION_TICKET, H.CLIENT_KEY_EXCHANGE, H.CERTIFICATE_VERIFY, CCS, H.FINISHED, H.SERVER_HELLO),
)


def hello(*, ticket: bool = False, status: bool = False) -> ServerHello:
    return ServerHello(0x0303, 0xC02F, is_retry=False, announces_ticket=ticket, announces_status=status)


def accepted(order: MessageOrder, messages: tuple[int, ...], body: bytes = b"body") -> bool:
    try:
        for each in messages:
            order.take(each, body)
    except TlsProtocolError as error:
        assert error.alert is AlertDescription.UNEXPECTED_MESSAGE  # noqa: PT017
        return False
    return True


def server(**more: bool) -> MessageOrder:
    has_key_exchange = more.pop("has_key_exchange", True)
    may_resume = more.pop("may_resume", False)
    return MessageOrder.of_server(hello(**more), has_key_exchange=has_key_exchange, may_resume=may_resume)


SERVERS = {
    "plain": ({}, [H.CERTIFICATE, H.SERVER_KEY_EXCHANGE, H.SERVER_HELLO_DONE, CCS]),
    "asks": ({}, [H.CERTIFICATE, H.SERVER_KEY_EXCHANGE, H.CERTIFICATE_REQUEST, H.SERVER_HELLO_DONE, CCS]),
    "RSA": ({"has_key_exchange": False}, [H.CERTIFICATE, H.CERTIFICATE_REQUEST, H.SERVER_HELLO_DONE, CCS]),
    "ticket": (
        {"ticket": True},
        [H.CERTIFICATE, H.SERVER_KEY_EXCHANGE, H.SERVER_HELLO_DONE, H.NEW_SESSION_TICKET, CCS],
    ),
    "status": (
        {"status": True},
        [H.CERTIFICATE, H.CERTIFICATE_STATUS, H.SERVER_KEY_EXCHANGE, H.SERVER_HELLO_DONE, CCS],
    ),
    "resumed": ({"may_resume": True}, [CCS]),
    "resumed with a ticket": ({"may_resume": True, "ticket": True}, [H.NEW_SESSION_TICKET, CCS]),
    "full, but repeats the session id": (
        {"may_resume": True},
        [H.CERTIFICATE, H.SERVER_KEY_EXCHANGE, H.SERVER_HELLO_DONE, CCS],
    ),
}
OPTIONAL = {H.CERTIFICATE_REQUEST, H.CERTIFICATE_STATUS}


@pytest.mark.parametrize("which", SERVERS)
def test_the_orders_of_a_server(which: str) -> None:
    facts, good = SERVERS[which]
    assert accepted(server(**facts), tuple(good))
    for index in range(len(good) + 1):
        start = tuple(good[:index])
        rest = good[index:]
        # What may come instead of the next message: an optional one before it, or what follows an optional one.
        allowed = {rest[0]} if rest else set()
        if rest and rest[0] in OPTIONAL:
            allowed.add(rest[1])
        if rest and rest[0] == H.SERVER_HELLO_DONE and (not start or start[-1] != H.CERTIFICATE_REQUEST):
            allowed.add(H.CERTIFICATE_REQUEST)
        if facts.get("may_resume") and not start:
            allowed |= {H.CERTIFICATE, H.NEW_SESSION_TICKET if facts.get("ticket") else CCS}
        for each in ALL:
            assert accepted(server(**facts), (*start, each)) == (each in allowed), (start, each)


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ({H.SERVER_HELLO, H.CERTIFICATE, H.SERVER_HELLO_DONE}, (H.CLIENT_KEY_EXCHANGE, CCS)),
        (
            {H.SERVER_HELLO, H.CERTIFICATE, H.CERTIFICATE_REQUEST, H.SERVER_HELLO_DONE},
            (H.CERTIFICATE, H.CLIENT_KEY_EXCHANGE, H.CERTIFICATE_VERIFY, CCS),
        ),
        ({H.SERVER_HELLO, CCS}, (CCS,)),
    ],
)
def test_the_orders_of_a_client(said: set[int], good: tuple[int, ...]) -> None:
    assert accepted(MessageOrder.of_client(said), good)
    for index, each in itertools.product(range(len(good) + 1), ALL):
        expected = index < len(good) and each == good[index]
        assert accepted(MessageOrder.of_client(said), (*good[:index], each)) == expected, (good[:index], each)


def test_a_client_that_shows_no_certificate_signs_nothing() -> None:
    said: set[int] = {H.SERVER_HELLO, H.CERTIFICATE_REQUEST, H.SERVER_HELLO_DONE}
    assert accepted(MessageOrder.of_client(said), (H.CERTIFICATE, H.CLIENT_KEY_EXCHANGE, CCS), b"\0\0\0")
    assert not accepted(MessageOrder.of_client(said), (H.CERTIFICATE, H.CLIENT_KEY_EXCHANGE, CCS))
    assert not accepted(
        MessageOrder.of_client(said), (H.CERTIFICATE, H.CLIENT_KEY_EXCHANGE, H.CERTIFICATE_VERIFY), b"\0\0\0"
    )


@pytest.mark.parametrize("place", range(6))
def test_a_hello_request_in_the_handshake_says_nothing(place: int) -> None:
    """RFC 5246, 7.4.1.1. The card gets it too, and overlooks it."""
    parts = [HELLO12, *(hs(kind) for kind in (11, 12, 13, 14))]
    parts.insert(place, encode_record(22, message(0, b"")))
    flight = b"".join(parts)
    take = Script("client")
    assert take(flight) == (flight if place < 5 else b"".join(parts[:5]))
    assert take(b"") is None
    finished = encode_record(20, b"\x01") + encode_record(22, bytes(40))
    given = take(finished)
    assert given is not None
    assert given.endswith(finished)


def test_a_hello_request_in_the_same_record_behind_the_end_of_a_flight() -> None:
    take = Script("client")
    flight = HELLO12 + hs(11, 12) + encode_record(22, message(14) + message(0, b""))
    assert take(flight) == flight


def test_a_hello_request_that_is_none_is_refused() -> None:
    for role, start in (("client", HELLO12), ("client", b""), ("server", b"")):
        with pytest.raises(TlsProtocolError):
            Script(role)(start + hs(0))
    take = Script("server")
    take(encode_record(22, CLIENT_HELLO))
    take.detector.own_flight(HELLO12 + hs(11, 12, 14))
    with pytest.raises(TlsProtocolError):
        take(encode_record(22, message(0, b"")))


def test_a_message_that_comes_twice_is_refused_at_once() -> None:
    take = Script("server")
    take(encode_record(22, CLIENT_HELLO))
    take.detector.own_flight(HELLO12 + hs(11, 12, 13, 14))
    with pytest.raises(TlsProtocolError) as caught:
        take(hs(11, 16, 16))
    assert caught.value.alert is AlertDescription.UNEXPECTED_MESSAGE
