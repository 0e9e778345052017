"""What protects each command and each answer of a session (Amendment D, 6.2.3 to 6.2.7).

A command's MAC is computed over the MAC of the command before it (16 bytes; at first zeros), the header with the secure messaging bit,
Lc as it is on the wire (with the MAC in it), and the data after encryption. An answer's MAC is computed over the same chaining value, the
data after encryption and the status word. Data are padded with 80 00.. and encrypted by AES-CBC; the IV is the encrypted number of the
command. Data that are empty are not encrypted (a peer that does so nevertheless is understood). Answers that report an error are not
protected.
"""

from __future__ import annotations

import hmac
from enum import IntEnum
from typing import Final

from secfunet.apdu import MAX_DATA, CommandApdu, ResponseApdu
from secfunet.scp03.errors import Scp03FormatError, Scp03SecurityError
from secfunet.scp03.keys import BLOCK, ScpMode, SessionKeys, cmac, decrypt_cbc, encrypt_cbc

SECURE_MESSAGING: Final = 0x04
"""Bit of CLA: the command is protected."""

_COMMAND_MAC, _COMMAND_ENCRYPTED, _ANSWER_MAC, _ANSWER_ENCRYPTED = 0x01, 0x02, 0x10, 0x20


class SecurityLevel(IntEnum):
    """P1 of EXTERNAL AUTHENTICATE: what each command and answer of the session has."""

    NONE = 0x00
    C_MAC = 0x01
    C_MAC_C_DEC = 0x03
    C_MAC_R_MAC = 0x11
    C_MAC_C_DEC_R_MAC = 0x13
    C_MAC_C_DEC_R_MAC_R_ENC = 0x33


class _Channel:
    """What both ends keep: keys, the chaining value, and the number of the command."""

    def __init__(self, keys: SessionKeys, level: SecurityLevel, mode: ScpMode, chaining_value: bytes) -> None:
        self._keys = keys
        self._level = level
        self._size = mode.value
        self._chaining_value = chaining_value
        self._counter = 0

    @property
    def level(self) -> SecurityLevel:
        """What the session protects."""
        return self._level

    @property
    def _has_command_mac(self) -> bool:
        return bool(self._level & _COMMAND_MAC)

    def _command_mac(self, header: bytes, data: bytes, *, extended: bool) -> bytes:
        """Moves the chaining value on; returns the MAC as it is sent."""
        self._chaining_value = command_mac(self._keys, self._chaining_value, header, data, self._size, extended)
        return self._chaining_value[: self._size]

    def _answer_mac(self, data: bytes, sw: int) -> bytes:
        return cmac(self._keys.rmac, self._chaining_value + data + sw.to_bytes(2))[: self._size]

    def _iv(self, *, answer: bool) -> bytes:
        block = bytes((0x80 if answer else 0x00,)) + self._counter.to_bytes(BLOCK - 1)
        return encrypt_cbc(self._keys.enc, bytes(BLOCK), block)

    def _encrypt(self, data: bytes, *, answer: bool) -> bytes:
        padded = data + b"\x80"
        return encrypt_cbc(self._keys.enc, self._iv(answer=answer), padded + bytes(-len(padded) % BLOCK))

    def _decrypt(self, untrusted: bytes, *, answer: bool) -> bytes:
        if len(untrusted) % BLOCK:
            raise Scp03SecurityError("encrypted data are whole blocks")
        plain = decrypt_cbc(self._keys.enc, self._iv(answer=answer), untrusted)
        data = plain.rstrip(b"\0")
        if len(plain) - len(data) >= BLOCK or not data.endswith(b"\x80"):
            raise Scp03SecurityError("wrong padding")
        return data[:-1]


def command_mac(
    keys: SessionKeys, chaining_value: bytes, header: bytes, data: bytes, size: int, extended: bool
) -> bytes:
    """The next chaining value (16 bytes), whose first ``size`` bytes are the MAC of a command; ``header``: CLA INS P1 P2."""
    length = len(data) + size
    lc = b"\0" + length.to_bytes(2) if extended or length > 255 else bytes((length,))
    return cmac(keys.mac, chaining_value + header + lc + data)


def header_of(command: CommandApdu) -> bytes:
    """CLA INS P1 P2."""
    return bytes((command.cla, command.ins, command.p1, command.p2))


class HostChannel(_Channel):
    """The administrator's end: protects commands, checks answers. One command after another, each answered before the next."""

    def wrap(self, command: CommandApdu) -> CommandApdu:
        """The command as it is sent. Raises Scp03FormatError if it is too long for that."""
        self._counter += 1
        if not self._has_command_mac:
            return command
        if len(command.data) > MAX_DATA - 2 * BLOCK:
            raise Scp03FormatError(f"{len(command.data)} bytes do not fit into a protected command")
        data = command.data
        if data and self._level & _COMMAND_ENCRYPTED:
            data = self._encrypt(data, answer=False)
        cla = command.cla | SECURE_MESSAGING
        # Lc on the wire may be extended for the sake of Le alone.
        draft = CommandApdu(cla, command.ins, command.p1, command.p2, data + bytes(self._size), command.le)
        mac = self._command_mac(header_of(draft), data, extended=draft.is_extended)
        return CommandApdu(cla, command.ins, command.p1, command.p2, data + mac, command.le)

    def unwrap(self, untrusted: ResponseApdu) -> ResponseApdu:
        """The answer to the last command. Raises Scp03SecurityError: it is not the card's, or not to this command."""
        if not self._level & _ANSWER_MAC or not _is_protected(untrusted.sw):
            if untrusted.data and not _is_protected(untrusted.sw):
                raise Scp03SecurityError("an error carries no data")
            return untrusted
        data, mac = untrusted.data[: -self._size], untrusted.data[-self._size :]
        if not hmac.compare_digest(mac, self._answer_mac(data, untrusted.sw)):
            raise Scp03SecurityError("the MAC of an answer is wrong")
        if data and self._level & _ANSWER_ENCRYPTED:
            data = self._decrypt(data, answer=True)
        return ResponseApdu(data, untrusted.sw)


class CardChannel(_Channel):
    """The card's end: checks commands, protects answers."""

    def unwrap(self, untrusted: CommandApdu, *, extended: bool = False) -> CommandApdu:
        """The command as it was meant, with the class of one that is not protected. ``extended``: Lc was so on the wire.

        Raises Scp03SecurityError; the channel is to be given up then.
        """
        if not self._has_command_mac:
            self._counter += 1
            return untrusted
        if not untrusted.cla & SECURE_MESSAGING or len(untrusted.data) < self._size:
            raise Scp03SecurityError("the command is not protected")
        data, mac = untrusted.data[: -self._size], untrusted.data[-self._size :]
        if not hmac.compare_digest(mac, self._command_mac(header_of(untrusted), data, extended=extended)):
            raise Scp03SecurityError("the MAC of a command is wrong")
        self._counter += 1
        if data and self._level & _COMMAND_ENCRYPTED:
            data = self._decrypt(data, answer=False)
        cla = untrusted.cla & ~SECURE_MESSAGING
        return CommandApdu(cla, untrusted.ins, untrusted.p1, untrusted.p2, data, untrusted.le)

    def wrap(self, data: bytes, sw: int = 0x9000) -> bytes:
        """The data of the answer as they are sent. Nothing protects an error, which has no data."""
        if not self._level & _ANSWER_MAC or not _is_protected(sw):
            return data
        if data and self._level & _ANSWER_ENCRYPTED:
            data = self._encrypt(data, answer=True)
        return data + self._answer_mac(data, sw)


def _is_protected(sw: int) -> bool:
    """Success and warnings are, errors are not (Amendment D, 6.2.5)."""
    return sw == 0x9000 or sw >> 8 in (0x62, 0x63)
