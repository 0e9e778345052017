"""From gose_client to a VM's card and back through ``gose serve``: every card and the grid are processes, every connection is real."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gose.authority import CardAccess, EnrolmentOrder, enrol
from gose_client.client import GoseClient
from gose_client.errors import GridRefusedError
from gose_client.session import VmSession
from gose_client.settings import GoseClientSettings
from secfunet.card.parameters import KeyAlgorithm
from secfunet.card.pool import SingleCard
from secfunet.container import verify_container
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import Holder, Role, load_certificate, rsa_key_of
from secfunet.operation import check_result, parse_result_set
from secfunet.vm_auth_token import unverified_claims
from tests.gose.grid import TestGrid, new_grid, restart, sign_operation
from tests.support.cards import CardProcess, running_card

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


@dataclass
class Chain:
    """The grid, its process, and the hypervisor's card with a client on it."""

    grid: TestGrid
    card: CardProcess
    config: Path
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """``gose serve``, until it says that it is ready."""
        with self.log.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gose.cli", "serve", "--config", str(self.config), stderr=log
            )
        deadline = time.monotonic() + 30
        while "the grid is ready" not in {entry["message"] for entry in self.logged()}:
            assert self.process.returncode is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            await asyncio.sleep(0.05)

    def logged(self) -> list[dict[str, Any]]:
        """The entries of the grid's log."""
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.terminate()
        return await self.process.wait()

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        await self.process.wait()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[GoseClient]:
        """What the middleware has."""
        settings = GoseClientSettings(
            service_provider=self.grid.sp,
            operations=f"localhost:{self.grid.settings.service_provider.grpc.port}",
            openid_provider=self.grid.op,
            openid_login=self.grid.login,
            authority=self.grid.authority.ca_path,
        )
        cards = SingleCard(lambda: self.card.connect("hypervisor"))
        try:
            async with GoseClient(settings, cards) as client:
                yield client
        finally:
            await cards.close()

    async def session(self, client: GoseClient, token: str = "") -> VmSession:
        """A session for vm-1."""
        token = token or self.grid.token("vm-1", "hv-card")
        return await client.open_session(self.grid.vms["vm-1"].certificate, token, timeout=30)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chain(short_folder: Path) -> AsyncIterator[Chain]:
    async with new_grid(short_folder) as grid, running_card(short_folder, name="hypervisor") as card:
        with grid.registry() as registry:
            await enrol(
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
        config = short_folder / "gose.toml"
        config.write_text(_toml(grid))
        chain = Chain(grid, card, config, short_folder / "gose.log")
        await chain.start()
        yield chain
        assert await chain.stop() == 0, chain.log.read_text()
        assert chain.logged()[-1]["message"] == "the grid shuts down"


def _toml(grid: TestGrid) -> str:
    settings = grid.settings
    lines = [
        'state = "state"',
        'names = ["localhost", "127.0.0.1"]',
        "[service_provider]",
        f'https = "{settings.service_provider.https}"',
        f'grpc = "{settings.service_provider.grpc}"',
        "[openid_provider]",
        f'endpoint = "{settings.openid_provider.endpoint}"',
        f'login = "{settings.openid_provider.login}"',
    ]
    for element in settings.secure_elements:
        lines += [
            "[[secure_elements]]",
            f'seid = "{element.seid}"',
            f'socket = "{element.socket}"',
            f'role = "{element.role}"',
            f'user_pin_file = "{element.user_pin_file.name}"',
        ]
    return "\n".join(lines) + "\n"


async def outputs_of(
    chain: Chain,
    client: GoseClient,
    session: VmSession,
    operations: Sequence[operation_pb2.Operation],
    containers: Sequence[bytes],
) -> list[bytes]:
    """What the middleware (content key) and the agent (trailer, then plaintext) make of containers."""
    authority = rsa_key_of(load_certificate(session.container_authority))
    outputs: dict[bytes, bytes] = {}
    asked = {operation.request_id: operation for operation in operations}
    for container in containers:
        key = await client.content_key(container, timeout=10)
        results = parse_result_set(verify_container(container, authority, 256).open(key))
        for result in results.results:
            if result.request_id in asked:
                outputs[result.request_id] = check_result(
                    results,
                    operation=asked[result.request_id],
                    vmid=session.vmid,
                    hvid=session.hvid,
                    now=time.time(),
                )
    return [outputs[operation.request_id] for operation in operations]


async def verify_with_openssl(chain: Chain, data: bytes, signature: bytes) -> None:
    """The last judge is a program that we did not write."""
    folder = chain.config.parent
    key = load_certificate(chain.grid.vms["vm-1"].certificate).public_key()
    (folder / "vm.pub").write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (folder / "data").write_bytes(data)
    (folder / "signature").write_bytes(signature)
    process = await asyncio.create_subprocess_exec(
        *("openssl", "dgst", "-sha256", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"),
        *("-verify", "vm.pub", "-signature", "signature", "data"),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


async def test_a_signature_through_the_whole_chain(chain: Chain) -> None:
    data = secrets.token_bytes(1000)
    operation = sign_operation(hashlib.sha256(data).digest())
    async with chain.client() as client:
        session = await chain.session(client)
        answer = await session.execute([operation], timeout=10, correlation="feedfacecafebeef")
        assert not answer.failures
        (signature,) = await outputs_of(chain, client, session, [operation], answer.containers)
        await session.close()
    await verify_with_openssl(chain, data, signature)
    done = [entry for entry in chain.logged() if entry["message"] == "operations done"]
    assert done[-1]["correlation"] == "feedfacecafebeef"
    assert done[-1]["done"] == [operation.request_id.hex()]


async def test_many_at_once(chain: Chain) -> None:
    operations = [sign_operation() for _ in range(150)]
    async with chain.client() as client:
        session = await chain.session(client)
        answers = await asyncio.gather(
            session.execute(operations[:100], timeout=20),
            *(session.execute([operation], timeout=20) for operation in operations[100:]),
        )
        assert not [failure for answer in answers for failure in answer.failures]
        containers = [container for answer in answers for container in answer.containers]
        outputs = await outputs_of(chain, client, session, operations, containers)
        assert len({*outputs}) == 150
        assert all(len(output) == 256 for output in outputs)
        await session.close()


async def test_a_killed_grid_heals_and_answers_again(chain: Chain) -> None:
    operation, second = sign_operation(), sign_operation()
    async with chain.client() as client:
        session = await chain.session(client)
        first = await session.execute([operation], timeout=10)
        await chain.kill()
        waiting = asyncio.create_task(session.execute([operation, second], timeout=40))
        await asyncio.sleep(0.2)
        await chain.start()
        answer = await waiting
        assert not answer.failures
        assert first.containers[0] in answer.containers, "the first answer, not a second execution"
        assert len(answer.containers) == 2
        logins = [entry for entry in chain.logged() if entry["message"] == "session granted"]
        assert not logins, "the session has survived"
        await session.close()


async def test_a_token_for_another_hypervisor_is_refused(chain: Chain) -> None:
    token = chain.grid.token("vm-1", chain.grid.hypervisor("hv-other").name)
    async with chain.client() as client:
        with pytest.raises(GridRefusedError) as caught:
            await client.open_session(chain.grid.vms["vm-1"].certificate, token, timeout=20)
    assert caught.value.reason == "TOKEN_REFUSED"


async def test_a_revoked_token_ends_the_session(chain: Chain) -> None:
    """By the administrator's own command, while the grid runs."""
    async with chain.client() as client:
        token = chain.grid.token("vm-1", "hv-card")
        session = await chain.session(client, token)
        assert (await session.execute([sign_operation()], timeout=10)).containers
        jti = unverified_claims(token).jti
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gose.cli", "revoke", "token", jti, "--config", str(chain.config)
        )
        assert await process.wait() == 0
        with pytest.raises(GridRefusedError) as caught:
            await session.execute([sign_operation()], timeout=10)
        assert caught.value.reason == "TOKEN_REFUSED"
        await session.close()


async def test_a_killed_vm_card_heals_within_the_callers_time(chain: Chain) -> None:
    card = chain.grid.cards["se-vm-1"]
    async with chain.client() as client:
        session = await chain.session(client)
        await card.kill()
        operation = sign_operation()
        waiting = asyncio.create_task(session.execute([operation], timeout=30))
        await asyncio.sleep(0.3)
        await restart(card)
        answer = await waiting
        assert not answer.failures
        assert await outputs_of(chain, client, session, [operation], answer.containers)
        await session.close()
