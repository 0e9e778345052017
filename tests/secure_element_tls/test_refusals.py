"""Who is refused, by which alert, and that the alert reaches the peer before the card reports the failure."""

import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from OpenSSL import SSL

from secfunet.card.parameters import EapState, TlsParameters
from secfunet.eap_tls import EapTlsMessage
from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secure_element.eap_engine import EapEngine, EapFailure, EapParametersRefused, TlsIdView
from tests.secure_element_tls.cards import Dock, engine, handshake
from tests.secure_element_tls.pki import CLIENT, DAY, SERVER, Authority, authority, tls_id

Make = Callable[[Authority, Authority, str], TlsIdView]
UTC_DAY = 86400


@pytest.fixture(scope="module")
def ca() -> Authority:
    return authority()


@pytest.fixture(scope="module")
def stranger() -> Authority:
    return authority("Another CA")


@pytest.fixture(scope="module")
def expired_ca(ca: Authority) -> Authority:
    return authority("Old CA", parent=ca, since=-20 * DAY, until=-10 * DAY)


def usage_for(role: str) -> tuple[object, ...]:
    """The usage of the other role."""
    return (SERVER,) if role == "client" else (CLIENT,)


BAD: dict[str, tuple[Make, AlertDescription]] = {
    "another issuer": (
        lambda ca, other, role: tls_id(other, role, authorities=[ca]),
        AlertDescription.UNKNOWN_CA,
    ),
    "an issuer of the same name": (
        lambda ca, other, role: tls_id(authority(), role, authorities=[ca]),
        AlertDescription.DECRYPT_ERROR,
    ),
    "expired": (
        lambda ca, other, role: tls_id(ca, role, since=-2 * DAY, until=-DAY),
        AlertDescription.CERTIFICATE_EXPIRED,
    ),
    "not yet valid": (
        lambda ca, other, role: tls_id(ca, role, since=DAY, until=2 * DAY),
        AlertDescription.BAD_CERTIFICATE,
    ),
    "wrong extended key usage": (
        lambda ca, other, role: tls_id(ca, role, usages=usage_for(role)),  # type: ignore[arg-type]  # identifiers
        AlertDescription.UNSUPPORTED_CERTIFICATE,
    ),
    "issued by a leaf": (
        lambda ca, other, role: tls_id(
            Authority((leaf := tls_id(ca, "leaf")).certificate, leaf.private_key),
            role,
            authorities=[Authority(leaf.certificate, leaf.private_key), ca],
        ),
        AlertDescription.UNKNOWN_CA,
    ),
}


def run_until_failure(bad: Dock, good: Dock, bad_is_client: bool) -> tuple[bytes, EapFailure]:
    """The flight that the good card gives when it refuses, and what it reports then."""
    client, server = (bad, good) if bad_is_client else (good, bad)
    flight = client.start()
    turn = server
    for _ in range(6):
        flight = turn.flight(flight)
        if turn is good and good.card.state is EapState.NOT_AUTHENTICATED:
            with pytest.raises(EapFailure) as failure:
                good.ack()
            return flight, failure.value
        turn = client if turn is server else server
    raise AssertionError("nobody was refused")


@pytest.mark.parametrize("bad_role", ["client", "server"])
@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
@pytest.mark.parametrize("case", BAD)
def test_bad_certificates(ca: Authority, stranger: Authority, case: str, version: int, bad_role: str) -> None:
    make, alert = BAD[case]
    good_role = "server" if bad_role == "client" else "client"
    limits = {"min_version": version, "max_version": version}
    bad = Dock(engine(make(ca, stranger, bad_role), TlsParameters(role=bad_role, **limits)))  # type: ignore[arg-type]
    good = Dock(engine(tls_id(ca, good_role), TlsParameters(role=good_role, **limits)))  # type: ignore[arg-type]
    flight, failure = run_until_failure(bad, good, bad_role == "client")
    assert failure.alert == alert
    assert failure.sw == 0x7001
    assert good.card.state is EapState.NOT_AUTHENTICATED
    # The alert is in the answer, and the peer's card can read it.
    assert flight
    if bad.card.state is EapState.AUTHENTICATED:
        # A client of TLS 1.3 is through before the server judges its certificate: its docking host reads the alert.
        assert version == TLS_1_3
        assert bad_role == "client"
        return
    if version == TLS_1_2:
        assert flight[-7:-2] == bytes.fromhex("1503030002")
        assert flight[-1] == alert
    with pytest.raises(EapFailure) as heard:
        bad.flight(flight)
    assert heard.value.alert == alert
    assert bad.card.state is EapState.NOT_AUTHENTICATED


def test_an_expired_authority(ca: Authority, expired_ca: Authority) -> None:
    """A certificate that outlives its issuer is worth nothing, though the root is fine."""
    client = Dock(
        engine(tls_id(expired_ca, "client", authorities=[expired_ca, ca]), TlsParameters(max_version=TLS_1_2))
    )
    server = Dock(engine(tls_id(ca, "server"), TlsParameters(role="server")))
    _, failure = run_until_failure(client, server, bad_is_client=True)
    assert failure.alert == AlertDescription.CERTIFICATE_EXPIRED


def test_an_expired_anchor(ca: Authority, expired_ca: Authority) -> None:
    """Also when the expired authority is itself the anchor."""
    client = Dock(engine(tls_id(expired_ca, "client", authorities=[ca]), TlsParameters(max_version=TLS_1_2)))
    server = Dock(engine(tls_id(ca, "server", authorities=[expired_ca]), TlsParameters(role="server")))
    _, failure = run_until_failure(client, server, bad_is_client=True)
    assert failure.alert == AlertDescription.CERTIFICATE_EXPIRED


@pytest.mark.parametrize("role", ["client", "server"])
def test_an_identity_without_authority_starts_nothing(ca: Authority, role: str) -> None:
    card = Dock(engine(tls_id(ca, "card", authorities=[]), TlsParameters(role=role)))  # type: ignore[arg-type]
    with pytest.raises(EapFailure, match="no certificate authority"):
        _ = card.start() if role == "client" else card.flight(hello_of(ca))
    assert card.card.state is EapState.NOT_AUTHENTICATED


def hello_of(ca: Authority) -> bytes:
    return Dock(engine(tls_id(ca, "client"), TlsParameters())).start()


def test_a_key_that_is_not_the_certificates(ca: Authority) -> None:
    identity = tls_id(ca, "card")
    broken = TlsIdView("card", b"", identity.certificate, identity.authorities, tls_id(ca, "other").private_key)
    with pytest.raises(EapFailure, match="key"):
        Dock(engine(broken, TlsParameters())).start()


def test_a_weak_key_is_refused(ca: Authority) -> None:
    weak = tls_id(ca, "client", key=rsa.generate_private_key(65537, 1024))  # noqa: S505 - it is the weak one
    with pytest.raises(EapFailure):
        Dock(engine(weak, TlsParameters())).start()


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_a_client_without_certificate(ca: Authority, version: int) -> None:
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(version)
    peer = SSL.Connection(context, None)
    peer.set_connect_state()
    server = Dock(engine(tls_id(ca, "server"), TlsParameters(role="server")))
    with pytest.raises(SSL.WantReadError):
        peer.do_handshake()
    peer.bio_write(server.flight(peer.bio_read(65536)))
    if version == TLS_1_2:
        with pytest.raises(SSL.WantReadError):
            peer.do_handshake()
    else:
        peer.do_handshake()
    flight = server.flight(peer.bio_read(65536))
    with pytest.raises(EapFailure) as failure:
        server.ack()
    expected = AlertDescription.HANDSHAKE_FAILURE if version == TLS_1_2 else AlertDescription.CERTIFICATE_REQUIRED
    assert failure.value.alert == expected
    peer.bio_write(flight)
    with pytest.raises(SSL.Error, match="alert"):
        peer.recv(100)


# -- time --


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_the_hosts_time_counts(version: int) -> None:
    """A chain that is over by the machine's clock is fine at the time that the host gives; one that is valid now is not, at another."""
    old = authority("Old CA", since=-40 * DAY, until=-10 * DAY)
    new = authority("New CA", since=-5 * DAY, until=5 * DAY)
    for issuer, days, valid in ((old, -20, True), (old, 0, False), (old, -41, False), (new, 0, True), (new, 20, False)):
        span = (-40 * DAY, -10 * DAY) if issuer is old else (-5 * DAY, 5 * DAY)
        limits = {"min_version": version, "max_version": version}
        client = Dock(
            engine(tls_id(issuer, "client", since=span[0], until=span[1], authorities=[new]), TlsParameters(**limits))  # type: ignore[arg-type]
        )
        server_id = tls_id(new, "server", authorities=[issuer])
        server = Dock(engine(server_id, TlsParameters(role="server", **limits)))  # type: ignore[arg-type]
        server.unix_time += days * UTC_DAY
        if valid:
            handshake(client, server)
        else:
            _, failure = run_until_failure(client, server, bad_is_client=True)
            late = days >= 0
            assert failure.alert == (AlertDescription.CERTIFICATE_EXPIRED if late else AlertDescription.BAD_CERTIFICATE)


def test_no_time_means_the_clock_of_the_process(ca: Authority) -> None:
    client = engine(tls_id(ca, "client", until=timedelta(hours=1)), TlsParameters(max_version=TLS_1_2))
    for clock_offset, refused in ((0, False), (2 * 3600, True)):
        server = EapEngine(randbytes=bytes, legacy_tls=False, clock=lambda by=clock_offset: time.time() + by)
        server.select_identity(tls_id(ca, "server"))
        server.set_parameters(TlsParameters(role="server"))
        server.reset_state()
        client.reset_state()
        client_dock, server_dock = Dock(client), Dock(server)
        server_dock.unix_time = None  # type: ignore[assignment]  # the host gives none
        if not refused:
            handshake(client_dock, server_dock)
            continue
        _, failure = run_until_failure(client_dock, server_dock, bad_is_client=True)
        assert failure.alert == AlertDescription.CERTIFICATE_EXPIRED


def test_the_time_stands_in_the_hello(ca: Authority) -> None:
    """The published bridge: the card copies the host's four bytes into ClientHello.random[0:4]. Ours does when its clock agrees."""
    card = engine(tls_id(ca, "client"), TlsParameters())
    dock = Dock(card)
    assert abs(int.from_bytes(dock.start()[11:15]) - dock.unix_time) <= 2
    card.reset_state()
    astray = Dock(card, unix_time=dock.unix_time - 3 * UTC_DAY)
    assert abs(int.from_bytes(astray.start()[11:15]) - astray.unix_time) > 2


# -- algorithms --


@pytest.mark.parametrize(
    "parameters",
    [
        TlsParameters(min_version=0x0302),
        TlsParameters(suites=(0x002F,)),
        TlsParameters(suites=(0x009C,)),
        TlsParameters(suites=(0xC013,)),
        TlsParameters(suites=(0xC02F, 0x0005)),
        TlsParameters(suites=(0xC02F,), min_version=TLS_1_3),
        TlsParameters(suites=(0x1301,), max_version=TLS_1_2),
        TlsParameters(groups=(0x0001,)),
    ],
)
def test_parameters_that_are_refused(ca: Authority, parameters: TlsParameters) -> None:
    card = engine(tls_id(ca, "card"), TlsParameters())
    with pytest.raises(EapParametersRefused) as refusal:
        card.set_parameters(parameters)
    assert refusal.value.sw == 0x6A80
    assert card.state is EapState.AUTHENTICATING
    assert Dock(card).start()


def test_legacy_suites_are_no_default(ca: Authority) -> None:
    """Also where the settings allow them, they have to be asked for."""
    client = engine(tls_id(ca, "client", kind="rsa"), TlsParameters(suites=(0x002F, 0xC013)), legacy_tls=True)
    server = Dock(engine(tls_id(ca, "server", kind="rsa"), TlsParameters(role="server"), legacy_tls=True))
    flight = server.flight(Dock(client).start())
    assert flight == bytes.fromhex("15030300020228")
    with pytest.raises(EapFailure) as failure:
        server.ack()
    assert failure.value.alert == AlertDescription.HANDSHAKE_FAILURE


def test_no_common_version(ca: Authority) -> None:
    client = Dock(engine(tls_id(ca, "client"), TlsParameters(max_version=TLS_1_2)))
    server = Dock(engine(tls_id(ca, "server"), TlsParameters(role="server", min_version=TLS_1_3)))
    flight = server.flight(client.start())
    assert flight[-1] == AlertDescription.PROTOCOL_VERSION
    with pytest.raises(EapFailure) as failure:
        client.flight(flight)
    assert failure.value.alert == AlertDescription.PROTOCOL_VERSION


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
def test_no_common_application_protocol(ca: Authority, version: int) -> None:
    client = Dock(engine(tls_id(ca, "client"), TlsParameters(alpn=("h2",), max_version=version)))
    server = Dock(engine(tls_id(ca, "server"), TlsParameters(role="server", alpn=("http/1.1",))))
    flight = server.flight(client.start())
    with pytest.raises(EapFailure) as failure:
        server.ack()
    assert failure.value.alert == AlertDescription.NO_APPLICATION_PROTOCOL
    with pytest.raises(EapFailure) as heard:
        client.flight(flight)
    assert heard.value.alert == AlertDescription.NO_APPLICATION_PROTOCOL


def test_after_a_failure_the_card_works_on(ca: Authority, stranger: Authority) -> None:
    server = engine(tls_id(ca, "server"), TlsParameters(role="server"))
    bad = Dock(engine(tls_id(stranger, "client", authorities=[ca]), TlsParameters()))
    flight = Dock(server).flight(bad.start())
    flight = Dock(server).flight(bad.flight(flight))
    with pytest.raises(EapFailure):
        Dock(server).ack()
    server.reset_state()
    good = engine(tls_id(ca, "client"), TlsParameters())
    handshake(Dock(good), Dock(server))


def test_the_alert_may_be_longer_than_a_fragment(ca: Authority, stranger: Authority) -> None:
    """The failure counts when the last fragment of the alert's record is out, not before."""
    client = Dock(engine(tls_id(stranger, "client", authorities=[ca]), TlsParameters(min_version=TLS_1_3)))
    server = Dock(engine(tls_id(ca, "server"), TlsParameters(role="server"), fragment=16))
    flight = client.flight(server.flight(client.start()))
    answer = server._exchange(EapTlsMessage(flight).encode())
    fragments = 1
    while answer.more:
        assert server.card.state is EapState.AUTHENTICATING
        answer = server.ack()
        fragments += 1
    assert fragments == 2
    assert server.card.state is EapState.NOT_AUTHENTICATED
    with pytest.raises(EapFailure) as failure:
        server.ack()
    assert failure.value.alert == AlertDescription.UNKNOWN_CA
