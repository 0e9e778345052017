"""Which session may be resumed: the same identity, server name and parameters, as long as every certificate is still valid."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from secfunet.card.parameters import EapState, TlsParameters
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secure_element.eap_engine import EapDiscarded, EapEngine, EapFailure, TlsIdView
from secure_element.tls_context import MAX_CONTEXTS, SESSION_LIFETIME
from secure_element.tls_sessions import MAX_SESSIONS
from tests.secure_element_tls.cards import Dock
from tests.secure_element_tls.pki import Authority, authority, tls_id

VERSIONS = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])


@pytest.fixture(scope="module")
def ca() -> Authority:
    return authority()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def card(tls_id: TlsIdView, monotonic: Callable[[], float] | None = None) -> EapEngine:
    made = EapEngine(randbytes=lambda n: b"\x07" * n, legacy_tls=False, monotonic=monotonic or Clock())
    made.select_identity(tls_id)
    return made


def connect(
    client: EapEngine, server: EapEngine, client_side: TlsParameters, server_side: TlsParameters, *, later: float = 0
) -> bool:
    """One connection with its tickets forwarded; whether it was resumed."""
    for one, parameters in ((client, client_side), (server, server_side)):
        one.set_parameters(parameters)
        one.reset_state()
    client_dock, server_dock = Dock(client), Dock(server)
    client_dock.unix_time += int(later)
    server_dock.unix_time += int(later)
    flight = client_dock.start()
    while flight:
        flight = server_dock.flight(flight)
        if flight:
            flight = client_dock.flight(flight)
    assert client.state is server.state is EapState.AUTHENTICATED
    assert client.session_key() == server.session_key()
    assert client.negotiated().resumed is server.negotiated().resumed
    return client.negotiated().resumed


def both(version: int, name: str = "a.example", **more: object) -> tuple[TlsParameters, TlsParameters]:
    limits = {"min_version": version, "max_version": version}
    return (
        TlsParameters(server_name=name, **limits, **more),  # type: ignore[arg-type]
        TlsParameters(role="server", **limits),  # type: ignore[arg-type]
    )


@VERSIONS
def test_resumed_again_and_again(ca: Authority, version: int) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    outcomes = [connect(client, server, *both(version)) for _ in range(5)]
    assert outcomes == [False, True, True, True, True]


@VERSIONS
def test_peer_certificates_survive_resumption(ca: Authority, version: int) -> None:
    intermediate = authority("Intermediate", parent=ca)
    client = card(tls_id(intermediate, "client", authorities=[intermediate, ca]))
    server = card(tls_id(intermediate, "server", authorities=[intermediate, ca]))
    connect(client, server, *both(version))
    seen = client.peer_certificates(), server.peer_certificates()
    assert [len(chain) for chain in seen] == [2, 2]
    assert connect(client, server, *both(version))
    assert (client.peer_certificates(), server.peer_certificates()) == seen


@VERSIONS
def test_another_server_name(ca: Authority, version: int) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    assert not connect(client, server, *both(version, "b.example"))
    assert connect(client, server, *both(version))


@VERSIONS
def test_another_port_of_the_same_name(ca: Authority, version: int) -> None:
    """Two servers at one name: the one's session is not offered to the other."""
    client, server, neighbour = (card(tls_id(ca, name)) for name in ("client", "server", "neighbour"))
    connect(client, server, *both(version, server_port=443))
    assert not connect(client, neighbour, *both(version, server_port=8443))
    assert connect(client, server, *both(version, server_port=443))
    assert connect(client, neighbour, *both(version, server_port=8443))


@VERSIONS
def test_a_server_without_a_name_is_never_resumed(ca: Authority, version: int) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    assert [connect(client, server, *both(version, "")) for _ in range(3)] == [False] * 3


@VERSIONS
def test_another_identity_of_the_client(ca: Authority, version: int) -> None:
    """Two identities of one card at the same server: neither is taken for the other."""
    alice, bob = tls_id(ca, "alice"), tls_id(ca, "bob")
    client, server = card(alice), card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    of_alice = server.peer_certificates()
    client.select_identity(bob)
    assert not connect(client, server, *both(version))
    assert server.peer_certificates() != of_alice
    client.select_identity(alice)
    assert connect(client, server, *both(version))
    assert server.peer_certificates() == of_alice


@VERSIONS
def test_another_identity_of_the_server(ca: Authority, version: int) -> None:
    """A session belongs to the identity that the server card had when it was made."""
    one, other = tls_id(ca, "one"), tls_id(ca, "other")
    client, server = card(tls_id(ca, "client")), card(one)
    connect(client, server, *both(version))
    server.select_identity(other)
    assert not connect(client, server, *both(version))
    server.select_identity(one)
    assert not connect(client, server, *both(version, "unknown.example"))


@VERSIONS
def test_other_authorities_of_the_same_certificate(ca: Authority, version: int) -> None:
    """What the client trusts is part of its identity: a session made under other authorities is not used."""
    identity = tls_id(ca, "client")
    more = TlsIdView(
        identity.name,
        identity.eap_id,
        identity.certificate,
        (ca.certificate, authority("More").certificate),
        identity.private_key,
    )
    client, server = card(identity), card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    client.select_identity(more)
    assert not connect(client, server, *both(version))


@VERSIONS
def test_other_parameters(ca: Authority, version: int) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    assert not connect(client, server, *both(version, alpn=("h2",)))
    assert not connect(client, server, *both(version, groups=(0x0017,)))
    assert connect(client, server, *both(version))


@VERSIONS
def test_resumption_switched_off(ca: Authority, version: int) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    on, server_side = both(version)
    off, _ = both(version, resume=False)
    connect(client, server, on, server_side)
    assert not connect(client, server, off, server_side)
    assert connect(client, server, on, server_side)
    limits = {"min_version": version, "max_version": version}
    never = TlsParameters(role="server", resume=False, **limits)  # type: ignore[arg-type]
    assert [connect(client, server, both(version, "off")[0], never) for _ in range(2)] == [False, False]


@VERSIONS
def test_a_session_ages_from_the_full_handshake(ca: Authority, version: int) -> None:
    clock = Clock()
    client, server = card(tls_id(ca, "client"), clock), card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    clock.now += SESSION_LIFETIME - 1
    assert connect(client, server, *both(version))
    clock.now += 1
    assert not connect(client, server, *both(version))


@VERSIONS
def test_not_resumed_when_the_servers_certificate_is_over(ca: Authority, version: int) -> None:
    """The client does not offer the session; the full handshake then tells the server why."""
    client = card(tls_id(ca, "client"))
    server = card(tls_id(ca, "server", until=timedelta(hours=1)))
    connect(client, server, *both(version))
    assert connect(client, server, *both(version), later=1800)
    with pytest.raises(EapFailure):
        connect(client, server, *both(version), later=7200)
    assert client.state is server.state is EapState.NOT_AUTHENTICATED


@VERSIONS
def test_not_resumed_when_the_clients_certificate_is_over(ca: Authority, version: int) -> None:
    """The server card checks the certificate of a resumed session against the time that its host gives."""
    client = card(tls_id(ca, "client", until=timedelta(hours=1)))
    server = card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    client.reset_state()
    server.reset_state()
    client_dock, server_dock = Dock(client), Dock(server)
    server_dock.unix_time += 7200
    hello = client_dock.start()
    assert server_dock.flight(hello) == bytes.fromhex("1503030002022D"), "certificate_expired, and no ServerHello"
    assert server.state is EapState.NOT_AUTHENTICATED
    with pytest.raises(EapFailure, match="not valid now"):
        server_dock.ack()


@VERSIONS
def test_a_failed_resumption_is_not_tried_again(ca: Authority, version: int) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    connect(client, server, *both(version))
    client.reset_state()
    offered = Dock(client)
    offered.start()
    with pytest.raises(EapFailure):
        offered.flight(bytes.fromhex("15030300020228"))
    assert not connect(client, server, *both(version))


def test_tickets_that_are_not_for_the_card(ca: Authority) -> None:
    """Application data, or bytes that no key opens: discarded, and the results stay."""
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    connect(client, server, *both(TLS_1_3))
    dock = Dock(client)
    dock.start_code()
    with pytest.raises(EapDiscarded):
        dock.flight(bytes.fromhex("1703030013") + bytes(19))
    assert client.state is EapState.AUTHENTICATED
    assert client.key_block() == server.key_block()


def test_tickets_while_tls12(ca: Authority) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    connect(client, server, *both(TLS_1_2))
    dock = Dock(client)
    dock.start_code()
    with pytest.raises(EapDiscarded):
        dock.flight(bytes.fromhex("1703030013") + bytes(19))
    assert client.state is EapState.AUTHENTICATED


def test_caches_are_bounded(ca: Authority) -> None:
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    for number in range(MAX_SESSIONS + 3):
        connect(client, server, *both(TLS_1_2, f"host{number}"))
    stacks = client._stacks
    assert len(stacks._sessions) == MAX_SESSIONS
    assert not connect(client, server, *both(TLS_1_2, "host0"))
    assert connect(client, server, *both(TLS_1_2, f"host{MAX_SESSIONS}"))
    identity = tls_id(ca, "client")
    for number in range(MAX_CONTEXTS + 3):
        client.select_identity(
            TlsIdView(
                "n",
                b"",
                identity.certificate,
                (ca.certificate, authority(f"CA {number}").certificate),
                identity.private_key,
            )
        )
        client.reset_state()
        Dock(client).start()
    assert len(stacks._contexts) == MAX_CONTEXTS


def test_a_context_is_built_once(ca: Authority) -> None:
    client, server = card(tls_id(ca, "client", kind="rsa")), card(tls_id(ca, "server", kind="rsa"))
    for _ in range(3):
        connect(client, server, *both(TLS_1_2, resume=False))
    assert len(client._stacks._contexts) == len(server._stacks._contexts) == 1


def test_a_server_context_is_replaced_in_time(ca: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a server keeps of its clients is bounded: after so many handshakes its sessions are forgotten."""
    monkeypatch.setattr("secure_element.tls_context.MAX_SERVER_HANDSHAKES", 3)
    client, server = card(tls_id(ca, "client")), card(tls_id(ca, "server"))
    outcomes = [connect(client, server, *both(TLS_1_2)) for _ in range(7)]
    assert outcomes == [False, True, True, False, True, True, False]
