"""The grid authenticates peers by RADIUS, with TLS in its server cards: who gets in, what is refused, and that no card stays busy."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from gose.authority.certificate_authority import CertificateAuthority
from gose.server import GridService
from secfunet.card.parameters import TLS_1_2, TLS_1_3
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.identity import Holder, Role, der_of, pem_of, thumbprint
from secfunet.radius.wire import Attribute, Code
from tests.gose.grid import Hypervisor, TestGrid, new_grid
from tests.gose_racs.node import settle
from tests.gose_radius.peer import SECRET, RadiusClient, eapol_test, engine_of, mppe_key, port_of, serve_radius
from tests.support.pki import key_pem

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERSIONS = pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="rad-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def grid(folder: Path) -> AsyncIterator[TestGrid]:
    """One server card: what is begun and not ended would be missed by the next."""
    async with new_grid(folder, vms=(), servers=1) as grid:
        serve_radius(grid)
        grid.hypervisor("hv-a")
        yield grid


@contextlib.asynccontextmanager
async def client_of(grid: TestGrid, secret: bytes = SECRET) -> AsyncIterator[RadiusClient]:
    client = await RadiusClient.connect(port_of(grid), secret)
    try:
        yield client
    finally:
        client.close()


def outcomes(service: GridService) -> dict[str, float]:
    """How many packets had which outcome."""
    return {
        sample.labels["outcome"]: sample.value
        for metric in service.metrics.registry.collect()
        if metric.name == "gose_radius_packets"
        for sample in metric.samples
        if sample.name.endswith("_total")
    }


def in_work(service: GridService) -> float:
    value = service.metrics.registry.get_sample_value("gose_radius_dialogues")
    assert value is not None
    return value


async def still_serves(grid: TestGrid, service: GridService) -> None:
    """Nothing is in work, and the one card is free at once."""
    await settle(lambda: in_work(service) == 0)
    async with client_of(grid) as client:
        began = time.monotonic()
        answer = await client.authenticate(engine_of(grid, grid.hypervisor("hv-a")))
        assert answer.code == Code.ACCESS_ACCEPT
        assert time.monotonic() - began < 3


# --- eapol_test


@pytest.mark.interop
@pytest.mark.parametrize("tls13", [False, True])
async def test_eapol_test_in_full_and_resumed(grid: TestGrid, tls13: bool) -> None:
    async with grid.running() as service:
        outcome = await eapol_test(grid, port_of(grid), grid.hypervisor("hv-a"), tls13=tls13, again=2)
        assert outcome.is_success, outcome.text[-3000:]
        assert set(outcome.versions) == {"TLSv1.3" if tls13 else "TLSv1.2"}
        # With TLS 1.3 it says so twice: a session ticket comes behind the handshake.
        times = 2 if tls13 else 1
        assert outcome.resumed == ["0"] * times + ["1"] * 2 * times
        assert outcome.keys == (3, 0)
        assert outcomes(service)["access_accept"] == 3
        assert in_work(service) == 0


@pytest.mark.interop
@pytest.mark.parametrize("fragment", [64, 300])
async def test_eapol_test_in_small_fragments(grid: TestGrid, fragment: int) -> None:
    async with grid.running():
        outcome = await eapol_test(grid, port_of(grid), grid.hypervisor("hv-a"), tls13=True, fragment=fragment)
        assert outcome.is_success, outcome.text[-3000:]


def stranger(grid: TestGrid, name: str, authority: CertificateAuthority, **how: Any) -> Hypervisor:
    """Somebody with a certificate that is not (or no longer) worth anything."""
    key = rsa.generate_private_key(65537, 2048)
    age = how.pop("age", 0.0)
    certificate = der_of(
        authority.issue(
            Holder(Role.HYPERVISOR, name), key.public_key(), now=time.time() - age, valid=how.pop("valid", 3600.0)
        )
    )
    pem = grid.folder / f"{name}.pem"
    pem.write_bytes(key_pem(key) + pem_of(certificate))
    return Hypervisor(name, thumbprint(certificate), certificate, key, pem)


@pytest.mark.interop
async def test_eapol_test_is_refused(grid: TestGrid) -> None:
    """Wrong authority on either side, an expired certificate, a revoked one, one that is not enrolled, and a wrong secret."""
    foreign = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP384R1()), now=time.time())
    foreign_file = grid.folder / "foreign.pem"
    foreign_file.write_bytes(pem_of(der_of(foreign.certificate)))
    ours = grid.authority.certificate_authority
    revoked = grid.hypervisor("hv-revoked")
    with grid.registry() as registry:
        registry.revoke_identity(Role.HYPERVISOR, "hv-revoked")
    strangers = [
        stranger(grid, "hv-foreign", foreign),
        stranger(grid, "hv-expired", ours, age=200, valid=100),
        revoked,
        stranger(grid, "hv-unknown", ours),
    ]
    async with grid.running() as service:
        for count, peer in enumerate(strangers, 1):
            for tls13 in (False, True):
                outcome = await eapol_test(grid, port_of(grid), peer, tls13=tls13)
                assert outcome.code != 0, peer.name
                assert "FAILURE" in outcome.text
            assert outcomes(service)["access_reject"] == 2 * count
        await still_serves(grid, service)
        # The peer ends this one, with an alert.
        outcome = await eapol_test(grid, port_of(grid), grid.hypervisor("hv-a"), authority=foreign_file)
        assert outcome.code != 0
        await still_serves(grid, service)
        before = outcomes(service)
        outcome = await eapol_test(
            grid, port_of(grid), grid.hypervisor("hv-a"), secret=b"another secret, as long as that", timeout=2
        )
        assert outcome.code != 0
        after = outcomes(service)
        assert after["wrong_secret"] >= 1
        assert {key: value for key, value in after.items() if key != "wrong_secret"} == before
        await still_serves(grid, service)


# --- packets that go astray


@VERSIONS
async def test_the_keys_are_the_peers_own(grid: TestGrid, version: int) -> None:
    peer = engine_of(grid, grid.hypervisor("hv-a"), min_version=version, max_version=version)
    async with grid.running() as service, client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        while answer.code == Code.ACCESS_CHALLENGE:
            packet, raw = client.request(peer.process(answer.eap), answer.state)
            client.send(raw)
            answer = await client.receive(packet)
        assert answer.code == Code.ACCESS_ACCEPT
        assert peer.process(answer.eap) == b""
        msk = peer.session_key()[:64]
        assert mppe_key(answer, packet.authenticator, 17) == msk[:32]
        assert mppe_key(answer, packet.authenticator, 16) == msk[32:]
        assert answer.packet[1] == [b"hv-a"]
        assert in_work(service) == 0


@VERSIONS
async def test_a_resumed_session_does_not_outlive_a_revocation(grid: TestGrid, version: int) -> None:
    name = f"hv-late-{version}"
    peer = engine_of(grid, grid.hypervisor(name), server_name="realm", min_version=version, max_version=version)
    async with grid.running() as service, client_of(grid) as client:
        for _ in range(2):
            answer = await client.authenticate(peer)
            assert answer.code == Code.ACCESS_ACCEPT
            assert peer.process(answer.eap) == b""
        assert peer.negotiated().resumed
        with grid.registry() as registry:
            registry.revoke_identity(Role.HYPERVISOR, name)
        assert (await client.authenticate(peer)).code == Code.ACCESS_REJECT
        await still_serves(grid, service)


async def test_lost_repeated_and_reordered_packets(grid: TestGrid) -> None:
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running() as service, client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        old: list[tuple[bytes, bytes | None]] = []
        while answer.code == Code.ACCESS_CHALLENGE:
            eap = peer.process(answer.eap)
            packet, raw = client.request(eap, answer.state)
            client.send(raw)
            first = await client.receive(packet)
            # The answer was lost, so the request is repeated: the same answer, and the card does not see it.
            client.send(raw)
            second = await client.receive(packet)
            assert (second.code, second.eap, second.state) == (first.code, first.eap, first.state)
            if first.code == Code.ACCESS_CHALLENGE:
                # A packet of before comes late, in a request of its own: it is ignored, and what is due is still due.
                for late, state in old:
                    again = await client.ask(late, state)
                    assert (again.code, again.eap, again.state) == (first.code, first.eap, first.state)
                    assert again.packet[Attribute.ERROR_CAUSE.value] == [(202).to_bytes(4)]
            old = [(eap, answer.state)]
            answer = first
        assert answer.code == Code.ACCESS_ACCEPT
        assert outcomes(service)["repeated"] >= 3
        # What comes when all is over has no dialogue any more.
        assert (await client.ask(*old[0])).code == Code.ACCESS_REJECT
        await still_serves(grid, service)


async def test_a_peer_that_goes_away_does_not_keep_the_card(grid: TestGrid) -> None:
    async with grid.running(peer_patience=0.5) as service, client_of(grid) as client:
        for rounds in (0, 1, 2):
            peer = engine_of(grid, grid.hypervisor("hv-a"))
            answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
            for _ in range(rounds):
                answer = await client.ask(peer.process(answer.eap), answer.state)
            assert in_work(service) == 1
            await still_serves(grid, service)


async def test_a_client_that_asks_for_the_first_word(grid: TestGrid) -> None:
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running() as service, client_of(grid) as client:
        answer = await client.ask(b"")
        assert (answer.code, answer.state) == (Code.ACCESS_CHALLENGE, None)
        assert EapPacket.decode(answer.eap) == EapPacket(EapCode.REQUEST, 0, EapType.IDENTITY)
        assert in_work(service) == 0
        answer = await client.ask(peer.process(answer.eap))
        while answer.code == Code.ACCESS_CHALLENGE:
            answer = await client.ask(peer.process(answer.eap), answer.state)
        assert answer.code == Code.ACCESS_ACCEPT


async def test_names_alone_take_no_card(grid: TestGrid) -> None:
    async with grid.running(handshakes=8) as service, client_of(grid) as client:
        for _ in range(8):
            assert (await client.begin()).code == Code.ACCESS_CHALLENGE
        answer = await client.begin()
        assert (answer.code, EapPacket.decode(answer.eap).code) == (Code.ACCESS_REJECT, EapCode.FAILURE)
        async with service.rack.servers.lease(timeout=1):
            pass


async def test_a_dialogue_belongs_to_its_state_and_its_client(grid: TestGrid) -> None:
    assert grid.settings.radius is not None
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running() as service, client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        hello = peer.process(answer.eap)
        assert answer.state is not None
        for state in (secrets.token_bytes(16), answer.state[:-1], b"x" * 200):
            assert (await client.ask(hello, state)).code == Code.ACCESS_REJECT
        # A peer that wants another method is refused, and that is all.
        other = await client.begin()
        nak = EapPacket(EapCode.RESPONSE, EapPacket.decode(other.eap).identifier, EapType.NAK, b"\x19").encode()
        assert (await client.ask(nak, other.state)).code == Code.ACCESS_REJECT
        assert (await client.ask(hello, answer.state)).code == Code.ACCESS_CHALLENGE
    assert in_work(service) == 0


async def test_what_is_not_answered(grid: TestGrid) -> None:
    identity = EapPacket(EapCode.RESPONSE, 7, EapType.IDENTITY, b"x").encode()
    async with grid.running() as service, client_of(grid) as client:
        wanted: dict[str, bytes] = {
            "unsigned": client.request(identity, signed=False)[1],
            "malformed": client.request(identity)[1][:-1],
        }
        signed = bytearray(client.request(identity)[1])
        signed[-1] ^= 1
        wanted["wrong_secret"] = bytes(signed)
        for reason, raw in wanted.items():
            client.send(raw)
            assert await client.nothing(), reason
            assert outcomes(service)[reason] == 1
        assert (await client.begin()).code == Code.ACCESS_CHALLENGE
    settings = grid.settings
    assert settings.radius is not None
    elsewhere = settings.radius.clients[0].model_copy(update={"address": "192.0.2.0/24"})
    try:
        grid.settings = settings.model_copy(
            update={"radius": settings.radius.model_copy(update={"clients": (elsewhere,)})}
        )
        async with grid.running() as service, client_of(grid) as client:
            client.send(client.request(identity)[1])
            assert await client.nothing()
            assert outcomes(service) == {"unknown_client": 1}
    finally:
        grid.settings = settings


async def test_a_flood_of_strangers_is_a_few_lines_of_the_log(grid: TestGrid, caplog: pytest.LogCaptureFixture) -> None:
    async with grid.running() as service, client_of(grid) as client, client_of(grid, b"another secret") as stranger:
        caplog.clear()
        began = time.monotonic()
        for _ in range(200):
            stranger.send(stranger.request(EapPacket(EapCode.RESPONSE, 7, EapType.IDENTITY, b"x").encode())[1])
        await settle(lambda: outcomes(service).get("wrong_secret") == 200)
        lines = [record for record in caplog.records if record.getMessage() == "packets discarded"]
        assert 1 <= len(lines) <= 2 + (time.monotonic() - began)
        assert (await client.begin()).code == Code.ACCESS_CHALLENGE


async def test_a_card_that_dies_in_the_middle(grid: TestGrid) -> None:
    card = grid.cards["server-0"]
    peer = engine_of(grid, grid.hypervisor("hv-a"))
    async with grid.running(card_backoff_max=0.3) as service, client_of(grid) as client:
        answer = await client.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        answer = await client.ask(peer.process(answer.eap), answer.state)
        await card.kill()
        assert (await client.ask(peer.process(answer.eap), answer.state)).code == Code.ACCESS_REJECT
        await card.start()
        (slot,) = service.rack.servers.slots
        await settle(lambda: slot.state.value == "in_service")
        await still_serves(grid, service)


async def test_many_at_once(grid: TestGrid) -> None:
    """More peers than cards: they wait for each other, and all get in."""
    async with grid.running() as service:

        async def one() -> int:
            async with client_of(grid) as client:
                return (await client.authenticate(engine_of(grid, grid.hypervisor("hv-a"), resume=False))).code

        assert await asyncio.gather(*(one() for _ in range(12))) == [Code.ACCESS_ACCEPT] * 12
        await settle(lambda: in_work(service) == 0)
