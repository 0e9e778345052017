"""A node for tests: an authority, cards that are processes, users with certificates, and somebody who speaks RACS by hand."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from gose.authority.certificate_authority import CertificateAuthority
from gose.racs.server import NodeService
from gose.racs.settings import NodeSettings
from gose.racs.tls import client_side
from secfunet.identity import Holder, Role, der_of, pem_of
from secfunet.racs.client import ClientConnection, Response
from secfunet.racs.commands import Command
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority as TestAuthority
from tests.support.pki import key_pem

DAY = 86400.0


@dataclass
class TestNode:
    """What a test needs to know of its node. ``users`` is the table that ``running`` gives it."""

    __test__ = False

    folder: Path
    ca: CertificateAuthority
    cards: dict[str, CardProcess]
    users: list[dict[str, Any]] = field(default_factory=list)

    @property
    def authority(self) -> Path:
        return self.folder / "ca.pem"

    def credentials(
        self,
        name: str,
        role: Role = Role.NODE,
        *,
        hosts: Sequence[str] = ("localhost",),
        ca: Any = None,
        valid: float = DAY,
        age: float = 0.0,
    ) -> tuple[Path, Path]:
        """Key and certificate of a holder, made anew."""
        key = ec.generate_private_key(ec.SECP256R1())
        has_names = role in (Role.NODE, Role.SERVER)
        certificate = (ca or self.ca).issue(
            Holder(role, name),
            key.public_key(),
            now=time.time() - age,
            valid=valid,
            server_names=hosts if has_names else (),
        )
        paths = self.folder / f"{name}-{role}.key", self.folder / f"{name}-{role}.pem"
        paths[0].touch(0o600)
        paths[0].write_bytes(key_pem(key))
        paths[1].write_bytes(pem_of(der_of(certificate)))
        return paths

    def context(self, name: str, role: Role = Role.NODE, **how: Any) -> ssl.SSLContext:
        """TLS as that holder, trusting the authority."""
        return client_side(*self.credentials(name, role, **how), self.authority)

    def settings(
        self, *, users: list[dict[str, Any]] | None = None, listen: str = "127.0.0.1:0", **limits: Any
    ) -> NodeSettings:
        """The node's settings."""
        key, certificate = self.credentials("node-b")
        return NodeSettings.model_validate(
            {
                "listen": listen,
                "key": key,
                "certificate": certificate,
                "authority": self.authority,
                "secure_elements": [{"seid": seid, "socket": card.socket} for seid, card in self.cards.items()],
                "users": self.users if users is None else users,
                "limits": limits,
            }
        )

    @contextlib.asynccontextmanager
    async def running(
        self, *, users: list[dict[str, Any]] | None = None, listen: str = "127.0.0.1:0", **limits: Any
    ) -> AsyncIterator[NodeService]:
        """The node in this process."""
        async with NodeService(self.settings(users=users, listen=listen, **limits)) as service:
            yield service


def refusals(service: NodeService) -> dict[str, float]:
    """Connections that became no session, by reason."""
    (metric,) = service.metrics.refused.collect()
    return {sample.labels["reason"]: sample.value for sample in metric.samples if sample.name.endswith("_total")}


def cards_in_use(service: NodeService) -> int:
    """How many cards a session has."""
    return sum(card.is_in_use for card in service.cards.values())


async def settle(condition: Callable[[], bool], timeout: float = 15.0) -> None:
    """Waits until it has come to that."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.02)


def user(name: str, *seids: str, allow: Sequence[str] = ("operate",), **more: Any) -> dict[str, Any]:
    """A user with one grant."""
    grant = {"secure_elements": list(seids), "allow": list(allow)}
    grant.update({key: more.pop(key) for key in ("deny", "may_name") if key in more})
    return {"name": name, "grants": [grant], **more}


class Talker:
    """A client that says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._protocol = ClientConnection()

    async def ask(self, *commands: Command, append: bool = False, identifier: str | None = None) -> Response:
        """One request."""
        self.writer.write(self._protocol.send(commands, append=append, identifier=identifier))
        while True:
            async with asyncio.timeout(20):
                response = self._protocol.receive(await self.reader.read(65536))
            if response is not None:
                return response

    async def code(self, *commands: Command) -> int:
        """The status of the last line: negative for a failure."""
        last = (await self.ask(*commands)).statuses[-1]
        return last.code if last.is_success else -last.code

    async def say(self, text: str) -> None:
        """Lines as they are."""
        self.writer.write(text.replace("\n", "\r\n").encode())
        await self.writer.drain()

    async def hear(self, count: int) -> list[str]:
        """So many lines."""
        async with asyncio.timeout(20):
            return [(await self.reader.readline()).decode().rstrip("\r\n") for _ in range(count)]

    async def is_closed(self) -> bool:
        """Whether the node ends the connection."""
        async with asyncio.timeout(20):
            try:
                return await self.reader.read() is not None
            except OSError:
                return True


@contextlib.asynccontextmanager
async def talking(service: NodeService, context: ssl.SSLContext) -> AsyncIterator[Talker]:
    """A connection to the node."""
    reader, writer = await asyncio.open_connection(
        *service.address, ssl=context, server_hostname="localhost", limit=2**20
    )
    try:
        yield Talker(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def new_node(folder: Path, seids: Sequence[str] = ("b-1", "b-2")) -> AsyncIterator[TestNode]:
    """Cards with a key each; the node itself is each test's own."""
    ca = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP256R1()), now=time.time())
    (folder / "ca.pem").write_bytes(pem_of(der_of(ca.certificate)))
    authority = TestAuthority()
    async with contextlib.AsyncExitStack() as stack:
        cards = {}
        for seid in seids:
            cards[seid] = await stack.enter_async_context(running_card(folder, name=seid))
            await personalise(cards[seid], authority, "vm")
        yield TestNode(folder, ca, cards)
