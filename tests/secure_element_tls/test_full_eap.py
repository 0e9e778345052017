"""Full EAP between a peer card and a server card: identity, fragments, success and failure, keys (RFC 5216, RFC 9190)."""

import itertools

import pytest
from OpenSSL import SSL, crypto

from secfunet.card.parameters import EapState, TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.eap_tls import ACK, EapTlsMessage
from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secure_element.eap_engine import EapDiscarded, EapEngine, EapFailure
from tests.secure_element_tls.cards import engine
from tests.secure_element_tls.pki import DAY, Authority, authority, tls_id

VERSIONS = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])


@pytest.fixture(scope="module")
def ca() -> Authority:
    return authority()


def cards(ca: Authority, version: int, *, kind: str = "ec", size: int = 1000) -> tuple[EapEngine, EapEngine]:
    limits = {"min_version": version, "max_version": version}
    peer = engine(tls_id(ca, "peer", kind=kind), TlsParameters(server_name="realm", **limits), fragment=size)  # type: ignore[arg-type]
    server = engine(tls_id(ca, "server", kind=kind), TlsParameters(role="server", **limits), fragment=size)  # type: ignore[arg-type]
    return peer, server


def converse(peer: EapEngine, server: EapEngine, identifier: int = 0xA5) -> list[bytes]:
    """All packets from EAP-Request/Identity to the outcome."""
    packets = [EapPacket(EapCode.REQUEST, identifier, EapType.IDENTITY).encode()]
    for _ in range(400):
        answer = peer.process(packets[-1])
        packets.append(answer)
        if not answer:
            return packets
        packets.append(server.process(answer))
    raise AssertionError("it does not end")


@pytest.mark.parametrize(
    ("version", "kind", "size"), list(itertools.product([TLS_1_2, TLS_1_3], ["rsa", "ec"], [64, 253, 1000, 16384]))
)
def test_full_then_resumed(ca: Authority, version: int, kind: str, size: int) -> None:
    peer, server = cards(ca, version, kind=kind, size=size)
    keys = set()
    for resumed in (False, True, True):
        packets = converse(peer, server)
        decoded = [EapPacket.decode(packet) for packet in packets[:-1]]
        assert decoded[1] == EapPacket(EapCode.RESPONSE, 0xA5, EapType.IDENTITY, b"peer@secfunet")
        assert decoded[2] == EapPacket(EapCode.REQUEST, 0xA6, EapType.TLS, b"\x20")
        assert decoded[-1] == EapPacket(EapCode.SUCCESS, decoded[-2].identifier)
        assert max(len(packet) for packet in packets) <= size + 10
        assert peer.state is server.state is EapState.AUTHENTICATED
        assert peer.negotiated().resumed is server.negotiated().resumed is resumed
        assert peer.session_key() == server.session_key()
        keys.add(peer.session_key())
        for index in range(1, 7):
            assert peer.exported_parameter(index) == server.exported_parameter(index)
        session_id = peer.exported_parameter(4)
        assert session_id == b"\x0d" + peer.exported_parameter(3)
        assert len(session_id) == 65
    assert len(keys) == 3


@VERSIONS
def test_exported_parameters(ca: Authority, version: int) -> None:
    peer, server = cards(ca, version)
    converse(peer, server)
    names = [peer.exported_parameter(index) for index in (1, 2)]
    assert b"peer" in names[0]
    assert b"server" in names[1]
    assert peer.exported_parameter(5) == peer.exported_parameter(6) == b""
    for index in (0, 7, 255):
        with pytest.raises(EapFailure):
            peer.exported_parameter(index)
    assert peer.state is EapState.AUTHENTICATED


def openssl_server(ca: Authority, version: int) -> SSL.Connection:
    identity = tls_id(ca, "server")
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(version)
    context.use_certificate(identity.certificate)
    context.use_privatekey(identity.private_key)
    store = context.get_cert_store()
    assert store is not None
    store.add_cert(crypto.X509.from_cryptography(ca.certificate))
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_session_id(b"eap")
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    return connection


class PlainServer:
    """An EAP-TLS server out of bare OpenSSL and the packet codec."""

    def __init__(self, peer: EapEngine, tls: SSL.Connection) -> None:
        self.peer = peer
        self.tls = tls
        self.identifier = 0

    def ask(self, data: bytes, kind: int = EapType.TLS) -> EapPacket:
        self.identifier += 1
        packet = EapPacket(EapCode.REQUEST, self.identifier, kind, data)
        answer = EapPacket.decode(self.peer.process(packet.encode()))
        assert (answer.code, answer.identifier) == (EapCode.RESPONSE, self.identifier)
        return answer

    def until_finished(self) -> None:
        self.ask(b"", EapType.IDENTITY)
        answer = EapTlsMessage.decode(self.ask(b"\x20").data)
        while True:
            flight = answer.data
            while answer.more:
                answer = EapTlsMessage.decode(self.ask(ACK.encode()).data)
                flight += answer.data
            self.tls.bio_write(flight)
            try:
                self.tls.do_handshake()
                return
            except SSL.WantReadError:
                answer = EapTlsMessage.decode(self.ask(EapTlsMessage(self.tls.bio_read(65536)).encode()).data)


def test_keys_of_rfc5216_against_openssl(ca: Authority) -> None:
    peer, _ = cards(ca, TLS_1_2)
    plain = PlainServer(peer, openssl_server(ca, TLS_1_2))
    plain.until_finished()
    assert peer.state is EapState.AUTHENTICATING
    assert plain.ask(EapTlsMessage(plain.tls.bio_read(65536)).encode()).data == b"\x00"
    assert peer.state is EapState.AUTHENTICATED
    assert peer.process(EapPacket(EapCode.SUCCESS, plain.identifier).encode()) == b""
    assert peer.session_key() == plain.tls.export_keying_material(b"client EAP encryption", 128)
    client_random, server_random = plain.tls.client_random(), plain.tls.server_random()
    assert client_random is not None
    assert server_random is not None
    assert peer.exported_parameter(4) == b"\x0d" + client_random + server_random


def test_keys_of_rfc9190_against_openssl(ca: Authority) -> None:
    peer, _ = cards(ca, TLS_1_3)
    plain = PlainServer(peer, openssl_server(ca, TLS_1_3))
    plain.until_finished()
    tickets = plain.tls.bio_read(65536)
    # Tickets alone are no success: an EAP-Success now is discarded, for anybody can write one.
    assert plain.ask(EapTlsMessage(tickets).encode()).data == b"\x00"
    assert peer.state is EapState.AUTHENTICATING
    with pytest.raises(EapDiscarded):
        peer.process(EapPacket(EapCode.SUCCESS, plain.identifier).encode())
    plain.tls.send(b"\x00")
    assert plain.ask(EapTlsMessage(plain.tls.bio_read(65536)).encode()).data == b"\x00"
    assert peer.state is EapState.AUTHENTICATED
    assert peer.session_key() == plain.tls.export_keying_material(b"EXPORTER_EAP_TLS_Key_Material", 128, b"\x0d")
    assert peer.exported_parameter(3) == plain.tls.export_keying_material(b"EXPORTER_EAP_TLS_Method-Id", 64, b"\x0d")


@pytest.mark.parametrize("data", [b"\x01", b"\x00\x00", b"hello"])
def test_another_commitment_is_refused(ca: Authority, data: bytes) -> None:
    peer, _ = cards(ca, TLS_1_3)
    plain = PlainServer(peer, openssl_server(ca, TLS_1_3))
    plain.until_finished()
    plain.tls.send(data)
    with pytest.raises(EapFailure):
        plain.ask(EapTlsMessage(plain.tls.bio_read(65536)).encode())
    assert peer.state is EapState.NOT_AUTHENTICATED


def test_an_alert_in_place_of_the_commitment(ca: Authority) -> None:
    """RFC 9190, 2.1.4: the server refuses after its Finished; the peer acknowledges the alert, and then comes EAP-Failure."""
    peer, _ = cards(ca, TLS_1_3)
    plain = PlainServer(peer, openssl_server(ca, TLS_1_3))
    plain.until_finished()
    plain.tls.shutdown()
    assert plain.ask(EapTlsMessage(plain.tls.bio_read(65536)).encode()).data == b"\x00"
    assert peer.state is EapState.NOT_AUTHENTICATED
    with pytest.raises(EapDiscarded):
        peer.process(EapPacket(EapCode.SUCCESS, plain.identifier).encode())
    with pytest.raises(EapFailure) as failure:
        peer.process(EapPacket(EapCode.FAILURE, plain.identifier).encode())
    assert failure.value.alert == AlertDescription.CLOSE_NOTIFY
    assert peer.state is EapState.NOT_AUTHENTICATED


@VERSIONS
def test_the_server_refuses_the_peer(ca: Authority, version: int) -> None:
    """Alert in a request, acknowledgement, EAP-Failure (RFC 5216, 2.1.3)."""
    peer, server = cards(ca, version)
    expired = tls_id(ca, "peer", since=-2 * DAY, until=-DAY)
    peer.select_identity(expired)
    peer.set_parameters(TlsParameters(min_version=version, max_version=version))
    with pytest.raises(EapFailure) as failure:
        converse(peer, server)
    assert failure.value.alert == AlertDescription.CERTIFICATE_EXPIRED
    assert failure.value.sw == 0x7001
    assert peer.state is server.state is EapState.NOT_AUTHENTICATED


@VERSIONS
def test_the_peer_refuses_the_server(ca: Authority, version: int) -> None:
    """Alert in a response, EAP-Failure."""
    peer, server = cards(ca, version)
    server.select_identity(tls_id(ca, "server", since=-2 * DAY, until=-DAY))
    server.set_parameters(TlsParameters(role="server"))
    server.reset_state()
    packets: list[bytes] = []
    with pytest.raises(EapFailure) as failure:
        packets += converse(peer, server)
    assert failure.value.alert == AlertDescription.CERTIFICATE_EXPIRED
    assert peer.state is server.state is EapState.NOT_AUTHENTICATED


def test_a_retransmitted_request_gets_the_same_answer(ca: Authority) -> None:
    peer, server = cards(ca, TLS_1_2, size=253)
    request = EapPacket(EapCode.REQUEST, 1, EapType.IDENTITY).encode()
    while True:
        answer = peer.process(request)
        if not answer:
            break
        if EapPacket.decode(request).type == EapType.TLS:
            assert peer.process(request) == answer
        request = server.process(answer)
    assert peer.session_key() == server.session_key()


def test_a_response_to_another_request_is_discarded(ca: Authority) -> None:
    peer, server = cards(ca, TLS_1_3, size=253)
    response = peer.process(EapPacket(EapCode.REQUEST, 1, EapType.IDENTITY).encode())
    request = server.process(response)
    response = peer.process(request)
    for wrong in (-1, 1, 7):
        other = EapPacket.decode(response)
        with pytest.raises(EapDiscarded):
            server.process(EapPacket(other.code, (other.identifier + wrong) & 0xFF, other.type, other.data).encode())
    while response:
        response = peer.process(server.process(response))
    assert peer.session_key() == server.session_key()


def test_a_failure_from_the_server_ends_it(ca: Authority) -> None:
    peer, server = cards(ca, TLS_1_2)
    response = peer.process(EapPacket(EapCode.REQUEST, 1, EapType.IDENTITY).encode())
    peer.process(server.process(response))
    with pytest.raises(EapFailure):
        peer.process(EapPacket(EapCode.FAILURE, 2).encode())
    assert peer.state is EapState.NOT_AUTHENTICATED


def test_a_failure_after_the_success_takes_the_keys_away(ca: Authority) -> None:
    peer, server = cards(ca, TLS_1_2)
    converse(peer, server)
    with pytest.raises(EapFailure):
        peer.process(EapPacket(EapCode.FAILURE, 2).encode())
    with pytest.raises(EapFailure):
        peer.session_key()


def test_a_peer_that_does_not_want_eap_tls(ca: Authority) -> None:
    _, server = cards(ca, TLS_1_2)
    request = EapPacket.decode(server.process(EapPacket(EapCode.RESPONSE, 9, EapType.IDENTITY, b"x").encode()))
    nak = EapPacket(EapCode.RESPONSE, request.identifier, EapType.NAK, b"\x19")
    assert server.process(nak.encode()) == EapPacket(EapCode.FAILURE, request.identifier).encode()
    assert server.state is EapState.NOT_AUTHENTICATED
