"""A card is authenticated by a RADIUS server: EAP-TLS inside the card, its packets carried to the server and back.

The docking host has two parts here that an access network has apart: it asks the card for its identity, as an authenticator does, and it
carries packets without looking into TLS. What it learns is whether the server accepts, and whether both ends have the same MSK: the card's
own, and the one that the server sends for the access point (RFC 3748, 7.10; RFC 2548). Neither is told to anybody.

The client card's work is full EAP (docs/protocols.md): RFC 5216 with TLS 1.2, RFC 9190 with TLS 1.3.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from secfunet.apdu import StatusError
from secfunet.card.client import CardClient
from secfunet.card.parameters import EapState, NegotiatedTls
from secfunet.eap import EapCode, EapFormatError, EapPacket, EapType
from secfunet.eap_tls import EapTlsError, EapTlsMessage
from secfunet.radius.access import AccessAnswer, AccessClient, AccessRequest
from secfunet.radius.errors import (
    KeysDifferError,
    PeerRefusedError,
    RadiusError,
    RadiusFormatError,
    RadiusRejectedError,
)
from secfunet.radius.wire import Code

MAX_ROUNDS: Final = 1024
"""Packets of one authentication: two flights of 16 KiB in the smallest fragments."""

Exchange = Callable[[AccessRequest], Awaitable[AccessAnswer]]
"""Sends a request and returns the server's answer (``secfunet.radius.udp``)."""

_SW_DISCARDED: Final = 0x7000
_SW_REFUSED: Final = frozenset((0x6985, 0x7001))


@dataclass(frozen=True)
class Authenticated:
    """An authentication that succeeded at both ends, with the same keys. ``rounds``: requests to the server."""

    identity: str
    tls: NegotiatedTls
    server_certificate: bytes
    rounds: int


async def authenticate(card: CardClient, client: AccessClient, exchange: Exchange, *, unix_time: int) -> Authenticated:
    """The current identity of ``card`` (PIN verified, identity and TLS parameters set) is authenticated.

    ``unix_time``: UTC seconds; the card has no clock, and checks the server's certificate at that time. Raises RadiusRejectedError,
    PeerRefusedError, KeysDifferError, RadiusSilenceError, RadiusFormatError, and what a card raises. Whatever it raises, the card's next
    Reset-State, Set-Identity or power-off makes it ready for the next one.
    """
    untrusted = await card.process_eap(EapPacket(EapCode.REQUEST, 0, EapType.IDENTITY).encode(), unix_time)
    identity = _identity_of(untrusted)
    state: bytes | None = None
    for rounds in range(1, MAX_ROUNDS + 1):
        answer = await exchange(client.request(identity, untrusted, state))
        if answer.code is Code.ACCESS_CHALLENGE:
            untrusted, state = await _ask(card, answer.eap), answer.state
        elif answer.code is Code.ACCESS_REJECT:
            raise await _why(card, untrusted)
        else:
            await _confirm(card, answer)
            return Authenticated(identity, await card.cipher_suite(), (await card.peer_certificates())[0], rounds)
    raise RadiusError(f"the authentication is not over after {MAX_ROUNDS} packets")


async def _ask(card: CardClient, untrusted_request: bytes) -> bytes:
    """The card's answer to a request of the server."""
    try:
        answer = await card.process_eap(untrusted_request)
    except StatusError as error:
        if error.sw == _SW_DISCARDED:
            raise RadiusFormatError("the server's packet does not fit where the authentication is") from None
        if error.sw in _SW_REFUSED:
            raise PeerRefusedError("the card has broken the authentication off") from None
        raise
    if not answer:
        raise RadiusFormatError("the server's packet asks for nothing")
    return answer


async def _confirm(card: CardClient, accept: AccessAnswer) -> None:
    """An accept is one if the card agrees, and has the same keys."""
    try:
        if EapPacket.decode(accept.eap).code is not EapCode.SUCCESS:
            raise EapFormatError("an accept carries EAP-Success")
        await card.process_eap(accept.eap)
    except EapFormatError:
        raise RadiusFormatError("the server accepts without EAP-Success") from None
    except StatusError as error:
        if error.sw == _SW_DISCARDED or error.sw in _SW_REFUSED:
            raise PeerRefusedError("the server accepts, but the card has not finished with it") from None
        raise
    msk = (await card.session_key(extended=True))[:64]
    if accept.msk is None or not hmac.compare_digest(msk, accept.msk):
        raise KeysDifferError("the server accepts, but its keys are not the card's")


async def _why(card: CardClient, last_answer: bytes) -> RadiusError:
    """Who has ended it: the card, if it failed and what it said last was an alert; else the server."""
    is_alert = False
    try:
        packet = EapPacket.decode(last_answer)
        is_alert = packet.type == EapType.TLS and not EapTlsMessage.decode(packet.data).is_ack
    except (EapFormatError, EapTlsError):
        pass
    if is_alert and await card.state() is EapState.NOT_AUTHENTICATED:
        return PeerRefusedError(
            "the card refuses the server: its certificate is of another authority, or not valid now"
        )
    return RadiusRejectedError("the server refuses the card")


def _identity_of(untrusted: bytes) -> str:
    try:
        packet = EapPacket.decode(untrusted)
        if packet.code is not EapCode.RESPONSE or packet.type != EapType.IDENTITY:
            raise EapFormatError("the card does not answer with its identity")
        return packet.data.decode()
    except (EapFormatError, UnicodeDecodeError):
        raise RadiusFormatError("the card does not answer with its identity") from None
