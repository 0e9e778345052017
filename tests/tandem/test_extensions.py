"""The handshake is OpenSSL's and the records are ours: what the card agrees on about records is kept, and nothing else is agreed on."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from secfunet.tandem.aio import start_tandem_server
from secfunet.tandem.connection import TandemConnection
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.handshake import HandshakeReader, HandshakeType
from secfunet.tls.key_schedule import traffic_keys
from secfunet.tls.protection import make_opener
from secfunet.tls.records import ContentType, encode_record, split_records
from secfunet.tls.stream import HandOver, ProtectedStream
from secure_element.tls_stack import TlsStack
from tests.support.pki import CertificateAuthority
from tests.tandem.conftest import Pools
from tests.tandem.engine_card import EngineCard, Host
from tests.tandem.peers import Files, program, read_until
from tests.tandem.test_attacks import until
from tests.tandem.test_both_ends import VERSIONS, Echo, only, port_of

FLAG = {TLS_1_2: "-tls1_2", TLS_1_3: "-tls1_3"}
AUTHORITY = CertificateAuthority()
EVERYTHING = {
    1: b"\x02",  # max_fragment_length: 1024
    5: b"\x01\0\0\0\0",  # status_request
    15: b"\x01",  # heartbeat
    18: b"",  # signed_certificate_timestamp
    19: b"\x01\0",  # client_certificate_type: X.509
    20: b"\x01\0",  # server_certificate_type
    27: b"\x02\0\x02",  # compress_certificate: brotli
    28: b"\x04\0",  # record_size_limit: 1024
    42: b"",  # early_data
    49: b"",  # post_handshake_auth
    13172: b"",  # next_protocol_negotiation
}
"""What the peers of this test offer beside what they offer anyway."""


@VERSIONS
@pytest.mark.parametrize("length", [512, 1024, 2048, 4096])
async def test_max_fragment_length_is_kept(
    pools: Pools, files: Files, tmp_path: Path, version: int, length: int
) -> None:
    """RFC 6066, 4: full and resumed."""
    certificate, key = files.leaf(server=False)
    session = tmp_path / "session.pem"
    text = b"a" * 30_000 + b"\n"
    options = ("-cert", certificate, "-key", key, "-CAfile", files.ca, "-servername", "localhost", FLAG[version])
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", parameters=only(version)) as listener:
        target = ("-connect", f"127.0.0.1:{port_of(listener)}", "-sess_out", session)
        asked = ("-maxfraglen", str(length))
        for more in (asked, ("-sess_in", session, *asked)):
            async with program(
                "openssl", "s_client", *target, *options, *more, "-quiet", stderr=asyncio.subprocess.DEVNULL
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(text)
                await process.stdin.drain()
                output = await read_until(process.stdout, b"\n")
                assert output == text.upper()
                negotiated = [connection.core.negotiated for connection in listener.connections][-1]
                assert negotiated is not None
                assert (negotiated.max_fragment, negotiated.resumed) == (length, "-sess_in" in more)
            await until(lambda: not listener.connections)
        assert listener.handshakes_failed == 0


@pytest.mark.parametrize("suite", [0x1301, 0xC02B, 0xC009])
def test_no_record_holds_more_than_was_agreed(suite: int) -> None:
    chosen = SUITES[suite]
    size = 2 * chosen.hash_length if chosen.version == TLS_1_3 else chosen.key_block_length
    hand_over = HandOver(chosen, os.urandom(size), 0, 0, encrypt_then_mac=True, max_fragment=512)
    client, server = ProtectedStream("client", hand_over), ProtectedStream("server", hand_over)
    data = os.urandom(10_000)
    records = split_records(bytes(client.seal(data)))
    assert len(records) == 20
    assert all(record.length <= 512 + 80 for record in records)
    got = b""
    for record in records:
        server.incoming.feed(record.raw)
        got += server.receive()
    assert got == data


def _with_extensions(hello: bytes, more: dict[int, bytes]) -> bytes:
    """A ClientHello's record with further extensions."""
    body = hello[9:]
    offset = 34
    offset += 1 + body[offset]
    offset += 2 + int.from_bytes(body[offset : offset + 2])
    offset += 1 + body[offset]
    extensions = body[offset + 2 :]
    added = b"".join(
        number.to_bytes(2) + len(value).to_bytes(2) + value
        for number, value in more.items()
        if number not in dict(_extensions(extensions))
    )
    extensions = added + extensions
    body = body[:offset] + len(extensions).to_bytes(2) + extensions
    return encode_record(ContentType.HANDSHAKE, b"\x01" + len(body).to_bytes(3) + body, 0x0301)


def _extensions(block: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < len(block):
        end = offset + 4 + int.from_bytes(block[offset + 2 : offset + 4])
        yield int.from_bytes(block[offset : offset + 2]), block[offset + 4 : end]
        offset = end


def _offer(version: int) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_3 if version == TLS_1_3 else ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    outgoing = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return _with_extensions(outgoing.read(), EVERYTHING)


def _server_hello_extensions(records: list[bytes]) -> set[int]:
    reader = HandshakeReader()
    for record in records:
        for kind, body in reader.feed(record):
            if kind == HandshakeType.SERVER_HELLO:
                offset = 34 + 1 + body[34] + 3
                return {number for number, _ in _extensions(body[offset + 2 :])}
    raise AssertionError("no ServerHello")


@VERSIONS
def test_these_extensions_are_agreed_on_and_no_others(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is added to this list must reach the record layer: a new OpenSSL that agrees on more shows here."""
    secrets: dict[str, bytes] = {}
    logged = TlsStack.key_logged

    def spy(stack: TlsStack, line: bytes) -> None:
        label, _, rest = line.decode().partition(" ")
        secrets[label] = bytes.fromhex(rest.split()[1])
        logged(stack, line)

    monkeypatch.setattr(TlsStack, "key_logged", spy)
    host = Host(TandemConnection("server", only(version, alpn=("h2",))), EngineCard(AUTHORITY))
    host.core.incoming.feed(_offer(version))
    host.core.received()
    records = split_records(host.work())
    clear = [record.fragment for record in records if record.kind == ContentType.HANDSHAKE]
    agreed = _server_hello_extensions(clear)
    if version == TLS_1_2:
        # max_fragment_length, ec_point_formats, ALPN, extended_master_secret, renegotiation_info.
        assert agreed == {1, 11, 16, 23, 0xFF01}
        return
    assert agreed == {43, 51}  # supported_versions, key_share
    suite = SUITES[int.from_bytes(clear[0][4 + 35 + clear[0][4 + 34] :][:2])]
    keys = traffic_keys(suite, secrets["SERVER_HANDSHAKE_TRAFFIC_SECRET"])
    opener = make_opener(suite, keys, 0, encrypt_then_mac=False)
    content = b""
    for record in records:
        if record.kind == ContentType.APPLICATION_DATA and not content:
            room = bytearray(len(record.raw))
            _, size = opener.open_into(memoryview(record.raw), memoryview(room))
            content = bytes(room[:size])
    ((kind, body), *_) = HandshakeReader().feed(content)
    assert kind == HandshakeType.ENCRYPTED_EXTENSIONS
    # max_fragment_length and ALPN.
    assert {number for number, _ in _extensions(body[2:])} == {1, 16}
