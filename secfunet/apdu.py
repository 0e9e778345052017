"""Command and response APDUs (ISO 7816-4, 5.1): short and extended lengths, and what status words mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from secfunet.errors import SecFuNetError

MAX_DATA: Final = 65535
"""The longest command data field, bytes (extended Lc)."""

MAX_RESPONSE: Final = 65536
"""The longest response data field, bytes (extended Le 0000)."""


class ApduError(SecFuNetError):
    """Root of what can be wrong with an exchange of APDUs."""


class ApduFormatError(ApduError):
    """Bytes that are no APDU, or values that do not fit into one."""


class StatusError(ApduError):
    """The card answered with a status word that is not a success; ``ins`` is the instruction that it refused."""

    def __init__(self, sw: int, ins: int) -> None:
        super().__init__(f"the card answered {sw:04X} ({describe_status(sw)}) to instruction {ins:02X}")
        self.sw = sw
        self.ins = ins


class PinError(StatusError):
    """The PIN is wrong, missing or blocked; ``attempts_remaining`` is 0 when it is blocked."""

    def __init__(self, sw: int, ins: int, attempts_remaining: int) -> None:
        super().__init__(sw, ins)
        self.attempts_remaining = attempts_remaining


def status_error(sw: int, ins: int) -> StatusError:
    """The error for a failing status word: PinError for 63xx (both 630n of EAP cards and 63Cn of ISO 7816-4) and 6983."""
    if sw == 0x6983:
        return PinError(sw, ins, 0)
    if sw >> 8 == 0x63:
        return PinError(sw, ins, sw & 0x0F)
    return StatusError(sw, ins)


_STATUS_TEXTS: Final[dict[int, str]] = {
    0x6700: "wrong length",
    0x6881: "logical channel not supported",
    0x6884: "command chaining not supported",
    0x6982: "security status not satisfied",
    0x6983: "PIN blocked",
    0x6985: "conditions of use not satisfied",
    0x6986: "command not allowed",
    0x6999: "no application selected",
    0x6A80: "wrong data",
    0x6A81: "function not supported",
    0x6A82: "application not found",
    0x6A84: "not enough memory",
    0x6A88: "no such identity",
    0x6A89: "identity exists already",
    0x6B00: "wrong P1 or P2",
    0x6D00: "unknown instruction",
    0x6E00: "unknown class",
    0x6F00: "internal error",
    0x7000: "packet silently discarded",
    0x7001: "authentication failure",
    0x9000: "success",
}


def describe_status(sw: int) -> str:
    """A few words for a person."""
    if sw in _STATUS_TEXTS:
        return _STATUS_TEXTS[sw]
    if sw >> 8 == 0x63:
        return f"PIN needed or wrong, {sw & 0x0F} attempts left"
    if sw >> 8 == 0x6C:
        return f"repeat with Le {sw & 0xFF:02X}"
    return "refused"


@dataclass(frozen=True)
class CommandApdu:
    """One command. ``le`` is the number of bytes wanted at most: None (none), or 1 to 65536; 256 is the short Le 00.

    The data may hold a PIN or a plaintext: it is no part of ``repr``.
    """

    cla: int
    ins: int
    p1: int
    p2: int
    data: bytes = field(default=b"", repr=False)
    le: int | None = None

    def __post_init__(self) -> None:
        for name in ("cla", "ins", "p1", "p2"):
            if not 0 <= getattr(self, name) <= 0xFF:
                raise ApduFormatError(f"{name} is no byte")
        if len(self.data) > MAX_DATA:
            raise ApduFormatError(f"{len(self.data)} bytes of data do not fit into an APDU")
        if self.le is not None and not 1 <= self.le <= MAX_RESPONSE:
            raise ApduFormatError(f"le {self.le} is out of range")

    @property
    def is_extended(self) -> bool:
        """Whether the lengths need the extended encoding."""
        return len(self.data) > 255 or (self.le or 0) > 256

    def encode(self) -> bytes:
        """The bytes on the wire: short lengths if they fit, else extended ones (ISO 7816-4, 5.1)."""
        encoded = bytes((self.cla, self.ins, self.p1, self.p2))
        if not self.is_extended:
            if self.data:
                encoded += bytes((len(self.data),)) + self.data
            return encoded if self.le is None else encoded + bytes((self.le & 0xFF,))
        encoded += b"\0"
        if self.data:
            encoded += len(self.data).to_bytes(2) + self.data
        return encoded if self.le is None else encoded + (self.le & 0xFFFF).to_bytes(2)

    @classmethod
    def decode(cls, untrusted: bytes) -> CommandApdu:
        """Parses any of the seven cases of ISO 7816-4, 5.1. Raises ApduFormatError."""
        if len(untrusted) < 4:
            raise ApduFormatError("an APDU has at least four bytes")
        cla, ins, p1, p2 = untrusted[:4]
        body = untrusted[4:]
        data, le = _decode_extended(body) if len(body) > 1 and body[0] == 0 else _decode_short(body)
        return cls(cla, ins, p1, p2, data, le)


def _decode_short(body: bytes) -> tuple[bytes, int | None]:
    if not body:
        return b"", None
    if len(body) == 1:
        return b"", body[0] or 256
    length = body[0]
    if len(body) == 1 + length:
        return body[1:], None
    if len(body) == 2 + length:
        return body[1:-1], body[-1] or 256
    raise ApduFormatError("Lc does not fit the length of the APDU")


def _decode_extended(body: bytes) -> tuple[bytes, int | None]:
    if len(body) < 3:
        raise ApduFormatError("an extended length has three bytes")
    length = int.from_bytes(body[1:3])
    if len(body) == 3:
        return b"", length or MAX_RESPONSE
    if length == 0:
        raise ApduFormatError("an extended Lc is not zero")
    if len(body) == 3 + length:
        return body[3:], None
    if len(body) == 5 + length:
        return body[3:-2], int.from_bytes(body[-2:]) or MAX_RESPONSE
    raise ApduFormatError("Lc does not fit the length of the APDU")


@dataclass(frozen=True)
class ResponseApdu:
    """One answer: data (no part of ``repr``: it may be a plaintext or a key block) and the status word."""

    data: bytes = field(default=b"", repr=False)
    sw: int = 0x9000

    def __post_init__(self) -> None:
        if not 0 <= self.sw <= 0xFFFF:
            raise ApduFormatError("a status word has two bytes")
        if len(self.data) > MAX_RESPONSE:
            raise ApduFormatError(f"{len(self.data)} bytes do not fit into a response")

    @property
    def sw1(self) -> int:
        """The first byte of the status word."""
        return self.sw >> 8

    @property
    def sw2(self) -> int:
        """The second byte of the status word."""
        return self.sw & 0xFF

    def encode(self) -> bytes:
        """Data, then the status word, big endian."""
        return self.data + self.sw.to_bytes(2)

    @classmethod
    def decode(cls, untrusted: bytes) -> ResponseApdu:
        """Raises ApduFormatError if there is no room for a status word, or too much for a response."""
        if len(untrusted) < 2:
            raise ApduFormatError("a response has at least two bytes")
        return cls(untrusted[:-2], int.from_bytes(untrusted[-2:]))
