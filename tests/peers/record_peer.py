"""A TLS client of tlslite-ng whose records are under control: each one can be changed, cut, doubled or left out before it is protected."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tlslite.api import X509, HandshakeSettings, TLSConnection, X509CertChain, parsePEMKey
from tlslite.errors import TLSAbruptCloseError, TLSLocalAlert, TLSRemoteAlert
from tlslite.messages import Message

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, DATA = 20, 21, 22, 23
CERTIFICATE, CERTIFICATE_VERIFY, FINISHED = 11, 15, 20
TLS_1_2: Final = (3, 3)
TLS_1_3: Final = (3, 4)
PATIENCE: Final = 20.0

Record = tuple[int, bytes]
Bend = Callable[[int, bytes], list[Record]]
"""What is sent in place of a record: content type and content, before protection."""


class Closed(Exception):
    """The client closed where it was told to."""


@dataclass
class Wire:
    """A socket that remembers what came, and sends what waits when something is to be read: a flight is whole before it is refused."""

    socket: socket.socket
    received: bytearray = field(default_factory=bytearray)
    waiting: bytearray = field(default_factory=bytearray)

    def send(self, data: bytes) -> int:
        self.waiting += data
        return len(data)

    def sendall(self, data: bytes) -> None:
        self.waiting += data

    def flush(self) -> None:
        waiting, self.waiting = self.waiting, bytearray()
        if waiting:
            self.socket.sendall(waiting)

    def recv(self, size: int) -> bytes:
        self.flush()
        data = self.socket.recv(size)
        self.received += data
        return data

    def close(self) -> None:
        """The test closes."""

    def drain(self) -> None:
        """Reads to the end; a reset is one."""
        try:
            while self.recv(65536):
                pass
        except ConnectionError:
            pass

    @property
    def records(self) -> list[tuple[int, int]]:
        """Content type and length of each record that came."""
        found, at = [], 0
        while at + 5 <= len(self.received):
            length = int.from_bytes(self.received[at + 3 : at + 5])
            found.append((self.received[at], length))
            at += 5 + length
        return found


class RecordPeer:
    """One connection to a port of loopback."""

    def __init__(self, port: int, version: tuple[int, int], files: tuple[Path, Path] | None) -> None:
        self.wire = Wire(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        self.tls: Any = TLSConnection(self.wire)
        self.tls.closeSocket = False
        self.settings = HandshakeSettings()
        self.settings.minVersion = self.settings.maxVersion = version
        # It compresses its certificate whether or not the server has offered that (RFC 8879, 4).
        self.settings.certificate_compression_send = []
        self._files = files
        self.sent: list[Record] = []
        self.bend: Bend = lambda kind, content: [(kind, content)]
        layer = self.tls._recordLayer
        send = layer.sendRecord

        def send_bent(message: Any) -> Iterator[Any]:
            for kind, content in self.bend(message.contentType, bytes(message.write())):
                self.sent.append((kind, content))
                yield from send(Message(kind, bytearray(content)))

        layer.sendRecord = send_bent

    def shake_hands(self) -> None:
        """Raises TLSRemoteAlert, TLSAbruptCloseError, Closed. A client of TLS 1.3 is done before the server has looked at its flight."""
        chain = key = None
        if self._files is not None:
            certificate = X509()
            certificate.parse(self._files[0].read_text())
            chain, key = X509CertChain([certificate]), parsePEMKey(self._files[1].read_text(), private=True)
        self.tls.handshakeClientCert(chain, key, settings=self.settings, serverName="localhost")

    def put(self, kind: int, content: bytes) -> None:
        """Sends a record, protected as the connection is now."""
        for _ in self.tls._recordLayer.sendRecord(Message(kind, bytearray(content))):
            pass
        self.flush()

    def flush(self) -> None:
        """Sends what waits."""
        self.tls.sock.flush()
        self.wire.flush()

    def echo(self, data: bytes) -> bytes:
        """Data there and back."""
        self.tls.write(data)
        return bytes(self.tls.read(max=len(data), min=len(data)))

    def alert(self) -> str:
        """The name of the alert with which the server ends the connection; "" if it ends otherwise."""
        try:
            self.tls.read(max=1, min=1)
        except TLSRemoteAlert as error:
            return str(error).partition(":")[0]
        except (TLSAbruptCloseError, TLSLocalAlert, ConnectionError):
            pass
        return ""

    def close(self) -> None:
        self.wire.socket.close()


def messages(content: bytes) -> list[tuple[int, bytes]]:
    """The handshake messages of a record, each with its header; a record of several is what tlslite joins."""
    found, at = [], 0
    while at + 4 <= len(content):
        end = at + 4 + int.from_bytes(content[at + 1 : at + 4])
        found.append((content[at], content[at:end]))
        at = end
    return found
