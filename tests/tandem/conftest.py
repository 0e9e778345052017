"""Two card processes for all tests of this room: one of a docking host that connects, one of a docking host that listens."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509

from secfunet.card import CardClient, KeyAlgorithm, Segmentation, SingleCard
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority
from tests.tandem.peers import Files

NAMES = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
ALGORITHMS = {"rsa": KeyAlgorithm.RSA_2048, "ec": KeyAlgorithm.P_256}


@dataclass(frozen=True)
class Cards:
    """``client`` has the identities client-rsa, client-ec and client-foreign; ``server`` has server-rsa and server-ec."""

    authority: CertificateAuthority
    foreign: CertificateAuthority
    client: CardProcess
    server: CardProcess
    certificates: dict[str, bytes]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cards(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cards]:
    """Real processes, made once."""
    folder = tmp_path_factory.mktemp("cards")
    authority, foreign = CertificateAuthority("Test CA"), CertificateAuthority("Foreign CA")
    certificates = {}
    async with (
        running_card(folder, name="client", settings="legacy_tls = true") as client,
        running_card(folder, name="server", settings="legacy_tls = true") as server,
    ):
        for kind, algorithm in ALGORITHMS.items():
            certificates[f"client-{kind}"] = await personalise(
                client, authority, f"client-{kind}", algorithm=algorithm, server=False
            )
            certificates[f"server-{kind}"] = await personalise(
                server, authority, f"server-{kind}", algorithm=algorithm, names=NAMES, client=False
            )
        await personalise(client, foreign, "client-foreign", server=False, authorities=(authority.der,))
        yield Cards(authority, foreign, client, server, certificates)


@dataclass
class Pools:
    """Makes pools of one card, closed at the end of the test. A card serves one pool: use one identity of each card in a test."""

    cards: Cards
    stack: contextlib.AsyncExitStack
    made: dict[str, SingleCard] = field(default_factory=dict)

    def client(self, kind: str = "ec", *, segmentation: Segmentation = Segmentation.EXTENDED) -> SingleCard:
        """A pool of the connecting host's card; ``kind``: rsa, ec or foreign."""
        return self._pool(self.cards.client, f"client-{kind}", segmentation)

    def server(self, kind: str = "ec", *, segmentation: Segmentation = Segmentation.EXTENDED) -> SingleCard:
        """A pool of the listening host's card."""
        return self._pool(self.cards.server, f"server-{kind}", segmentation)

    def _pool(self, card: CardProcess, identity: str, segmentation: Segmentation) -> SingleCard:
        async def connect() -> CardClient:
            return await card.connect(identity, segmentation=segmentation)

        if identity not in self.made:
            self.made[identity] = SingleCard(connect)
            self.stack.push_async_callback(self.made[identity].close)
        return self.made[identity]


@pytest_asyncio.fixture
async def pools(cards: Cards) -> AsyncIterator[Pools]:
    """See Pools."""
    async with contextlib.AsyncExitStack() as stack:
        yield Pools(cards, stack)


@pytest.fixture
def files(cards: Cards, tmp_path: Path) -> Files:
    """Certificates and keys as files, for programs."""
    return Files(tmp_path, cards.authority, cards.foreign)
