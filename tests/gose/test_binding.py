"""A VM's card that is bound to a hypervisor, in a running grid: the service provider carries results that it can neither read nor make.

The service provider of these tests is the real one, and then one that does everything it could: it has the containers, the container
authority's key, the card and its user's PIN.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from gose.authority.enrolment import CardAccess, EnrolmentOrder, enrol
from gose.authority.errors import TokenNotIssuedError
from gose_client import GoseClient, GoseClientSettings, VmSession
from gose_client.errors import ContainerRefusedError
from secfunet.apdu import StatusError
from secfunet.card import CardClient, KeyAlgorithm, SingleCard, connect_unix
from secfunet.card.binding import SealedOperation, SealRequest
from secfunet.card.instructions import KeyOperation
from secfunet.container import ContainerSealer
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import Holder, Role, load_certificate, rsa_key_of
from secfunet.middleware.v1 import agent_pb2
from tests.gose.grid import TestGrid, new_grid, sign_operation
from tests.support.cards import CardProcess, running_card
from vm_agent.batching import Ticket
from vm_agent.errors import AnswerRefusedError
from vm_agent.identity import parse_identity
from vm_agent.results import ResultChecker

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256


@dataclass
class World:
    """A grid with vm-1, and two hypervisors with their cards."""

    grid: TestGrid
    hypervisors: dict[str, CardProcess]
    config: Path

    async def gose(self, *words: str) -> str:
        """The command, as an administrator gives it while the grid runs."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gose.cli", *words, "--config", str(self.config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode()

    @contextlib.asynccontextmanager
    async def client(self, hypervisor: str) -> AsyncIterator[GoseClient]:
        """What that hypervisor's middleware has."""
        settings = GoseClientSettings(
            service_provider=self.grid.sp,
            operations=f"localhost:{self.grid.settings.service_provider.grpc.port}",
            openid_provider=self.grid.op,
            openid_login=self.grid.login,
            authority=self.grid.authority.ca_path,
        )
        cards = SingleCard(lambda: self.hypervisors[hypervisor].connect("hypervisor"))
        try:
            async with GoseClient(settings, cards) as client:
                yield client
        finally:
            await cards.close()

    async def session(self, client: GoseClient, hypervisor: str) -> VmSession:
        token = self.grid.token("vm-1", hypervisor)
        return await client.open_session(self.grid.vms["vm-1"].certificate, token, timeout=60)

    def checker(self, session: VmSession, hypervisor: str) -> ResultChecker:
        """What the agent in the VM checks with, by what dom0 tells it."""
        with self.grid.registry() as registry:
            certificate = registry.named(Role.HYPERVISOR, hypervisor).certificate
        told = agent_pb2.Identity(
            vm_certificate=self.grid.vms["vm-1"].certificate,
            container_authority=session.container_authority,
            hypervisor_certificate=certificate,
        )
        return ResultChecker(identity=parse_identity(told))

    def verify(self, digest: bytes, signature: object) -> None:
        assert isinstance(signature, bytes)
        key = rsa_key_of(load_certificate(self.grid.vms["vm-1"].certificate))
        key.verify(signature, digest, padding.PSS(padding.MGF1(SHA256()), 32), Prehashed(SHA256()))


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="gb-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(short_folder: Path) -> AsyncIterator[World]:
    async with contextlib.AsyncExitStack() as stack:
        grid = await stack.enter_async_context(new_grid(short_folder, servers=1))
        hypervisors = {
            name: await stack.enter_async_context(running_card(short_folder, name=name)) for name in ("hv-a", "hv-b")
        }
        with grid.registry() as registry:
            for name, card in hypervisors.items():
                order = EnrolmentOrder(Holder(Role.HYPERVISOR, name), "hypervisor", KeyAlgorithm.RSA_2048, 86400.0)
                access = CardAccess.at(card.socket, card.keys)
                await enrol(order, access, grid.authority.certificate_authority, registry, clock=time.time)
        config = short_folder / "gose.toml"
        lines = [f'state = "{grid.settings.state}"']
        for element in grid.settings.secure_elements:
            lines += ["[[secure_elements]]", f'seid = "{element.seid}"', f'role = "{element.role}"']
            lines += [
                f'{key} = "{getattr(element, key)}"' for key in ("socket", "user_pin_file", "administrator_keys_file")
            ]
        config.write_text("\n".join(lines) + "\n")
        world = World(grid, hypervisors, config)
        await stack.enter_async_context(grid.running(watchdog_interval=1))
        yield world


async def operate(
    client: GoseClient, session: VmSession, operations: list[operation_pb2.Operation]
) -> agent_pb2.OperateResponse:
    """What dom0 answers to the agent."""
    answer = await session.execute(operations, timeout=60)
    sealed = [
        agent_pb2.SealedResults(container=container, content_key=await client.content_key(container, timeout=60))
        for container in answer.containers
    ]
    return agent_pb2.OperateResponse(results=sealed, failures=answer.failures)


def outcome(checker: ResultChecker, operation: operation_pb2.Operation, response: agent_pb2.OperateResponse) -> object:
    return checker.settle([Ticket(operation.request_id, operation)], response)[operation.request_id]


async def test_an_sp_that_tampers_swaps_or_forges_is_caught(world: World) -> None:
    assert "bound to hv-a" in await world.gose("bind-vm", "vm-1", "--hypervisor", "hv-a")
    async with world.client("hv-a") as client:
        session = await world.session(client, "hv-a")
        assert session.container_authority == world.grid.vms["vm-1"].certificate
        checker = world.checker(session, "hv-a")
        digest = secrets.token_bytes(32)
        mine, other = sign_operation(digest), sign_operation()
        good = await operate(client, session, [mine])
        world.verify(digest, outcome(checker, mine, good))
        (sealed,) = good.results

        # Tampered: any bit, header, body or trailer. dom0 does not even ask its card.
        for at in (0, 255, 256, 300, len(sealed.container) - 1):
            container = bytearray(sealed.container)
            container[at] ^= 1
            with pytest.raises(ContainerRefusedError):
                await client.content_key(bytes(container), timeout=60)
            changed = agent_pb2.SealedResults(container=bytes(container), content_key=sealed.content_key)
            with pytest.raises(AnswerRefusedError):
                checker.open(changed)
        # Swapped: the good answer to another request.
        theirs = await operate(client, session, [other])
        assert isinstance(outcome(checker, mine, theirs), AnswerRefusedError)
        # Forged: all that the service provider has is the key that it seals unbound VMs' results with.
        results = operation_pb2.ResultSet.FromString(checker.open(sealed).SerializeToString())
        results.results[0].output = b"\0" * 256
        recipient = _key_of(world, "hv-a")
        for key in (world.grid.authority.container_key, rsa.generate_private_key(65537, 2048)):
            forged = ContainerSealer(recipient, key).seal(results.SerializeToString())
            content_key = secrets.token_bytes(32)
            with contextlib.suppress(ContainerRefusedError):
                content_key = await client.content_key(forged, timeout=60)
            answer = agent_pb2.OperateResponse(
                results=[agent_pb2.SealedResults(container=forged, content_key=content_key)]
            )
            assert isinstance(outcome(checker, mine, answer), AnswerRefusedError)
        # Read: neither the plaintext nor the content key is anywhere in what it carries, and its own key opens nothing.
        assert outcome(checker, mine, good) not in (None, b"")
        assert bytes(outcome(checker, mine, good)) not in sealed.container  # type: ignore[call-overload]
        assert sealed.content_key not in sealed.container


async def test_the_card_itself_helps_nobody_to_forge(world: World) -> None:
    """With the card and its user's PIN: no signature comes out in clear, so no trailer can be made of one."""
    await world.gose("bind-vm", "vm-1", "--hypervisor", "hv-a")
    card = world.grid.cards["se-vm-1"]
    with world.grid.registry() as registry, registry.reserved("se-vm-1", seconds=60):
        client = await _patiently(card)
        try:
            await client.select()
            await client.verify_pin(card.user_pin)
            await client.set_identity("vm")
            trailer = hashlib.sha256(b"header and body of a forged container").digest()
            with pytest.raises(StatusError) as refused:
                await client.sign(PSS, trailer)
            assert refused.value.sw == 0x6985
            request = SealedOperation(KeyOperation.SIGN, PSS, secrets.token_bytes(16), trailer)
            answer = await client.seal(SealRequest(int(time.time()), (request,)))
            assert not answer.failures  # sealed for the hypervisor: whoever asked cannot read it
            with pytest.raises(StatusError):
                await client.bind_identity("vm", 1)
        finally:
            await client.close()


async def test_rebinding_is_one_command(world: World) -> None:
    await world.gose("bind-vm", "vm-1", "--hypervisor", "hv-a")
    with pytest.raises(TokenNotIssuedError, match="bind-vm"):
        world.grid.token("vm-1", "hv-b")
    async with world.client("hv-a") as before:
        session = await world.session(before, "hv-a")
        await operate(before, session, [sign_operation()])
        await world.gose("bind-vm", "vm-1", "--hypervisor", "hv-b")
        answer = await session.execute([sign_operation()], timeout=60)
        assert [failure.reason for failure in answer.failures] == ["CARD_REFUSED"]
    async with world.client("hv-b") as after:
        session = await world.session(after, "hv-b")
        digest = secrets.token_bytes(32)
        operation = sign_operation(digest)
        world.verify(
            digest, outcome(world.checker(session, "hv-b"), operation, await operate(after, session, [operation]))
        )
        many = [sign_operation() for _ in range(20)]  # more than the card is given at once
        response = await operate(after, session, many)
        checker = world.checker(session, "hv-b")
        assert all(isinstance(outcome(checker, one, response), bytes) for one in many)
        assert len({bytes(one.content_key) for one in response.results}) == 1
    await world.gose("unbind-vm", "vm-1")
    async with world.client("hv-a") as client:
        session = await world.session(client, "hv-a")
        assert session.container_authority != world.grid.vms["vm-1"].certificate
        operation = sign_operation(digest)
        world.verify(
            digest, outcome(world.checker(session, "hv-a"), operation, await operate(client, session, [operation]))
        )


def _key_of(world: World, hypervisor: str) -> rsa.RSAPublicKey:
    with world.grid.registry() as registry:
        return rsa_key_of(load_certificate(registry.named(Role.HYPERVISOR, hypervisor).certificate))


async def _patiently(card: CardProcess) -> CardClient:
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Exception):
                return CardClient(await connect_unix(card.socket, timeout=5))
            await asyncio.sleep(0.1)
