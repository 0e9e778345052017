"""Cards are pulled, fall silent, come back; pcscd dies or hangs: who asked is told in time, others go on, service returns by itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from demo.readers import Pcscd
from gose.cards import CardWays
from gose.metrics import Metrics
from gose.settings import Limits, SecureElementSettings
from gose.slots.bank import Bank
from gose.slots.connect import CardConnector, ReadyCard
from gose.slots.errors import CardUnavailableError
from gose.slots.slot import SlotState
from secfunet.card import CardBusyError, CardClient, CardGoneError, CardPort
from secfunet.card.parameters import TlsParameters
from secfunet.card.pcsc import worker_pid
from secfunet.card.place import CardPlace, connect_card
from secfunet.gose.v1 import operation_pb2
from secure_element.attachment import CardAttachment
from secure_element.card_os import CardOs
from tests.secfunet_pcsc.scripted import LOOK, scripted_card
from tests.secure_element.test_process_handshake import DockingHost, handshake
from tests.support.cards import CardProcess
from tests.support.local_card import new_store

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

LIMITS = Limits(
    operation_timeout=1.0,
    card_connect_timeout=2.0,
    card_backoff=0.05,
    card_backoff_max=0.2,
    watchdog_interval=0.5,
    watchdog_timeout=1.0,
)
OK = bytes.fromhex("9000")
PATIENCE = 20.0


class Others:
    """Somebody who uses another card of the same pcscd all the time; every operation is to succeed."""

    def __init__(self) -> None:
        self.done = 0

    @contextlib.asynccontextmanager
    async def at(self, bank: Bank) -> AsyncIterator[None]:
        async def work() -> None:
            while True:
                assert await bank.submit(sign, deadline=soon())
                self.done += 1

        task = asyncio.create_task(work())
        try:
            yield
            assert not task.done(), task.exception()
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def sign(card: ReadyCard) -> bytes:
    return await card.client.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32))


def soon() -> float:
    return time.monotonic() + PATIENCE


async def settle(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def signed_once_back(bank: Bank) -> bytes:
    """A signature; tries again while the loss of the card comes out, and while it is found again."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(CardUnavailableError):
                return await bank.submit(sign, deadline=soon())
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still: it neither answers nor goes away."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def pid_of(card: CardProcess) -> int:
    assert card.process is not None
    return card.process.pid


@pytest_asyncio.fixture(loop_scope="module")
async def banks(cards: list[CardProcess]) -> AsyncIterator[list[Bank]]:
    """A bank of the grid for each card, through PC/SC."""
    banks = []
    for card in cards:
        place = card.place
        element = SecureElementSettings.model_validate(
            {
                "seid": card.config.stem,
                "pcsc": {"reader": place.reader, "daemon": place.daemon},
                "role": "vm",
                "user_pin_file": card.user_pin_file,
            }
        )
        connector = CardConnector(element, LIMITS, CardWays())
        banks.append(Bank(element.seid, [(element.seid, connector)], LIMITS, Metrics()))
    await asyncio.gather(*(bank.start() for bank in banks))
    assert all(bank.slots[0].state is SlotState.IN_SERVICE for bank in banks)
    yield banks
    await asyncio.gather(*(bank.close() for bank in banks))


async def test_a_card_is_pulled_in_the_middle_of_a_signature(cards: list[CardProcess], banks: list[Bank]) -> None:
    others = Others()
    async with others.at(banks[1]):
        with stopped(pid_of(cards[0])):
            job = banks[0].submit(sign, deadline=soon())
            before = others.done
            await settle(lambda: others.done > before + 10)  # the signature is under way, and stands
            await cards[0].kill()
            with pytest.raises(CardUnavailableError, match=r"the card was taken out of SecFuNet|did not answer"):
                await job
        await settle(lambda: banks[0].slots[0].state is SlotState.OUT_OF_SERVICE)
        assert "no card is in SecFuNet" in banks[0].slots[0].cause
        await cards[0].start()
        await settle(lambda: banks[0].slots[0].state is SlotState.IN_SERVICE)
        assert await banks[0].submit(sign, deadline=soon())
    assert others.done > before + 20


async def test_a_card_that_never_answers_holds_nobody_else_up(cards: list[CardProcess], banks: list[Bank]) -> None:
    """The operation ends at its deadline though PC/SC cannot cancel it; the reader is not tried by ever more threads; it comes back."""
    others = Others()
    async with others.at(banks[1]):
        with stopped(pid_of(cards[0])):
            with pytest.raises(CardUnavailableError, match="did not answer within 1 s"):
                await banks[0].submit(sign, deadline=soon())
            await settle(lambda: "has not answered its last command yet" in banks[0].slots[0].cause)
            before, threads = others.done, worker_threads(cards[0])
            with pytest.raises(CardUnavailableError):
                await banks[0].submit(sign, deadline=soon())
            await settle(lambda: others.done > before + 50)
            assert worker_threads(cards[0]) <= threads + 1
            assert banks[0].slots[0].state is SlotState.OUT_OF_SERVICE
        await settle(lambda: banks[0].slots[0].state is SlotState.IN_SERVICE)
        assert await banks[0].submit(sign, deadline=soon())


async def test_an_idle_card_is_pulled_and_put_back(cards: list[CardProcess], banks: list[Bank]) -> None:
    """Nobody asks for anything: the watchdog notices, and the card comes back."""
    assert await cards[0].stop() == 0
    await settle(lambda: banks[0].slots[0].state is SlotState.OUT_OF_SERVICE)
    await cards[0].start()
    await settle(lambda: banks[0].slots[0].state is SlotState.IN_SERVICE)
    assert await banks[0].submit(sign, deadline=soon())


async def test_pcscd_is_killed_and_restarted(cards: list[CardProcess], banks: list[Bank], pcscd: Pcscd) -> None:
    """In the middle of operations. The cards attach themselves to the new one; nobody starts anything but pcscd."""
    jobs = [bank.submit(sign, deadline=soon()) for bank in banks for _ in range(20)]
    await pcscd.kill()
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert all(isinstance(outcome, bytes | CardUnavailableError) for outcome in outcomes)
    await settle(lambda: all(bank.slots[0].state is SlotState.OUT_OF_SERVICE for bank in banks))
    await settle(lambda: all("does not answer" in bank.slots[0].cause for bank in banks))
    await pcscd.start()
    await settle(lambda: all(bank.slots[0].state is SlotState.IN_SERVICE for bank in banks))
    for bank in banks:
        assert await bank.submit(sign, deadline=soon())


async def test_a_pcscd_that_hangs_costs_a_deadline(cards: list[CardProcess], banks: list[Bank], pcscd: Pcscd) -> None:
    with stopped(pcscd.pid):
        with pytest.raises(CardUnavailableError, match="did not answer within 1 s"):
            await banks[0].submit(sign, deadline=soon())
        with pytest.raises(CardGoneError, match=r"does not answer within 0\.5 s"):
            await connect_card(pcscd.readers[3].place, timeout=0.5)
        await settle(lambda: banks[0].slots[0].state is SlotState.OUT_OF_SERVICE)
    await settle(lambda: all(bank.slots[0].state is SlotState.IN_SERVICE for bank in banks))
    assert await banks[0].submit(sign, deadline=soon())


async def test_the_worker_is_killed(cards: list[CardProcess], banks: list[Bank], pcscd: Pcscd) -> None:
    """Both cards are lost with it, and found again by the next one."""
    pid = worker_pid(pcscd.socket)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    for bank in banks:
        assert await signed_once_back(bank)
    assert worker_pid(pcscd.socket) != pid


async def test_a_card_is_pulled_in_the_middle_of_a_handshake(cards: list[CardProcess]) -> None:
    """After its first flight; the other card is of use all the time, and the handshake succeeds when the card is back."""
    client, server = [await card.connect("vm") for card in cards]
    ends = DockingHost(client, is_client=True), DockingHost(server, is_client=False)
    await ends[0].begin(TlsParameters(server_name="server", resume=False))
    await ends[1].begin(TlsParameters(role="server"))
    hello = await ends[0].start()
    assert await ends[1].flight(hello)
    await cards[1].kill()
    with pytest.raises(CardGoneError, match=r"taken out of|does not answer to a reset"):
        await ends[1].flight(hello)
    with pytest.raises(CardGoneError):
        await server.state()
    assert await client.state()
    await server.close()
    await cards[1].start()
    server = await cards[1].connect("vm")
    ends = DockingHost(client, is_client=True), DockingHost(server, is_client=False)
    await ends[0].begin(TlsParameters(server_name="server", resume=False))
    await ends[1].begin(TlsParameters(role="server"))
    await handshake(*ends)
    await client.close()
    await server.close()


async def test_a_card_that_is_exchanged_unnoticed_starts_from_nothing(pcscd: Pcscd) -> None:
    """Out and in between two looks of the reader: the new card is not taken for the old one in the middle of its work."""
    reader = pcscd.readers[3]
    async with scripted_card(reader, lambda command: b"first" + OK) as card:
        port = await connect_card(reader.place, timeout=5)
        assert await port.transmit(b"\x00\xb0\x00\x00\x00") == b"first" + OK
        card.pull()
        async with scripted_card(reader, lambda command: b"second" + OK) as other:
            with pytest.raises(CardGoneError):
                await ask_for_a_while(port)
            await port.close()
            assert other.commands == []
    async with scripted_card(reader, lambda command: b"second" + OK):
        port = await connect_card(reader.place, timeout=5)
        assert await port.transmit(b"\x00\xb0\x00\x00\x00") == b"second" + OK
        await port.close()


async def test_a_card_that_is_exchanged_in_no_time_is_found_again(pcscd: Pcscd, tmp_path: Path) -> None:
    """Pulled under a command, and in again before the reader looks: pcscd may go on saying that nothing is there, until it comes anew."""
    reader = pcscd.readers[3]
    with contextlib.closing(new_store(tmp_path)) as store:
        for _ in range(6):
            async with CardAttachment(CardOs(store), ("127.0.0.1", reader.port)):
                port = await connect_in_the_end(reader.place)
                client = CardClient(port)
                await client.select()
                asked = asyncio.create_task(client.pin_attempts())
                await asyncio.sleep(0)
            for asking in (asked, client.pin_attempts()):
                with contextlib.suppress(CardGoneError):
                    await asking
            await port.close()
    await asyncio.sleep(LOOK)  # for the next test's card, which does not come anew


async def connect_in_the_end(place: CardPlace) -> CardPort:
    """As a slot does: again and again."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(CardGoneError):
                return await connect_card(place, timeout=2)
            await asyncio.sleep(0.1)


async def test_a_silent_card_is_not_waited_for_twice(pcscd: Pcscd) -> None:
    """Its first command stands; a second connection is refused at once, and the reader is free when the card is pulled."""
    reader = pcscd.readers[3]
    async with scripted_card(reader, lambda command: None):
        port = await connect_card(reader.place, timeout=5, answer_timeout=0.3)
        with pytest.raises(CardGoneError, match="was lost"):
            await port.transmit(b"\x00\xb0\x00\x00\x00")
        with pytest.raises(CardBusyError, match="has not answered its last command yet"):
            await connect_card(reader.place, timeout=5)
    async with scripted_card(reader, lambda command: OK):
        port = await connect_card(reader.place, timeout=5)
        assert await port.transmit(b"\x00\xb0\x00\x00\x00") == OK
        await port.close()


async def ask_for_a_while(port: CardPort) -> None:
    """For longer than a reader takes to look."""
    for _ in range(100):
        await port.transmit(b"\x00\xb0\x00\x00\x00")
        await asyncio.sleep(0.02)


def worker_threads(card: CardProcess) -> int:
    """Of this program's worker for the card's pcscd."""
    pid = worker_pid(card.place.daemon)
    assert pid is not None
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
