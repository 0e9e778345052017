"""The issuer security domain (GlobalPlatform Card Specification 2.3.1, 11): its administrators' keys, and what the card says of itself.

It loads no code: a card of this kind has its one applet from the beginning. GET DATA answers anybody; the rest needs the secure channel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from secfunet.apdu import CommandApdu
from secfunet.card.ber import Element, decode_elements, encode_element
from secfunet.card.errors import CardFormatError
from secfunet.card.instructions import AID, AID_OF_DOMAIN, Cla, DomainIns
from secfunet.scp03 import KeySet, PutKey, Scp03Error
from secfunet.scp03.handshake import I_RANDOM_R_MAC_R_ENC
from secfunet.scp03.put_key import FIRST_OF_SEVERAL, KEY_TYPE_AES
from secure_element.errors import CommandRefusedError, Sw
from secure_element.secure_channel import SecureChannel
from secure_element.store import CardStore, DomainRecord

log = logging.getLogger(__name__)

MAX_KEY_SETS: Final = 4
MAX_DATA: Final = 255
"""Bytes of one element that STORE DATA keeps."""

ISSUER_NUMBER, CARD_NUMBER = 0x42, 0x45
STORABLE: Final = frozenset((ISSUER_NUMBER, CARD_NUMBER))
"""Issuer identification number and card image number (Card Specification, 7.4.1)."""

_AID_TAG, _LIFE_CYCLE, _PRIVILEGES, _ENTRY, _KEY_IDENTIFIER, _KEY_VERSION = 0x4F, 0x9F70, 0xC5, 0xE3, 0xD0, 0xD2
_KEY_INFORMATION, _ONE_KEY, _RECOGNITION = 0xE0, 0xC0, 0x66
_DOMAINS, _APPLICATIONS, _OTHERS = 0x80, 0x40, (0x20, 0x10)
_TLV_FORMAT, _LAST_BLOCK_BER, _DELETE_LAST = 0x02, 0x90, 0x01
_SECURED, _SELECTABLE = b"\x0f", b"\x07"
_OID: Final = bytes.fromhex("2A864886FC6B")
"""1.2.840.114283: GlobalPlatform."""


class SecurityDomain:
    """The handlers of its commands; who may give them was looked at before."""

    def __init__(self, store: CardStore, channel: SecureChannel) -> None:
        self._store = store
        self._channel = channel
        self.handlers: dict[tuple[int, int], Callable[[CommandApdu], bytes]] = {
            (Cla.ISO, DomainIns.GET_DATA): self._get_data,
            (Cla.KEYS, DomainIns.GET_DATA): self._get_data,
            (Cla.KEYS, DomainIns.PUT_KEY): self._put_key,
            (Cla.ISO, DomainIns.STORE_DATA): self._store_data,
            (Cla.KEYS, DomainIns.STORE_DATA): self._store_data,
            (Cla.KEYS, DomainIns.GET_STATUS): self._get_status,
            (Cla.KEYS, DomainIns.DELETE): self._delete,
        }

    @staticmethod
    def select() -> bytes:
        """File control information: the AID, and the longest command (9F65)."""
        proprietary = encode_element(0xA5, encode_element(0x9F65, b"\xff"))
        return encode_element(0x6F, encode_element(0x84, AID_OF_DOMAIN) + proprietary)

    # Keys

    def _put_key(self, command: CommandApdu) -> bytes:
        """P1: the version that is replaced, 00: none is."""
        if command.p2 != FIRST_OF_SEVERAL:
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        try:
            new = PutKey.decode(command.data, self._channel.keys.dek)
        except Scp03Error:
            raise CommandRefusedError(Sw.WRONG_DATA) from None
        sets = self._domain.key_sets
        if command.p1 and command.p1 not in sets:
            raise CommandRefusedError(Sw.NOT_FOUND)
        kept = {version: keys for version, keys in sets.items() if version != command.p1}
        if new.version in kept:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)  # another one's place
        if len(kept) >= MAX_KEY_SETS:
            raise CommandRefusedError(Sw.FULL)
        self._write(replace(self._domain, key_sets={**kept, new.version: new.keys}))
        log.info("key set loaded", extra={"key_version": new.version, "replaced": command.p1 or None})
        return new.receipt

    def _delete(self, command: CommandApdu) -> bytes:
        """A key set by its version. Never the last one: nobody could administer the card any more."""
        if command.p1 != 0 or command.p2 not in (0, _DELETE_LAST):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        elements = _elements(command.data)
        if {element.tag for element in elements} & {_AID_TAG, _KEY_IDENTIFIER}:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)  # applets stay, and keys come and go by threes
        if len(elements) != 1 or elements[0].tag != _KEY_VERSION or len(elements[0].value) != 1:
            raise CommandRefusedError(Sw.WRONG_DATA)
        version = elements[0].value[0]
        sets: dict[int, KeySet] = dict(self._domain.key_sets)
        if sets.pop(version, None) is None:
            raise CommandRefusedError(Sw.NOT_FOUND)
        if not sets:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        self._write(replace(self._domain, key_sets=sets))
        log.info("key set deleted", extra={"key_version": version})
        return b""

    # What it says, and is told to say

    def _store_data(self, command: CommandApdu) -> bytes:
        """One block of BER elements; an empty value takes one away."""
        if (command.p1, command.p2) != (_LAST_BLOCK_BER, 0):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        elements = _elements(command.data)
        if not elements or any(one.tag not in STORABLE or len(one.value) > MAX_DATA for one in elements):
            raise CommandRefusedError(Sw.WRONG_DATA)
        data = {**self._domain.data, **{element.tag: element.value for element in elements}}
        self._write(replace(self._domain, data={tag: value for tag, value in data.items() if value}))
        return b""

    def _get_data(self, command: CommandApdu) -> bytes:
        """Class 80: the element (GlobalPlatform); class 00: only its value (ISO 7816-4, 11.4.3)."""
        tag = command.p1 << 8 | command.p2
        value = self._element(tag)
        return value if command.cla == Cla.ISO else encode_element(tag, value)

    def _element(self, tag: int) -> bytes:
        if tag == _KEY_INFORMATION:
            return b"".join(
                encode_element(_ONE_KEY, bytes((identifier, version, KEY_TYPE_AES, len(keys.enc))))
                for version, keys in self._domain.key_sets.items()
                for identifier in (1, 2, 3)
            )
        if tag == _RECOGNITION:
            oids = ((0x60, "02020301"), (0x63, "03"), (0x64, f"0403{I_RANDOM_R_MAC_R_ENC:02x}"))
            inner = encode_element(0x06, _OID + b"\1")
            for outer, oid in oids:
                inner += encode_element(outer, encode_element(0x06, _OID + bytes.fromhex(oid)))
            return encode_element(0x73, inner)
        value = self._domain.data.get(tag)
        if value is None:
            raise CommandRefusedError(Sw.NOT_FOUND)
        return value

    def _get_status(self, command: CommandApdu) -> bytes:
        """P1: 80 this domain, 40 applications, 20 and 10 load files (none); P2 02: as elements. Data: 4F, an AID or its beginning."""
        if command.p2 != _TLV_FORMAT or command.p1 not in (_DOMAINS, _APPLICATIONS, *_OTHERS):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        elements = _elements(command.data)
        if len(elements) != 1 or elements[0].tag != _AID_TAG:
            raise CommandRefusedError(Sw.WRONG_DATA)
        entries = {
            _DOMAINS: (AID_OF_DOMAIN, _SECURED, b"\x80\0\0"),
            _APPLICATIONS: (AID, _SELECTABLE, b"\0\0\0"),
        }
        entry = entries.get(command.p1)
        if entry is None or not entry[0].startswith(elements[0].value):
            raise CommandRefusedError(Sw.NOT_FOUND)
        parts = zip((_AID_TAG, _LIFE_CYCLE, _PRIVILEGES), entry, strict=True)
        return encode_element(_ENTRY, b"".join(encode_element(tag, value) for tag, value in parts))

    @property
    def _domain(self) -> DomainRecord:
        return self._store.contents.domain

    def _write(self, domain: DomainRecord) -> None:
        self._store.replace(replace(self._store.contents, domain=domain))


def _elements(untrusted: bytes) -> list[Element]:
    try:
        return decode_elements(untrusted)
    except CardFormatError:
        raise CommandRefusedError(Sw.WRONG_DATA) from None
