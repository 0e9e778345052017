"""The values that a docking host and its card exchange: states, roles, key algorithms, and what a TLS handshake is to be and became."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, Literal

from secfunet.card.errors import CardFormatError
from secfunet.card.tlv import decode_tlv, encode_tlv


class EapState(IntEnum):
    """Answer of Get-State (draft-urien-eap-smartcard, Get-State)."""

    IDENTITY_NOT_SET = 1
    AUTHENTICATING = 2
    AUTHENTICATED = 3
    NOT_AUTHENTICATED = 4


class KeyAlgorithm(IntEnum):
    """A key pair's algorithm and size (P1 of the key generation command)."""

    RSA_2048 = 1
    RSA_3072 = 2
    RSA_4096 = 3
    P_256 = 4
    P_384 = 5

    @property
    def is_rsa(self) -> bool:
        """Whether the key can decrypt and unwrap, not only sign."""
        return self <= KeyAlgorithm.RSA_4096


class Segmentation(Enum):
    """How long commands and answers travel."""

    EXTENDED = "extended"  # extended APDUs
    DRAFT = "draft"  # short APDUs: P1 More and ISO command chaining in, 61xx and 9Fxx with FETCH out


TLS_1_2: Final = 0x0303
TLS_1_3: Final = 0x0304

_ROLE, _SERVER_NAME, _ALPN, _MIN_VERSION, _MAX_VERSION, _SUITES, _FLAGS, _GROUPS, _EAP_MTU, _SERVER_PORT = range(1, 11)
_RESUME = 0x01
_REPORT = 0x02

MAX_ALPN_NAMES: Final = 16
MAX_SUITES: Final = 64
MAX_GROUPS: Final = 16
MIN_EAP_MTU: Final = 60
"""Bytes: a Framed-MTU of 64 (RFC 2865, 5.12) less the header of 802.1X."""


@dataclass(frozen=True)
class TlsParameters:
    """How the next handshake is to run (Set-TLS-Parameters). Empty suites or groups mean the card's defaults.

    ``server_name`` goes into SNI (client); with ``server_port`` (0: not told) it says whose session is resumed. Versions, suites and
    groups are the numbers of the TLS registry. Legacy suites are refused by a card whose own settings do not allow them. ``eap_mtu``: bytes
    of the longest EAP packet that the card is to send in full EAP; None: as the card's own settings say, which also holds where they say
    less. ``report``: the card may be given bytes from behind the peer's Finished, does not look at them, and says how many they were.
    """

    role: Literal["client", "server"] = "client"
    server_name: str = ""
    alpn: tuple[str, ...] = ()
    min_version: int = TLS_1_2
    max_version: int = TLS_1_3
    suites: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    resume: bool = True
    eap_mtu: int | None = None
    server_port: int = 0
    report: bool = False

    def __post_init__(self) -> None:
        if self.role not in ("client", "server"):
            raise CardFormatError("a TLS role is client or server")
        if not 0 <= self.server_port <= 0xFFFF:
            raise CardFormatError("a port has two bytes")
        _check_text(self.server_name, 255, "server name", may_be_empty=True)
        if len(self.alpn) > MAX_ALPN_NAMES:
            raise CardFormatError("too many ALPN names")
        for name in self.alpn:
            _check_text(name, 255, "ALPN name")
        if not 0x0301 <= self.min_version <= self.max_version <= TLS_1_3:
            raise CardFormatError("TLS versions are out of range or out of order")
        for numbers, limit, what in ((self.suites, MAX_SUITES, "suites"), (self.groups, MAX_GROUPS, "groups")):
            if len(numbers) > limit or any(not 0 <= number <= 0xFFFF for number in numbers):
                raise CardFormatError(f"{what} are out of range")
        if self.eap_mtu is not None and not MIN_EAP_MTU <= self.eap_mtu <= 0xFFFF:
            raise CardFormatError(f"an EAP packet has {MIN_EAP_MTU} to 65535 bytes at most")

    def encode(self) -> bytes:
        """Items: 01 role (00 client, 01 server), 02 server name, 03 one ALPN name each, 04 and 05 lowest and highest version (2 bytes),
        06 suites (2 bytes each), 07 flags (bit 0: resume, bit 1: report), 08 groups (2 bytes each), 09 longest EAP packet (2 bytes), 0A
        server's port (2 bytes). Empty ones are left out."""
        items: list[tuple[int, bytes]] = [(_ROLE, b"\1" if self.role == "server" else b"\0")]
        if self.server_name:
            items.append((_SERVER_NAME, self.server_name.encode("ascii")))
        items += [(_ALPN, name.encode("ascii")) for name in self.alpn]
        items += [(_MIN_VERSION, self.min_version.to_bytes(2)), (_MAX_VERSION, self.max_version.to_bytes(2))]
        if self.suites:
            items.append((_SUITES, b"".join(suite.to_bytes(2) for suite in self.suites)))
        items.append((_FLAGS, bytes(((_RESUME if self.resume else 0) | (_REPORT if self.report else 0),))))
        if self.groups:
            items.append((_GROUPS, b"".join(group.to_bytes(2) for group in self.groups)))
        if self.eap_mtu is not None:
            items.append((_EAP_MTU, self.eap_mtu.to_bytes(2)))
        if self.server_port:
            items.append((_SERVER_PORT, self.server_port.to_bytes(2)))
        return encode_tlv(items)

    @classmethod
    def decode(cls, untrusted: bytes) -> TlsParameters:
        """Items that are missing have their default; a repeated or unknown one is an error. Raises CardFormatError."""
        items = decode_tlv(untrusted)
        alpn = tuple(_text(value) for tag, value in items if tag == _ALPN)
        values = _single_items([item for item in items if item[0] != _ALPN], range(_ROLE, _SERVER_PORT + 1))
        role = values.get(_ROLE, b"\0")
        if role not in (b"\0", b"\1"):
            raise CardFormatError("a TLS role is 00 or 01")
        flags = values.get(_FLAGS, bytes((_RESUME,)))
        if len(flags) != 1 or flags[0] & ~(_RESUME | _REPORT):
            raise CardFormatError("unknown flags")
        return cls(
            role="server" if role == b"\1" else "client",
            server_name=_text(values.get(_SERVER_NAME, b"")),
            alpn=alpn,
            min_version=_number(values.get(_MIN_VERSION, TLS_1_2.to_bytes(2)), 2),
            max_version=_number(values.get(_MAX_VERSION, TLS_1_3.to_bytes(2)), 2),
            suites=_numbers(values.get(_SUITES, b"")),
            groups=_numbers(values.get(_GROUPS, b"")),
            resume=bool(flags[0] & _RESUME),
            eap_mtu=_number(values[_EAP_MTU], 2) if _EAP_MTU in values else None,
            server_port=_number(values.get(_SERVER_PORT, bytes(2)), 2),
            report=bool(flags[0] & _REPORT),
        )


_VERSION, _SUITE, _OUTCOME, _READ_SEQUENCE, _WRITE_SEQUENCE, _PROTOCOL, _UNUSED, _MAX_FRAGMENT = range(1, 9)
_ENCRYPT_THEN_MAC = 0x01
_RESUMED = 0x02


@dataclass(frozen=True)
class NegotiatedTls:
    """What a handshake became (CipherSuite): all that the docking host needs beside the key block to go on with the records.

    ``read_sequence`` and ``write_sequence`` are the numbers of the next record that the docking host reads and writes. From a card that
    was asked to report (TlsParameters), else None: ``unused``, how many bytes at the end of what it was given last it did not look at,
    because the handshake was over; ``max_fragment``, the most bytes of content that a record may have (RFC 6066, 4), 0 if none was
    agreed.
    """

    version: int
    suite: int
    encrypt_then_mac: bool
    resumed: bool
    read_sequence: int
    write_sequence: int
    alpn: str
    unused: int | None = None
    max_fragment: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.version <= 0xFFFF or not 0 <= self.suite <= 0xFFFF:
            raise CardFormatError("version or suite is out of range")
        if not 0 <= self.read_sequence < 2**64 or not 0 <= self.write_sequence < 2**64:
            raise CardFormatError("a sequence number is out of range")
        if not 0 <= (self.unused or 0) < 2**32:
            raise CardFormatError("the number of unused bytes is out of range")
        if (self.max_fragment or 0) not in (0, 512, 1024, 2048, 4096):
            raise CardFormatError("RFC 6066 knows no such length of records")
        _check_text(self.alpn, 255, "ALPN name", may_be_empty=True)

    def encode(self) -> bytes:
        """Items: 01 version, 02 suite (2 bytes each), 03 flags (bit 0 encrypt-then-MAC, bit 1 resumed), 04 read and 05 write sequence
        number (8 bytes each), 06 ALPN name; 07 unused bytes (4), 08 most bytes in a record (2), left out if None."""
        flags = (_ENCRYPT_THEN_MAC if self.encrypt_then_mac else 0) | (_RESUMED if self.resumed else 0)
        items = [
            (_VERSION, self.version.to_bytes(2)),
            (_SUITE, self.suite.to_bytes(2)),
            (_OUTCOME, bytes((flags,))),
            (_READ_SEQUENCE, self.read_sequence.to_bytes(8)),
            (_WRITE_SEQUENCE, self.write_sequence.to_bytes(8)),
            (_PROTOCOL, self.alpn.encode("ascii")),
        ]
        if self.unused is not None:
            items.append((_UNUSED, self.unused.to_bytes(4)))
        if self.max_fragment is not None:
            items.append((_MAX_FRAGMENT, self.max_fragment.to_bytes(2)))
        return encode_tlv(items)

    @classmethod
    def decode(cls, untrusted: bytes) -> NegotiatedTls:
        """Items 01 to 06 must be there, none twice. Raises CardFormatError."""
        values = _single_items(decode_tlv(untrusted), range(_VERSION, _MAX_FRAGMENT + 1))
        if any(tag not in values for tag in range(_VERSION, _PROTOCOL + 1)):
            raise CardFormatError("an item is missing")
        flags = _number(values[_OUTCOME], 1)
        if flags & ~(_ENCRYPT_THEN_MAC | _RESUMED):
            raise CardFormatError("unknown flags")
        return cls(
            version=_number(values[_VERSION], 2),
            suite=_number(values[_SUITE], 2),
            encrypt_then_mac=bool(flags & _ENCRYPT_THEN_MAC),
            resumed=bool(flags & _RESUMED),
            read_sequence=_number(values[_READ_SEQUENCE], 8),
            write_sequence=_number(values[_WRITE_SEQUENCE], 8),
            alpn=_text(values[_PROTOCOL]),
            unused=_number(values[_UNUSED], 4) if _UNUSED in values else None,
            max_fragment=_number(values[_MAX_FRAGMENT], 2) if _MAX_FRAGMENT in values else None,
        )


_CERTIFICATE = 1
MAX_PEER_CERTIFICATES: Final = 16


def encode_certificates(certificates: tuple[bytes, ...]) -> bytes:
    """A chain of DER certificates, leaf first: items 01."""
    return encode_tlv((_CERTIFICATE, certificate) for certificate in certificates)


def decode_certificates(untrusted: bytes) -> tuple[bytes, ...]:
    """The reverse of encode_certificates, at most 16; the DER is not parsed. Raises CardFormatError."""
    items = decode_tlv(untrusted)
    if len(items) > MAX_PEER_CERTIFICATES or any(tag != _CERTIFICATE for tag, _ in items):
        raise CardFormatError("not a chain of certificates")
    return tuple(value for _, value in items)


def _single_items(items: list[tuple[int, bytes]], known: range) -> dict[int, bytes]:
    values = dict(items)
    if len(values) != len(items):
        raise CardFormatError("an item is repeated")
    if any(tag not in known for tag in values):
        raise CardFormatError("unknown item")
    return values


def _number(untrusted: bytes, size: int) -> int:
    if len(untrusted) != size:
        raise CardFormatError(f"a number must have {size} bytes")
    return int.from_bytes(untrusted)


def _numbers(untrusted: bytes) -> tuple[int, ...]:
    if len(untrusted) % 2:
        raise CardFormatError("a list of numbers has two bytes each")
    return tuple(int.from_bytes(untrusted[index : index + 2]) for index in range(0, len(untrusted), 2))


def _text(untrusted: bytes) -> str:
    try:
        return untrusted.decode("ascii")
    except UnicodeDecodeError:
        raise CardFormatError("text must be ASCII") from None


def _check_text(text: str, limit: int, what: str, *, may_be_empty: bool = False) -> None:
    if not text.isascii() or not text.isprintable() or len(text) > limit or not (text or may_be_empty):
        raise CardFormatError(f"the {what} must be printable ASCII of at most {limit} characters")
