"""Where the join information comes from: a file in the domain's channel, or xenstore, where dom0 writes for this domain alone."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from vm_agent.errors import JoinError
from vm_agent.join import JoinInformation, erase_join, parse_join, read_join
from vm_agent.options import XENSTORE


class JoinSource(Protocol):
    where: str
    """For a person: what was looked at."""

    def read(self) -> JoinInformation | None:
        """What is there; None if nothing is. Raises JoinError if it cannot be used. May block for an exchange with xenstored."""
        ...

    def erase(self) -> bool:
        """Removes it, now that it is used; False if this agent may not, though it should."""
        ...


class JoinFile:
    """The file ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def read(self) -> JoinInformation | None:
        return read_join(self._path)

    def erase(self) -> bool:
        return erase_join(self._path)


class JoinXenstore:
    """What dom0 wrote into this domain's home in xenstore; dom0 removes it once it is used.

    A connection to xenstore is made for each look: it would not survive everything that may happen to a domain.
    """

    def __init__(self, state: Path) -> None:
        # Only now: an agent that was handed a file needs none of Xen's libraries.
        from secfunet.xen import JOIN_PATH

        self._path = JOIN_PATH
        self._folder = state
        self.where = f"{JOIN_PATH} in xenstore"

    def read(self) -> JoinInformation | None:
        from secfunet.xen.errors import XenError
        from secfunet.xen.xenstore import Xenstore

        try:
            with Xenstore() as xenstore:
                untrusted = xenstore.read(self._path)
        except XenError as error:
            raise JoinError(str(error)) from error
        return parse_join(untrusted, self._folder) if untrusted else None

    def erase(self) -> bool:
        return True


def join_source(join: Path | str, state: Path) -> JoinSource:
    """The source that the settings name: ``xenstore``, or a file."""
    return JoinXenstore(state) if join == XENSTORE else JoinFile(Path(join))
