"""The embedded default: a folder a domain, mode 0700, with Unix sockets and, until it is used, ``join.json`` (0600).

Whoever runs the domain hands the folder to its guest. The channels through Xen keep their servers' sockets in such folders too, and hand
nothing of them over.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from dom0_middleware.channels.port import (
    UUID,
    ChannelAddresses,
    ChannelDomain,
    ChannelError,
    ChannelStatus,
    JoinInformation,
)
from secfunet.service.files import private_folder, sync_folder, write_atomically

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
        path = self.path(uuid)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)

    def sweep(self, running: Iterable[str]) -> None:
        """Removes the folders of all other domains."""
        keep = set(running)
        for path in self._folder.iterdir():
            if path.name not in keep and UUID.fullmatch(path.name):
                self.remove(path.name)

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


class FolderChannel:
    """See ``port.GuestChannel``."""

    through_xen = False

    def __init__(self, folder: Path) -> None:
        self._folders = DomainFolders(folder)

    async def open(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.make(domain.uuid)
        return self._addresses(domain.uuid)

    async def reopen(self, domain: ChannelDomain) -> ChannelAddresses:
        self._folders.keep(domain.uuid)
        return self._addresses(domain.uuid)

    def folder(self, uuid: str) -> str:
        return str(self._folders.path(uuid))

    def status(self, uuid: str) -> ChannelStatus:
        return ChannelStatus()

    async def hand_over(self, join: JoinInformation) -> None:
        write_atomically(self._folders.path(join.uuid) / "join.json", join.to_json())

    async def erase_join(self, uuid: str) -> None:
        path = self._folders.path(uuid)
        if path.is_dir():
            (path / "join.json").unlink(missing_ok=True)
            sync_folder(path)

    async def close(self, uuid: str, *, grace: float = 0.0) -> None:
        self._folders.remove(uuid)

    async def sweep(self, running: Iterable[str]) -> None:
        self._folders.sweep(running)

    async def stop(self) -> None:
        return

    def _addresses(self, uuid: str) -> ChannelAddresses:
        enrol, agent = (f"unix:{socket}" for socket in self._folders.sockets(uuid))
        return ChannelAddresses(enrol, agent, guest_enrol=enrol, guest_agent=agent, folder=self.folder(uuid))
