"""The targets: what is called with the bytes, and the errors that its documentation allows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

Run = Callable[[bytes], None]
KEY: Final = bytes(range(16))
SECRET: Final = b"a shared secret of sixteen and more"
UNIX_TIME: Final = 1_800_000_000


@dataclass(frozen=True)
class Target:
    """``make`` imports what is fuzzed and returns the function that is called; any exception that comes out of that is a fault."""

    name: str
    make: Callable[[], Run]


TARGETS: dict[str, Target] = {}


def target(make: Callable[[], Run]) -> Callable[[], Run]:
    """Registers a target under the function's name."""
    name = make.__name__.replace("_", "-")
    TARGETS[name] = Target(name, make)
    return make


def codec(decode: Callable[[bytes], Any], encode: Callable[[Any], bytes], error: type[Exception]) -> Run:
    """Bytes to a value or ``error``; a value, encoded, decodes to itself."""

    def run(data: bytes) -> None:
        try:
            value = decode(data)
        except error:
            return
        assert decode(encode(value)) == value

    return run


def both(*runs: Run) -> Run:
    """The first byte chooses, so that one target may have several parsers of one kind."""

    def run(data: bytes) -> None:
        if data:
            runs[data[0] % len(runs)](data[1:])

    return run


def only(error: type[Exception], parse: Callable[[bytes], object]) -> Run:
    """Bytes to anything, or this error."""

    def run(data: bytes) -> None:
        with suppress(error):
            parse(data)

    return run


def text(data: bytes) -> str:
    """Any text, for parsers of text; UTF-8 where it is some."""
    return data.decode("utf-8", "surrogateescape")


def parts(data: bytes, limit: int = 32) -> Iterator[bytes]:
    """Pieces, each behind its length (two bytes): a conversation."""
    while len(data) >= 2 and limit:
        length = int.from_bytes(data[:2])
        yield data[2 : 2 + length]
        data, limit = data[2 + length :], limit - 1


# What cards and their hosts say


@target
def apdu() -> Run:
    from secfunet.apdu import ApduFormatError, CommandApdu, ResponseApdu

    return both(
        codec(CommandApdu.decode, CommandApdu.encode, ApduFormatError),
        codec(ResponseApdu.decode, ResponseApdu.encode, ApduFormatError),
    )


@target
def card_objects() -> Run:
    from secfunet.card.ber import decode_elements
    from secfunet.card.binding import Binding, SealedAnswer, SealRequest
    from secfunet.card.errors import CardFormatError
    from secfunet.card.parameters import NegotiatedTls, TlsParameters, decode_certificates, encode_certificates
    from secfunet.card.profile import CardProfile
    from secfunet.card.tlv import decode_tlv, encode_tlv

    return both(
        codec(decode_tlv, encode_tlv, CardFormatError),
        only(CardFormatError, decode_elements),
        codec(TlsParameters.decode, TlsParameters.encode, CardFormatError),
        codec(NegotiatedTls.decode, NegotiatedTls.encode, CardFormatError),
        codec(decode_certificates, encode_certificates, CardFormatError),
        codec(CardProfile.decode, CardProfile.encode, CardFormatError),
        codec(SealRequest.decode, SealRequest.encode, CardFormatError),
        codec(SealedAnswer.decode, SealedAnswer.encode, CardFormatError),
        codec(Binding.decode, lambda value: b"" if value is None else value.encode(), CardFormatError),
    )


@cache
def _cards() -> tuple[tempfile.TemporaryDirectory[str], Any]:
    import asyncio

    from secfunet.card import KeyAlgorithm
    from tests.support.local_card import new_store, personalised
    from tests.support.pki import CertificateAuthority

    folder = tempfile.TemporaryDirectory(prefix="fuzz-")
    identity = ("web", KeyAlgorithm.P_256)
    return folder, asyncio.run(personalised(new_store(Path(folder.name)), CertificateAuthority("Fuzz CA"), identity))


@target
def card() -> Run:
    """A whole card, personalised: commands in a row, each behind its length. It answers whatever comes, and never with 6F00."""
    import asyncio

    from secfunet.card.errors import CardFormatError
    from secfunet.card.vpcd import FrameDecoder
    from tests.support.local_card import USER_PIN, LocalPort

    _, made = _cards()

    def run(data: bytes) -> None:
        from secfunet.card import CardClient

        made.reset()
        if data[:1] and data[0] & 1:
            asyncio.run(_verified(CardClient(LocalPort(made)), USER_PIN))
        for command in parts(data[1:]):
            if made.takes_long(command):
                continue  # a key pair takes seconds
            response = made.process(command)
            assert len(response) >= 2
            assert response[-2:] != b"\x6f\x00", command.hex()

    async def _verified(client: Any, pin: bytes) -> None:
        from secfunet.apdu import StatusError

        await client.select()
        with suppress(StatusError):  # an earlier input may have used the attempts up
            await client.verify_pin(pin)
            await client.set_identity("web")

    def frames(data: bytes) -> None:
        decoder = FrameDecoder()
        with suppress(CardFormatError):
            for piece in parts(data):
                decoder.feed(piece)

    return lambda data: frames(data[1:]) if data[:1] == b"\xff" else run(data)


@target
def scp03() -> Run:
    from secfunet.apdu import ApduFormatError, CommandApdu, ResponseApdu
    from secfunet.scp03 import HostHandshake, KeySet
    from secfunet.scp03.errors import Scp03Error
    from secfunet.scp03.handshake import CardHandshake, InitializeUpdateAnswer
    from secfunet.scp03.put_key import PutKey

    keys = KeySet(KEY, KEY, KEY)

    def host(data: bytes) -> None:
        handshake = HostHandshake(keys, bytes(8))
        with suppress(Scp03Error, ApduFormatError):
            answer, *responses = [*parts(data)] or [b""]
            handshake.authenticate(answer)
            for response in responses:
                handshake.channel.unwrap(ResponseApdu.decode(response))

    def at_the_card(data: bytes) -> None:
        handshake = CardHandshake(keys, 1, b"key data..", bytes(8), bytes(8))
        with suppress(Scp03Error, ApduFormatError):
            first, *commands = [CommandApdu.decode(piece) for piece in parts(data)] or [CommandApdu(0, 0, 0, 0)]
            channel = handshake.authenticate(first)
            for command in commands:
                channel.unwrap(command)

    return both(
        codec(InitializeUpdateAnswer.decode, InitializeUpdateAnswer.encode, Scp03Error),
        only(Scp03Error, lambda data: PutKey.decode(data, KEY)),
        host,
        at_the_card,
    )


@target
def pcsc() -> Run:
    from secfunet.pcsc.frames import FrameDecoder, FrameError, decode_readers, encode_readers

    def frames(data: bytes) -> None:
        decoder = FrameDecoder()
        with suppress(FrameError):
            for piece in parts(data):
                decoder.feed(piece)

    return both(codec(decode_readers, encode_readers, FrameError), frames)


# EAP, TLS


@target
def eap() -> Run:
    from secfunet.eap import EapFormatError, EapPacket
    from secfunet.eap_tls import EapTlsChannel, EapTlsError, EapTlsMessage

    def channel(data: bytes) -> None:
        end = EapTlsChannel(1000)
        with suppress(EapTlsError):
            for piece in parts(data):
                end.receive(EapTlsMessage.decode(piece))

    return both(
        codec(EapPacket.decode, EapPacket.encode, EapFormatError),
        codec(EapTlsMessage.decode, EapTlsMessage.encode, EapTlsError),
        channel,
    )


@target
def tls_records() -> Run:
    from secfunet.tls.errors import TlsError
    from secfunet.tls.records import RecordBuffer, parse_alert, split_records

    def buffer(data: bytes) -> None:
        records = RecordBuffer()
        with suppress(TlsError):
            for piece in parts(data):
                rest = memoryview(piece)
                while rest and (taken := records.feed(rest)):
                    rest = rest[taken:]
                    while records.take(1 << 14) is not None:
                        pass

    return both(only(TlsError, split_records), only(TlsError, parse_alert), buffer)


@target
def tls_handshake() -> Run:
    from secfunet.tls.errors import TlsError
    from secfunet.tls.flights import FlightDetector
    from secfunet.tls.handshake import HandshakeReader, check_client_hello, parse_server_hello
    from secfunet.tls.records import RecordBuffer

    def reader(data: bytes) -> None:
        messages = HandshakeReader()
        with suppress(TlsError):
            for piece in parts(data):
                messages.feed(piece)

    def flights(data: bytes) -> None:
        detector = FlightDetector("client" if data[:1] and data[0] & 1 else "server")
        buffer = RecordBuffer()
        with suppress(TlsError):
            for piece in parts(data[1:]):
                if piece[:1] == b"\xff":
                    detector.own_flight(piece[1:])
                    continue
                rest = memoryview(piece)
                while rest and (taken := buffer.feed(rest)):
                    rest = rest[taken:]
                    while detector.next_flight(buffer):
                        pass

    return both(only(TlsError, parse_server_hello), only(TlsError, check_client_hello), reader, flights)


@target
def tls_stream() -> Run:
    """What an authenticated peer puts into records: the bytes are the content of records that are sealed as its own would be."""
    from secfunet.tls.cipher_suites import SUITES
    from secfunet.tls.errors import TlsError
    from secfunet.tls.protection import MAX_EXPANSION
    from secfunet.tls.stream import HandOver, ProtectedStream

    def run(data: bytes) -> None:
        suite = SUITES[0x1301 if data[:1] and data[0] & 1 else 0xC02F]
        tls13 = suite.version == 0x0304
        keys = bytes(2 * suite.hash_length if tls13 else suite.key_block_length)
        over = HandOver(suite, keys, int(not tls13), int(not tls13))
        peer, ours = (ProtectedStream(role, over) for role in ("client", "server"))
        with suppress(TlsError):
            for piece in parts(data[1:]):
                if not piece:
                    continue
                out = bytearray(len(piece) + MAX_EXPANSION)
                with memoryview(out) as view:
                    size = peer._sealer.seal_into(piece[0], piece[1:], view)
                ours.incoming.feed(bytes(out[:size]))
                while ours.receive():
                    pass
                ours.take_output()

    return run


# What the grid and its clients exchange


@target
def certificates() -> Run:
    from dom0_middleware.errors import MiddlewareError
    from dom0_middleware.guest_authority import agent_certificate, parse_request
    from secfunet.identity import IdentityError, der_of, load_certificate, role_of, rsa_key_of
    from secfunet.user_token import UserTokenError, load_authority_key

    def certificate(data: bytes) -> None:
        with suppress(IdentityError):
            loaded = load_certificate(data)
            assert der_of(load_certificate(der_of(loaded))) == der_of(loaded)
            with suppress(IdentityError):
                role_of(loaded)
            rsa_key_of(loaded)

    return both(
        certificate,
        only(MiddlewareError, parse_request),
        only(MiddlewareError, agent_certificate),
        only(UserTokenError, load_authority_key),
    )


@cache
def _keys() -> tuple[Any, Any]:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    return rsa.generate_private_key(65537, 2048), ec.derive_private_key(7, ec.SECP256R1())


@target
def tokens() -> Run:
    from secfunet.user_token import UserToken, UserTokenError
    from secfunet.vm_auth_token import TokenError, TokenVerifier, key_id, unverified_claims, unverified_expiry

    public = _keys()[1].public_key()
    verifier = TokenVerifier("grid", "https://grid", {key_id(public): public})

    def verify(data: bytes) -> None:
        with suppress(TokenError):
            verifier.verify(text(data), vmid="v", hvid="h", now=UNIX_TIME, is_revoked=lambda _: False)

    return both(
        verify,
        only(TokenError, lambda data: unverified_claims(text(data))),
        only(TokenError, lambda data: unverified_expiry(text(data))),
        codec(UserToken.decode, UserToken.encode, UserTokenError),
    )


@target
def containers() -> Run:
    from secfunet.container import ContainerError, VerifiedContainer, unwrap_content_key, verify_container
    from secfunet.operation import parse_result_set

    private = _keys()[0]

    def opened(data: bytes) -> None:
        with suppress(ContainerError):
            VerifiedContainer(b"", data[32:]).open(data[:32])

    return both(
        only(ContainerError, lambda data: verify_container(data, private.public_key(), 256)),
        only(ContainerError, lambda data: unwrap_content_key(private, data)),
        only(ContainerError, parse_result_set),
        opened,
    )


@target
def operations() -> Run:
    """What a program or a guest asks of a key."""
    from google.protobuf.message import DecodeError

    from secfunet.gose.v1 import operation_pb2
    from secfunet.operation import OperationError, check_key, request_digest, validate_operation

    public = _keys()[1].public_key()

    def run(data: bytes) -> None:
        with suppress(DecodeError, OperationError):
            operation = operation_pb2.Operation.FromString(data)
            validate_operation(operation)
            assert len(request_digest(operation)) == 32
            check_key(operation, public)

    return run


@target
def openid() -> Run:
    from secfunet.openid.diffie_hellman import DhGroup, decode_base64, decode_number
    from secfunet.openid.discovery import parse_html, parse_xrds
    from secfunet.openid.errors import OpenIdError
    from secfunet.openid.form import decode_form, decode_key_values, decode_query, encode_key_values, message_of
    from secfunet.openid.realm import check_realm, check_return_to, parse_url

    def returning(data: bytes) -> None:
        realm, _, address = text(data).partition("\n")
        check_return_to(address, realm)

    def group(data: bytes) -> None:
        modulus, _, generator = text(data).partition("\n")
        DhGroup(decode_number(modulus), decode_number(generator))

    return both(
        codec(decode_key_values, lambda fields: encode_key_values(fields.items()), OpenIdError),
        only(OpenIdError, lambda data: message_of(decode_form(data))),
        only(OpenIdError, lambda data: decode_query(text(data))),
        only(OpenIdError, parse_xrds),
        only(OpenIdError, parse_html),
        only(OpenIdError, lambda data: parse_url(text(data))),
        only(OpenIdError, lambda data: check_realm(text(data))),
        only(OpenIdError, returning),
        only(OpenIdError, group),
        only(OpenIdError, lambda data: decode_base64(text(data), limit=64)),
    )


@target
def cookies() -> Run:
    from gose_client.cookies import CookieJar

    def run(data: bytes) -> None:
        jar = CookieJar(lambda: float(UNIX_TIME))
        for piece in parts(data):
            jar.take("grid", piece.decode("latin-1"))
        assert not set(jar.header("grid", "/login")) & set("\r\n\0")

    return run


@target
def racs() -> Run:
    from secfunet.racs.client import ClientConnection
    from secfunet.racs.commands import CommandError, encode_command, parse_command
    from secfunet.racs.errors import RacsError
    from secfunet.racs.seids import decode_seids, encode_seids
    from secfunet.racs.server import ServerConnection
    from secfunet.racs.status import Status

    def command(data: bytes) -> None:
        with suppress(CommandError):
            step = parse_command(1, data.decode("latin-1"))
            with suppress(RacsError):
                assert parse_command(1, encode_command(step.command, append=step.append)) == step

    def server(data: bytes) -> None:
        connection = ServerConnection()
        with suppress(RacsError):
            for piece in parts(data):
                connection.receive(piece)
                while connection.next_request() is not None:
                    pass

    def client(data: bytes) -> None:
        from secfunet.racs.commands import GetVersion

        connection = ClientConnection()
        connection.send([GetVersion()])
        with suppress(RacsError):
            for piece in parts(data):
                if connection.receive(piece) is not None:
                    connection.send([GetVersion()])

    def seids(data: bytes) -> None:
        with suppress(RacsError):
            found = decode_seids(data.decode("latin-1").split(" "))
            assert sorted(decode_seids(encode_seids(found))) == sorted(found)

    return both(command, server, client, seids, only(RacsError, lambda data: Status.decode(data.decode("latin-1"))))


@target
def radius() -> Run:
    """Both ends. Behind the first byte: a packet; it is signed for the server, so that what is behind the signature is reached, too."""
    import hashlib
    import hmac

    from gose.radius.packets import RadiusDiscard, parse_request
    from secfunet.radius.access import AccessClient
    from secfunet.radius.errors import RadiusFormatError
    from secfunet.radius.wire import split_attributes

    def signed(data: bytes) -> bytes:
        length = min(20 + 18 + len(data[17:]), 4096)
        head = data[:1] + b"\x07" + length.to_bytes(2) + data[1:17].ljust(16, b"\0")
        unsigned = head + b"\x50\x12" + bytes(16) + data[17:]
        code = hmac.digest(SECRET, unsigned[:length], hashlib.md5)
        return head + b"\x50\x12" + code + data[17:]

    def answer(data: bytes) -> None:
        client = AccessClient(SECRET, nas="nas", mtu=1400, randbytes=bytes)
        request = client.request("web", b"\x02\x01\x00\x05\x01", None)
        with suppress(RadiusFormatError):
            request.answer(data)

    return both(
        only(RadiusFormatError, split_attributes),
        only(RadiusDiscard, lambda data: parse_request(data, SECRET)),
        only(RadiusDiscard, lambda data: parse_request(signed(data), SECRET)),
        answer,
    )


# What a guest, or a host's other programs, hand to dom0


@target
def multiplex() -> Run:
    """Both ends of a guest's channel."""
    from secfunet.xen.errors import MultiplexError
    from secfunet.xen.multiplex import Multiplexer

    def run(data: bytes) -> None:
        is_host = bool(data[:1] and data[0] & 1)
        end = Multiplexer(is_host=is_host)
        with suppress(MultiplexError):
            for piece in parts(data[1:]):
                end.receive(piece)
                end.data_to_send()
                assert end.streams <= 64

    return run


@target
def host_tables() -> Run:
    from dom0_middleware.channels import interfaces
    from dom0_middleware.channels.iproute import FactsUnavailable

    parsers = [getattr(interfaces, name) for name in dir(interfaces) if name.startswith("parse_")]
    return both(*(only(FactsUnavailable, parse) for parse in parsers))


@target
def handed_over() -> Run:
    """Files that come from another machine: join information, a VM's definition; lines of an audit log."""
    from dom0_middleware.vm_file import DefinitionError, definition_from_json
    from secfunet.service.audit import split_line
    from vm_agent.errors import JoinError
    from vm_agent.join import parse_join

    return both(
        only(JoinError, lambda data: parse_join(data, Path("/nowhere"))),
        only(DefinitionError, definition_from_json),
        only(ValueError, split_line),
    )


@target
def addresses() -> Run:
    from secfunet.service.addresses import canonical_address, canonical_network, rate_key, text_of_address

    return both(
        only(ValueError, lambda data: canonical_address(text(data))),
        only(ValueError, lambda data: canonical_network(text(data))),
        lambda data: assert_text(rate_key(text(data))),
        lambda data: assert_text(text_of_address(text(data))),
    )


def assert_text(value: str) -> None:
    assert isinstance(value, str)
