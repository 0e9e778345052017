"""Reads out of the passing flights what a handshake became and OpenSSL does not tell: suite number and encrypt-then-MAC."""

from __future__ import annotations

from typing import Final

from secfunet.tls.errors import TlsError
from secfunet.tls.handshake import HandshakeReader, HandshakeType, parse_server_hello
from secfunet.tls.records import HEADER_LENGTH, ContentType

_EXTENSION_ENCRYPT_THEN_MAC: Final = 22


class ServerHelloWatcher:
    """Follows the server's records up to its ServerHello. What it cannot read it leaves to OpenSSL, which refuses it."""

    def __init__(self) -> None:
        self._messages: HandshakeReader | None = HandshakeReader()
        self.version = 0
        self.suite = 0
        self.encrypt_then_mac = False

    def feed(self, untrusted_records: bytes) -> None:
        """Take whole records of the server, in order."""
        offset = 0
        while self._messages is not None and offset + HEADER_LENGTH <= len(untrusted_records):
            end = offset + HEADER_LENGTH + int.from_bytes(untrusted_records[offset + 3 : offset + 5])
            if untrusted_records[offset] == ContentType.HANDSHAKE:
                self._read(self._messages, untrusted_records[offset + HEADER_LENGTH : end])
            offset = end

    def _read(self, messages: HandshakeReader, fragment: bytes) -> None:
        try:
            for kind, body in messages.feed(fragment):
                if kind == HandshakeType.SERVER_HELLO and self._server_hello(body):
                    self._messages = None
                    return
        except TlsError:
            self._messages = None

    def _server_hello(self, body: bytes) -> bool:
        hello = parse_server_hello(body)
        if hello.is_retry:
            return False
        self.version, self.suite = hello.version, hello.suite
        self.encrypt_then_mac = _EXTENSION_ENCRYPT_THEN_MAC in _extensions(body)
        return True


def _extensions(body: bytes) -> set[int]:
    """The extensions of a ServerHello that was parsed before: version 2, random 32, session id, suite 2, compression 1, extensions."""
    offset = 34 + 1 + body[34] + 3 + 2
    found = set()
    while offset + 4 <= len(body):
        found.add(int.from_bytes(body[offset : offset + 2]))
        offset += 4 + int.from_bytes(body[offset + 2 : offset + 4])
    return found
