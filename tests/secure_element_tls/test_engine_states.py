"""States of the engine (draft-urien-eap-smartcard), what is discarded in each, and that no bytes leave it inconsistent."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secfunet.card.parameters import EapState, TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.eap_tls import EapTlsMessage
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secure_element.eap_engine import EapDiscarded, EapEngine, EapFailure, EapNotReady, TlsIdView
from tests.secure_element_tls.cards import Dock, engine, handshake
from tests.secure_element_tls.pki import authority, tls_id

CA = authority()
CLIENT = tls_id(CA, "client")
SERVER = tls_id(CA, "server")
START = bytes.fromhex("011400060D20")
IDENTITY = bytes.fromhex("01A5000501")
MD5 = bytes.fromhex("01A6000804021234")


def fresh() -> EapEngine:
    return EapEngine(randbytes=os.urandom, legacy_tls=False)


def test_without_identity_everything_is_discarded() -> None:
    card = fresh()
    card.reset_state()
    assert card.state is EapState.IDENTITY_NOT_SET
    for packet in (START, IDENTITY, MD5, b"", b"\x03\x01\x00\x04"):
        with pytest.raises(EapDiscarded) as discarded:
            card.process(packet)
        assert discarded.value.sw == 0x7000
    assert card.state is EapState.IDENTITY_NOT_SET


def test_after_set_identity_the_identity_is_asked_first() -> None:
    card = fresh()
    card.select_identity(CLIENT)
    assert card.state is EapState.NOT_AUTHENTICATED
    assert card.process(START) == bytes.fromhex("02140006030D")
    assert card.process(MD5) == bytes.fromhex("02A60006030D")
    assert card.state is EapState.NOT_AUTHENTICATED
    assert card.process(IDENTITY) == EapPacket(EapCode.RESPONSE, 0xA5, EapType.IDENTITY, b"client@secfunet").encode()
    assert card.state is EapState.AUTHENTICATING
    assert card.process(MD5) == bytes.fromhex("02A60006030D")
    assert card.process(START)[:6] == bytes.fromhex("0214") + card_length(card) + bytes.fromhex("0D80")
    with pytest.raises(EapDiscarded):
        card.process(MD5)


def card_length(card: EapEngine) -> bytes:
    assert card._last is not None
    return card._last[1][2:4]


def test_the_docking_start() -> None:
    """Reset-State, then the Start: the ten-byte header of the published bridge, then the record."""
    card = fresh()
    card.select_identity(CLIENT)
    card.reset_state()
    assert card.state is EapState.AUTHENTICATING
    answer = card.process(START, 0x3FAA2B6A)
    assert answer[:2] == bytes.fromhex("0214")
    assert int.from_bytes(answer[2:4]) == len(answer)
    assert answer[4:6] == bytes.fromhex("0D80")
    assert int.from_bytes(answer[6:10]) == len(answer) - 10
    assert answer[10:12] == bytes.fromhex("1603")


def test_fragments_have_six_bytes_of_header() -> None:
    card = engine(CLIENT, TlsParameters(server_name="x" * 100), fragment=64)
    first = card.process(START)
    assert first[4:6] == bytes.fromhex("0DC0")
    assert len(first) == 10 + 64
    total, sizes = int.from_bytes(first[6:10]), [64]
    number = 0x15
    while sum(sizes) < total:
        piece = card.process(bytes((1, number, 0, 6, 13, 0)))
        sizes.append(len(piece) - 6)
        assert piece[5] == (0x00 if sum(sizes) == total else 0x40)
        number += 1
    with pytest.raises(EapDiscarded):
        card.process(bytes((1, number, 0, 6, 13, 0)))


def test_notification_is_acknowledged() -> None:
    card = engine(CLIENT, TlsParameters())
    packet = EapPacket(EapCode.REQUEST, 3, EapType.NOTIFICATION, b"hello")
    assert card.process(packet.encode()) == bytes.fromhex("0203000502")


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_results_only_when_authenticated(version: int) -> None:
    client = engine(CLIENT, TlsParameters(min_version=version, max_version=version))
    server = engine(SERVER, TlsParameters(role="server"))

    def nothing() -> None:
        for card in (client, server):
            for ask in (card.session_key, card.negotiated, card.key_block, card.peer_certificates):
                with pytest.raises(EapNotReady) as refusal:
                    ask()
                assert refusal.value.sw == 0x6985
            with pytest.raises(EapNotReady):
                card.exported_parameter(1)

    nothing()
    hello = Dock(client).start()
    flight = Dock(server).flight(hello)
    nothing()
    handshake_rest(client, server, flight)
    for card in (client, server):
        assert card.key_block()
        with pytest.raises(EapNotReady):
            card.key_block()
        assert len(card.session_key()) == 128
        card.reset_state()
        assert card.state is EapState.AUTHENTICATING
    nothing()


def handshake_rest(client: EapEngine, server: EapEngine, flight: bytes) -> None:
    client_dock, server_dock = Dock(client), Dock(server)
    client_dock.start_code()
    while EapState.AUTHENTICATING in (client.state, server.state):
        flight = client_dock.flight(flight)
        if flight:
            flight = server_dock.flight(flight)


def test_results_come_when_the_last_fragment_is_out() -> None:
    """Keys are not handed over before the peer can have the whole last flight."""
    client = engine(CLIENT, TlsParameters(), fragment=64)
    server = engine(SERVER, TlsParameters(role="server"))
    dock = Dock(client)
    flight = Dock(server).flight(dock.start())
    answer = dock._exchange(EapTlsMessage(flight).encode())
    while answer.more:
        assert client.state is EapState.AUTHENTICATING
        with pytest.raises(EapNotReady):
            client.key_block()
        answer = dock.ack()
    assert client.state is EapState.AUTHENTICATED


def test_a_start_in_the_middle_is_discarded() -> None:
    card = engine(CLIENT, TlsParameters())
    card.process(START)
    with pytest.raises(EapDiscarded):
        card.process(bytes.fromhex("011500060D20"))


def test_the_identity_begins_anew_at_any_time() -> None:
    client, server = engine(CLIENT, TlsParameters()), engine(SERVER, TlsParameters(role="server"))
    handshake(Dock(client), Dock(server))
    assert client.process(IDENTITY)
    assert client.state is EapState.AUTHENTICATING
    with pytest.raises(EapNotReady):
        client.key_block()
    assert server.process(bytes.fromhex("02050005" + "01")) == bytes.fromhex("010600060D20")
    assert server.state is EapState.AUTHENTICATING


def test_records_behind_the_handshake_are_refused() -> None:
    """The card must not swallow what belongs to the application: the docking host learns that it gave too much."""
    client = engine(CLIENT, TlsParameters())
    server = engine(SERVER, TlsParameters(role="server"))
    dock = Dock(client)
    flight = Dock(server).flight(dock.start())
    with pytest.raises(EapFailure, match="behind the end"):
        dock.flight(flight + bytes.fromhex("1703030013") + bytes(19))
    assert client.state is EapState.NOT_AUTHENTICATED


@pytest.mark.parametrize(
    "behind", [b"", bytes.fromhex("1703030013") + bytes(19), bytes.fromhex("1703030005") + b"noise"]
)
def test_a_card_that_is_asked_to_reports_what_it_did_not_use(behind: bytes) -> None:
    client = engine(CLIENT, TlsParameters(report=True))
    dock = Dock(client)
    flight = Dock(engine(SERVER, TlsParameters(role="server"))).flight(dock.start())
    assert dock.flight(flight + behind)
    assert client.state is EapState.AUTHENTICATED
    assert (client.negotiated().unused, client.negotiated().max_fragment) == (len(behind), 0)
    plain = engine(CLIENT, TlsParameters())
    dock = Dock(plain)
    dock.flight(Dock(engine(SERVER, TlsParameters(role="server"))).flight(dock.start()))
    assert (plain.negotiated().unused, plain.negotiated().max_fragment) == (None, None)


def test_packets_for_the_other_role_are_discarded() -> None:
    client, server = engine(CLIENT, TlsParameters()), engine(SERVER, TlsParameters(role="server"))
    for card, packet in (
        (client, EapPacket(EapCode.RESPONSE, 1, EapType.TLS, b"\x00")),
        (client, EapPacket(EapCode.SUCCESS, 1)),
        (client, EapPacket(EapCode.FAILURE, 1)),
        (server, EapPacket(EapCode.REQUEST, 1, EapType.TLS, b"\x20")),
        (server, EapPacket(EapCode.REQUEST, 1, EapType.IDENTITY)),
        (server, EapPacket(EapCode.SUCCESS, 1)),
        (server, EapPacket(EapCode.RESPONSE, 1, EapType.TLS, b"\x00")),
        (server, EapPacket(EapCode.RESPONSE, 1, 4, b"\x00")),
    ):
        with pytest.raises(EapDiscarded):
            card.process(packet.encode())
        assert card.state is EapState.AUTHENTICATING
    handshake(Dock(client), Dock(server))


def test_parameters_hold_from_the_next_handshake() -> None:
    client, server = engine(CLIENT, TlsParameters()), engine(SERVER, TlsParameters(role="server"))
    dock = Dock(client)
    hello = dock.start()
    client.set_parameters(TlsParameters(role="server"))
    handshake_rest(client, server, Dock(server).flight(hello))
    assert client.key_block() == server.key_block()
    client.reset_state()
    assert Dock(client).flight(hello)


def test_secrets_do_not_show() -> None:
    view = repr(TlsIdView("n", b"", CLIENT.certificate, CLIENT.authorities, CLIENT.private_key))
    assert "PrivateKey" not in view


# -- any bytes --


def consistent(card: EapEngine) -> None:
    """The state and what may be had in it agree, and the card still does a handshake."""
    if card.state is EapState.AUTHENTICATED:
        assert card.session_key()
    else:
        with pytest.raises(EapNotReady):
            card.session_key()


def feed(card: EapEngine, packet: bytes) -> bytes | None:
    try:
        answer = card.process(packet)
    except EapDiscarded:
        return None
    except EapFailure:
        assert card.state is EapState.NOT_AUTHENTICATED
        return None
    if answer:
        EapPacket.decode(answer)
    return answer


tls_data = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=60).map(lambda data: bytes.fromhex("160303") + len(data).to_bytes(2) + data),
    st.binary(max_size=40).map(lambda data: bytes.fromhex("170303") + len(data).to_bytes(2) + data),
    st.just(bytes.fromhex("140303000101")),
    st.just(bytes.fromhex("15030300020228")),
    st.just(bytes.fromhex("15030300020100")),
)
eap_tls_packets = st.builds(
    lambda code, number, data, more, start, total: EapPacket(
        code, number, EapType.TLS, EapTlsMessage(data, more=more, start=start, total_length=total).encode()
    ).encode(),
    st.sampled_from([EapCode.REQUEST, EapCode.RESPONSE]),
    st.integers(0, 4),
    tls_data,
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 200),
)
any_packets = st.one_of(
    st.binary(max_size=64),
    eap_tls_packets,
    st.sampled_from([START, IDENTITY, MD5, bytes.fromhex("02050005" + "01"), b"\x03\x01\x00\x04", b"\x04\x01\x00\x04"]),
    st.just(bytes.fromhex("010100060D00")),
)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("role", ["client", "server"])
@relaxed
@given(packets=st.lists(any_packets, max_size=10), reset=st.booleans())
def test_any_packets(role: str, packets: list[bytes], reset: bool) -> None:
    card = SHARED[role]
    card.select_identity(CLIENT if role == "client" else SERVER)
    card.set_parameters(TlsParameters(role=role))  # type: ignore[arg-type]
    if reset:
        card.reset_state()
    for packet in packets:
        feed(card, packet)
        consistent(card)
    usable(card, role)


SHARED = {"client": fresh(), "server": fresh()}
OTHER = {"client": engine(SERVER, TlsParameters(role="server")), "server": engine(CLIENT, TlsParameters())}


def usable(card: EapEngine, role: str) -> None:
    other = OTHER[role]
    card.reset_state()
    other.reset_state()
    client, server = (card, other) if role == "client" else (other, card)
    handshake(Dock(client), Dock(server))


@pytest.mark.parametrize("target", ["client", "server"])
@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
@relaxed
@given(
    turn=st.integers(0, 2),
    position=st.integers(0, 4000),
    change=st.integers(1, 255),
    cut=st.none() | st.integers(0, 200),
)
def test_a_changed_flight(version: int, target: str, turn: int, position: int, change: int, cut: int | None) -> None:
    """A flight with a byte changed or its end missing: an answer or an error, never a handshake that both take for good."""
    client, server = SHARED["client"], SHARED["server"]
    for card, identity, role in ((client, CLIENT, "client"), (server, SERVER, "server")):
        card.select_identity(identity)
        card.set_parameters(TlsParameters(role=role, min_version=version, max_version=version))  # type: ignore[arg-type]
        card.reset_state()
    client_dock, server_dock = Dock(client), Dock(server)
    flight = client_dock.start()
    taking, turns = server_dock, {"client": 0, "server": 0}
    changed = False
    for _ in range(6):
        name = "server" if taking is server_dock else "client"
        if name == target and turns[name] == turn and flight:
            if cut is None:
                index = position % len(flight)
                flight = flight[:index] + bytes((flight[index] ^ change,)) + flight[index + 1 :]
            else:
                flight = flight[: -1 - cut % len(flight)]
            changed = True
        turns[name] += 1
        if not flight:
            break
        try:
            flight = taking.flight(flight)
        except (EapFailure, EapDiscarded):
            break
        taking = client_dock if taking is server_dock else server_dock
    for card in (client, server):
        consistent(card)
    if changed and client.state is server.state is EapState.AUTHENTICATED:
        # Only tickets (TLS 1.3), or bytes that TLS lets anybody change (a record's legacy version), went wrong.
        assert client.session_key() == server.session_key()
    usable(client, "client")
    usable(server, "server")
