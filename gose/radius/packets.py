"""RADIUS packets of EAP: Access-Request in; Access-Challenge, -Accept and -Reject out (RFC 2865, 3579; RFC 2548 for the keys).

Message-Authenticator is required in every request, and comes first in every answer (CVE-2024-3596). pyrad carries the attributes; what it
leaves open is checked before it sees a packet: any bytes give a request, or raise RadiusDiscard.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pyrad.packet import AuthPacket, PacketError

from gose.errors import GoseError
from secfunet.radius.errors import RadiusFormatError
from secfunet.radius.wire import (
    MAX_EAP,
    RECV_KEY,
    SEND_KEY,
    Attribute,
    Code,
    eap_chunks,
    split_attributes,
    text_value,
)


class RadiusDiscard(GoseError):
    """The packet is not answered; ``reason`` is one word for the metrics."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class AccessRequest:
    """An authenticated request; ``eap`` is empty for EAP-Start (RFC 3579, 2.1).

    ``key`` is the same for a retransmission and for nothing else of the same client (RFC 5080, 2.2.2).
    """

    eap: bytes
    state: bytes | None
    key: tuple[int, bytes]
    packet: AuthPacket = field(repr=False, compare=False)


@dataclass(frozen=True)
class Reply:
    """What is answered. ``msk``: 64 bytes, for an accept; ``user_name``: who was authenticated."""

    code: Code
    eap: bytes
    state: bytes | None = None
    msk: bytes | None = field(default=None, repr=False)
    user_name: str | None = None


def parse_request(untrusted: bytes, secret: bytes) -> AccessRequest:
    """Checks form and Message-Authenticator. Raises RadiusDiscard."""
    try:
        attributes = split_attributes(untrusted)
    except RadiusFormatError as error:
        raise RadiusDiscard("malformed", str(error)) from None
    if untrusted[0] != Code.ACCESS_REQUEST:
        raise RadiusDiscard("malformed", "that is no Access-Request")
    signatures = [value for kind, value in attributes if kind == Attribute.MESSAGE_AUTHENTICATOR]
    if not signatures:
        raise RadiusDiscard("unsigned", "the request has no Message-Authenticator")
    if len(signatures) > 1 or len(signatures[0]) != 16:
        raise RadiusDiscard("malformed", "a Message-Authenticator is there once, and has 16 bytes")
    length = int.from_bytes(untrusted[2:4])
    try:
        packet = AuthPacket(secret=secret, packet=untrusted[:length])
        is_authentic = packet.verify_message_authenticator()
    except (PacketError, ValueError) as error:
        raise RadiusDiscard("malformed", str(error)) from None
    if not is_authentic:
        raise RadiusDiscard("wrong_secret", "the Message-Authenticator is not that of the shared secret")
    states = [value for kind, value in attributes if kind == Attribute.STATE]
    if len(states) > 1:
        raise RadiusDiscard("malformed", "there is more than one State")
    messages = [value for kind, value in attributes if kind == Attribute.EAP_MESSAGE]
    eap = b"".join(messages)
    if not messages or len(eap) > MAX_EAP:
        raise RadiusDiscard("malformed", "there is no EAP packet, or a very long one")
    return AccessRequest(eap, states[0] if states else None, (untrusted[1], untrusted[4:20]), packet)


def encode_reply(request: AccessRequest, reply: Reply) -> bytes:
    """The whole packet, with Message-Authenticator and Response Authenticator."""
    packet = request.packet.CreateReply()
    packet.code = int(reply.code)
    packet.add_message_authenticator()
    packet[Attribute.EAP_MESSAGE.value] = eap_chunks(reply.eap)
    if reply.state is not None:
        packet[Attribute.STATE.value] = [reply.state]
    if reply.user_name is not None:
        packet[Attribute.USER_NAME.value] = [text_value(reply.user_name)]
    if reply.msk is not None:
        receive, send = reply.msk[:32], reply.msk[32:64]
        packet[RECV_KEY] = [packet.SaltCrypt(receive)]
        packet[SEND_KEY] = [packet.SaltCrypt(send)]
        while packet[SEND_KEY][0][:2] == packet[RECV_KEY][0][:2]:
            packet[SEND_KEY] = [packet.SaltCrypt(send)]  # salts are unique within a packet (RFC 2548, 2.4.2)
    encoded: bytes = packet.ReplyPacket()
    return encoded
