"""The main job with all cards in readers of a pcscd: the same programs, the same settings but for the cards' places."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from demo.attacks import public_key_pem
from demo.processes import run
from demo.stack import Stack
from demo.story import OPENSSL_PSS
from tests.e2e.test_restarts import kill_and_start, load

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    yield path / "i"
    shutil.rmtree(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pcsc_stack(folder: Path) -> AsyncIterator[Stack]:
    """One VM; five cards in a pcscd of the installation's own."""
    async with Stack(folder, vms=("web",), hypervisors=("xen-1",), cards="pcsc") as running:
        yield running


async def test_a_vm_signs_with_a_card_in_a_reader(pcsc_stack: Stack, tmp_path: Path) -> None:
    document, signature, public = tmp_path / "document", tmp_path / "signature", tmp_path / "public.pem"
    document.write_bytes(b"signed behind pcscd")
    public.write_bytes(public_key_pem(pcsc_stack.layout.certificate("web")))
    await pcsc_stack.agent("web", "sign", str(document), "--out", str(signature))
    verified = await run(
        "openssl", "dgst", "-sha256", "-verify", public, *OPENSSL_PSS, "-signature", signature, document
    )
    assert verified.output == b"Verified OK\n"
    status = json.loads(await pcsc_stack.gose("status", "--json"))
    assert {card["seid"]: (card["state"], card["place"]) for card in status["secure_elements"]} == {
        seid: ("in service", str(pcsc_stack.place(seid))) for seid in ("op-1", "op-2", "web")
    }
    assert str(pcsc_stack.place("web")).startswith("pcsc:SecFuNet")


@pytest.mark.parametrize("card", ["card-web", "card-xen-1", "card-op-1"])
async def test_a_card_is_pulled_and_put_back_in_the_middle_of_operations(pcsc_stack: Stack, card: str) -> None:
    """The VM's, the hypervisor's, one of the login page's: callers get their signatures, or are told; then all is as before."""
    async with load(pcsc_stack, "web") as signing:
        await signing.more(20)
        await kill_and_start(pcsc_stack, card)
        await signing.more(40)
    assert set(signing.failed) <= {"UNAVAILABLE"}


async def test_pcscd_is_killed_and_restarted_in_the_middle_of_operations(pcsc_stack: Stack) -> None:
    """All cards at once: the hypervisor's, the VM's, those of the login page."""
    (pcscd,) = pcsc_stack.pcscds
    async with load(pcsc_stack, "web") as signing:
        await signing.more(20)
        await pcscd.kill()
        await asyncio.sleep(0.5)
        await pcscd.start()
        await signing.more(40)
    assert set(signing.failed) <= {"UNAVAILABLE"}
    assert b"sound" in await pcsc_stack.middleware("audit", "verify")
