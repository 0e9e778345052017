"""Protecting and opening single records (RFC 8446, 5.2; RFC 5246, 6.2.3; RFC 5288; RFC 7905; RFC 7366).

A :class:`RecordSealer` writes one direction, a :class:`RecordOpener` reads the other. Both work into memory of the caller, so that a
bulk transfer copies each byte once. Whatever is wrong with a record, opening it raises the one BadRecordMacError.
"""

from __future__ import annotations

import abc
import hashlib
import hmac
from collections.abc import Callable
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher as BlockCipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC

from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import TLS_1_3, Cipher, CipherSuite
from secfunet.tls.errors import BadRecordMacError, KeyUsageLimitError, RecordError
from secfunet.tls.key_schedule import DirectionKeys
from secfunet.tls.records import HEADER_LENGTH, MAX_PLAINTEXT, ContentType

MAX_SEQUENCE: Final = (1 << 64) - 1
"""A sequence number never wraps (RFC 8446, 5.3): this one is not used any more."""
TAG_LENGTH: Final = 16
MAX_EXPANSION: Final = HEADER_LENGTH + 16 + 48 + 256
"""No seal adds more than this to its content: header, IV or nonce, MAC, padding."""
_BLOCK: Final = 16
_APPLICATION_DATA: Final = int(ContentType.APPLICATION_DATA)

_Aead = AESGCM | ChaCha20Poly1305


def _aead(suite: CipherSuite, keys: DirectionKeys) -> _Aead:
    return AESGCM(keys.key) if suite.cipher is Cipher.AES_GCM else ChaCha20Poly1305(keys.key)


class RecordSealer(abc.ABC):
    """Protects the records of one direction, in order."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        """Number of the next record."""

    @abc.abstractmethod
    def seal_into(self, kind: int, content: memoryview | bytes, out: memoryview) -> int:
        """Write one record that holds ``content`` (at most 2^14 bytes) to the start of ``out``; return its length.

        ``out`` needs len(content) + MAX_EXPANSION bytes. Raises KeyUsageLimitError when the sequence numbers are used up.
        """

    def _next_sequence(self) -> int:
        sequence = self.sequence
        if sequence >= MAX_SEQUENCE:
            raise KeyUsageLimitError("the sequence numbers of this key are used up")
        self.sequence = sequence + 1
        return sequence


class RecordOpener(abc.ABC):
    """Opens the records of one direction, in order."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        """Number of the next record."""

    @abc.abstractmethod
    def open_into(self, record: memoryview, out: memoryview) -> tuple[int, int]:
        """Open one whole record; write its content to the start of ``out``; return content type and length.

        ``out`` needs as many bytes as the record has, and may be overwritten past the content. Raises BadRecordMacError, and
        RecordError(record_overflow) for more than 2^14 bytes of content, (unexpected_message) for TLS 1.3 content without a type.
        """

    def _next_sequence(self) -> int:
        sequence = self.sequence
        if sequence >= MAX_SEQUENCE:
            raise RecordError("the sequence numbers of this key are used up", AlertDescription.INTERNAL_ERROR)
        self.sequence = sequence + 1
        return sequence


def _overflow() -> RecordError:
    return RecordError("a record holds more than 2^14 bytes", AlertDescription.RECORD_OVERFLOW)


class _Tls13Sealer(RecordSealer):
    """TLSInnerPlaintext without padding, AEAD over the header (RFC 8446, 5.2)."""

    def __init__(self, suite: CipherSuite, keys: DirectionKeys, sequence: int) -> None:
        super().__init__(sequence)
        self._encrypt_into = _aead(suite, keys).encrypt_into
        self._iv = int.from_bytes(keys.iv, "big")
        # The AEAD wants content and type side by side; this is where they meet.
        self._inner = bytearray(MAX_PLAINTEXT + 1)
        self._inner_view = memoryview(self._inner)

    def seal_into(self, kind: int, content: memoryview | bytes, out: memoryview) -> int:
        size = len(content)
        self._inner[:size] = content
        self._inner[size] = kind
        length = size + 1 + TAG_LENGTH
        header = b"\x17\x03\x03" + length.to_bytes(2, "big")
        end = HEADER_LENGTH + length
        out[:HEADER_LENGTH] = header
        nonce = (self._iv ^ self._next_sequence()).to_bytes(12, "big")
        self._encrypt_into(nonce, self._inner_view[: size + 1], header, out[HEADER_LENGTH:end])
        return end


class _Tls13Opener(RecordOpener):
    def __init__(self, suite: CipherSuite, keys: DirectionKeys, sequence: int) -> None:
        super().__init__(sequence)
        self._decrypt_into = _aead(suite, keys).decrypt_into
        self._iv = int.from_bytes(keys.iv, "big")

    def open_into(self, record: memoryview, out: memoryview) -> tuple[int, int]:
        size = len(record) - HEADER_LENGTH - TAG_LENGTH
        if record[0] != _APPLICATION_DATA:
            raise RecordError("a record in clear after the handshake", AlertDescription.UNEXPECTED_MESSAGE)
        if size < 1:
            raise BadRecordMacError
        nonce = (self._iv ^ self._next_sequence()).to_bytes(12, "big")
        try:
            self._decrypt_into(nonce, record[HEADER_LENGTH:], bytes(record[:HEADER_LENGTH]), out[:size])
        except InvalidTag:
            raise BadRecordMacError from None
        if size > MAX_PLAINTEXT + 1:
            raise _overflow()  # type and padding count, too (RFC 8446, 5.4)
        last = size - 1
        kind = out[last]
        if not kind:
            # Padding: the type is the last byte that is not zero (RFC 8446, 5.4).
            inner = bytes(out[:size]).rstrip(b"\0")
            if not inner:
                raise RecordError("a record has no content type", AlertDescription.UNEXPECTED_MESSAGE)
            last, kind = len(inner) - 1, inner[-1]
        return kind, last


class _Tls12AeadSealer(RecordSealer):
    """AES-GCM with the sequence number as explicit nonce (RFC 5288), or ChaCha20-Poly1305 without one (RFC 7905)."""

    def __init__(self, suite: CipherSuite, keys: DirectionKeys, sequence: int) -> None:
        super().__init__(sequence)
        self._encrypt_into = _aead(suite, keys).encrypt_into
        self._explicit = suite.cipher is Cipher.AES_GCM
        self._salt = keys.iv
        self._iv = int.from_bytes(keys.iv, "big")

    def seal_into(self, kind: int, content: memoryview | bytes, out: memoryview) -> int:
        size = len(content)
        sequence = self._next_sequence()
        number = sequence.to_bytes(8, "big")
        if self._explicit:
            start = HEADER_LENGTH + 8
            out[HEADER_LENGTH:start] = number
            nonce = self._salt + number
        else:
            start = HEADER_LENGTH
            nonce = (self._iv ^ sequence).to_bytes(12, "big")
        end = start + size + TAG_LENGTH
        out[:HEADER_LENGTH] = bytes((kind, 3, 3)) + (end - HEADER_LENGTH).to_bytes(2, "big")
        aad = number + bytes((kind, 3, 3)) + size.to_bytes(2, "big")
        self._encrypt_into(nonce, content, aad, out[start:end])
        return end


class _Tls12AeadOpener(RecordOpener):
    def __init__(self, suite: CipherSuite, keys: DirectionKeys, sequence: int) -> None:
        super().__init__(sequence)
        self._decrypt_into = _aead(suite, keys).decrypt_into
        self._explicit = suite.cipher is Cipher.AES_GCM
        self._salt = keys.iv
        self._iv = int.from_bytes(keys.iv, "big")

    def open_into(self, record: memoryview, out: memoryview) -> tuple[int, int]:
        start = HEADER_LENGTH + (8 if self._explicit else 0)
        size = len(record) - start - TAG_LENGTH
        if size < 0:
            raise BadRecordMacError
        if size > MAX_PLAINTEXT:
            raise _overflow()
        sequence = self._next_sequence()
        kind = record[0]
        counted = (self._iv ^ sequence).to_bytes(12, "big")
        nonce = self._salt + bytes(record[HEADER_LENGTH:start]) if self._explicit else counted
        aad = sequence.to_bytes(8, "big") + bytes(record[:3]) + size.to_bytes(2, "big")
        try:
            self._decrypt_into(nonce, record[start:], aad, out[:size])
        except InvalidTag:
            raise BadRecordMacError from None
        return kind, size


def _mac_input(sequence: int, header: bytes, length: int) -> bytes:
    """seq_num, type, version, length: what an HMAC covers before the data (RFC 5246, 6.2.3.1)."""
    return sequence.to_bytes(8, "big") + header[:3] + length.to_bytes(2, "big")


class _CbcSealer(RecordSealer):
    """AES-CBC with a random explicit IV; MAC-then-encrypt (RFC 5246, 6.2.3.2) or encrypt-then-MAC (RFC 7366)."""

    def __init__(
        self,
        suite: CipherSuite,
        keys: DirectionKeys,
        sequence: int,
        encrypt_then_mac: bool,
        randbytes: Callable[[int], bytes],
    ) -> None:
        super().__init__(sequence)
        self._suite = suite
        self._keys = keys
        self._etm = encrypt_then_mac
        self._randbytes = randbytes

    def seal_into(self, kind: int, content: memoryview | bytes, out: memoryview) -> int:
        sequence = self._next_sequence()
        plain = bytes(content)
        start = bytes((kind, 3, 3))
        mac_key, mac_name = self._keys.mac_key, self._suite.mac_name
        if not self._etm:
            plain += hmac.digest(mac_key, _mac_input(sequence, start, len(plain)) + plain, mac_name)
        padding = _BLOCK - 1 - len(plain) % _BLOCK
        plain += bytes((padding,)) * (padding + 1)
        iv = self._randbytes(_BLOCK)
        encryptor = BlockCipher(AES(self._keys.key), CBC(iv)).encryptor()
        fragment = iv + encryptor.update(plain) + encryptor.finalize()
        if self._etm:
            fragment += hmac.digest(mac_key, _mac_input(sequence, start, len(fragment)) + fragment, mac_name)
        end = HEADER_LENGTH + len(fragment)
        out[:end] = start + len(fragment).to_bytes(2, "big") + fragment
        return end


class _CbcOpener(RecordOpener):
    def __init__(self, suite: CipherSuite, keys: DirectionKeys, sequence: int, encrypt_then_mac: bool) -> None:
        super().__init__(sequence)
        self._suite = suite
        self._keys = keys
        self._etm = encrypt_then_mac

    def _mac(self, data: bytes) -> bytes:
        return hmac.digest(self._keys.mac_key, data, self._suite.mac_name)

    def _decrypt(self, iv: bytes, ciphertext: bytes) -> bytes:
        decryptor = BlockCipher(AES(self._keys.key), CBC(iv)).decryptor()
        return decryptor.update(ciphertext) + decryptor.finalize()

    def open_into(self, record: memoryview, out: memoryview) -> tuple[int, int]:
        sequence = self._next_sequence()
        header = bytes(record[:HEADER_LENGTH])
        fragment = bytes(record[HEADER_LENGTH:])
        content = self._open_etm(sequence, header, fragment) if self._etm else self._open(sequence, header, fragment)
        if len(content) > MAX_PLAINTEXT:
            raise _overflow()
        out[: len(content)] = content
        return header[0], len(content)

    def _open_etm(self, sequence: int, header: bytes, fragment: bytes) -> bytes:
        size = len(fragment) - self._suite.mac_length
        if size < 2 * _BLOCK or size % _BLOCK:
            raise BadRecordMacError
        body, mac = fragment[:size], fragment[size:]
        if not hmac.compare_digest(self._mac(_mac_input(sequence, header, size) + body), mac):
            raise BadRecordMacError
        plain = self._decrypt(body[:_BLOCK], body[_BLOCK:])
        padding = plain[-1]
        if padding + 1 > len(plain) or plain[-padding - 1 :] != bytes((padding,)) * (padding + 1):
            raise BadRecordMacError
        return plain[: -padding - 1]

    def _open(self, sequence: int, header: bytes, fragment: bytes) -> bytes:
        """MAC-then-encrypt: padding and MAC are both computed whatever is found, and judged once (RFC 5246, 6.2.3.2).

        The dummy hashing levels the number of compression calls between long and short padding ("Lucky Thirteen"); Python gives
        no better than this, which is one reason why these suites need to be configured.
        """
        mac_length = self._suite.mac_length
        if len(fragment) < 2 * _BLOCK or len(fragment) % _BLOCK or len(fragment) - _BLOCK < mac_length + 1:
            raise BadRecordMacError
        plain = self._decrypt(fragment[:_BLOCK], fragment[_BLOCK:])
        longest = len(plain) - mac_length - 1
        padding = plain[-1]
        fits = padding <= longest
        padding = padding if fits else 0
        good_padding = hmac.compare_digest(plain[-padding - 1 :], bytes((padding,)) * (padding + 1)) & fits
        padding = padding if good_padding else 0
        size = longest - padding
        expected = self._mac(_mac_input(sequence, header, size) + plain[:size])
        block = hashlib.new(self._suite.mac_name).block_size
        self._mac(bytes(block * ((longest + 13 + 8) // block - (size + 13 + 8) // block)))
        good_mac = hmac.compare_digest(expected, plain[size : size + mac_length])
        if not (good_mac & good_padding):
            raise BadRecordMacError
        return plain[:size]


def make_sealer(
    suite: CipherSuite,
    keys: DirectionKeys,
    sequence: int,
    *,
    encrypt_then_mac: bool,
    randbytes: Callable[[int], bytes],
) -> RecordSealer:
    """Return what protects records of ``suite`` from number ``sequence`` on. ``randbytes`` gives the IVs of CBC."""
    if suite.version == TLS_1_3:
        return _Tls13Sealer(suite, keys, sequence)
    if suite.cipher is Cipher.AES_CBC:
        return _CbcSealer(suite, keys, sequence, encrypt_then_mac, randbytes)
    return _Tls12AeadSealer(suite, keys, sequence)


def make_opener(suite: CipherSuite, keys: DirectionKeys, sequence: int, *, encrypt_then_mac: bool) -> RecordOpener:
    """Return what opens records of ``suite`` from number ``sequence`` on."""
    if suite.version == TLS_1_3:
        return _Tls13Opener(suite, keys, sequence)
    if suite.cipher is Cipher.AES_CBC:
        return _CbcOpener(suite, keys, sequence, encrypt_then_mac)
    return _Tls12AeadOpener(suite, keys, sequence)
