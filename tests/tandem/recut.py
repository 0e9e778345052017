"""A peer of Python's ssl module over memory BIOs, whose handshake messages are taken out of their records and put into others.

The secrets are in the peer's own key log. What comes out is the same handshake: joined, cut and padded as a test wants it, with data of any
record lengths behind it.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.tls.cipher_suites import Cipher, CipherSuite
from secfunet.tls.key_schedule import DirectionKeys, key_block_tls12, split_hand_over, traffic_keys
from secfunet.tls.protection import MAX_EXPANSION, RecordSealer, make_opener, make_sealer
from secfunet.tls.records import ContentType, encode_record, split_records
from tests.support.pki import CertificateAuthority, PrivateKey, key_pem

KINDS = ("p256", "p384", "rsa2048", "rsa4096")


def new_key(kind: str) -> PrivateKey:
    match kind:
        case "p256":
            return ec.generate_private_key(ec.SECP256R1())
        case "p384":
            return ec.generate_private_key(ec.SECP384R1())
        case _:
            return rsa.generate_private_key(65537, int(kind.removeprefix("rsa")))


class Identities:
    """Certificates and keys of peers as files, one for each kind of key."""

    def __init__(
        self,
        folder: Path,
        authority: CertificateAuthority,
        *,
        expired: bool = False,
        kinds: tuple[str, ...] = KINDS,
    ) -> None:
        self.folder = folder
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(authority.pem)
        for kind in kinds:
            key = new_key(kind)
            certificate = authority.issue(
                key.public_key(),
                kind,
                names=[x509.DNSName("localhost")],
                not_before=timedelta(hours=-2),
                not_after=timedelta(hours=-1 if expired else 1),
            )
            (folder / f"{kind}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
            (folder / f"{kind}.key").write_bytes(key_pem(key))

    def context(self, role: str, kind: str) -> ssl.SSLContext:
        """With a key log of its own, at ``context.keylog_filename``."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER)
        context.load_verify_locations(self.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self.folder / f"{kind}.pem", self.folder / f"{kind}.key")
        context.set_ciphers("ALL")
        context.keylog_filename = str(self.folder / f"{role}-{kind}-{os.urandom(4).hex()}.keys")
        return context


@dataclass
class Records:
    """How messages become records. ``cuts``: contents of so many bytes, again and again; ``padding``: zeros behind each (TLS 1.3)."""

    cuts: list[int]
    padding: list[int]

    def of(self, content: bytes) -> Iterable[tuple[bytes, int]]:
        offset = index = 0
        while offset < len(content):
            size = self.cuts[index % len(self.cuts)]
            yield content[offset : offset + size], self.padding[index % len(self.padding)]
            offset += size
            index += 1


class MemoryPeer:
    """One connection."""

    def __init__(self, context: ssl.SSLContext, role: str, session: ssl.SSLSession | None = None) -> None:
        self.role = role
        self.is_through = False
        self._log = Path(context.keylog_filename)
        self._log.write_bytes(b"")
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=role == "server",
            server_hostname="localhost" if role == "client" else None,
            session=session,
        )

    def step(self, data: bytes = b"") -> bytes:
        """Take what came, and return what is to be sent."""
        self.incoming.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.do_handshake()
            self.is_through = True
        return self.outgoing.read()

    def read(self, data: bytes = b"") -> bytes:
        self.incoming.write(data)
        got = b""
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self.tls.read(65536):
                got += piece
        return got

    def send(self, data: bytes) -> bytes:
        self.tls.write(data)
        return self.outgoing.read()

    def secret(self, label: str) -> bytes:
        for line in self._log.read_text().splitlines():
            name, _, rest = line.partition(" ")
            if name == label:
                return bytes.fromhex(rest.split()[1])
        raise AssertionError(f"{label} is not in the key log")

    def randoms(self, hello: bytes) -> tuple[bytes, bytes]:
        """Client's (of the key log) and server's (of its ServerHello record)."""
        line = next(line for line in self._log.read_text().splitlines() if line.startswith("CLIENT_RANDOM"))
        return bytes.fromhex(line.split()[1]), hello[11:43]


def reseal(sealer: RecordSealer, kind: int, content: bytes, padding: int = 0) -> bytes:
    """One record; ``padding``: zeros behind the type (TLS 1.3)."""
    if padding:
        content, kind = content + bytes((kind,)) + bytes(padding - 1), 0
    room = bytearray(len(content) + MAX_EXPANSION)
    with memoryview(room) as view:
        length = sealer.seal_into(kind, content, view)
    return bytes(room[:length])


class Recut:
    """Splits a peer's flight into its clear and its encrypted part, and protects the latter anew."""

    def __init__(
        self, peer: MemoryPeer, suite: CipherSuite, *, change: Callable[[bytes], bytes] = lambda content: content
    ) -> None:
        """``change``: what is done to the messages on the way."""
        self.peer = peer
        self.suite = suite
        self._change = change
        self._etm = suite.cipher is Cipher.AES_CBC  # both ends are OpenSSL's

    def _open(self, keys: DirectionKeys, records: list[bytes]) -> bytes:
        """The handshake messages of these records; anything else of a handshake is left out."""
        opener = make_opener(self.suite, keys, 0, encrypt_then_mac=self._etm)
        content = b""
        for record in records:
            room = bytearray(len(record))
            kind, size = opener.open_into(memoryview(record), memoryview(room))
            assert kind == ContentType.HANDSHAKE
            content += room[:size]
        return content

    def tls13(self, flight: bytes, how: Records) -> tuple[bytes, bytes]:
        """What is in clear (ServerHello, ChangeCipherSpec) and the rest, cut anew; tickets behind a server's Finished are not in it."""
        records = split_records(flight)
        clear = b"".join(record.raw for record in records if record.kind != ContentType.APPLICATION_DATA)
        encrypted = [record.raw for record in records if record.kind == ContentType.APPLICATION_DATA]
        content = self._open(self._handshake_keys(), encrypted)
        sealer = self.sealer13()
        return clear, b"".join(
            reseal(sealer, ContentType.HANDSHAKE, piece, pad) for piece, pad in how.of(self._change(content))
        )

    def _handshake_keys(self) -> DirectionKeys:
        return traffic_keys(self.suite, self.peer.secret(f"{self.peer.role.upper()}_HANDSHAKE_TRAFFIC_SECRET"))

    def sealer13(self) -> RecordSealer:
        """What protects the peer's handshake, from its first record on."""
        return make_sealer(self.suite, self._handshake_keys(), 0, encrypt_then_mac=False, randbytes=os.urandom)

    def data13(self, sizes: list[int]) -> tuple[bytes, bytes]:
        """Records of application data of these lengths, the first ones under the peer's application keys; and the data."""
        keys = traffic_keys(self.suite, self.peer.secret(f"{self.peer.role.upper()}_TRAFFIC_SECRET_0"))
        return self._data(make_sealer(self.suite, keys, 0, encrypt_then_mac=self._etm, randbytes=os.urandom), sizes)

    @staticmethod
    def _data(sealer: RecordSealer, sizes: list[int]) -> tuple[bytes, bytes]:
        data = [os.urandom(size) for size in sizes]
        return b"".join(reseal(sealer, ContentType.APPLICATION_DATA, piece) for piece in data), b"".join(data)

    def keys12(self, hello: bytes) -> DirectionKeys:
        """The peer's write keys; ``hello``: the server's ServerHello record."""
        randoms = self.peer.randoms(hello)
        block = key_block_tls12(self.suite, self.peer.secret("CLIENT_RANDOM"), *randoms)
        return split_hand_over(self.suite, block)[self.peer.role == "server"]

    def clear12(self, flight: bytes, how: Records) -> bytes:
        """Messages in clear, cut anew; ChangeCipherSpec and what follows it stays."""
        content, rest = b"", b""
        for record in split_records(flight):
            if record.kind == ContentType.HANDSHAKE and not rest:
                content += record.fragment
            else:
                rest += record.raw
        return (
            b"".join(encode_record(ContentType.HANDSHAKE, piece) for piece, _ in how.of(self._change(content))) + rest
        )

    def finished12(self, flight: bytes, hello: bytes, how: Records, sizes: list[int]) -> tuple[bytes, bytes, bytes]:
        """The flight with its Finished cut anew, records of data behind it, and the data."""
        keys = self.keys12(hello)
        *before, last = split_records(flight)
        sealer = make_sealer(self.suite, keys, 0, encrypt_then_mac=self._etm, randbytes=os.urandom)
        finished = [reseal(sealer, ContentType.HANDSHAKE, piece) for piece, _ in how.of(self._open(keys, [last.raw]))]
        records, data = self._data(sealer, sizes)
        return b"".join(record.raw for record in before) + b"".join(finished), records, data
