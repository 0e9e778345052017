"""Two cards in docking mode, client against server: every combination completes, and both sides hand over the same keys."""

import contextlib
import itertools
import os

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from secfunet.card.parameters import EapState, TlsParameters
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.key_schedule import split_hand_over
from secfunet.tls.protection import make_opener, make_sealer
from secfunet.tls.records import split_records
from tests.secure_element_tls.cards import Dock, engine, handshake
from tests.secure_element_tls.pki import Authority, authority, tls_id

NAME = "server.example"
SIZES = [64, 240, 1484, 16384]


@pytest.fixture(scope="module")
def ca() -> Authority:
    return authority()


@pytest.mark.parametrize(("version", "kind", "size"), list(itertools.product([TLS_1_2, TLS_1_3], ["rsa", "ec"], SIZES)))
def test_full_then_resumed(ca: Authority, version: int, kind: str, size: int) -> None:
    client = engine(
        tls_id(ca, "client", kind=kind),
        TlsParameters(server_name=NAME, min_version=version, max_version=version),
        fragment=size,
    )
    server = engine(
        tls_id(ca, NAME, kind=kind),
        TlsParameters(role="server", min_version=version, max_version=version),
        fragment=size,
    )
    for resumed in (False, True, True):
        client.reset_state()
        server.reset_state()
        client_dock, server_dock = Dock(client, fragment=size), Dock(server, fragment=size)
        flight = client_dock.start()
        last = b""
        while flight:
            flight = server_dock.flight(flight)
            last = flight
            if flight and client.state is not EapState.AUTHENTICATED:
                flight = client_dock.flight(flight)
            elif flight:
                break  # tickets: the docking host's to forward
        assert client.state is EapState.AUTHENTICATED
        assert server.state is EapState.AUTHENTICATED
        at_client, at_server = client.negotiated(), server.negotiated()
        assert at_client.resumed is resumed
        assert at_server.resumed is resumed
        assert (at_client.version, at_client.suite) == (at_server.version, at_server.suite)
        assert at_client.version == version
        assert client.session_key() == server.session_key()
        assert len(client.session_key()) == 128
        assert client.peer_certificates() == (server_der(server),)
        assert server.peer_certificates() == (server_der(client),)
        for index in range(1, 7):
            assert client.exported_parameter(index) == server.exported_parameter(index)
        key_block = client.key_block()
        assert key_block == server.key_block()
        suite = SUITES[at_client.suite]
        if version == TLS_1_2:
            assert len(key_block) == suite.key_block_length == 40
            assert (at_client.read_sequence, at_client.write_sequence) == (1, 1)
            assert (at_server.read_sequence, at_server.write_sequence) == (1, 1)
        else:
            assert len(key_block) == 2 * suite.hash_length
            assert (at_client.read_sequence, at_client.write_sequence) == (0, 0)
            # Two tickets after a full handshake, one after a resumed one, are already sent.
            assert (at_server.read_sequence, at_server.write_sequence) == (0, 1 if resumed else 2)
            assert client_dock.flight(last) == b""


def server_der(card: object) -> bytes:
    return card._tls_id.certificate.public_bytes(Encoding.DER)  # type: ignore[attr-defined]  # the test knows its cards


SUITES_12 = [0xC02B, 0xC02C, 0xC02F, 0xC030, 0xCCA8, 0xCCA9]
LEGACY = [
    0x009C,
    0x009D,
    0x002F,
    0x0035,
    0x003C,
    0x003D,
    0xC009,
    0xC00A,
    0xC013,
    0xC014,
    0xC023,
    0xC024,
    0xC027,
    0xC028,
]


@pytest.mark.parametrize("number", [*SUITES_12, *LEGACY, 0x1301, 0x1302, 0x1303])
def test_each_suite(ca: Authority, number: int) -> None:
    kind = "ec" if "ECDSA" in SUITES[number].name else "rsa"
    parameters = TlsParameters(suites=(number,))
    legacy = number in LEGACY
    client = engine(tls_id(ca, "client", kind=kind), parameters, legacy_tls=legacy)
    server = engine(tls_id(ca, NAME, kind=kind), TlsParameters(role="server", suites=(number,)), legacy_tls=legacy)
    handshake(Dock(client), Dock(server))
    assert client.negotiated().suite == server.negotiated().suite == number
    is_cbc = SUITES[number].is_legacy and "CBC" in SUITES[number].name
    assert client.negotiated().encrypt_then_mac is server.negotiated().encrypt_then_mac is is_cbc
    key_block = client.key_block()
    assert key_block == server.key_block()
    assert len(key_block) == (
        SUITES[number].key_block_length if number > 0x13FF or number < 0x1300 else 2 * SUITES[number].hash_length
    )


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
@pytest.mark.parametrize(
    ("offered", "ours", "chosen"), [(("h2",), ("http/1.1", "h2"), "h2"), (("h2",), (), ""), ((), ("h2",), "")]
)
def test_application_protocol(
    ca: Authority, version: int, offered: tuple[str, ...], ours: tuple[str, ...], chosen: str
) -> None:
    client = engine(tls_id(ca, "client"), TlsParameters(alpn=offered, min_version=version, max_version=version))
    server = engine(tls_id(ca, NAME), TlsParameters(role="server", alpn=ours))
    handshake(Dock(client), Dock(server))
    assert client.negotiated().alpn == server.negotiated().alpn == chosen


@pytest.mark.parametrize("groups", [(0x0017,), (0x0018,), (0x0019,), (0x001D,), (0x001E,), (0x11EC,)])
def test_groups(ca: Authority, groups: tuple[int, ...]) -> None:
    client = engine(tls_id(ca, "client"), TlsParameters(groups=groups, min_version=TLS_1_3))
    server = engine(tls_id(ca, NAME), TlsParameters(role="server", groups=groups))
    handshake(Dock(client), Dock(server))
    assert client.key_block() == server.key_block()


def test_hello_retry_request(ca: Authority) -> None:
    """The client's first share is of a group that the server does not want: one more round trip, and the same keys."""
    client = engine(tls_id(ca, "client"), TlsParameters(groups=(0x001D, 0x0018), min_version=TLS_1_3))
    server = engine(tls_id(ca, NAME), TlsParameters(role="server", groups=(0x0018,)))
    handshake(Dock(client), Dock(server))
    assert client.negotiated().version == TLS_1_3
    assert client.key_block() == server.key_block()


def test_chain_with_an_intermediate(ca: Authority) -> None:
    """The identity's intermediate travels with it, the root does not; an intermediate alone is an anchor too."""
    intermediate = authority("Intermediate", parent=ca)
    client = engine(tls_id(intermediate, "client", authorities=[intermediate, ca]), TlsParameters())
    server = engine(tls_id(ca, NAME), TlsParameters(role="server"))
    handshake(Dock(client), Dock(server))
    assert len(server.peer_certificates()) == 2
    pinned = engine(tls_id(ca, NAME, authorities=[intermediate]), TlsParameters(role="server"))
    client.reset_state()
    trusting = engine(tls_id(intermediate, "client", authorities=[intermediate, ca]), TlsParameters())
    handshake(Dock(trusting), Dock(pinned))


@pytest.mark.parametrize("record_by_record", [False, True])
@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_partial_flights_are_acknowledged(ca: Authority, version: int, record_by_record: bool) -> None:
    """A docking host that cannot see where a flight ends gives record after record, even bytes: the card says when it has something."""
    client = engine(tls_id(ca, "client"), TlsParameters(min_version=version, max_version=version))
    server = engine(tls_id(ca, NAME), TlsParameters(role="server"))
    client_dock, server_dock = Dock(client), Dock(server)
    flight = server_dock.flight(client_dock.start())
    pieces = []
    while flight:
        size = 5 + int.from_bytes(flight[3:5]) if record_by_record else min(97, len(flight))
        pieces.append(flight[:size])
        flight = flight[size:]
    for piece in pieces[:-1]:
        assert client_dock.flight(piece) == b""
        assert client.state is EapState.AUTHENTICATING
    answer = server_dock.flight(client_dock.flight(pieces[-1]))
    if version == TLS_1_2:
        client_dock.flight(answer)
    assert client.state is server.state is EapState.AUTHENTICATED
    assert client.key_block() == server.key_block()


def plain_server(ca: Authority, version: int) -> SSL.Connection:
    """A server of pyOpenSSL without any of our code."""
    identity = tls_id(ca, NAME)
    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_max_proto_version(version)
    context.use_certificate(identity.certificate)
    context.use_privatekey(identity.private_key)
    store = context.get_cert_store()
    assert store is not None
    store.add_cert(crypto.X509.from_cryptography(ca.certificate))
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_session_id(b"test")
    connection = SSL.Connection(context, None)
    connection.set_accept_state()
    return connection


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_the_hand_over_is_exact(ca: Authority, version: int) -> None:
    """Against plain OpenSSL: the records that follow are opened with what the card handed over, from the number that it named."""
    peer = plain_server(ca, version)
    client = engine(tls_id(ca, "client"), TlsParameters())
    dock = Dock(client)
    flight = dock.start()
    while flight:
        peer.bio_write(flight)
        with contextlib.suppress(SSL.WantReadError):
            peer.do_handshake()
        if client.state is EapState.AUTHENTICATED:
            break
        flight = dock.flight(peer.bio_read(65536))
    assert client.state is EapState.AUTHENTICATED
    negotiated = client.negotiated()
    suite = SUITES[negotiated.suite]
    keys_of_client, keys_of_server = split_hand_over(suite, client.key_block())
    peer.send(b"hello from the server")
    opener = make_opener(suite, keys_of_server, negotiated.read_sequence, encrypt_then_mac=negotiated.encrypt_then_mac)
    contents = []
    for record in split_records(peer.bio_read(65536)):
        out = bytearray(record.length + 5)
        kind, length = opener.open_into(memoryview(record.raw), memoryview(out))
        contents.append((kind, bytes(out[:length])))
    assert contents[-1] == (23, b"hello from the server")
    assert [kind for kind, _ in contents[:-1]] == ([22, 22] if version == TLS_1_3 else [])
    sealer = make_sealer(suite, keys_of_client, negotiated.write_sequence, encrypt_then_mac=False, randbytes=os.urandom)
    out = bytearray(200)
    length = sealer.seal_into(23, b"hello from the client", memoryview(out))
    peer.bio_write(bytes(out[:length]))
    assert peer.recv(100) == b"hello from the client"
