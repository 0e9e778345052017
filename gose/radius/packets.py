"""RADIUS packets of EAP: Access-Request in; Access-Challenge, -Accept and -Reject out (RFC 2865, 3579; RFC 2548 for the keys).

Message-Authenticator is required in every request, and comes first in every answer (CVE-2024-3596). Any bytes give a request, or raise
RadiusDiscard. What is authentic gives a request, whatever else is wrong with it: a proxy takes a server that is silent for a dead one.
The one exception is a packet whose code has no meaning here, which RFC 2865, 3 wants discarded.

pyrad makes the answers; it does not see what came.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

from pyrad.packet import AuthPacket

from gose.errors import GoseError
from secfunet.radius.errors import RadiusFormatError
from secfunet.radius.wire import (
    AUTHENTICATOR_SIZE,
    MAX_EAP,
    MAX_PACKET,
    MIN_MTU,
    MIN_PACKET,
    RECV_KEY,
    SEND_KEY,
    Attribute,
    Code,
    attributes_and_fault,
    eap_chunks,
    text_value,
)

IGNORED: Final = 202
"""Error-Cause "Invalid EAP Packet (Ignored)" of a challenge that asks for the same again (RFC 3579, 2.2)."""
STATE_SIZE: Final = 16

_CODES: Final = frozenset((Code.ACCESS_REQUEST, Code.STATUS_SERVER))
LINK_HEADER: Final = 4
"""Bytes of Framed-MTU that 802.1X keeps for its own header (RFC 3579, 2.4); another link may need none, and loses nothing."""
_ATTRIBUTE_HEADER: Final = 2
_ERROR_CAUSE_LENGTH: Final = 6
_CHUNK: Final = 253 + _ATTRIBUTE_HEADER
_SIGNED: Final = MIN_PACKET + _ATTRIBUTE_HEADER + AUTHENTICATOR_SIZE


class RadiusDiscard(GoseError):
    """The packet is not answered; ``reason`` is one word for the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ReplyTooLongError(GoseError):
    """The answer, with the Proxy-States that it must repeat, has more than 4096 bytes."""


@dataclass(frozen=True)
class AccessRequest:
    """An authenticated request. ``eap``: None without EAP-Message; empty for EAP-Start (RFC 3579, 2.1).

    ``fault``: why it can only be rejected; "" if it need not be. ``mtu``: the longest EAP packet that its link carries, by its
    Framed-MTU; None: it does not say. ``key`` is the same for a retransmission and for nothing else of the same client (RFC 5080, 2.2.2).
    """

    code: Code
    eap: bytes | None
    state: bytes | None
    mtu: int | None
    fault: str
    key: tuple[int, bytes]
    packet: AuthPacket = field(repr=False, compare=False)

    @property
    def room(self) -> int:
        """Bytes of the longest EAP packet that fits into a challenge to this request; may be negative."""
        proxies = sum(_ATTRIBUTE_HEADER + len(value) for value in self.packet.get(Attribute.PROXY_STATE.value, []))
        left = MAX_PACKET - _SIGNED - proxies - _ATTRIBUTE_HEADER - STATE_SIZE - _ERROR_CAUSE_LENGTH
        return left - _ATTRIBUTE_HEADER * (max(left, 0) // _CHUNK + 1)


@dataclass(frozen=True)
class Reply:
    """What is answered; ``eap`` may be empty. ``msk``: 64 bytes, for an accept; ``user_name``: who was authenticated.

    ``error_cause``: of RFC 5176, 3.5.
    """

    code: Code
    eap: bytes = b""
    state: bytes | None = None
    msk: bytes | None = field(default=None, repr=False)
    user_name: str | None = None
    error_cause: int | None = None


def parse_request(untrusted: bytes, secret: bytes) -> AccessRequest:
    """Checks form and Message-Authenticator. Raises RadiusDiscard."""
    try:
        attributes, fault = attributes_and_fault(untrusted)
    except RadiusFormatError as error:
        raise RadiusDiscard("malformed", str(error)) from None
    if untrusted[0] not in _CODES:
        raise RadiusDiscard("malformed", f"packets of code {untrusted[0]} are not for this port")
    _authenticate(untrusted[: int.from_bytes(untrusted[2:4])], attributes, secret)
    packet = AuthPacket(id=untrusted[1], secret=secret, authenticator=untrusted[4:MIN_PACKET])
    if proxies := _values(attributes, Attribute.PROXY_STATE):
        packet[Attribute.PROXY_STATE.value] = proxies
    states = _values(attributes, Attribute.STATE)
    messages = _values(attributes, Attribute.EAP_MESSAGE)
    eap = b"".join(messages)
    if not fault and len(states) > 1:
        fault = "there is more than one State"
    if not fault and len(eap) > MAX_EAP:
        fault = f"an EAP packet has at most {MAX_EAP} bytes"
    return AccessRequest(
        code=Code(untrusted[0]),
        eap=eap if messages else None,
        state=states[0] if states else None,
        mtu=_mtu(_values(attributes, Attribute.FRAMED_MTU)),
        fault=fault,
        key=(untrusted[1], untrusted[4:MIN_PACKET]),
        packet=packet,
    )


def _authenticate(raw: bytes, attributes: list[tuple[int, bytes]], secret: bytes) -> None:
    """Raises RadiusDiscard unless the packet has one Message-Authenticator, which is right (RFC 3579, 3.2)."""
    at, places = MIN_PACKET, []
    for kind, value in attributes:
        at += _ATTRIBUTE_HEADER
        if kind == Attribute.MESSAGE_AUTHENTICATOR:
            places.append((at, value))
        at += len(value)
    if not places:
        raise RadiusDiscard("unsigned", "the request has no Message-Authenticator")
    (at, signature), *more = places
    if more or len(signature) != AUTHENTICATOR_SIZE:
        raise RadiusDiscard("malformed", "a Message-Authenticator is there once, and has 16 bytes")
    zeroed = raw[:at] + bytes(AUTHENTICATOR_SIZE) + raw[at + AUTHENTICATOR_SIZE :]
    if not hmac.compare_digest(hmac.digest(secret, zeroed, "md5"), signature):
        raise RadiusDiscard("wrong_secret", "the Message-Authenticator is not that of the shared secret")


def _values(attributes: list[tuple[int, bytes]], wanted: Attribute) -> list[bytes]:
    return [value for kind, value in attributes if kind == wanted]


def _mtu(values: list[bytes]) -> int | None:
    """The smallest of several; those that do not have four bytes say nothing."""
    sizes = [int.from_bytes(value) for value in values if len(value) == 4]
    return max(min(sizes), MIN_MTU) - LINK_HEADER if sizes else None


def encode_reply(request: AccessRequest, reply: Reply) -> bytes:
    """The whole packet, with Message-Authenticator and Response Authenticator. Raises ReplyTooLongError.

    An Access-Reject with EAP-Failure fits wherever the request did that had an EAP packet, one without EAP wherever any did.
    """
    packet = request.packet.CreateReply()
    packet.code = int(reply.code)
    packet.add_message_authenticator()
    if reply.eap:
        packet[Attribute.EAP_MESSAGE.value] = eap_chunks(reply.eap)
    if reply.state is not None:
        packet[Attribute.STATE.value] = [reply.state]
    if reply.error_cause is not None:
        packet[Attribute.ERROR_CAUSE.value] = [reply.error_cause.to_bytes(4)]
    if reply.user_name is not None:
        packet[Attribute.USER_NAME.value] = [text_value(reply.user_name)]
    if reply.msk is not None:
        receive, send = reply.msk[:32], reply.msk[32:64]
        packet[RECV_KEY] = [packet.SaltCrypt(receive)]
        packet[SEND_KEY] = [packet.SaltCrypt(send)]
        while packet[SEND_KEY][0][:2] == packet[RECV_KEY][0][:2]:
            packet[SEND_KEY] = [packet.SaltCrypt(send)]  # salts are unique within a packet (RFC 2548, 2.4.2)
    encoded: bytes = packet.ReplyPacket()
    if len(encoded) > MAX_PACKET:
        raise ReplyTooLongError(f"an answer of {len(encoded)} bytes does not fit into a RADIUS packet")
    return encoded
