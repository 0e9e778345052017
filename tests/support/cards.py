"""Real ``secure-element`` processes for tests, and quick identities on them.

::

    async with running_card(tmp_path) as card:
        await personalise(card, authority, "hypervisor")
        pool = SingleCard(lambda: card.connect("hypervisor"))
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from demo.installation import place_line
from demo.readers import VirtualReader
from secfunet.card import CardBusyError, CardClient, CardError, KeyAlgorithm, Segmentation
from secfunet.card.administrator import open_secure_channel
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.place import CardPlace, connect_card
from tests.support.pki import CertificateAuthority

START_TIMEOUT = 60.0


@dataclass
class CardProcess:
    """A card that runs as a process of its own; ``process`` may be killed and ``start`` called again."""

    folder: Path
    socket: Path
    user_pin: bytes
    user_pin_file: Path
    keys_file: Path
    config: Path
    log: Path
    reader: VirtualReader | None = None
    process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    async def start(self) -> None:
        """Starts the process; returns when it serves."""
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "secure_element.cli", "serve", "--config", str(self.config), stderr=log
            )
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        while True:
            try:
                await (await connect_card(self.place, timeout=1)).close()
                return
            except CardBusyError:
                return  # it serves, somebody who was quicker
            except CardError as error:
                if self.process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                    raise RuntimeError(f"the card did not start: {error}: {self.log.read_text()}") from None
                await asyncio.sleep(0.02)

    async def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
        return await self.process.wait()

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    @property
    def place(self) -> CardPlace:
        """Where programs find it."""
        return self.socket if self.reader is None else self.reader.place

    @property
    def keys(self) -> AdministratorKeys:
        """Those that administer it now."""
        return AdministratorKeys.read(self.keys_file)

    async def administer(self, *, segmentation: Segmentation = Segmentation.EXTENDED) -> CardClient:
        """A client through the administrator's secure channel, the applet selected."""
        client = CardClient(await connect_card(self.place, timeout=10), segmentation=segmentation)
        try:
            await client.select()
            return await open_secure_channel(client, self.keys)
        except BaseException:
            await client.close()
            raise

    async def connect(
        self, identity: str | None = None, *, segmentation: Segmentation = Segmentation.EXTENDED
    ) -> CardClient:
        """A client that is ready for work: applet selected, PIN verified, identity set."""
        client = CardClient(await connect_card(self.place, timeout=10), segmentation=segmentation)
        try:
            await client.select()
            await client.verify_pin(self.user_pin)
            if identity is not None:
                await client.set_identity(identity)
        except BaseException:
            await client.close()
            raise
        return client


@contextlib.asynccontextmanager
async def running_card(
    folder: Path, *, name: str = "card", settings: str = "", reader: VirtualReader | None = None
) -> AsyncIterator[CardProcess]:
    """Makes a card in ``folder`` (several may share it under different names) and runs it: at a socket, or in ``reader``.

    ``settings``: more TOML lines.

    A Unix socket's path is at most 107 bytes: a deeper folder gets a short link under /tmp while the card runs.
    """
    short = Path("/tmp") / f"card-{secrets.token_hex(6)}"  # noqa: S108 - a random name for a link into the test's own folder
    short.symlink_to(folder)
    card = CardProcess(
        folder=folder,
        socket=(short if len(str(folder)) > 80 else folder) / f"{name}.sock",
        user_pin=secrets.token_hex(4).encode(),
        user_pin_file=folder / f"{name}.user-pin",
        keys_file=folder / f"{name}.keys",
        config=folder / f"{name}.toml",
        log=folder / f"{name}.log",
        reader=reader,
    )
    where = f'socket = "{card.socket}"'
    if reader is not None:
        where = f'attach = "{reader.address}"\n{place_line(reader.place)}'
    card.config.write_text(f'{where}\nstore = "{name}.store"\n{settings}\n[store_key]\nfile = "{name}.key"\n')
    card.user_pin_file.touch(0o600)
    card.user_pin_file.write_bytes(card.user_pin + b"\n")
    try:
        init = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "secure_element.cli", "init", "--config", str(card.config)),
            *("--user-pin-file", str(card.user_pin_file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await init.communicate()
        assert init.returncode == 0, output.decode()
        try:
            await card.start()
            yield card
        finally:
            if card.process is not None:
                await card.stop()
    finally:
        short.unlink()


async def personalise(
    card: CardProcess,
    authority: CertificateAuthority,
    name: str,
    *,
    algorithm: KeyAlgorithm = KeyAlgorithm.P_256,
    common_name: str | None = None,
    names: Sequence[x509.GeneralName] = (),
    authorities: Sequence[bytes] = (),
    client: bool = True,
    server: bool = True,
) -> bytes:
    """Gives the card an identity whose key it makes; returns its certificate (DER). The card trusts ``authority`` unless told otherwise."""
    administrator = await card.administer()
    try:
        await administrator.generate_key(name, algorithm)
        request = await administrator.certificate_signing_request(name, common_name or name)
        certificate = authority.issue_for_request(request, names=names, client=client, server=server)
        await administrator.load_identity(name, name.encode(), certificate, authorities or (authority.der,))
    finally:
        await administrator.close()
    return certificate
