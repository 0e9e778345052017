"""The way between one domain and dom0, which only dom0 can lay: made before the domain boots, gone when it stops.

``GuestChannel`` is the port. ``FolderChannel`` is the embedded default: a folder a domain, mode 0700, with Unix sockets and ``join.json``;
whoever runs the domain hands the folder to its guest. On Xen the sockets become vchan or TCP on the bridge, and ``join.json`` goes through
xenstore.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dom0_middleware.errors import MiddlewareError, Reason
from secfunet.service.files import private_folder, sync_folder, write_atomically

MAX_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less its final zero
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class ChannelError(MiddlewareError):
    """The channel cannot be made."""

    def __init__(self, problem: str) -> None:
        super().__init__(Reason.INTERNAL, problem)


@dataclass(frozen=True)
class ChannelAddresses:
    """Where dom0 listens for one domain (gRPC addresses), and the folder with it all ("" if it travels through Xen)."""

    enrol: str
    agent: str
    folder: str


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
    def open(self, uuid: str) -> ChannelAddresses:
        """Makes a fresh channel; whatever an earlier run left is gone. Raises ChannelError."""
        ...

    def reopen(self, uuid: str) -> ChannelAddresses:
        """The channel of a domain that went on running while this daemon did not."""
        ...

    def folder(self, uuid: str) -> str:
        """The folder of an open channel ("" if it travels through Xen)."""
        ...

    def hand_over(self, join: JoinInformation) -> None:
        """Gives the domain its join information."""
        ...

    def erase_join(self, uuid: str) -> None:
        """Takes the join information back: it was used. Does nothing if it is gone."""
        ...

    def close(self, uuid: str) -> None:
        """Removes the channel. Does nothing if there is none."""
        ...

    def sweep(self, running: Iterable[str]) -> None:
        """Removes the channels of all other domains."""
        ...


class FolderChannel:
    """``folder``/<uuid>/ with ``enrol.sock``, ``agent.sock`` and, until it is used, ``join.json`` (0600)."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_folder(folder.absolute())
        # gRPC makes its sockets with the umask's mode: these two folders are what keeps others out.
        self._folder.chmod(0o700)
        longest = self._folder / ("0" * 36) / "enrol.sock"
        if len(str(longest).encode()) > MAX_SOCKET_PATH:
            raise ChannelError(f"{folder}: its path is too long for Unix sockets in it; choose a shorter state folder")

    def open(self, uuid: str) -> ChannelAddresses:
        self.close(uuid)
        self._path(uuid).mkdir(mode=0o700)
        return self._addresses(uuid)

    def reopen(self, uuid: str) -> ChannelAddresses:
        path = private_folder(self._path(uuid))
        for socket in path.glob("*.sock"):
            # The guest can write here, too.
            if socket.is_dir() and not socket.is_symlink():
                shutil.rmtree(socket)
            else:
                socket.unlink()
        return self._addresses(uuid)

    def folder(self, uuid: str) -> str:
        return str(self._path(uuid))

    def hand_over(self, join: JoinInformation) -> None:
        write_atomically(self._path(join.uuid) / "join.json", join.to_json())

    def erase_join(self, uuid: str) -> None:
        path = self._path(uuid)
        if path.is_dir():
            (path / "join.json").unlink(missing_ok=True)
            sync_folder(path)

    def close(self, uuid: str) -> None:
        path = self._path(uuid)
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)

    def sweep(self, running: Iterable[str]) -> None:
        keep = set(running)
        for path in self._folder.iterdir():
            if path.name not in keep and _UUID.fullmatch(path.name):
                self.close(path.name)

    def _path(self, uuid: str) -> Path:
        if not _UUID.fullmatch(uuid):
            raise ChannelError(f"'{uuid}' is no UUID")
        return self._folder / uuid

    def _addresses(self, uuid: str) -> ChannelAddresses:
        path = self._path(uuid)
        return ChannelAddresses(f"unix:{path / 'enrol.sock'}", f"unix:{path / 'agent.sock'}", str(path))
