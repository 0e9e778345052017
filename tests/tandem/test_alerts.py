"""However a handshake fails: the peer gets one fatal alert, the right one, in the protection that it expects, and nothing behind it; and
the card's log says at that moment whom it refused, and why.

The peer is Python's ssl module; docking host and card are in memory.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from secfunet.errors import SecFuNetError
from secfunet.tandem.connection import TandemConnection, TandemState
from secfunet.tandem.errors import HandshakeRefusedError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.alerts import AlertDescription
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.errors import ServerNameError, TlsProtocolError
from secfunet.tls.records import ContentType, encode_record, split_records
from tests.support.pki import CertificateAuthority
from tests.tandem.engine_card import EngineCard, Host
from tests.tandem.recut import Identities, MemoryPeer, Records, Recut, reseal
from tests.tandem.test_both_ends import VERSIONS, only

AUTHORITY, FOREIGN = CertificateAuthority("Test CA"), CertificateAuthority("Foreign CA")
ROLES = pytest.mark.parametrize("role", ["client", "server"])
SUITE = {TLS_1_2: SUITES[0xC02B], TLS_1_3: SUITES[0x1301]}


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identities]:
    """Of peers, by what is wrong with their certificates."""
    made = {}
    for name, authority, expired in (
        ("good", AUTHORITY, False),
        ("foreign", FOREIGN, False),
        ("expired", AUTHORITY, True),
    ):
        made[name] = Identities(tmp_path_factory.mktemp(name), authority, expired=expired, kinds=("p256",))
        made[name].ca.write_bytes(AUTHORITY.pem)
    return made


def give_up(host: Host) -> bytes:
    """What aio does with a connection that failed; return what is still sent."""
    host.core.fail(AlertDescription.INTERNAL_ERROR)
    return host.core.take_output()


def heard(peer: MemoryPeer, data: bytes) -> tuple[str, int]:
    """The alert that the peer hears in ``data``, and how many bytes it has not looked at."""
    peer.incoming.write(data)
    try:
        while True:
            if peer.is_through:
                peer.tls.read(65536)
            else:
                peer.tls.do_handshake()
                peer.is_through = True
    except ssl.SSLWantReadError:
        return "nothing", peer.incoming.pending
    except ssl.SSLError as error:
        return str(error.reason).lower().rpartition("alert_")[2], peer.incoming.pending


class Story:
    """A handshake of our ``role`` with a peer, up to the failure. ``change`` is told each flight of the peer's, and may change it."""

    def __init__(
        self,
        role: str,
        version: int,
        identities: Identities,
        *,
        name: str = "localhost",
        change: Callable[[MemoryPeer, bytes], bytes] = lambda peer, flight: flight,
        context: Callable[[ssl.SSLContext], None] = lambda context: None,
        parameters: TandemParameters | None = None,
    ) -> None:
        parameters = parameters or only(version, suites=(SUITE[version].number,))
        peer_role = "server" if role == "client" else "client"
        made = identities.context(peer_role, "p256")
        context(made)
        self.peer = MemoryPeer(made, peer_role)
        self.host = Host(
            TandemConnection(role, parameters, server_name=name if role == "client" else ""),  # type: ignore[arg-type]
            EngineCard(AUTHORITY),
        )
        self.change = change
        self.error: SecFuNetError | None = None

    def fail(self) -> bytes:
        """Run it; return what the host sends from the failure on, alert included."""
        out = self.host.work() if self.host.core.role == "client" else b""
        for _ in range(6):
            flight = self.change(self.peer, self.peer.step(out))
            try:
                self.host.core.incoming.feed(flight)
                self.host.core.received()
                out = self.host.work()
            except SecFuNetError as error:
                self.error = error
                return self.host.core.take_output() + give_up(self.host)
            assert self.host.core.state is not TandemState.OPEN, "it did not fail"
        raise AssertionError("it does not end")


def tampered(version: int, message: int) -> Callable[[MemoryPeer, bytes], bytes]:
    """Flips the last bit of the peer's message of this type; the records are protected as ever."""

    def flip(content: bytes) -> bytes:
        changed, offset = bytearray(content), 0
        while offset < len(changed):
            end = offset + 4 + int.from_bytes(changed[offset + 1 : offset + 4])
            if changed[offset] == message:
                changed[end - 1] ^= 1
            offset = end
        return bytes(changed)

    hello = b""

    def change(peer: MemoryPeer, flight: bytes) -> bytes:
        nonlocal hello
        hello = hello or flight
        recut = Recut(peer, SUITE[version], change=flip)
        how = Records([16000], [0])
        if version == TLS_1_3:
            if not any(record.kind == ContentType.APPLICATION_DATA for record in split_records(flight)):
                return flight
            return b"".join(recut.tls13(flight, how))
        return recut.clear12(flight, how)

    return change


# What is wrong, what our end is, and what the peer hears in TLS 1.2 and in 1.3.
REFUSED_CERTIFICATES = {
    "foreign": ("unknown_ca", "unable to get local issuer certificate"),
    "expired": ("certificate_expired", "certificate has expired"),
}


@VERSIONS
@ROLES
@pytest.mark.parametrize("what", REFUSED_CERTIFICATES)
def test_a_certificate_that_the_card_refuses(
    identities: dict[str, Identities], role: str, version: int, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    alert, words = REFUSED_CERTIFICATES[what]
    story = Story(role, version, identities[what])
    with caplog.at_level(logging.WARNING):
        output = story.fail()
    assert heard(story.peer, output) == (alert, 0)
    assert isinstance(story.error, HandshakeRefusedError)
    assert story.error.peer_is_told
    assert "6985" not in str(story.error)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("secure_element")]
    assert len(lines) == 1
    assert lines[0].startswith("authentication of id failed: ")
    assert words in lines[0]
    assert alert in lines[0]


@VERSIONS
def test_a_client_without_a_certificate(
    identities: dict[str, Identities], version: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Bare(Identities):
        def context(self, role: str, kind: str) -> ssl.SSLContext:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(self.ca)
            context.keylog_filename = str(tmp_path / "keys")
            return context

    story = Story("server", version, Bare(tmp_path, AUTHORITY, kinds=()))
    output = story.fail()
    expected = "certificate_required" if version == TLS_1_3 else "handshake_failure"
    assert heard(story.peer, output) == (expected, 0)
    assert len([record for record in caplog.records if record.name.startswith("secure_element")]) == 1


@ROLES
@pytest.mark.parametrize("message", [15, 20], ids=["CertificateVerify", "Finished"])
def test_a_proof_of_tls13_that_is_wrong(
    identities: dict[str, Identities], role: str, message: int, caplog: pytest.LogCaptureFixture
) -> None:
    story = Story(role, TLS_1_3, identities["good"], change=tampered(TLS_1_3, message))
    output = story.fail()
    assert heard(story.peer, output) == ("decrypt_error", 0)
    assert isinstance(story.error, HandshakeRefusedError)
    assert story.error.peer_is_told
    assert len([record for record in caplog.records if record.name.startswith("secure_element")]) == 1


def test_a_proof_of_tls12_that_is_wrong(identities: dict[str, Identities], caplog: pytest.LogCaptureFixture) -> None:
    """A CertificateVerify, and a ClientKeyExchange, which it signs."""
    for count, message in enumerate((15, 16), 1):
        story = Story("server", TLS_1_2, identities["good"], change=tampered(TLS_1_2, message))
        assert heard(story.peer, story.fail()) == ("decrypt_error", 0)
        assert len([record for record in caplog.records if record.name.startswith("secure_element")]) == count


@ROLES
@VERSIONS
def test_nothing_in_common(identities: dict[str, Identities], role: str, version: int) -> None:
    other = {TLS_1_2: ssl.TLSVersion.TLSv1_3, TLS_1_3: ssl.TLSVersion.TLSv1_2}[version]

    def limit(context: ssl.SSLContext) -> None:
        context.minimum_version = context.maximum_version = other

    story = Story(role, version, identities["good"], context=limit)
    if role == "client":
        # The server refuses; nothing is said behind its alert.
        with contextlib.suppress(ssl.SSLError):
            story.peer.step(story.host.work())
        story.host.core.incoming.feed(story.peer.outgoing.read())
        with pytest.raises(SecFuNetError):
            story.host.core.received()
        assert not story.host.core.take_output() + give_up(story.host)
    else:
        assert heard(story.peer, story.fail()) == ("protocol_version", 0)


def test_a_server_of_another_name(identities: dict[str, Identities]) -> None:
    for version in (TLS_1_2, TLS_1_3):
        story = Story("client", version, identities["good"], name="elsewhere.example")
        output = story.fail()
        assert isinstance(story.error, ServerNameError)
        assert heard(story.peer, output) == ("bad_certificate", 0)


BROKEN = {
    "a handshake record in clear": (encode_record(22, b"\x0b\x00\x00\x00"), "unexpected_message"),
    "an unknown type": (b"\x63\x03\x03\x00\x01a", "unexpected_message"),
    "a record that is too long": (b"\x17\x03\x03\xff\xff", "record_overflow"),
    "a malformed ChangeCipherSpec": (encode_record(20, b"\x02"), "unexpected_message"),
    "an empty record": (encode_record(23, b""), "bad_record_mac"),
    "noise": (encode_record(23, bytes(100)), "bad_record_mac"),
    "a short record": (encode_record(23, bytes(5)), "bad_record_mac"),
}


@ROLES
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_flight_of_tls13_gets_the_cards_alert_at_once(
    identities: dict[str, Identities], role: str, what: str
) -> None:
    broken, alert = BROKEN[what]

    def change(peer: MemoryPeer, flight: bytes) -> bytes:
        records = split_records(flight)
        if not any(record.kind == ContentType.APPLICATION_DATA for record in records):
            return flight
        return b"".join(record.raw for record in records if record.kind != ContentType.APPLICATION_DATA) + broken

    story = Story(role, TLS_1_3, identities["good"], change=change)
    assert heard(story.peer, story.fail()) == (alert, 0)


SEALED = {
    "an empty alert": (21, b"", "unexpected_message"),
    "an alert that is too long": (21, b"\x02\x28\x00", "unexpected_message"),
    "an empty handshake record": (22, b"", "unexpected_message"),
    "an empty Finished": (22, b"\x14\0\0\0", "unexpected_message"),
    "data": (23, b"early", "unexpected_message"),
    "no content at all": (0, b"", "unexpected_message"),
}


@ROLES
@pytest.mark.parametrize("what", SEALED)
def test_a_record_of_tls13_that_breaks_the_handshake_gets_the_cards_alert_at_once(
    identities: dict[str, Identities], role: str, what: str
) -> None:
    kind, content, alert = SEALED[what]

    def change(peer: MemoryPeer, flight: bytes) -> bytes:
        if not any(record.kind == ContentType.APPLICATION_DATA for record in split_records(flight)):
            return flight
        recut = Recut(peer, SUITE[TLS_1_3])
        clear, _ = recut.tls13(flight, Records([16000], [0]))
        return clear + reseal(recut.sealer13(), kind, content)

    story = Story(role, TLS_1_3, identities["good"], change=change)
    assert heard(story.peer, story.fail()) == (alert, 0)


def test_a_hello_of_an_impossible_version() -> None:
    """OpenSSL's alert for it is in a record of that version, which would be no record to the peer."""
    peer_hello = Host(TandemConnection("client", TandemParameters(), server_name="x"), EngineCard(AUTHORITY)).work()
    host = Host(TandemConnection("server", TandemParameters()), EngineCard(AUTHORITY))
    host.core.incoming.feed(peer_hello[:9] + b"\0\0" + peer_hello[11:])
    host.core.received()
    with pytest.raises(HandshakeRefusedError, match="protocol_version"):
        host.work()
    assert host.core.take_output() + give_up(host) == encode_record(ContentType.ALERT, b"\x02\x46")


@VERSIONS
@ROLES
def test_no_alert_where_only_the_card_could_make_it(identities: dict[str, Identities], role: str, version: int) -> None:
    """A host that gives up (the peer stalls, the card is gone) says so in clear as long as the peer reads that, and then not at all."""
    told = encode_record(ContentType.ALERT, b"\x02\x50")
    seen = []
    for flights in range(4):
        story = Story(role, version, identities["good"])
        host, peer = story.host, story.peer
        out = host.work() if role == "client" else b""
        for _ in range(flights):
            host.core.incoming.feed(peer.step(out))
            host.core.received()
            out = host.work()
        if host.core.state is TandemState.OPEN:
            break
        alert = give_up(host)
        assert heard(peer, out + alert)[0] in ("nothing", "internal_error")
        seen.append(alert)
    # A client has said hello, a server nothing; then the server's ServerHello, or (TLS 1.2) our ChangeCipherSpec is what counts.
    expected = {
        ("client", TLS_1_2): [told, b""],
        ("client", TLS_1_3): [told],
        ("server", TLS_1_2): [told, told],
        ("server", TLS_1_3): [told, b""],
    }
    assert seen == expected[role, version]


def test_a_failure_is_told_once() -> None:
    core = TandemConnection("server", TandemParameters())
    core.start()
    core.incoming.feed(b"\x17\x03\x03\x00\x01a")
    with pytest.raises(TlsProtocolError):
        core.received()
    assert core.take_output() == encode_record(ContentType.ALERT, b"\x02\x0a")
    core.fail(AlertDescription.INTERNAL_ERROR)
    assert not core.take_output()
