"""The bench as a hypervisor of its own: the second host's card, and the grid's client that the Secure Middleware uses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from demo.stack import Stack
from dom0_middleware.settings import MiddlewareSettings
from gose_client.client import GoseClient
from secfunet.card import CardClient, SingleCard, connect_unix
from secfunet.identity import der_of, load_certificate
from secfunet.service.files import read_secret
from secfunet.service.settings import load_settings


@asynccontextmanager
async def hypervisor_client(stack: Stack) -> AsyncIterator[tuple[GoseClient, bytes, str]]:
    """A client of the grid, and the certificate (DER) and token of a VM that may run on the second host."""
    host, vm = stack.hypervisors[1], stack.vms[-1]
    settings = load_settings(MiddlewareSettings, stack.layout.middleware_config(host))
    token = stack.layout.token(vm, host)
    if not token.exists():
        await stack.gose("issue-token", "--vm", vm, "--hypervisor", host, "--out", token)

    async def connect() -> CardClient:
        card = CardClient(await connect_unix(settings.card.socket, timeout=10))
        await card.select()
        await card.verify_pin(read_secret(settings.card.user_pin_file).strip())
        await card.set_identity(settings.card.identity)
        return card

    pool = SingleCard(connect)
    certificate = der_of(load_certificate(stack.layout.certificate(vm).read_bytes()))
    try:
        async with GoseClient(settings.grid, pool) as client:
            yield client, certificate, token.read_text().strip()
    finally:
        await pool.close()
