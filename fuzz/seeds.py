"""Real messages for the corpus, made by the product's own ends. Certificates and keys in them are new each time; they are worth nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

SEEDS: dict[str, Callable[[], Iterable[bytes]]] = {}


def seeds(make: Callable[[], Iterable[bytes]]) -> Callable[[], Iterable[bytes]]:
    """Registers what a target's corpus begins with, under the target's name."""
    SEEDS[make.__name__.replace("_", "-")] = make
    return make


def chosen(index: int, content: bytes) -> bytes:
    """For a target that has several parsers."""
    return bytes((index,)) + content


def talk(pieces: Sequence[bytes]) -> bytes:
    """A conversation: each piece behind its length."""
    return b"".join(len(piece).to_bytes(2) + piece for piece in pieces)


def authority() -> tuple[bytes, bytes]:
    """A CA's certificate and one that it issued, both DER."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding

    from tests.support.pki import CertificateAuthority

    made = CertificateAuthority("Fuzz CA")
    issued = made.issue(ec.generate_private_key(ec.SECP256R1()).public_key(), "web")
    return made.der, issued.public_bytes(Encoding.DER)


@seeds
def apdu() -> Iterable[bytes]:
    for command in (
        "00A4040006A00000003001",
        "0020000008303030302020202020",
        "00C00000FF",
        "00B0000000000000",
        "80100200",
    ):
        yield chosen(0, bytes.fromhex(command))
    yield chosen(0, bytes.fromhex("80100000000005") + bytes(5) + b"\0\0")
    yield chosen(1, b"answer\x90\x00")
    yield chosen(1, b"\x63\xc2")


@seeds
def card_objects() -> Iterable[bytes]:
    from secfunet.card.binding import SealedAnswer, SealedOperation, SealRequest
    from secfunet.card.instructions import KeyOperation
    from secfunet.card.parameters import NegotiatedTls, TlsParameters, encode_certificates
    from secfunet.card.profile import CardProfile
    from secfunet.card.tlv import encode_tlv

    ca, certificate = authority()
    yield chosen(0, encode_tlv([(1, b"one"), (2, b"")]))
    yield chosen(1, CardProfile(b"web", (certificate,), (ca,)).encode())
    yield chosen(
        2, TlsParameters(role="server", server_name="grid.example.org", alpn=("h2",), suites=(0x1301,)).encode()
    )
    yield chosen(3, NegotiatedTls(0x0304, 0x1301, False, True, 0, 1, "h2").encode())
    yield chosen(4, encode_certificates((ca, certificate)))
    yield chosen(5, CardProfile(b"web", (certificate,), (ca,)).encode())
    operation = SealedOperation(KeyOperation.SIGN, 1, bytes(16), bytes(32))
    yield chosen(6, SealRequest(1_800_000_000, (operation,)).encode())
    yield chosen(7, SealedAnswer(bytes(200), ((bytes(16), 0x6A80),)).encode())


@seeds
def card() -> Iterable[bytes]:
    """What real clients say to a card: selection, PIN, operations, the start of an EAP-TLS handshake."""
    from secfunet.card import CardClient, KeyAlgorithm
    from secfunet.card.client import pad_pin
    from secfunet.gose.v1 import operation_pb2
    from tests.support.local_card import USER_PIN, LocalPort, administrator_client, new_store, personalised
    from tests.support.pki import CertificateAuthority

    async def conversations() -> list[bytes]:
        with tempfile.TemporaryDirectory() as folder:
            made = await personalised(
                new_store(Path(folder)), CertificateAuthority("Fuzz CA"), ("web", KeyAlgorithm.P_256)
            )
            port = LocalPort(made)
            client = CardClient(port)
            await client.select()
            await client.verify_pin(USER_PIN)
            await client.set_identity("web")
            await client.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, os.urandom(32))
            commands = [command for command, _ in port.exchanges]
            administrator = await administrator_client(made)
            await administrator.certificate_signing_request("web", "web")
            eap = [bytes.fromhex("A08000000501010005" + "01"), bytes.fromhex("A0800000060102000601" + "20")]
            return [
                b"\0" + talk(commands),
                b"\1" + talk(commands[2:]),
                b"\1" + talk(eap),
                b"\0" + talk([commands[0], b"\x00\x20\x00\x00\x08" + pad_pin(b"9999")]),
                b"\xff" + talk([len(commands[0]).to_bytes(2) + commands[0]]),
            ]

    return asyncio.run(conversations())


@seeds
def scp03() -> Iterable[bytes]:
    from fuzz.targets import KEY
    from secfunet.apdu import CommandApdu
    from secfunet.scp03 import HostHandshake, KeySet
    from secfunet.scp03.handshake import CardHandshake
    from secfunet.scp03.put_key import PutKey

    keys = KeySet(KEY, KEY, KEY)
    at_card = CardHandshake(keys, 1, b"key data..", bytes(8), bytes(8))
    answer = at_card.answer.encode()
    host = HostHandshake(keys, bytes(8))
    command = host.authenticate(answer)
    channel = at_card.authenticate(command)
    wrapped = host.channel.wrap(CommandApdu(0x80, 0xF2, 0x20, 0x02, b"O\0"))
    channel.unwrap(wrapped)
    yield chosen(0, answer)
    yield chosen(1, PutKey(1, keys).encode(KEY))
    yield chosen(2, talk([answer, channel.wrap(b"status") + b"\x90\x00"]))
    yield chosen(3, talk([command.encode(), wrapped.encode()]))


@seeds
def pcsc() -> Iterable[bytes]:
    from secfunet.pcsc.frames import Frame, Kind, ReaderSeen, encode_readers

    readers = encode_readers((ReaderSeen("ACS ACR 38U 00 00", True), ReaderSeen("empty 00 00", False)))
    yield chosen(0, readers)
    yield chosen(1, talk([Frame(kind, b"some text").encode() for kind in list(Kind)[:6]]))


@seeds
def eap() -> Iterable[bytes]:
    from secfunet.eap import EapCode, EapPacket, EapType

    start = EapPacket(EapCode.REQUEST, 1, EapType.TLS, b"\x20").encode()
    yield chosen(0, start)
    yield chosen(0, EapPacket(EapCode.RESPONSE, 1, EapType.IDENTITY, b"web").encode())
    yield chosen(0, EapPacket(EapCode.SUCCESS, 2).encode())
    yield chosen(1, b"\x80" + (200).to_bytes(4) + bytes(200))
    yield chosen(2, talk([b"\xc0" + (300).to_bytes(4) + bytes(200), b"\x00" + bytes(100)]))


def _flights() -> tuple[bytes, bytes, bytes, bytes]:
    """ClientHello and the server's answer, of TLS 1.3 and 1.2, by OpenSSL."""
    import ssl

    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from tests.support.pki import CertificateAuthority

    found = []
    made = CertificateAuthority("Fuzz CA")
    key = ec.generate_private_key(ec.SECP256R1())
    issued = made.issue(key.public_key(), "web")
    pem = issued.public_bytes(Encoding.PEM)
    with tempfile.TemporaryDirectory() as folder:
        chain, private = Path(folder) / "c.pem", Path(folder) / "k.pem"
        chain.write_bytes(pem)
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        for version in (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_2):
            server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            server.load_cert_chain(chain, private)
            client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
            client.minimum_version = client.maximum_version = version
            to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
            ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
            for end, out in zip(ends, (to_server, to_client), strict=True):
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
                found.append(out.read())
                if out is to_server:
                    to_server.write(found[-1])
    return found[0], found[1], found[2], found[3]


@seeds
def tls_records() -> Iterable[bytes]:
    hello13, answer13, _, answer12 = _flights()
    yield chosen(0, answer13)
    yield chosen(0, answer12)
    yield chosen(1, b"\x02\x28")
    yield chosen(2, talk([hello13[:50], hello13[50:], answer12]))


@seeds
def tls_handshake() -> Iterable[bytes]:
    hello13, answer13, hello12, answer12 = _flights()
    for answer in (answer13, answer12):
        yield chosen(0, answer[9 : 9 + int.from_bytes(answer[6:9])])
    for hello in (hello13, hello12):
        yield chosen(1, hello[9:])
    yield chosen(2, talk([hello13[5:100], hello13[100:]]))
    yield chosen(3, b"\1" + talk([answer13]))
    yield chosen(3, b"\1" + talk([answer12[:200], answer12[200:]]))
    yield chosen(3, b"\0" + talk([hello13, b"\xff" + answer13]))
    yield chosen(3, b"\0" + talk([hello12, b"\xff" + answer12, b"\x14\x03\x03\x00\x01\x01"]))


@seeds
def tls_stream() -> Iterable[bytes]:
    update = b"\x16\x18\x00\x00\x01\x01"
    yield b"\1" + talk([b"\x17data", update, b"\x17more", b"\x15\x01\x00"])
    yield b"\0" + talk([b"\x17data", b"\x15\x01\x00"])


@seeds
def certificates() -> Iterable[bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import NameOID

    from secfunet.identity import pem_of
    from secfunet.user_token import public_key_der

    ca, certificate = authority()
    yield chosen(0, ca)
    yield chosen(0, certificate)
    yield chosen(0, pem_of(certificate))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent")])
    for key in (ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)):
        request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
        yield chosen(1, request.public_bytes(Encoding.DER))
    yield chosen(2, pem_of(certificate))
    yield chosen(3, public_key_der(rsa.generate_private_key(65537, 2048).public_key()))


@seeds
def tokens() -> Iterable[bytes]:
    import base64

    from secfunet.user_token import UserToken

    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    header = {"typ": "vm-auth+jwt", "alg": "ES256", "kid": "k"}
    claims = {
        "iss": "grid",
        "sub": "v" * 43,
        "cnf": {"x5t#S256": "h" * 43},
        "aud": "https://grid",
        "iat": 1_800_000_000,
        "nbf": 1_800_000_000,
        "exp": 1_800_003_600,
        "jti": str(uuid.UUID(int=7)),
        "ops": ["sign"],
    }
    token = part(header) + b"." + part(claims) + b"." + base64.urlsafe_b64encode(bytes(64)).rstrip(b"=")
    for index in range(3):
        yield chosen(index, token)
    yield chosen(3, UserToken(1, bytes(32), "ticket", b"value").encode())


@seeds
def containers() -> Iterable[bytes]:
    from fuzz.targets import _keys
    from secfunet.container import ContainerSealer
    from secfunet.gose.v1 import operation_pb2

    private = _keys()[0]
    results = operation_pb2.ResultSet().SerializeToString()
    container = ContainerSealer(private.public_key(), private).seal(results)
    yield chosen(0, container)
    yield chosen(1, container[:256])
    yield chosen(2, results)
    yield chosen(3, bytes(32) + container[256:-256])


@seeds
def operations() -> Iterable[bytes]:
    from secfunet.gose.v1 import operation_pb2
    from secfunet.operation import encryption_scheme, encryption_scheme_names, signature_scheme, signature_scheme_names

    for name in signature_scheme_names():
        operation = operation_pb2.Operation(request_id=bytes(16))
        operation.sign.scheme, operation.sign.digest = signature_scheme(name), bytes(32)
        yield operation.SerializeToString()
    for name in encryption_scheme_names():
        operation = operation_pb2.Operation(request_id=bytes(16))
        operation.decrypt.scheme, operation.decrypt.ciphertext = encryption_scheme(name), bytes(256)
        yield operation.SerializeToString()


@seeds
def openid() -> Iterable[bytes]:
    from secfunet.openid.diffie_hellman import encode_number
    from secfunet.openid.discovery import html_document, xrds_document
    from secfunet.openid.form import encode_key_values

    url = "https://grid.example.org:9443/openid"
    fields = {"ns": "http://specs.openid.net/auth/2.0", "mode": "associate", "assoc_type": "HMAC-SHA256"}
    yield chosen(0, encode_key_values(fields.items()))
    form = "&".join(f"openid.{name}={value}" for name, value in fields.items()).encode()
    yield chosen(1, form)
    yield chosen(2, url.encode() + b"?" + form)
    yield chosen(3, xrds_document(url))
    yield chosen(4, html_document(xrds_location=url, endpoint_url=url))
    yield chosen(5, url.encode())
    yield chosen(6, b"https://*.example.org/")
    yield chosen(7, b"https://grid.example.org/\nhttps://grid.example.org/back?state=1")
    yield chosen(8, f"{encode_number(2**1024 - 1)}\n{encode_number(2)}".encode())
    yield chosen(9, b"YWJj")


@seeds
def cookies() -> Iterable[bytes]:
    yield talk([b"sid=abc; Path=/; Secure; HttpOnly; Max-Age=60", b"sid=; Max-Age=0"])


@seeds
def racs() -> Iterable[bytes]:
    lines = (
        b"BEGIN here\r\n",
        b"GET-VERSION APPEND\r\n",
        b"POWERON web APPEND\r\n",
        b"APDU web 00A40400 APPEND\r\n",
        b"END\r\n",
    )
    for line in lines[1:4]:
        yield chosen(0, line.strip())
    yield chosen(1, talk(lines))
    yield chosen(1, talk([b"".join(lines)]))
    yield chosen(2, talk([b"BEGIN\r\n", b"+001 001 1.0\r\n", b"END\r\n"]))
    yield chosen(3, b"device#[1-4;7] web")
    yield chosen(4, b"+001 001 1.0")


@seeds
def radius() -> Iterable[bytes]:
    from fuzz.targets import SECRET
    from secfunet.radius.access import AccessClient

    client = AccessClient(SECRET, nas="nas", mtu=1400)
    request = client.request("web", b"\x02\x01\x00\x05\x01", b"state").encoded
    yield chosen(0, request)
    yield chosen(1, request)
    yield chosen(2, request[:1] + request[4:20] + request[20:])
    yield chosen(3, b"\x03\x00\x00\x14" + bytes(16))


@seeds
def multiplex() -> Iterable[bytes]:
    from secfunet.xen.multiplex import Multiplexer

    guest, host = Multiplexer(is_host=False), Multiplexer(is_host=True)
    said, answered = [guest.data_to_send()], [host.data_to_send()]
    host.receive(said[0])
    guest.receive(answered[0])
    stream = guest.open("agent")
    guest.send(stream, b"a question")
    guest.ping(bytes(8))
    guest.end(stream)
    said.append(guest.data_to_send())
    host.receive(said[1])
    host.send(stream, b"an answer")
    host.consumed(stream, 10)
    host.end(stream)
    answered.append(host.data_to_send())
    yield b"\1" + talk(said)
    yield b"\1" + talk([said[0], *(said[1][at : at + 7] for at in range(0, len(said[1]), 7))])
    yield b"\0" + talk(answered)


@seeds
def host_tables() -> Iterable[bytes]:
    neighbours = [{"dst": "192.0.2.7", "lladdr": "00:16:3e:00:00:11", "state": ["REACHABLE"]}]
    forwarding = [{"mac": "00:16:3e:00:00:11", "ifname": "vif1.0", "flags": [], "master": "xenbr0", "state": ""}]
    for index, table in enumerate((neighbours, forwarding, neighbours, forwarding)):
        yield chosen(index, json.dumps(table).encode())


@seeds
def handed_over() -> Iterable[bytes]:
    import hashlib

    from dom0_middleware.vm_file import definition_to_json
    from secfunet.middleware.v1 import orchestrator_pb2 as pb
    from vm_agent.join import JoinInformation

    ca, certificate = authority()
    join = JoinInformation(
        str(uuid.UUID(int=7)), bytes(32), ca, "unix:/enrol.sock", "unix:/agent.sock", "secure-middleware"
    )
    yield chosen(0, json.dumps(join.fields()).encode())
    definition = pb.VmDefinition(
        uuid=str(uuid.UUID(int=7)), name="web", vm_certificate=certificate, memory_mib=256, vcpus=1
    )
    yield chosen(1, definition_to_json(definition).encode())
    body = json.dumps({"n": 1, "time": 1.5, "prev": "0" * 64}, separators=(",", ":")).encode()
    yield chosen(2, body[:-1] + b',"hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}')


@seeds
def addresses() -> Iterable[bytes]:
    for index, address in enumerate((b"::ffff:192.0.2.7", b"2001:db8::/48", b"fe80::1%eth0", b"192.0.2.7")):
        yield chosen(index, address)


NAMES: Final = tuple(SEEDS)
