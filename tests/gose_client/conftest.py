"""A real grid with its cards, and a hypervisor whose card is a process too; the running service is each test's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio

from gose.authority import CardAccess, EnrolmentOrder, enrol
from gose_client import GoseClient, GoseClientSettings, VmSession
from secfunet.card import CardClient, KeyAlgorithm, SingleCard
from secfunet.container import verify_container
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import Holder, Role, load_certificate, rsa_key_of
from secfunet.operation import parse_result_set
from tests.gose.grid import TestGrid, new_grid
from tests.support.cards import CardProcess, running_card


@dataclass
class Host:
    """A hypervisor: its card, and the grid that it belongs to."""

    grid: TestGrid
    card: CardProcess
    certificate: bytes
    hvid: str
    leases: int = 0

    def settings(self, **changes: object) -> GoseClientSettings:
        """As an administrator of the host would write them."""
        ports = self.grid.settings
        return GoseClientSettings.model_validate(
            {
                "service_provider": self.grid.sp,
                "operations": f"localhost:{ports.service_provider.grpc.port}",
                "openid_provider": self.grid.op,
                "openid_login": self.grid.login,
                "authority": self.grid.authority.ca_path,
                **changes,
            }
        )

    async def connect(self) -> CardClient:
        """A client of the hypervisor's card, ready for work."""
        self.leases += 1
        return await self.card.connect("hypervisor")

    @contextlib.asynccontextmanager
    async def client(self, **changes: object) -> AsyncIterator[GoseClient]:
        """A GoseClient with the hypervisor's card."""
        cards = SingleCard(self.connect)
        try:
            async with GoseClient(self.settings(**changes), cards) as client:
                yield client
        finally:
            await cards.close()

    def token(self, vm: str = "vm-1", **arguments: object) -> str:
        """A VM-Auth-Token for a VM on this hypervisor."""
        return self.grid.token(vm, "hv-card", **arguments)  # type: ignore[arg-type]  # passed through

    async def session(self, client: GoseClient, vm: str = "vm-1", *, timeout: float = 20.0) -> VmSession:
        """A session for a VM."""
        return await client.open_session(self.grid.vms[vm].certificate, self.token(vm), timeout=timeout)

    async def open(
        self, client: GoseClient, session: VmSession, container: bytes, vm: str = "vm-1"
    ) -> operation_pb2.ResultSet:
        """What the agent does: the trailer is verified, then the body is opened with the content key."""
        key = await client.content_key(container, timeout=10)
        authority = rsa_key_of(load_certificate(session.container_authority))
        results = parse_result_set(verify_container(container, authority, 256).open(key))
        assert (results.vmid, results.hvid) == (session.vmid, self.hvid)
        return results


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder with a short path, for Unix sockets."""
    with TemporaryDirectory(prefix="gc-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host(short_folder: Path) -> AsyncIterator[Host]:
    """Two VMs, one server card, and the hypervisor hv-card."""
    async with (
        new_grid(short_folder, vms=("vm-1", "vm-2"), servers=1) as grid,
        running_card(short_folder, name="hv") as card,
    ):
        with grid.registry() as registry:
            identity = await enrol(
                EnrolmentOrder(
                    Holder(Role.HYPERVISOR, "hv-card"),
                    label="hypervisor",
                    algorithm=KeyAlgorithm.RSA_2048,
                    valid=86400.0,
                ),
                CardAccess.at(card.socket, card.keys),
                grid.authority.certificate_authority,
                registry,
                clock=time.time,
            )
        yield Host(grid, card, identity.certificate, identity.thumbprint)
