"""A grid whose cards' PINs are typed, or given by systemd: asked for once, tried once, and the counter is shown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.installation import Ports, place_line
from demo.processes import COMMANDS, run
from gose.running import ask_running_grid
from gose.settings import GoseSettings
from secfunet.service.files import private_folder
from secfunet.service.settings import load_settings
from tests.support.cards import CardProcess

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@dataclass
class Terminal:
    """What a person sees of ``gose serve``, and the process."""

    master: int
    reader: asyncio.StreamReader
    process: asyncio.subprocess.Process
    seen: str = ""

    async def until(self, words: str) -> None:
        """Reads on until they stand there."""
        async with asyncio.timeout(30):
            while words not in self.seen:
                self.seen += (await self.reader.read(4096)).decode()

    def type(self, words: str) -> None:
        os.write(self.master, words.encode() + b"\n")


@contextlib.asynccontextmanager
async def serving(config: Path, log: Path, environment: dict[str, str] | None = None) -> AsyncIterator[Terminal]:
    """``gose serve`` at a terminal."""
    master, slave = pty.openpty()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, master)
        stack.callback(os.close, slave)
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *(str(COMMANDS / "gose"), "serve", "--config", str(config)),
                stdin=slave,
                stdout=file,
                stderr=slave,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        try:
            reader = asyncio.StreamReader()
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(os.dup(master), "rb", buffering=0)
            )
            stack.callback(transport.close)
            yield Terminal(master, reader, process)
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


async def grid(folder: Path, card: CardProcess, pin: str) -> Path:
    """The settings of a grid with that one card."""
    config, ports = private_folder(folder) / "gose.toml", Ports.free()
    config.write_text(
        f"""\
[service_provider]
https = "127.0.0.1:{ports.sp_https}"
grpc = "127.0.0.1:{ports.sp_grpc}"
[openid_provider]
endpoint = "127.0.0.1:{ports.op_endpoint}"
login = "127.0.0.1:{ports.op_login}"
[limits]
card_backoff = 0.05
card_backoff_max = 0.1
[[secure_elements]]
seid = "web"
role = "vm"
{place_line(card.place)}
{pin}
"""
    )
    await run("gose", "init", "--config", config)
    return config


async def cause(config: Path, wanted: str) -> str:
    """Why the running grid does not use the card: as soon as it says ``wanted``, or what it says in the end."""
    said = ""
    for _ in range(300):
        grid = await ask_running_grid(load_settings(GoseSettings, config).state)
        said = grid.cards[0].cause if grid is not None else ""
        if wanted in said:
            break
        await asyncio.sleep(0.1)
    return said


async def attempts(card: CardProcess) -> int:
    """What ``gose readers`` shows."""
    report = json.loads((await run("gose", "readers", "--json", "--pcscd", card.place.daemon)).output)
    (mine,) = (entry for entry in report if entry["reader"] == card.place.reader)
    return int(mine["pin_attempts"])


def shown_to_everybody(pid: int) -> bytes:
    """Command line and environment of a process."""
    folder = Path(f"/proc/{pid}")
    return (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()


async def test_a_pin_that_is_typed_wrong_is_tried_once(cards: list[CardProcess], short_folder: Path) -> None:
    card = cards[0]
    config = await grid(short_folder / "typed", card, "user_pin_prompt = true")
    async with serving(config, short_folder / "typed.log") as terminal:
        await terminal.until(f"PIN of web ({card.place}): ")
        terminal.type("99999999")
        said = await cause(config, "attempts left")
        assert said == "web: the card has refused this PIN before; it is not tried again; attempts left: 2; " + (
            "unblock the card, or correct its PIN"
        )
        await asyncio.sleep(1)  # some ten more connections
        assert b"attempts left: 2" in (await run("gose", "status", "--config", config)).output
        assert b"99999999" not in shown_to_everybody(terminal.process.pid)
        assert terminal.seen.count("PIN of web") == 1
    assert "99999999" not in terminal.seen
    log = (short_folder / "typed.log").read_text()
    assert "99999999" not in log
    assert await attempts(card) == 2
    await (await card.connect("vm")).close()
    assert await attempts(card) == 3


@pytest.mark.parametrize("source", ["typed", "credential"])
async def test_a_right_pin_opens_the_card(cards: list[CardProcess], short_folder: Path, source: str) -> None:
    """It is not enrolled in this grid, which is all that is said against it."""
    card = cards[0]
    folder = short_folder / f"right-{source}"
    setting = "user_pin_prompt = true" if source == "typed" else 'user_pin_credential = "web-pin"'
    config = await grid(folder, card, setting)
    credentials = private_folder(folder / "credentials")
    (credentials / "web-pin").touch(0o400)
    (credentials / "web-pin").write_bytes(card.user_pin)
    environment = {"CREDENTIALS_DIRECTORY": str(credentials)} if source == "credential" else {}
    async with serving(config, folder / "log", environment) as terminal:
        if source == "typed":
            await terminal.until("): ")
            terminal.type(card.user_pin.decode())
        said = await cause(config, "enrolled")
    assert "enrolled" in said
    assert "PIN" not in said
    assert await attempts(card) == 3
