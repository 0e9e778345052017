"""A VM whose card is bound to its hypervisor, through every process of the chain: what a service provider can do that lies.

The service provider is the grid's own program with the grid's own keys and cards (``tests/support/hostile_grid.py``). A second VM, whose
card is bound to nobody, is the control: its results are the service provider's to make, so there the same forgery passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from demo.attacks import public_key_pem
from demo.processes import Daemon, Finished, run
from demo.stack import Stack
from tests.support import hostile_grid

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")
BOUND, UNBOUND = "web", "db"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bound(stack: Stack) -> Stack:
    """``web`` is bound to the host that it runs on, while it runs."""
    said = await stack.gose("bind-vm", BOUND, "--hypervisor", stack.host)
    assert b"issue a new one" in said
    await new_token(stack)
    return stack


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def liar(bound: Stack) -> Path:
    """In place of the grid until the tests end; the file that says which lie it tells."""
    layout, file = bound.layout, bound.layout.folder / "lie"
    tell(file, "none")
    await bound.daemons["gose"].stop()
    program = Path(hostile_grid.__file__)
    words = ("python", program, file, "serve", "--config", layout.gose_config)
    bound.daemons["gose"] = Daemon("gose", words, layout.log("gose"))
    await bound.daemons["gose"].start()
    return file


def tell(file: Path, lie: str) -> None:
    file.write_text(lie)


@contextlib.contextmanager
def lying(file: Path, lie: str) -> Iterator[None]:
    tell(file, lie)
    try:
        yield
    finally:
        tell(file, "none")


async def new_token(stack: Stack) -> None:
    """For the VM as it runs: neither domain nor agent is started again."""
    token = stack.layout.token(BOUND, stack.host)
    token.unlink()
    await stack.gose("issue-token", "--vm", BOUND, "--hypervisor", stack.host, "--out", token)
    await stack.middleware("vm", "start", BOUND, "--token-file", token)


async def must_work(stack: Stack, vm: str, folder: Path) -> None:
    document, signature, public = folder / "document", folder / "signature", folder / "public.pem"
    document.write_bytes(b"what is signed")
    public.write_bytes(public_key_pem(stack.layout.certificate(vm)))
    await stack.agent(vm, "sign", str(document), "--out", str(signature))
    command = ("openssl", "dgst", "-sha256", *PSS, "-verify", public, "-signature", signature, document)
    assert (await run(*command)).output == b"Verified OK\n"
    ciphertext = await stack.agent(vm, "encrypt", "-", input_data=b"a secret")
    assert await stack.agent(vm, "decrypt", "-", input_data=ciphertext) == b"a secret"


async def sign(stack: Stack, vm: str) -> Finished:
    words = ("sign", "-", "--timeout", "10", "--config", stack.layout.agent_config(vm))
    return await run("vm-agent", *words, input_data=b"sign this", check=False)


async def test_a_bound_vm_and_one_that_is_not_use_their_keys(bound: Stack, tmp_path: Path) -> None:
    await must_work(bound, BOUND, tmp_path)
    await must_work(bound, UNBOUND, tmp_path)


@pytest.mark.parametrize("name", hostile_grid.LIES)
async def test_a_service_provider_that_lies_is_caught(bound: Stack, liar: Path, tmp_path: Path, name: str) -> None:
    await must_work(bound, BOUND, tmp_path)
    with lying(liar, name):
        refused = await sign(bound, BOUND)
    assert (refused.exit_code != 0, refused.output) == (True, b"")
    assert "refused" in refused.errors
    assert "Traceback" not in refused.errors
    await must_work(bound, BOUND, tmp_path)


async def test_what_is_forged_for_an_unbound_vm_passes(bound: Stack, liar: Path) -> None:
    """The control: the forgery above is a whole one, and binding is what stops it."""
    with lying(liar, "forged"):
        believed = await sign(bound, UNBOUND)
    assert (believed.exit_code, believed.output) == (0, hostile_grid.FORGED)


async def test_bound_to_another_host_it_has_no_key_here_and_back_it_has(bound: Stack, tmp_path: Path) -> None:
    """As a VM is moved and comes back: one command each, and a token."""
    await bound.gose("bind-vm", BOUND, "--hypervisor", "xen-2")
    refused = await sign(bound, BOUND)
    assert (refused.exit_code != 0, refused.output) == (True, b"")
    await bound.gose("bind-vm", BOUND, "--hypervisor", bound.host)
    await new_token(bound)
    await must_work(bound, BOUND, tmp_path)
    await bound.gose("unbind-vm", BOUND)
    await new_token(bound)
    await must_work(bound, BOUND, tmp_path)
