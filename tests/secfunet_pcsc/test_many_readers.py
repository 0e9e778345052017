"""More cards than one pcscd can carry: several daemons on one host, all reached by one program."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest

from demo.processes import ProcessError
from demo.readers import READERS, SLOTS, Pcscd, await_card, free_ports, virtual_readers
from secfunet.apdu import PinError
from secfunet.card import CardClient, CardGoneError
from secfunet.card.pcsc import list_readers, worker_pid
from secfunet.card.place import connect_card
from secfunet.service.files import private_folder
from secure_element.attachment import CardAttachment
from secure_element.card_os import CardOs
from tests.secfunet_pcsc.scripted import scripted_card
from tests.support.local_card import USER_PIN, new_store

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CARDS = 18
OK = bytes.fromhex("9000")


async def test_eighteen_cards_take_two_daemons(short_folder: Path) -> None:
    """Real card operating systems in virtual readers, each of which has its own PIN counter: none is taken for another."""
    daemons = virtual_readers(short_folder, free_ports(CARDS), short_folder)
    assert [len(daemon.readers) for daemon in daemons] == [READERS, CARDS - READERS]
    readers = [reader for daemon in daemons for reader in daemon.readers]
    async with contextlib.AsyncExitStack() as stack:
        for daemon in daemons:
            await daemon.start()
            stack.push_async_callback(daemon.stop)
        attachments = []
        for number, reader in enumerate(readers):
            store = stack.enter_context(contextlib.closing(new_store(private_folder(short_folder / str(number)))))
            attachments.append(CardAttachment(CardOs(store), ("127.0.0.1", reader.port)))
            stack.push_async_exit(attachments[-1])
        await asyncio.gather(*(attachment.__aenter__() for attachment in attachments))
        await asyncio.gather(*(await_card(reader.place) for reader in readers))
        ports = await asyncio.gather(*(connect_card(reader.place, timeout=20) for reader in readers))
        clients = [CardClient(port) for port in ports]
        for number, client in enumerate(clients):
            stack.push_async_callback(client.close)
            await client.select()
            with contextlib.suppress(PinError):
                await client.verify_pin(USER_PIN if number % 3 else b"99999999")
        assert [await client.pin_attempts() for client in clients] == [
            3 if number % 3 else 2 for number in range(CARDS)
        ]
        workers = [worker_pid(daemon.socket) for daemon in daemons]
        assert len(set(workers)) == 2
        assert None not in workers
        for daemon in daemons:
            assert all(seen.is_in_use for seen in await list_readers(daemon.socket, timeout=20))
        await daemons[0].kill()
        with pytest.raises(CardGoneError):
            await clients[0].pin_attempts()
        assert await clients[-1].pin_attempts() == 3, "another daemon's cards do not notice"


def listening_at(port: int) -> list[str]:
    """The addresses at which somebody listens on that port, as the kernel writes them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [address for _, address, _, state, *_ in lines if state == "0A" and address.endswith(f":{port:04X}")]


async def test_readers_listen_on_loopback_only(short_folder: Path) -> None:
    """The driver itself listens on every address: whoever connects first from the network would be the card, and be told the PIN."""
    pcscd = Pcscd(short_folder, "loopback", free_ports(1), short_folder / "loopback.log")
    await pcscd.start()
    try:
        port = pcscd.readers[0].port
        assert listening_at(port) == [f"0100007F:{port:04X}"]
    finally:
        await pcscd.stop()


def number_in(run: Path) -> int | None:
    """The number of the process that keeps its things in that folder."""
    file = run / "pcscd.pid"
    return int(file.read_text().strip("\n\0")) if file.exists() else None


async def test_our_own_pcscd_leaves_the_systems_alone(short_folder: Path) -> None:
    """Its folder has its process number in it, by which it is told of USB readers; and the readers themselves."""
    before = number_in(Path("/run/pcscd"))
    pcscd = Pcscd(short_folder, "own", free_ports(1), short_folder / "own.log")
    await pcscd.start()
    try:
        assert number_in(short_folder / "own.run") == pcscd.pid
        assert number_in(Path("/run/pcscd")) == before
        seen = await list_readers(pcscd.socket, timeout=20)
        assert [reader.name[:-2] for reader in seen] == [pcscd.readers[0].place.reader[:-2]] * SLOTS
    finally:
        await pcscd.stop()
    assert number_in(Path("/run/pcscd")) == before


async def test_another_users_process_is_not_the_card(short_folder: Path) -> None:
    """It would be told the PIN. It is let in by the kernel, and dropped by the reader; the card that comes after it is in."""
    pcscd = Pcscd(short_folder, "foreign", free_ports(1), short_folder / "foreign.log")
    reader = pcscd.readers[0]
    code = (
        "import socket, sys\ns = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "s.settimeout(10)\nprint('in', flush=True)\ntry:\n    print(s.recv(1))\nexcept OSError as error:\n    print(error)\n"
    )
    await pcscd.start()
    try:
        try:
            foreign = await asyncio.create_subprocess_exec(
                *("/usr/bin/python3", "-c", code, str(reader.port)), user="nobody", stdout=asyncio.subprocess.PIPE
            )
        except PermissionError:
            pytest.skip("only root may be somebody else")
        assert foreign.stdout is not None
        assert await foreign.stdout.readline() == b"in\n"
        async with scripted_card(reader, lambda command: OK) as card:
            port = await connect_card(reader.place, timeout=20)
            assert await port.transmit(b"\x00\xb0\x00\x00\x00") == OK
            await port.close()
            assert card.commands
        said = await foreign.stdout.read()
        assert said in (b"b''\n", b"[Errno 104] Connection reset by peer\n"), "not one byte for it"
        await foreign.wait()
    finally:
        await pcscd.stop()


async def test_a_pcscd_that_cannot_have_its_port_is_no_success(short_folder: Path) -> None:
    ports = free_ports(1)
    pcscd = Pcscd(short_folder, "taken", ports, short_folder / "taken.log")
    with socket.create_server(("127.0.0.1", ports[0])), pytest.raises(ProcessError):
        await asyncio.wait_for(pcscd.start(), 30)
    assert not pcscd.running


async def test_a_card_may_be_started_before_its_reader(short_folder: Path) -> None:
    """It waits, and is in the reader when that comes."""
    pcscd = Pcscd(short_folder, "late", free_ports(1), short_folder / "late.log")
    reader = pcscd.readers[0]
    folder = private_folder(short_folder / "late-card")
    with contextlib.closing(new_store(folder)) as store:
        attachment = CardAttachment(CardOs(store), ("127.0.0.1", reader.port))
        entering = asyncio.create_task(attachment.__aenter__())
        await asyncio.sleep(0.3)
        assert not entering.done()
        await pcscd.start()
        try:
            await entering
            await await_card(reader.place)
            port = await connect_card(reader.place, timeout=20)
            await CardClient(port).select()
            await port.close()
        finally:
            await attachment.__aexit__(None, None, None)
            await pcscd.stop()
