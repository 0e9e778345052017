"""The ways to dom0 that join information can name, as gRPC targets: a Unix socket, TCP, or the vchan that Xen keeps for this domain.

``unix:PATH`` and ``tcp:ADDRESS:PORT`` are targets almost as they stand. ``vchan:SERVICE`` is a Unix socket of our own, in the state folder,
behind which the channel is.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from secfunet.service.files import private_folder
from secfunet.service.unix_socket import unix_target
from vm_agent.join import TCP, UNIX, VCHAN

if TYPE_CHECKING:
    from secfunet.xen.guest_end import GuestEnd

KEEPALIVE_MS = 15_000
# A peer on the bridge that is silently gone (a host that lost its power) is noticed within half a minute.
TCP_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)


class Transport:
    """An async context manager; the channel is opened with the first address that needs it, and stays."""

    def __init__(self, state: Path) -> None:
        self._folder = state / "c"
        self._stack = AsyncExitStack()
        self._guest_end: GuestEnd | None = None
        self.name = ""
        """Of the address that was used last: ``unix``, ``tcp`` or ``vchan``; "" before."""

    async def __aenter__(self) -> Transport:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def target(self, address: str) -> str:
        """The gRPC target of an address of join information."""
        scheme, _, rest = address.partition(":")
        self.name = scheme
        if scheme == VCHAN:
            end = self._guest_end or await self._open_channel()
            await end.opened(timeout=OPEN_TIMEOUT)
            return unix_target(end.socket(rest))
        if scheme == TCP:
            return f"{'ipv6' if rest.startswith('[') else 'ipv4'}:{rest}"
        return unix_target(Path(rest))

    async def _open_channel(self) -> GuestEnd:
        # Only now: an agent on another transport needs none of Xen's libraries.
        from secfunet.xen import AGENT_SERVICE, ENROL_SERVICE
        from secfunet.xen.guest_end import GuestEnd

        end = GuestEnd(private_folder(self._folder), (ENROL_SERVICE, AGENT_SERVICE))
        self._guest_end = await self._stack.enter_async_context(end)
        return end


OPEN_TIMEOUT = 3.0  # seconds that the first call waits for the channel, rather than fail and be tried again


def options_for(target: str) -> tuple[tuple[str, int], ...]:
    """gRPC options that a target needs."""
    return () if target.startswith(f"{UNIX}:") else TCP_OPTIONS
