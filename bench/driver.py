"""What asks a grid for signatures: a stream a VM with some batches in flight, every answer kept and checked afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import padding, rsa, utils
from cryptography.hazmat.primitives.hashes import SHA256

from bench.load_grid import LoadGrid
from secfunet.container import unwrap_content_key, verify_container
from secfunet.gose.v1 import operation_pb2
from secfunet.gose.v1 import service_provider_pb2 as pb
from secfunet.identity import load_certificate
from secfunet.operation import parse_result_set
from tests.gose.grid import sign_operation

PSS = padding.PSS(padding.MGF1(SHA256()), 32)


@dataclass
class Answers:
    """Of one VM: when each came, and what it was to."""

    vm: str
    times: list[float] = field(default_factory=list)
    kept: list[tuple[operation_pb2.Operation, bytes]] = field(default_factory=list)

    def rate(self) -> float:
        """Answers a second between the first and the last; 0 with fewer than two."""
        if len(self.times) < 2:
            return 0.0
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class Driver:
    """A session for each VM, opened once, over one channel for each hypervisor. Used as a context."""

    def __init__(self, load: LoadGrid) -> None:
        self._load = load
        self._stack = AsyncExitStack()
        self._stubs: dict[str, Any] = {}
        self.sessions: dict[str, str] = {}
        self._content_keys: dict[tuple[str, bytes], bytes] = {}

    async def __aenter__(self) -> Driver:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def log_in(self, vms: Sequence[str]) -> None:
        """Those that are not yet."""
        for vm in vms:
            if vm not in self.sessions:
                granted = await self._load.grid.session(vm, self._load.hypervisor_of(vm))
                self.sessions[vm] = granted["session"]

    async def stub(self, vm: str) -> Any:
        """The service, as its hypervisor reaches it."""
        hypervisor = self._load.hypervisor_of(vm)
        if hypervisor not in self._stubs:
            channel = await self._stack.enter_async_context(self._load.grid.channel(hypervisor))
            self._stubs[hypervisor] = self._load.grid.stub(channel)
        return self._stubs[hypervisor]

    def metadata(self, vm: str) -> tuple[tuple[str, str], ...]:
        """What names the VM's session."""
        return (("secfunet-session", self.sessions[vm]),)

    async def sign(self, vms: Sequence[str], *, seconds: float, depth: int) -> list[Answers]:
        """Every VM signs for so long, ``depth`` batches of one operation in flight; what is in flight at the end is dropped."""
        await self.log_in(vms)
        until = time.perf_counter() + seconds
        return await asyncio.gather(*(self._sign(vm, until, depth) for vm in vms))

    async def _sign(self, vm: str, until: float, depth: int) -> Answers:
        found = Answers(vm)
        asked: dict[int, operation_pb2.Operation] = {}
        number = 0
        call = (await self.stub(vm)).ExecuteStream(metadata=self.metadata(vm))

        async def ask() -> None:
            nonlocal number
            number += 1
            asked[number] = sign_operation()
            await call.write(pb.ExecuteStreamRequest(batch_id=number, operations=[asked[number]]))

        try:
            for _ in range(depth):
                await ask()
            while True:
                response = await call.read()
                now = time.perf_counter()
                if not isinstance(response, pb.ExecuteStreamResponse) or not response.containers:
                    raise RuntimeError(f"{vm} was not answered: {response}")
                if now > until:
                    return found
                found.times.append(now)
                found.kept.append((asked.pop(response.batch_id), response.containers[0]))
                await ask()
        finally:
            call.cancel()

    def check(self, answers: Sequence[Answers]) -> int:
        """Verifies and opens every container and verifies every signature in it. Returns how many; raises if one is wrong."""
        grid = self._load.grid
        authority = grid.authority.container_key.public_key()
        done = 0
        for one in answers:
            hypervisor = grid.hypervisor(self._load.hypervisor_of(one.vm))
            public = load_certificate(grid.vms[one.vm].certificate).public_key()
            assert isinstance(public, rsa.RSAPublicKey)
            for operation, container in one.kept:
                verified = verify_container(container, authority, 256)
                key = self._content_keys.get((one.vm, verified.header))
                if key is None:
                    key = self._content_keys[one.vm, verified.header] = unwrap_content_key(
                        hypervisor.key, verified.header
                    )
                (result,) = parse_result_set(verified.open(key)).results
                if result.request_id != operation.request_id:
                    raise RuntimeError("an answer to something else")
                public.verify(result.output, operation.sign.digest, PSS, utils.Prehashed(SHA256()))
                done += 1
        return done
