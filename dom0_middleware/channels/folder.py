"""The embedded default: a folder a domain, mode 0700, with Unix sockets and, until it is used, ``join.json`` (0600).

Whoever runs the domain hands the folder to its guest. The channels through Xen keep their servers' sockets in such folders too, and hand
nothing of them over.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from dom0_middleware.channels.door import BACKLOG, Door
from dom0_middleware.channels.port import (
    UUID,
    ChannelAddresses,
    ChannelDomain,
    ChannelError,
    ChannelState,
    ChannelStatus,
    Flooded,
    JoinInformation,
)
from dom0_middleware.channels.relay import Relay
from secfunet.service.files import private_folder, sync_folder, write_atomically
from secfunet.service.flood_log import FloodLog
from secfunet.service.unix_socket import OwnSocket, SocketPathError, bind_unix

log = logging.getLogger(__name__)
_flood = FloodLog(log)

MAX_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less its final zero


class DomainFolders:
    """``folder``/<uuid>/ with ``enrol.sock`` and ``agent.sock``."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder.absolute())
        # gRPC makes its sockets with the umask's mode: these two folders are what keeps others out.
        self._folder.chmod(0o700)
        longest = self._folder / ("0" * 36) / "enrol.sock"
        if len(str(longest).encode()) > MAX_SOCKET_PATH:
            raise ChannelError(f"{folder}: its path is too long for Unix sockets in it; choose a shorter state folder")

    def make_inner(self, uuid: str) -> None:
        """A new, empty folder for servers whose guest has the other one."""
        _remove(self._inner(uuid))
        self._inner(uuid).mkdir(mode=0o700)

    def inner_sockets(self, uuid: str) -> tuple[Path, Path]:
        """As ``sockets``, in that folder."""
        return self._inner(uuid) / "e", self._inner(uuid) / "a"

    def _inner(self, uuid: str) -> Path:
        path = self.path(uuid)
        return path.with_name(f".{path.name}")

    def make(self, uuid: str) -> Path:
        """A new, empty folder."""
        self.remove(uuid)
        path = self.path(uuid)
        path.mkdir(mode=0o700)
        return path

    def keep(self, uuid: str) -> Path:
        """The folder of before, without its sockets."""
        path = private_folder(self.path(uuid))
        for socket in path.glob("*.sock"):
            # The guest may have been able to write here, too.
            if socket.is_dir() and not socket.is_symlink():
                shutil.rmtree(socket)
            else:
                socket.unlink()
        return path

    def remove(self, uuid: str) -> None:
        _remove(self.path(uuid))
        _remove(self._inner(uuid))

    def sweep(self, running: Iterable[str]) -> None:
        """Removes the folders of all other domains."""
        keep = set(running)
        for path in self._folder.iterdir():
            uuid = path.name.removeprefix(".")
            if uuid not in keep and UUID.fullmatch(uuid):
                self.remove(uuid)

    def uuids(self) -> tuple[str, ...]:
        """Domains that have a folder."""
        return tuple(path.name for path in self._folder.iterdir() if UUID.fullmatch(path.name))

    def path(self, uuid: str) -> Path:
        """Raises ChannelError for what is no UUID."""
        if not UUID.fullmatch(uuid):
            raise ChannelError(f"'{uuid}' is no UUID")
        return self._folder / uuid

    def sockets(self, uuid: str) -> tuple[Path, Path]:
        """Of the enrolment and the agent's server."""
        path = self.path(uuid)
        return path / "enrol.sock", path / "agent.sock"


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


class _Doors:
    """Of one domain: where its guest knocks, and what is behind it."""

    def __init__(self, uuid: str) -> None:
        self.relay = Relay(partial(_note_refused, uuid))
        self.doors: list[tuple[Door, OwnSocket]] = []

    async def close(self) -> None:
        for door, own in self.doors:
            door.close()
            own.remove()
        await self.relay.close()


class FolderChannel:
    """See ``port.GuestChannel``. The servers' own sockets are in a folder beside, which is not handed over."""

    through_xen = False

    def __init__(self, folder: Path, *, flooded: Flooded = lambda uuid, why: None) -> None:
        self._flooded = flooded
        self._folders = DomainFolders(folder)
        self._doors: dict[str, _Doors] = {}

    async def open(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.make(domain.uuid)
        return await self._serve(domain.uuid)

    async def reopen(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.keep(domain.uuid)
        return await self._serve(domain.uuid)

    def folder(self, uuid: str) -> str:
        return str(self._folders.path(uuid))

    def status(self, uuid: str) -> ChannelStatus:
        if (doors := self._doors.get(uuid)) is None:
            return ChannelStatus()
        return ChannelStatus(ChannelState.OPEN if doors.relay.is_used else ChannelState.WAITING, doors.relay.since)

    def hang_up(self, uuid: str, why: str) -> None:
        if (doors := self._doors.get(uuid)) is None or not doors.relay.hang_up():
            return
        log.warning("a domain's channel ended: %s", why, extra={"vm": uuid})
        for door, _ in doors.doors:
            door.punish()
        self._flooded(uuid, why)

    async def hand_over(self, join: JoinInformation) -> None:
        write_atomically(self._folders.path(join.uuid) / "join.json", join.to_json())

    async def erase_join(self, uuid: str) -> None:
        path = self._folders.path(uuid)
        if path.is_dir():
            (path / "join.json").unlink(missing_ok=True)
            sync_folder(path)

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        await self._shut(uuid)
        self._folders.remove(uuid)

    async def sweep(self, running: Iterable[str]) -> None:
        self._folders.sweep(running)

    async def stop(self) -> None:
        for uuid in list(self._doors):
            await self._shut(uuid)

    async def _serve(self, uuid: str) -> ChannelAddresses:
        await self._shut(uuid)
        self._folders.make_inner(uuid)
        doors = self._doors[uuid] = _Doors(uuid)
        for outside, inside in zip(self._folders.sockets(uuid), self._folders.inner_sockets(uuid), strict=True):
            try:
                listener, own = bind_unix(outside, backlog=BACKLOG)
            except SocketPathError as error:
                raise ChannelError(str(error)) from error
            welcome = partial(doors.relay.take, inside)
            doors.doors.append((Door(listener, welcome=welcome, no_room=_note_no_room), own))
        return self._addresses(uuid)

    async def _shut(self, uuid: str) -> None:
        doors = self._doors.pop(uuid, None)
        if doors is not None:
            await doors.close()

    def _addresses(self, uuid: str) -> ChannelAddresses:
        enrol, agent = (f"unix:{socket}" for socket in self._folders.inner_sockets(uuid))
        guest_enrol, guest_agent = (f"unix:{socket}" for socket in self._folders.sockets(uuid))
        return ChannelAddresses(
            enrol, agent, guest_enrol=guest_enrol, guest_agent=guest_agent, folder=self.folder(uuid)
        )


def _note_refused(uuid: str, reason: str, why: str) -> None:
    _flood.warning(reason, "a connection to a domain's socket is refused", {"vm": uuid, "why": why})


def _note_no_room(error: OSError) -> None:
    _flood.warning("no room", f"a connection of a domain cannot be taken: {error.strerror}")
