"""A RADIUS client's packets: Access-Request out; Access-Challenge, -Accept and -Reject in (RFC 2865, 3579; RFC 2548 for the keys). No IO.

Every request carries Message-Authenticator, and so must every answer (RFC 3579, 3.2; CVE-2024-3596), but for one: an Access-Reject without
an EAP packet, which a server sends that has given the dialogue up (RFC 3579, 2.6.3). Whoever could forge that could as well drop packets.
What is not signed with the shared secret, or not for this request, is not an answer.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pyrad.packet import AuthPacket, PacketError

from secfunet.radius.errors import RadiusFormatError
from secfunet.radius.wire import (
    AUTHENTICATOR_SIZE,
    MAX_EAP,
    MIN_MTU,
    RECV_KEY,
    SEND_KEY,
    Attribute,
    Code,
    eap_chunks,
    split_attributes,
    text_value,
    vendor_values,
)

KEY_SIZE: Final = 32
_ETHERNET: Final = 15
"""NAS-Port-Type (RFC 2865, 5.41)."""
_ANSWERS: Final = frozenset((Code.ACCESS_ACCEPT, Code.ACCESS_REJECT, Code.ACCESS_CHALLENGE))


@dataclass(frozen=True)
class AccessAnswer:
    """What the server says. ``msk``: 64 bytes out of the MPPE keys of an accept that has both, else None."""

    code: Code
    eap: bytes
    state: bytes | None
    msk: bytes | None = field(default=None, repr=False)


class AccessRequest:
    """One request, and the check of what answers it. ``encoded`` is the same for every repetition."""

    def __init__(self, packet: AuthPacket) -> None:
        self._packet = packet
        self.encoded: bytes = packet.RequestPacket()

    def answer(self, untrusted: bytes) -> AccessAnswer:
        """Raises RadiusFormatError for whatever is not the server's answer to this request."""
        attributes = split_attributes(untrusted)
        raw = untrusted[: int.from_bytes(untrusted[2:4])]
        if raw[0] not in _ANSWERS:
            raise RadiusFormatError("that is no answer to an Access-Request")
        signatures = [value for kind, value in attributes if kind == Attribute.MESSAGE_AUTHENTICATOR]
        eap = b"".join(value for kind, value in attributes if kind == Attribute.EAP_MESSAGE)
        is_bare = raw[0] == Code.ACCESS_REJECT and not eap and not signatures
        if not is_bare and (len(signatures) != 1 or len(signatures[0]) != AUTHENTICATOR_SIZE):
            raise RadiusFormatError("an answer has one Message-Authenticator")
        try:
            packet = self._packet.CreateReply(packet=raw)
            is_authentic = self._packet.VerifyReply(packet, raw, enforce_ma=not is_bare)
            if not is_authentic:
                raise RadiusFormatError("the answer is not signed with the shared secret, or answers something else")
            packet.request_authenticator = self._packet.authenticator
            keys = [_key_of(packet, vendor_values(attributes, name)) for name in (RECV_KEY, SEND_KEY)]
        except (PacketError, ValueError, KeyError, IndexError) as error:
            raise RadiusFormatError(f"the answer is malformed ({type(error).__name__})") from None
        states = [value for kind, value in attributes if kind == Attribute.STATE]
        if len(states) > 1 or len(eap) > MAX_EAP:
            raise RadiusFormatError("an answer has one State at most, and an EAP packet that is not very long")
        code = Code(raw[0])
        receive, send = keys
        msk = receive + send if code is Code.ACCESS_ACCEPT and receive is not None and send is not None else None
        return AccessAnswer(code, eap, states[0] if states else None, msk)


class AccessClient:
    """Makes the requests of one authentication. ``mtu``: the longest EAP packet that the server is asked to send (Framed-MTU)."""

    def __init__(
        self,
        secret: bytes,
        *,
        nas: str,
        mtu: int,
        randbytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        if not MIN_MTU <= mtu <= MAX_EAP:
            raise RadiusFormatError(f"an EAP packet has {MIN_MTU} to {MAX_EAP} bytes at most")
        self._secret = secret
        self._nas = nas
        self._mtu = mtu
        self._randbytes = randbytes
        self._number = randbytes(1)[0]

    def request(self, user_name: str, eap: bytes, state: bytes | None) -> AccessRequest:
        """Raises RadiusFormatError for an EAP packet that does not fit."""
        if not 0 < len(eap) <= MAX_EAP:
            raise RadiusFormatError(f"an EAP packet of {len(eap)} bytes does not fit into a RADIUS packet")
        self._number = (self._number + 1) & 0xFF
        packet = AuthPacket(id=self._number, secret=self._secret, authenticator=self._randbytes(AUTHENTICATOR_SIZE))
        packet.add_message_authenticator()
        packet[Attribute.USER_NAME.value] = [text_value(user_name)]
        packet[Attribute.NAS_IDENTIFIER.value] = [text_value(self._nas)]
        packet[Attribute.NAS_PORT_TYPE.value] = [_ETHERNET.to_bytes(4)]
        packet[Attribute.FRAMED_MTU.value] = [self._mtu.to_bytes(4)]
        packet[Attribute.EAP_MESSAGE.value] = eap_chunks(eap)
        if state is not None:
            packet[Attribute.STATE.value] = [state]
        return AccessRequest(packet)


def _key_of(packet: AuthPacket, values: list[bytes]) -> bytes | None:
    """A key of RFC 2548, 2.4.2 and 2.4.3; None unless it is there once, with its 32 bytes."""
    if len(values) != 1:
        return None
    key: bytes = packet.SaltDecrypt(values[0])
    return key if len(key) == KEY_SIZE else None
