"""A guest that speaks HTTP/2 by hand: it begins requests that it never ends."""

from __future__ import annotations

import socket
import ssl
import struct
import tempfile
from types import TracebackType

from secfunet.identity import pem_of
from tests.dom0_middleware.world import Guest, pem_key

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
ACK, END_HEADERS = 1, 4


def _literal(name: str, value: str) -> bytes:
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def _frame(kind: int, flags: int, stream: int, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


class RawConnection:
    """Blocking: for a thread. ``ended``: the streams that the server has ended."""

    def __init__(self, guest: Guest, *, address: str | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        with tempfile.NamedTemporaryFile() as pair:
            pair.write(pem_key(guest.key) + pem_of(guest.certificate))
            pair.flush()
            context.load_cert_chain(pair.name)
        raw = socket.socket(socket.AF_UNIX)
        raw.connect((address or guest.join["agent"]).removeprefix("unix:"))
        self._tls = context.wrap_socket(raw, server_hostname="secure-middleware")
        self._tls.settimeout(0.2)
        self._tls.sendall(PREFACE + _frame(SETTINGS, 0, 0))
        self._buffer = b""
        self.ended: set[int] = set()
        self.closed = False

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tls.close()

    def begin(self, stream: int, path: str, part: bytes) -> None:
        """The head of a call, and the first ``part`` of its message."""
        headers = (
            (":method", "POST"),
            (":scheme", "https"),
            (":path", path),
            (":authority", "secure-middleware"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        )
        self._tls.sendall(_frame(HEADERS, END_HEADERS, stream, b"".join(_literal(*one) for one in headers)))
        self._tls.sendall(_frame(DATA, 0, stream, part))

    def give_up(self, stream: int) -> None:
        self._tls.sendall(_frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))

    def listen(self) -> None:
        """Reads what is there, for a moment."""
        try:
            data = self._tls.recv(65536)
        except (TimeoutError, ssl.SSLWantReadError):
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
        self._buffer += data
        while len(self._buffer) >= 9 and len(self._buffer) >= (size := 9 + int.from_bytes(self._buffer[:3], "big")):
            frame, self._buffer = self._buffer[:size], self._buffer[size:]
            kind, flags, stream = frame[3], frame[4], int.from_bytes(frame[5:9], "big")
            if kind == SETTINGS and not flags & ACK:
                self._tls.sendall(_frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self._tls.sendall(_frame(PING, ACK, 0, frame[9:]))
            elif kind in (HEADERS, RST_STREAM):
                self.ended.add(stream)
            elif kind == GOAWAY:
                self.closed = True


def unfinished(size: int) -> bytes:
    """The first bytes of a message of ``size`` bytes, of which the last is never sent."""
    return struct.pack(">BI", 0, size) + b"\x0a" + bytes(min(size, 8192) - 2)
