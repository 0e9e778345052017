"""What a channel of a domain is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from dom0_middleware.errors import MiddlewareError, Reason

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
GOING_AWAY = 3.0  # seconds that a guest gets to close its end before a migration


class ChannelError(MiddlewareError):
    """The channel cannot be made."""

    def __init__(self, problem: str) -> None:
        super().__init__(Reason.INTERNAL, problem)


@dataclass(frozen=True)
class ChannelAddresses:
    """Where dom0's servers of one domain listen (gRPC addresses), and where its guest finds them (``vm_agent.join`` has the forms).

    ``folder``: with it all, if it is handed over as a folder; "" if it travels through Xen.
    """

    enrol: str
    agent: str
    guest_enrol: str
    guest_agent: str
    folder: str = ""


@dataclass(frozen=True)
class ChannelDomain:
    """The domain that a channel is for. ``domain_id`` None: it does not run yet. ``address``: its IP address, "" if none was given."""

    uuid: str
    domain_id: int | None
    address: str = ""


class ChannelState(StrEnum):
    """What the guest makes of its channel."""

    OPEN = "open"  # its agent is connected
    WAITING = "waiting"  # nobody is
    PAUSED = "paused"  # it ended, and is made again in a while
    REFUSED = "refused"  # it ended too often: there is none until the domain's next run
    UNKNOWN = "unknown"  # dom0 does not see it, or there is no channel


@dataclass(frozen=True)
class ChannelStatus:
    """``since``: seconds since 1970, 0.0 if unknown. ``why``: how the last one ended ("" if none did)."""

    state: ChannelState = ChannelState.UNKNOWN
    since: float = 0.0
    why: str = ""


Flooded = Callable[[str, str], None]
"""Told of each channel that was ended because its guest went beyond its bounds: the UUID, and why."""


@dataclass(frozen=True)
class JoinInformation:
    """What the domain is handed, once."""

    uuid: str
    join_secret: str = field(repr=False)
    guest_authority: str
    enrol: str
    agent: str
    server_name: str

    def to_json(self) -> bytes:
        return json.dumps(
            {
                "uuid": self.uuid,
                "join_secret": self.join_secret,
                "guest_authority": self.guest_authority,
                "enrol": self.enrol,
                "agent": self.agent,
                "server_name": self.server_name,
            },
            indent=2,
        ).encode("ascii")


class GuestChannel(Protocol):
    """One for all domains of a host. ``through_xen``: it is laid for a domain that exists already (paused), by its number."""

    through_xen: bool

    async def open(self, domain: ChannelDomain) -> ChannelAddresses:
        """Makes a fresh channel; whatever an earlier run left is gone. Raises ChannelError."""
        ...

    async def reopen(self, domain: ChannelDomain) -> ChannelAddresses:
        """The channel of a domain that went on running while this daemon did not. Raises ChannelError."""
        ...

    def folder(self, uuid: str) -> str:
        """The folder of an open channel ("" if it travels through Xen)."""
        ...

    def status(self, uuid: str) -> ChannelStatus:
        """What the domain's channel is doing."""
        ...

    def hang_up(self, uuid: str, why: str) -> None:
        """The guest makes too much work: what its channel carries ends now, and it has to wait before it carries anything again."""
        ...

    async def hand_over(self, join: JoinInformation) -> None:
        """Gives the domain its join information. Raises ChannelError."""
        ...

    async def erase_join(self, uuid: str) -> None:
        """Takes the join information back: it was used. Does nothing if it is gone."""
        ...

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        """Removes the channel; with ``grace``, the guest has so many seconds to close its end first. Does nothing if there is none."""
        ...

    async def sweep(self, running: Iterable[str]) -> None:
        """Removes the channels of all other domains."""
        ...

    async def stop(self) -> None:
        """This daemon ends; channels of running domains are there again with ``reopen``."""
        ...
