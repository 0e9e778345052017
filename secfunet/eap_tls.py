"""EAP-TLS packets (RFC 5216, 3; RFC 9190): flags, and the fragmentation and reassembly of TLS flights, the same for either role.

EAP is lock-step: each side sends one packet and waits for one. A flight that needs several packets is sent with the M bit, and the
other side asks for each further piece with an empty packet (RFC 5216, 2.1.5). ``EapTlsChannel`` does both directions of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from secfunet.eap import MAX_PACKET, EapError

MAX_MESSAGE: Final = 1 << 17
"""Most bytes of one flight that are put together or sent (as many as the docking host's flight detector passes on)."""
MIN_FRAGMENT: Final = 16
HEADERS: Final = 10
"""Bytes of a packet that are not TLS: code, identifier, length, type, flags and the four bytes of the L bit."""
MAX_FRAGMENT: Final = MAX_PACKET - HEADERS

_LENGTH: Final = 0x80
_MORE: Final = 0x40
_START: Final = 0x20


class EapTlsError(EapError):
    """Bytes that are no EAP-TLS packet, or a packet that does not fit where the exchange is."""


@dataclass(frozen=True, slots=True)
class EapTlsMessage:
    """What follows the type byte: flags, the flight's length if the L bit is set, a piece of the flight."""

    data: bytes = b""
    more: bool = False
    start: bool = False
    total_length: int | None = None

    def __post_init__(self) -> None:
        if self.total_length is not None and not 0 <= self.total_length <= 0xFFFFFFFF:
            raise EapTlsError("a TLS message length has four bytes")

    @property
    def is_ack(self) -> bool:
        """Whether it only asks for the next piece, or says that there is nothing to say: six bytes with the EAP header
        (an L bit with a length of 0 is tolerated)."""
        return not (self.data or self.more or self.start or self.total_length)

    def encode(self) -> bytes:
        """Flags and data (RFC 5216, 3.1)."""
        flags = (_MORE if self.more else 0) | (_START if self.start else 0)
        if self.total_length is None:
            return bytes((flags,)) + self.data
        return bytes((flags | _LENGTH,)) + self.total_length.to_bytes(4) + self.data

    @classmethod
    def decode(cls, untrusted: bytes) -> EapTlsMessage:
        """The reserved bits are ignored, as RFC 5216, 3.1 demands. Raises EapTlsError."""
        if not untrusted:
            raise EapTlsError("an EAP-TLS packet has flags")
        flags = untrusted[0]
        total = None
        data = untrusted[1:]
        if flags & _LENGTH:
            if len(data) < 4:
                raise EapTlsError("the TLS message length is cut short")
            total = int.from_bytes(data[:4])
            data = data[4:]
        return cls(bytes(data), more=bool(flags & _MORE), start=bool(flags & _START), total_length=total)


ACK: Final = EapTlsMessage()


class Asked(Enum):
    """What a received packet asks for when it does not complete a flight."""

    ACK = "acknowledge a fragment"
    FRAGMENT = "send the next fragment"
    NOTHING = "an acknowledgement, and nothing is left to send"


class EapTlsChannel:
    """Fragments and reassembles flights. ``fragment_size``: most TLS bytes in a packet that is sent."""

    def __init__(self, fragment_size: int, *, max_message: int = MAX_MESSAGE) -> None:
        if not MIN_FRAGMENT <= fragment_size <= MAX_FRAGMENT:
            raise EapTlsError(f"a fragment has {MIN_FRAGMENT} to {MAX_FRAGMENT} bytes")
        self._fragment_size = fragment_size
        self._max_message = max_message
        self._incoming = bytearray()
        self._announced: int | None = None
        self._outgoing = b""
        self._sent = 0

    @property
    def is_sending(self) -> bool:
        """Whether pieces of a flight wait to be asked for."""
        return self._sent < len(self._outgoing)

    @property
    def is_receiving(self) -> bool:
        """Whether a flight has begun to come in and is not whole."""
        return self._announced is not None

    def send(self, flight: bytes) -> EapTlsMessage:
        """Begin to send a flight; return its first packet: L bit and length, and M bit if more is to follow.

        Raises EapTlsError if another flight is on its way, or this one is empty or longer than the bound.
        """
        if self.is_sending or self.is_receiving:
            raise EapTlsError("another flight is on its way")
        if not 0 < len(flight) <= self._max_message:
            raise EapTlsError(f"a flight of {len(flight)} bytes cannot be sent")
        self._outgoing, self._sent = flight, 0
        return self.next_fragment()

    def next_fragment(self) -> EapTlsMessage:
        """The next packet of the flight that is being sent. Raises EapTlsError if there is none."""
        if not self.is_sending:
            raise EapTlsError("nothing is left to send")
        total = len(self._outgoing) if self._sent == 0 else None
        piece = self._outgoing[self._sent : self._sent + self._fragment_size]
        self._sent += len(piece)
        more = self.is_sending
        if not more:
            self._outgoing, self._sent = b"", 0
        return EapTlsMessage(piece, more=more, total_length=total)

    def receive(self, message: EapTlsMessage) -> bytes | Asked:
        """Take a packet: return a flight that is now whole, or what the packet asks for.

        A flight in one packet may lack the L bit. Raises EapTlsError, and forgets what had come of a flight: data while we are sending;
        a first fragment without its length; a length that changes, is exceeded, is not reached, or is past the bound; an empty fragment.
        """
        try:
            return self._receive(message)
        except EapTlsError:
            self._forget_incoming()
            raise

    def _receive(self, message: EapTlsMessage) -> bytes | Asked:
        if message.start:
            raise EapTlsError("a Start in the middle of an exchange")
        if self.is_sending:
            if not message.is_ack:
                raise EapTlsError("data where an acknowledgement was due")
            return Asked.FRAGMENT
        if message.is_ack and not self.is_receiving:
            return Asked.NOTHING
        if not message.data:
            raise EapTlsError("an empty fragment")
        self._check_length(message)
        self._incoming += message.data
        if message.more:
            return Asked.ACK
        flight, announced = bytes(self._incoming), self._announced
        if announced is not None and len(flight) != announced:
            raise EapTlsError("a flight is shorter than was announced")
        self._forget_incoming()
        return flight

    def _check_length(self, message: EapTlsMessage) -> None:
        total = message.total_length
        if self._announced is None:
            if message.more and total is None:
                raise EapTlsError("the first fragment does not tell the length")
            self._announced = total
        elif total is not None and total != self._announced:
            raise EapTlsError("the announced length changed")
        limit = self._max_message if self._announced is None else self._announced
        if limit > self._max_message:
            raise EapTlsError(f"a flight of {limit} bytes is too long")
        length = len(self._incoming) + len(message.data)
        if length > limit or (message.more and length == limit):
            raise EapTlsError("a flight is longer than was announced")

    def _forget_incoming(self) -> None:
        self._incoming = bytearray()
        self._announced = None
