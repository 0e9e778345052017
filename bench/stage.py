"""The real processes that rows are measured on: one installation in a folder of its own, started once for all groups that need it."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.stack import Stack

VMS = ("web", "mail", "shop", "wiki")
HYPERVISORS = ("xen-1", "xen-2")
# For the groups that are a hypervisor themselves, with the second one's card: a VM is where the newest of its used tokens says, so that one
# which runs on the first would be refused there from then on.
ELSEWHERE = ("roam",)


class Stage:
    """Starts the installation when it is first asked for."""

    def __init__(self) -> None:
        self._exits = AsyncExitStack()
        self._stack: Stack | None = None

    async def stack(self) -> Stack:
        """The running installation. Raises ProcessError if it does not start."""
        if self._stack is None:
            folder = Path(tempfile.mkdtemp(prefix="bench-"))
            self._exits.callback(shutil.rmtree, folder, ignore_errors=True)
            self._stack = await self._exits.enter_async_context(
                Stack(folder / "i", vms=VMS, hypervisors=HYPERVISORS, elsewhere=ELSEWHERE)
            )
        return self._stack

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exits.aclose()
