"""Cards behind a real pcscd, through pyscard: what went through a Unix socket goes through PC/SC."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.processes import run
from demo.readers import Pcscd
from gose.authority.enrolment import CardAccess
from secfunet.apdu import MAX_RESPONSE, PinError, StatusError
from secfunet.card import CardBusyError, CardClient, CardGoneError, KeyAlgorithm, Segmentation, ready_card
from secfunet.card.instructions import AID, Ins
from secfunet.card.parameters import TlsParameters
from secfunet.card.pcsc import connect_pcsc, list_readers, worker_pid
from secfunet.card.place import PcscPlace, connect_card
from secfunet.card.ports import PipeliningPort
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from tests.secfunet_pcsc.scripted import scripted_card
from tests.secure_element.test_process_handshake import DockingHost, handshake
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

SIGN = 7  # SIGNATURE_SCHEME_ECDSA_SHA256
NO_PIN = 0x6303  # with the attempts that are left
OK = bytes.fromhex("9000")


@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_a_card_signs(cards: list[CardProcess], segmentation: Segmentation) -> None:
    client = await cards[0].connect("vm", segmentation=segmentation)
    assert isinstance(client.port, PipeliningPort)
    assert len(await client.sign(SIGN, bytes(32))) >= 64
    assert await client.certificate("vm")
    await client.close()


@pytest.mark.parametrize(
    "segmentations",
    list(itertools.product(Segmentation, repeat=2)),
    ids=lambda pair: "-".join(one.value for one in pair),
)
async def test_a_handshake_in_both_ways_of_segmentation(
    cards: list[CardProcess], segmentations: tuple[Segmentation, Segmentation]
) -> None:
    """P1 More, 61xx, 9Fxx with FETCH and 6Cxx in short APDUs on the draft's side; extended APDUs on the other."""
    client, server = [
        await card.connect("vm", segmentation=segmentation)
        for card, segmentation in zip(cards, segmentations, strict=True)
    ]
    for version in (TLS_1_2, TLS_1_3):
        ends = DockingHost(client, is_client=True), DockingHost(server, is_client=False)
        await ends[0].begin(TlsParameters(server_name="server", min_version=version, max_version=version, resume=False))
        await ends[1].begin(TlsParameters(role="server"))
        await handshake(*ends)
        assert await client.key_block() == await server.key_block()
    await client.close()
    await server.close()


@pytest.mark.parametrize("style", ["draft", "iso"])
async def test_both_styles_of_long_answers(pcscd: Pcscd, tmp_path: Path, style: str) -> None:
    """A certificate of more than two short answers, by short APDUs: 9F00 and FETCH, or 61xx and GET RESPONSE."""
    authority = CertificateAuthority()
    async with running_card(tmp_path, reader=pcscd.readers[2], settings=f'segmentation = "{style}"') as card:
        await personalise(card, authority, "vm", algorithm=KeyAlgorithm.RSA_2048)
        client = await card.connect("vm", segmentation=Segmentation.DRAFT)
        statuses = set()
        transmit = client.port.transmit

        async def watched(command: bytes) -> bytes:
            response = await transmit(command)
            statuses.add(response[-2])
            return response

        client.port.transmit = watched  # type: ignore[method-assign]
        assert len(await client.certificate("vm")) > 512
        await client.close()
    assert statuses == ({0x9F, 0x90} if style == "draft" else {0x61, 0x90})


async def test_a_wrong_length_is_corrected(pcscd: Pcscd) -> None:
    """6Cxx: the command again, with that Le."""

    def answer(command: bytes) -> bytes:
        return bytes.fromhex("6C03") if command[-1] != 3 else b"abc" + OK

    async with scripted_card(pcscd.readers[3], answer) as card:
        client = CardClient(await connect_card(pcscd.readers[3].place, timeout=5), segmentation=Segmentation.DRAFT)
        assert await client.profile() == b"abc"
        assert [command[-1] for command in card.commands] == [0, 3]
        await client.close()


async def test_the_longest_apdus_go_through(pcscd: Pcscd) -> None:
    """65533 bytes there (what pcscd takes), 65533 and a status word back (what a frame of the virtual reader takes)."""
    length = 65526
    async with scripted_card(pcscd.readers[3], lambda command: bytes(MAX_RESPONSE - 3) + OK) as card:
        port = await connect_card(pcscd.readers[3].place, timeout=5)
        command = bytes.fromhex("80AA000000") + length.to_bytes(2) + os.urandom(length)
        assert await port.transmit(command) == bytes(MAX_RESPONSE - 3) + OK
        assert card.commands == [command]
        await port.close()


async def test_t0_gets_no_le(pcscd: Pcscd) -> None:
    """A card whose answer to reset offers T=0 alone."""
    async with scripted_card(pcscd.readers[3], lambda command: OK, atr="3B00") as card:
        port = await connect_card(pcscd.readers[3].place, timeout=5)
        await CardClient(port, segmentation=Segmentation.DRAFT).select()
        assert card.commands == [bytes((0x00, Ins.SELECT, 4, 0, len(AID))) + AID]
        with pytest.raises(CardGoneError, match="draft"):
            await CardClient(port).select()
        await port.close()


async def test_resets_are_cold_and_warm(pcscd: Pcscd) -> None:
    """Power off and on, or the reset line alone; and closing takes the power away."""
    off, on, reset = 0, 1, 2
    async with scripted_card(pcscd.readers[3], lambda command: OK) as card:
        port = await connect_card(pcscd.readers[3].place, timeout=5)
        assert card.controls[-2:] == [off, on], "a card begins cold"
        card.controls.clear()
        assert await port.reset() == bytes.fromhex("3B80800101")
        assert card.controls == [reset]
        card.controls.clear()
        assert await port.reset(cold=True) == bytes.fromhex("3B80800101")
        assert card.controls == [off, on]
        await port.close()
        assert card.controls[-1] == off


@pytest.mark.parametrize("cold", [False, True])
async def test_a_reset_forgets_the_pin(cards: list[CardProcess], cold: bool) -> None:
    client = await cards[0].connect("vm")
    await client.port.reset(cold=cold)
    await client.select()
    with pytest.raises(PinError):
        await client.sign(SIGN, bytes(32))
    await client.close()


async def test_a_card_is_for_one_program(cards: list[CardProcess], pcscd: Pcscd) -> None:
    """Neither this program nor another one gets the card whose PIN was verified, not even to share it."""
    client = await cards[0].connect("vm")
    with pytest.raises(CardBusyError, match="in use here"):
        await connect_card(cards[0].place, timeout=5)
    assert foreign(pcscd, cards[0], "SCARD_SHARE_SHARED") == "SCARD_E_SHARING_VIOLATION"
    assert await client.sign(SIGN, bytes(32))
    await client.close()
    assert foreign(pcscd, cards[0], "SCARD_SHARE_SHARED") == hex(NO_PIN)


async def test_a_program_that_is_killed_leaves_no_open_card(cards: list[CardProcess], pcscd: Pcscd) -> None:
    """Nothing could close it: pcscd resets the card itself, and its PIN is not verified for the next one."""
    client = await cards[0].connect("vm")
    pid = worker_pid(pcscd.socket)
    assert pid is not None
    os.kill(pid, 9)
    with pytest.raises(CardGoneError):
        await client.sign(SIGN, bytes(32))
    await client.close()
    async with asyncio.timeout(5):
        while (seen := foreign(pcscd, cards[0], "SCARD_SHARE_SHARED")) == "SCARD_E_SHARING_VIOLATION":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert seen == hex(NO_PIN)
    again = await cards[0].connect("vm")  # with a new worker
    assert worker_pid(pcscd.socket) not in (pid, None)
    assert await again.sign(SIGN, bytes(32))
    await again.close()


async def test_a_worker_ends_with_its_program(cards: list[CardProcess], pcscd: Pcscd) -> None:
    """A program that is killed while it has a card leaves no process behind, and no locked card."""
    code = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom secfunet.card.pcsc import connect_pcsc, worker_pid\n"
        "async def main():\n    where = Path(sys.argv[2])\n    port = await connect_pcsc(sys.argv[1], where, timeout=10)\n"
        "    print(worker_pid(where), flush=True)\n    await asyncio.sleep(60)\nasyncio.run(main())\n"
    )
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cards[1].reader.place.reader, str(pcscd.socket), stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    worker = int(await program.stdout.readline())
    program.kill()
    await program.wait()
    async with asyncio.timeout(5):
        while is_alive(worker):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    client = await cards[1].connect("vm")
    await client.close()


async def test_an_identity_is_enrolled_through_pcsc(cards: list[CardProcess], pcscd: Pcscd) -> None:
    """The administrator's secure channel, in short APDUs."""
    place = PcscPlace(cards[0].place.reader, pcscd.socket, Segmentation.DRAFT)
    client = await CardAccess.at(place, cards[0].keys).connect()
    assert client.segmentation is Segmentation.DRAFT
    await client.close()


async def test_what_is_not_there_is_said(pcscd: Pcscd, tmp_path: Path) -> None:
    with pytest.raises(CardGoneError, match="no card is in"):
        await connect_card(pcscd.readers[3].place, timeout=5)
    with pytest.raises(CardGoneError, match=r"no reader.*it has: 'SecFuNet"):
        await connect_card(PcscPlace("Nobody's", pcscd.socket), timeout=5)
    with pytest.raises(CardGoneError, match="does not answer"):
        await connect_card(PcscPlace("Any", tmp_path / "none.comm"), timeout=5)


async def test_a_wrong_pin_is_not_tried_twice(cards: list[CardProcess]) -> None:
    """And the error says how many attempts are left."""
    port = await connect_card(cards[0].place, timeout=5)
    with pytest.raises(PinError) as refused:
        await ready_card(port, pin=b"99999999", identity="vm")
    assert refused.value.attempts_remaining == 2
    report = json.loads(
        (await run("gose", "readers", "--json", "--pcscd", cards[0].reader.place.daemon)).output.decode()
    )
    assert [entry["pin_attempts"] for entry in report] == [2, 3, None, None]
    await (await cards[0].connect("vm")).close()


async def test_commands_find_the_card_in_its_reader(cards: list[CardProcess], tmp_path: Path) -> None:
    """status, pin change: secure-element's own commands go through the reader."""
    status = json.loads((await run("secure-element", "status", "--json", "--config", cards[0].config)).output)
    assert (status["state"], status["pin_attempts"]) == ("free", 3)
    assert status["place"] == str(cards[0].place)
    old, new = tmp_path / "old", tmp_path / "new"
    for path, pin in ((old, cards[0].user_pin), (new, b"87654321")):
        path.touch(0o600)
        path.write_bytes(pin)
    await run(
        "secure-element", "pin", "change", "--config", cards[0].config, "--old-pin-file", old, "--new-pin-file", new
    )
    await run(
        "secure-element", "pin", "change", "--config", cards[0].config, "--old-pin-file", new, "--new-pin-file", old
    )
    client = await cards[0].connect("vm")
    status = json.loads((await run("secure-element", "status", "--json", "--config", cards[0].config)).output)
    assert status["state"] == "in use"
    await client.close()


async def test_readers_are_shown(cards: list[CardProcess], pcscd: Pcscd) -> None:
    client = await cards[1].connect("vm")
    for command in ("gose", "secure-middleware"):
        lines = (await run(command, "readers", "--pcscd", pcscd.socket)).output.decode().splitlines()
        assert [line.split("  ")[0] for line in lines[1:]] == [str(reader.place) for reader in pcscd.readers]
        assert ["answers" in lines[1], "in use" in lines[2], "empty" in lines[3]] == [True] * 3
    await client.close()
    assert len(await list_readers(pcscd.socket, timeout=5)) == 4


async def test_many_operations_are_one_request(cards: list[CardProcess]) -> None:
    """Commands that are sent at once are answered in their order."""
    client = await cards[0].connect("vm")
    assert isinstance(client.port, PipeliningPort)
    commands = [bytes.fromhex("A020000000"), bytes.fromhex("A0FF000000")] * 20
    answers = await client.port.transmit_many(commands)
    assert len(answers) == 40
    assert len({answers[0], answers[1]}) == 2
    assert answers == answers[:2] * 20
    with pytest.raises(StatusError):
        await client.set_identity("nobody")
    await client.close()


async def test_the_name_without_numbers_is_enough_if_it_is_the_only_one(pcscd: Pcscd) -> None:
    """Here each name has two readers, so it is not."""
    with pytest.raises(CardGoneError, match="or several"):
        await connect_pcsc(pcscd.readers[0].place.reader[:-6], pcscd.socket, timeout=5)


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


def foreign(pcscd: Pcscd, card: CardProcess, share: str) -> str:
    """Another program (pyscard alone): how PC/SC refuses it, or the card's answer to a signature without a PIN."""
    code = (
        "import sys\nfrom smartcard import scard\n"
        "_, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)\n"
        "result, card, protocol = scard.SCardConnect(context, sys.argv[1], getattr(scard, sys.argv[2]), 3)\n"
        "if result == scard.SCARD_E_SHARING_VIOLATION:\n    sys.exit('SCARD_E_SHARING_VIOLATION')\n"
        "assert result == 0, scard.SCardGetErrorMessage(result)\n"
        "for command in sys.argv[3:]:\n"
        "    result, response = scard.SCardTransmit(card, scard.SCARD_PCI_T1, list(bytes.fromhex(command)))\n"
        "scard.SCardDisconnect(card, scard.SCARD_LEAVE_CARD)\n"
        "sys.exit(hex((response[-2] & 0xFF) << 8 | response[-1] & 0xFF))\n"
    )
    commands = (f"00A40400{len(AID):02X}{AID.hex()}", "802A9E0720" + "00" * 32)
    finished = subprocess.run(
        (sys.executable, "-c", code, card.place.reader, share, *commands),
        env={**os.environ, "PCSCLITE_CSOCK_NAME": str(pcscd.socket)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    return finished.stderr.strip()
