"""A grid whose cards are partly on a node: the same authority for both, the node's cards enrolled from afar."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gose.authority import CardAccess, EnrolmentOrder, enrol
from gose.cards import CardWays
from gose.settings import RacsSettings, SecureElementSettings
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.parameters import KeyAlgorithm
from secfunet.identity import Holder, Role
from tests.gose.grid import TestGrid, free_ports, new_grid
from tests.gose_racs.node import TestNode, user
from tests.support.cards import running_card


@dataclass
class RemoteGrid:
    """``grid`` has its own cards and the node's; the node is not running."""

    grid: TestGrid
    node: TestNode
    address: str
    users: list[dict[str, Any]]

    def node_running(self, *, users: list[dict[str, Any]] | None = None, **limits: Any) -> Any:
        """The node in this process."""
        return self.node.running(users=self.users if users is None else users, listen=self.address, **limits)


@contextlib.asynccontextmanager
async def new_remote_grid(folder: Path, remote: Mapping[str, str], *, servers: int = 1) -> AsyncIterator[RemoteGrid]:
    """``remote``: SEID and role of the node's cards. A VM's is called like the card; every one is enrolled through RACS."""
    async with contextlib.AsyncExitStack() as stack:
        grid = await stack.enter_async_context(new_grid(folder, servers=servers))
        cards = {seid: await stack.enter_async_context(running_card(folder, name=seid)) for seid in remote}
        node = TestNode(folder, grid.authority.certificate_authority, cards)
        node.authority.write_bytes(grid.authority.ca_path.read_bytes())
        key, certificate = node.credentials("grid-a")
        address = f"localhost:{free_ports(1)[0]}"
        far = [
            SecureElementSettings.model_validate(
                {
                    "seid": f"far-{seid}",
                    "role": role,
                    "racs": {"address": address, "seid": seid},
                    "user_pin_file": cards[seid].user_pin_file,
                    "administrator_keys_file": cards[seid].keys_file,
                }
            )
            for seid, role in remote.items()
        ]
        grid.settings = grid.settings.model_copy(
            update={
                "racs": RacsSettings(key=key, certificate=certificate),
                "secure_elements": (*grid.settings.secure_elements, *far),
            }
        )
        allow = {"vm": "operate", "server": "tls"}
        users = [
            {
                "name": "grid-a",
                "grants": [{"secure_elements": [seid], "allow": [allow[role]]} for seid, role in remote.items()],
            }
        ]
        world = RemoteGrid(grid, node, address, users)
        async with world.node_running(users=[user("grid-a", *remote, allow=["personalise"])]):
            for seid, role in remote.items():
                await _enrol(grid, f"far-{seid}", Role(role), seid)
        yield world


async def _enrol(grid: TestGrid, seid: str, role: Role, name: str) -> None:
    element = grid.settings.secure_element(seid)
    assert element is not None
    assert element.administrator_keys_file is not None
    ways = CardWays.of(grid.settings)
    with grid.registry() as registry:
        identity = await enrol(
            EnrolmentOrder(
                Holder(role, name),
                label=role.value,
                algorithm=KeyAlgorithm.RSA_2048 if role is Role.VM else KeyAlgorithm.P_256,
                valid=86400.0,
                seid=seid,
                server_names=grid.settings.names if role is Role.SERVER else (),
            ),
            CardAccess.through(
                lambda: ways.connect(element, timeout=5),
                AdministratorKeys.read(element.administrator_keys_file),
                where=element.place,
            ),
            grid.authority.certificate_authority,
            registry,
            clock=time.time,
        )
    if role is Role.VM:
        grid.vms[name] = identity
