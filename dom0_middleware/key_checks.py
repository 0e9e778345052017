"""Checks of keys and signatures that a guest chose: in a thread, one at a time, and of each domain one after the other.

``parse_request`` bounds what one costs; here is bounded what many of them cost those who wait for the event loop.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from dom0_middleware.authority import PublicKey
from dom0_middleware.guest import GuestDomain
from dom0_middleware.guest_authority import parse_request


class KeyChecks:
    """For all domains of a host."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="key-check")

    async def key_of(self, guest: GuestDomain, untrusted_request: bytes) -> PublicKey:
        """See ``parse_request``. Time passes: what the caller looked at before it has to look at again."""
        async with guest.key_check:
            return await asyncio.get_running_loop().run_in_executor(self._thread, parse_request, untrusted_request)
