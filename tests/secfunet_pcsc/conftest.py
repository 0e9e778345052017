"""A real pcscd with virtual readers, and two real cards in them, for all tests of a module."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from demo.readers import Pcscd, free_ports
from secfunet.card import KeyAlgorithm
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.pki import CertificateAuthority


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """For sockets: their paths are short."""
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    yield folder
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def running_pcscd(folder: Path, readers: int) -> AsyncIterator[Pcscd]:
    """One with so many readers."""
    pcscd = Pcscd(folder, "pcscd-1", free_ports(readers), folder / "pcscd-1.log")
    await pcscd.start()
    try:
        yield pcscd
    finally:
        await pcscd.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pcscd(short_folder: Path) -> AsyncIterator[Pcscd]:
    """Four readers; the two of ``cards`` are the first."""
    async with running_pcscd(short_folder, 4) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cards(short_folder: Path, pcscd: Pcscd) -> AsyncIterator[list[CardProcess]]:
    """Two cards with a P-256 key each, of one authority."""
    authority = CertificateAuthority()
    first, second = pcscd.readers[:2]
    async with (
        running_card(short_folder, name="one", reader=first) as one,
        running_card(short_folder, name="two", reader=second) as two,
    ):
        for card in (one, two):
            await personalise(card, authority, "vm", algorithm=KeyAlgorithm.P_256)
        yield [one, two]
