"""The bench as a hypervisor of its own: the second host's card, and the grid's client that the Secure Middleware uses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from demo.stack import Stack
from dom0_middleware.card import hypervisor_card
from dom0_middleware.settings import MiddlewareSettings
from gose_client.client import GoseClient
from secfunet.identity import der_of, load_certificate
from secfunet.service.settings import load_settings


@asynccontextmanager
async def hypervisor_client(stack: Stack) -> AsyncIterator[tuple[GoseClient, bytes, str]]:
    """A client of the grid, and the certificate (DER) and token of a VM that may run on the second host."""
    host, vm = stack.hypervisors[1], stack.elsewhere[0]
    settings = load_settings(MiddlewareSettings, stack.layout.middleware_config(host))
    token = stack.layout.token(vm, host)
    if not token.exists():
        await stack.gose("issue-token", "--vm", vm, "--hypervisor", host, "--out", token)

    pool = hypervisor_card(settings.card)
    certificate = der_of(load_certificate(stack.layout.certificate(vm).read_bytes()))
    try:
        async with GoseClient(settings.grid, pool) as client:
            yield client, certificate, token.read_text().strip()
    finally:
        await pool.close()
