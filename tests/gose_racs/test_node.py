"""A node over real TLS and real cards: who gets in, who gets which card, and which commands reach it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import ssl
import subprocess
import time
from collections.abc import Awaitable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from gose.authority.certificate_authority import CertificateAuthority
from gose.racs.server import NodeService
from secfunet.apdu import StatusError
from secfunet.card.errors import CardBusyError, CardGoneError
from secfunet.card.instructions import AID, KeyOperation
from secfunet.card.ports import PipeliningPort
from secfunet.card.ready import ready_card
from secfunet.identity import Role, der_of, load_certificate, thumbprint
from secfunet.racs.card import connect_racs
from secfunet.racs.commands import (
    Apdu,
    Command,
    Echo,
    GetSen,
    GetVersion,
    ListCards,
    PowerOn,
    Reset,
    Sen,
    SetVersion,
    Shutdown,
)
from tests.gose_racs.node import Talker, TestNode, cards_in_use, refusals, settle, talking, user
from tests.support.pki import CertificateAuthority as ForeignAuthority

pytestmark = pytest.mark.asyncio(loop_scope="module")

SELECT = bytes.fromhex("00A40400") + bytes((len(AID),)) + AID
GRID = [user("grid-a", "b-1", "b-2"), user("other", "b-2")]
DIGEST = bytes(range(32))


async def test_the_commands_that_need_no_card(node: TestNode) -> None:
    async with node.running(users=GRID) as service, talking(service, node.context("grid-a")) as talker:
        response = await talker.ask(
            GetVersion(), SetVersion("0.2"), ListCards(), Echo("Hello"), append=True, identifier="x"
        )
        assert [(status.code, status.line) for status in response.statuses] == [(2, 1), (3, 2), (4, 3), (9, 4)]
        assert [status.text for status in response.statuses][2:] == ["b-[1;2]", "Hello"]
        assert await talker.code(SetVersion("1.0")) == -403
        await talker.say("BEGIN\nEND\nBEGIN two\nDANCE\nEND\n")
        assert await talker.hear(6) == [
            *("BEGIN", "+001 000 Success", "END"),
            *("BEGIN two", "-100 001 Unknown command at line 1", "END"),
        ]


async def test_a_card_is_used_and_given_back(node: TestNode) -> None:
    async with node.running(users=GRID) as service, talking(service, node.context("grid-a")) as talker:
        assert await talker.code(PowerOn("b-1")) == 8
        assert await talker.code(PowerOn("b-1")) == 8  # again: no error
        response = await talker.ask(Apdu("b-1", SELECT, continue_sw=0x9000), Apdu("b-1", bytes.fromhex("A019000001")))
        assert response.statuses[-1].text == "6303"  # no PIN yet
        assert await talker.code(Apdu("b-1", bytes.fromhex("A019000001"), continue_sw=0x9000)) == -6
        assert await talker.code(Reset("b-1", warm=True)) == 5
        assert (
            await talker.code(Apdu("b-1", bytes.fromhex("A019000001"), continue_sw=0x6999)) == 6
        )  # nothing is selected now
        assert await talker.code(Reset("b-1")) == 5
        assert await talker.code(Shutdown("b-1")) == 7
        assert await talker.code(Shutdown("b-1")) == 7
        assert await talker.code(Apdu("b-1", SELECT)) == 6  # powers it on by itself
        assert cards_in_use(service) == 1
    assert cards_in_use(service) == 0


async def test_a_card_has_one_user_at_a_time(node: TestNode) -> None:
    async with node.running(users=GRID) as service, talking(service, node.context("other")) as other:
        async with (
            talking(service, node.context("grid-a")) as first,
            talking(service, node.context("grid-a")) as second,
        ):
            assert await first.code(PowerOn("b-2")) == 8
            # Neither another session of the same user, nor another user.
            for talker in (second, other):
                assert await talker.code(PowerOn("b-2")) == -708
                assert await talker.code(Reset("b-2")) == -705
                assert await talker.code(Apdu("b-2", SELECT)) == -706
                assert await talker.code(Shutdown("b-2")) == -707
            assert await first.code(Shutdown("b-2")) == 7
            assert await other.code(PowerOn("b-2")) == 8
            assert await other.code(Shutdown("b-2")) == 7
            assert await first.code(PowerOn("b-2")) == 8
        # The end of the session unlocks (5.2).
        await settle(lambda: cards_in_use(service) == 0)
        assert await other.code(PowerOn("b-2")) == 8


async def test_a_user_has_only_the_cards_of_its_grants(node: TestNode) -> None:
    async with node.running(users=GRID) as service, talking(service, node.context("other")) as talker:
        assert (await talker.ask(ListCards())).statuses[0].text == "b-2"
        for seid in ("b-1", "no-such-card"):
            # One that is another's and one that is not there look the same.
            assert await talker.code(PowerOn(seid)) == -608
            assert await talker.code(Reset(seid)) == -605
            assert await talker.code(Apdu(seid, SELECT)) == -606
            assert await talker.code(Shutdown(seid)) == -607
            assert await talker.code(Sen(seid)) == -410
            assert await talker.code(GetSen(seid)) == -511
        assert cards_in_use(service) == 0


async def test_only_commands_that_a_rule_means_reach_the_card(node: TestNode) -> None:
    sign_only = ["00A40400", "A0200000", "802A9E00/FFFFFF00"]
    users = [user("grid-a", "b-1", allow=sign_only, deny=["802A9E01"])]
    card = node.cards["b-1"]
    async with node.running(users=users) as service, talking(service, node.context("grid-a")) as talker:
        pin = card.user_pin.ljust(8, b"\xff")
        assert (
            await talker.code(
                Apdu("b-1", SELECT, continue_sw=0x9000),
                Apdu("b-1", bytes.fromhex("A020000008") + pin, continue_sw=0x9000),
                Apdu("b-1", bytes.fromhex("802A9E0720") + DIGEST + b"\0", continue_sw=0x9000),
            )
            == 6
        )
        refused = [
            "802A800120" + DIGEST.hex(),  # decrypt
            "802A9E0120" + DIGEST.hex(),  # a scheme that deny takes away
            "80460000" + "04" + "78787878",  # make a key
            "A0200001" + "08" + "00" * 8,  # another PIN
            "012A9E0720" + DIGEST.hex(),  # another logical channel, another class
            "902A9E0720" + DIGEST.hex(),  # chaining is another class, too
            "802A9E",
        ]
        for apdu in refused[:-1]:
            assert await talker.code(Apdu("b-1", bytes.fromhex(apdu))) == -606
        # What the node itself would send on the user's behalf is looked at as well.
        assert await talker.code(Apdu("b-1", SELECT, more=0x90, fetch=bytes.fromhex("80460000"))) == -606
        assert await talker.code(PowerOn("b-1")) == 8
    assert service.metrics.statuses.labels("APDU", "unauthorised")._value.get() == 7


async def refused_over(service: NodeService, context: ssl.SSLContext) -> bytes:
    """What the node says to somebody whom it does not let in; with TLS 1.3 that comes behind the handshake."""
    try:
        async with talking(service, context) as talker:
            await talker.say("BEGIN\nLIST\nEND\n")
            return await talker.reader.read()
    except OSError:
        return b""


async def test_nothing_is_allowed_that_is_not_written(node: TestNode) -> None:
    async with node.running(users=[]) as service:
        assert await refused_over(service, node.context("grid-a")) == b""
        await settle(lambda: refusals(service) == {"no user": 1})


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_who_is_let_in(node: TestNode, version: ssl.TLSVersion) -> None:
    foreign = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP256R1()), now=time.time())
    strangers = {
        "another authority": (node.context("grid-a", ca=foreign), "tls"),
        "an expired certificate": (node.context("grid-a", age=200, valid=100), "tls"),
        "no certificate": (ssl.create_default_context(cafile=str(node.authority)), "tls"),
        "another role": (node.context("grid-a", Role.VM), "no user"),
        "another name": (node.context("nobody"), "no user"),
    }
    async with node.running(users=GRID) as service:
        for what, (context, reason) in strangers.items():
            context.minimum_version = context.maximum_version = version
            before = refusals(service).get(reason, 0)
            assert await refused_over(service, context) == b"", what
            await settle(lambda reason=reason, before=before: refusals(service).get(reason, 0) == before + 1)
        good = node.context("grid-a")
        good.minimum_version = good.maximum_version = version
        async with talking(service, good) as talker:
            assert await talker.code(Echo("x")) == 9


async def test_a_user_may_be_one_certificate(node: TestNode) -> None:
    context = node.context("anybody")
    pinned = thumbprint(der_of(load_certificate((node.folder / "anybody-node.pem").read_bytes())))
    users = [{"thumbprint": pinned, "grants": [{"secure_elements": ["b-1"], "allow": ["operate"]}]}]
    async with node.running(users=users) as service:
        async with talking(service, context) as talker:
            assert await talker.code(PowerOn("b-1")) == 8
        assert await refused_over(service, node.context("anybody")) == b""  # the same name, another certificate


async def test_a_certificate_that_ends_ends_the_session(node: TestNode) -> None:
    now = time.time()
    async with NodeService(node.settings(users=GRID), clock=lambda: now) as service:
        async with talking(service, node.context("grid-a", valid=3600)) as talker:
            assert await talker.code(PowerOn("b-1")) == 8
            now += 4000
            await talker.say("BEGIN\nECHO x\nEND\n")
            assert await talker.reader.read() == b""
        await settle(lambda: cards_in_use(service) == 0)


async def test_names_of_cards(node: TestNode) -> None:
    users = [user("grid-a", "b-1", may_name=True), user("other", "b-1")]
    async with node.running(users=users) as service, talking(service, node.context("grid-a")) as talker:
        assert await talker.code(GetSen("b-1")) == -11  # it has none
        response = await talker.ask(Sen("b-1", "key1.com"), GetSen("b-1"), append=True)
        assert [status.text for status in response.statuses] == [
            "SEN= key1.com AID= default",
            "key1.com [AID= default]",
        ]
        response = await talker.ask(Sen("b-1", "key1.com", bytes.fromhex("010203040500")), GetSen("b-1"))
        assert response.statuses[-1].text == "key1.com [AID= 010203040500]"
        async with talking(service, node.context("other")) as other:
            assert await other.code(Sen("b-1")) == 10
            assert await other.code(Sen("b-1", "mine.com")) == -610


# --- bounds, and what goes wrong


async def test_a_session_that_breaks_the_protocol_is_told_and_closed(node: TestNode) -> None:
    async with node.running(users=GRID) as service:
        async with talking(service, node.context("grid-a")) as talker:
            await talker.say("BEGIN one\nECHO 1\nEND\nBEGIN two\nECHO 2\nBEGIN three\n")
            assert await talker.hear(3) == ["BEGIN one", "+009 001 1", "END"]
            assert (await talker.hear(3))[0::2] == ["BEGIN two", "END"]
            assert await talker.reader.read() == b""
        async with talking(service, node.context("grid-a")) as talker:
            await talker.say("GET / HTTP/1.1\n")
            assert (await talker.hear(3))[1].startswith("-300 000 ")
            assert await talker.reader.read() == b""
        assert service.metrics.malformed._value.get() == 2
        async with talking(service, node.context("grid-a")) as talker:
            assert await talker.code(Echo("x")) == 9


async def test_a_request_that_drips_and_a_session_that_is_silent_are_ended(node: TestNode) -> None:
    async with node.running(users=GRID, request_timeout=0.5, idle_timeout=0.5) as service:
        async with talking(service, node.context("grid-a")) as talker:
            await talker.say("BEGIN\n")
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() < began + 10 and not talker.reader.at_eof():
                    await talker.say("ECHO x\n")
                    await asyncio.sleep(0.1)
            assert time.monotonic() < began + 10
        async with talking(service, node.context("grid-a")) as talker:
            assert await talker.code(PowerOn("b-1")) == 8
            assert await talker.is_closed()
        await settle(lambda: cards_in_use(service) == 0)


async def test_connections_and_sessions_are_bounded(node: TestNode) -> None:
    async with (
        node.running(users=GRID, connections=3, sessions_per_user=2, handshake_timeout=1) as service,
        talking(service, node.context("other")) as other,
        talking(service, node.context("grid-a")) as first,
    ):
        assert await first.code(Echo("x")) == await other.code(Echo("x")) == 9
        async with talking(service, node.context("other")) as second:
            assert await second.code(Echo("x")) == 9
            with pytest.raises(OSError):
                await asyncio.open_connection(*service.address, ssl=node.context("other"), server_hostname="localhost")
            await settle(lambda: refusals(service).get("too many connections") == 1)
        # Somebody who says nothing has a place among strangers, for the time of a handshake only.
        _, silent = await asyncio.open_connection(*service.address)
        await settle(lambda: len(service.keeper.silent) == 1)
        await settle(lambda: len(service.keeper.silent) == 0)
        silent.close()


async def test_strangers_take_no_place_of_a_user_and_fill_no_log(
    node: TestNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with contextlib.AsyncExitStack() as stack:
        service = await stack.enter_async_context(node.running(users=GRID, connections=32))
        for number in range(400):
            _, writer = await asyncio.open_connection(*service.address)
            writer.write(b"\x16" if number % 2 else b"")
            stack.callback(writer.close)
        for _ in range(3):
            async with talking(service, node.context("grid-a")) as talker:
                assert await talker.code(Echo("x")) == 9
        caplog.clear()
        for _ in range(200):
            _, writer = await asyncio.open_connection(*service.address)
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            writer.close()
        await asyncio.sleep(0.2)
        assert len(caplog.records) < 20, [record.message for record in caplog.records]


async def test_sessions_of_a_user_are_bounded(node: TestNode) -> None:
    async with node.running(users=GRID, sessions_per_user=1) as service, talking(service, node.context("other")) as one:
        assert await one.code(Echo("x")) == 9
        assert await refused_over(service, node.context("other")) == b""
        assert refusals(service) == {"too many sessions": 1}
        async with talking(service, node.context("grid-a")) as talker:
            assert await talker.code(Echo("x")) == 9


async def test_a_card_that_hangs_costs_its_own_session_only(node: TestNode) -> None:
    card = node.cards["b-1"].process
    assert card is not None
    async with node.running(users=GRID, apdu_timeout=1.0) as service:
        context = node.context("grid-a")
        async with talking(service, context) as talker, talking(service, context) as other:
            assert await talker.code(PowerOn("b-1")) == 8
            assert await other.code(PowerOn("b-2")) == 8
            card.send_signal(signal.SIGSTOP)
            try:
                hanging = asyncio.create_task(talker.code(Apdu("b-1", SELECT)))
                await asyncio.sleep(0.1)
                assert await other.code(Apdu("b-2", SELECT, continue_sw=0x9000)) == 6
                assert not hanging.done()
                assert await hanging == -806
                assert not service.cards["b-1"].is_in_use
            finally:
                card.send_signal(signal.SIGCONT)
            await settle_code(talker, PowerOn("b-1"), 8)


async def settle_code(talker: Talker, command: Command, code: int) -> None:
    deadline = time.monotonic() + 10
    while (found := await talker.code(command)) != code:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.05)


async def test_a_user_who_vanishes_gives_its_card_back_at_once(node: TestNode) -> None:
    card = node.cards["b-1"].process
    assert card is not None
    async with node.running(users=GRID) as service:
        context = node.context("grid-a")
        async with talking(service, context) as talker:
            assert await talker.code(PowerOn("b-1")) == 8
            card.send_signal(signal.SIGSTOP)
            await talker.say(f"BEGIN\nAPDU b-1 {SELECT.hex()}\nEND\n")
            await asyncio.sleep(0.1)
        try:
            await settle(lambda: not service.cards["b-1"].is_in_use)
        finally:
            card.send_signal(signal.SIGCONT)
        async with talking(service, context) as talker:
            await settle_code(talker, PowerOn("b-1"), 8)


async def test_a_card_that_is_dead_is_said_without_its_path(node: TestNode) -> None:
    await node.cards["b-1"].kill()
    try:
        async with node.running(users=GRID) as service, talking(service, node.context("grid-a")) as talker:
            (status,) = (await talker.ask(PowerOn("b-1"))).statuses
            assert (status.code, status.text) == (808, "b-1 does not answer")
            assert cards_in_use(service) == 0
    finally:
        await node.cards["b-1"].start()


async def test_the_node_stops_with_sessions_open(node: TestNode) -> None:
    async with node.running(users=GRID) as service, talking(service, node.context("grid-a")) as talker:
        assert await talker.code(PowerOn("b-1")) == 8
        await service.__aexit__(None, None, None)
        assert await talker.is_closed()
    assert cards_in_use(service) == 0
    await (await node.cards["b-1"].connect("vm")).close()


# --- the port


def port_to(service: NodeService, seid: str, context: ssl.SSLContext, **more: float) -> Awaitable[PipeliningPort]:
    return connect_racs("localhost", service.address[1], seid, context, timeout=10, **more)


async def test_a_remote_card_is_a_card(node: TestNode) -> None:
    pin = node.cards["b-1"].user_pin
    async with node.running(users=GRID) as service:
        context = node.context("grid-a")
        card = await ready_card(await port_to(service, "b-1", context), pin=pin, identity="vm")
        key = x509.load_der_x509_certificate(await card.certificate()).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(await card.sign(7, DIGEST), DIGEST, ec.ECDSA(Prehashed(SHA256())))
        outcomes = await card.operate(
            [(KeyOperation.SIGN, 7, bytes([n]) * 32) for n in range(150)]
        )  # more than one request
        assert len(outcomes) == 150
        for number, outcome in enumerate(outcomes):
            assert isinstance(outcome, bytes)
            key.verify(outcome, bytes([number]) * 32, ec.ECDSA(Prehashed(SHA256())))
        with pytest.raises(CardBusyError):
            await port_to(service, "b-1", context)
        await card.close()
        await card.close()
        again = await port_to(service, "b-1", context)  # free as soon as close returns
        await again.close()
        with pytest.raises(CardGoneError):
            await again.transmit(SELECT)


async def test_what_the_policy_refuses_is_a_status_word_and_the_card_stays(node: TestNode) -> None:
    users = [user("grid-a", "b-1", deny=["802A8000/FFFFFF00"])]
    async with node.running(users=users) as service:
        port = await port_to(service, "b-1", node.context("grid-a"))
        card = await ready_card(port, pin=node.cards["b-1"].user_pin, identity="vm")
        sign, decrypt = (KeyOperation.SIGN, 7, DIGEST), (KeyOperation.DECRYPT, 1, DIGEST)
        outcomes = await card.operate([sign, decrypt, sign, decrypt])
        assert [type(outcome) for outcome in outcomes] == [bytes, StatusError, bytes, StatusError]
        assert isinstance(outcomes[1], StatusError)
        assert outcomes[1].sw == 0x6986
        with pytest.raises(StatusError, match="6986"):
            await card.select(b"another application")
        await card.close()


async def test_a_node_that_goes_and_a_call_that_is_cancelled(node: TestNode) -> None:
    async with node.running(users=GRID) as service:
        context = node.context("grid-a")
        port = await port_to(service, "b-1", context)
        cancelled = asyncio.create_task(port.transmit(SELECT))
        await asyncio.sleep(0)
        cancelled.cancel()
        # Its answer is dropped before the next command.
        assert await port.transmit(bytes.fromhex("A019000001")) == bytes.fromhex("6303")
        assert await port.reset() == b""
        with pytest.raises(CardGoneError, match="-608"):
            await port_to(service, "no-such", context)
    with pytest.raises(CardGoneError):
        await port.transmit(SELECT)
    with pytest.raises(CardGoneError):
        await port_to(service, "b-1", context)


async def test_a_port_checks_who_the_node_is(node: TestNode) -> None:
    async with node.running(users=GRID) as service:
        other = ssl.create_default_context(cadata=ForeignAuthority().pem.decode())
        with pytest.raises(CardGoneError, match="certificate"):
            await connect_racs("localhost", service.address[1], "b-1", other, timeout=5)
        with pytest.raises(CardGoneError, match="certificate"):
            await connect_racs("127.0.0.1", service.address[1], "b-1", node.context("grid-a"), timeout=5)


async def test_openssl_speaks_to_a_node(node: TestNode) -> None:
    """A client that nobody here wrote carries the text."""
    key, certificate = node.credentials("grid-a")
    async with node.running(users=GRID) as service:
        client = await asyncio.create_subprocess_exec(
            *("openssl", "s_client", "-quiet", "-no_ign_eof", "-verify_return_error", "-verify_hostname", "localhost"),
            *("-connect", f"127.0.0.1:{service.address[1]}", "-CAfile", str(node.authority)),
            *("-cert", str(certificate), "-key", str(key)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert client.stdin is not None
        assert client.stdout is not None
        client.stdin.write(b"BEGIN SanchoPanza\r\nLIST APPEND\r\nPOWERON b-1 APPEND\r\nSHUTDOWN b-1\r\nEND\r\n")
        async with asyncio.timeout(20):
            lines = [(await client.stdout.readline()).decode().rstrip() for _ in range(5)]
        assert lines == [
            "BEGIN SanchoPanza",
            "+004 001 b-[1;2]",
            "+008 002 b-1 has been powered up",
            "+007 003 b-1 has been powered down",
            "END",
        ]
        client.kill()
        await client.wait()
