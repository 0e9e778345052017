"""A VM that goes from one host to the other, with what a test asks of it on the way."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from secfunet.middleware.v1 import orchestrator_pb2 as pb
from testbed import Testbed
from testbed.guests import Guest
from tests.xen.deployment import GRID, HOST, SECOND_HOST
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import Vm, issue_token

HOSTS = (HOST, SECOND_HOST, GRID)
MIGRATION = 1800.0  # seconds for one; some twenty on a quiet machine
NAME, NUMBER = "web", 21


class Moving:
    """The VM of these tests, and the host that it is on."""

    def __init__(self, vm: Vm, bed: Testbed, orchestrators: dict[str, Orchestrator]) -> None:
        self.vm = vm
        self.bed = bed
        self.orchestrators = orchestrators
        self.host = HOST
        self.began = self._boot_id()

    @classmethod
    def boot(cls, bed: Testbed, orchestrators: dict[str, Orchestrator], folder: Path) -> Moving:
        """A new one, which works."""
        vm = Vm.make(NAME, NUMBER, grid=bed[GRID], host=bed[HOST], orchestrator=orchestrators[HOST], folder=folder)
        vm.boot()
        vm.guest.wait_for("true", timeout=600)
        vm.must_work(timeout=900)
        return cls(vm, bed, orchestrators)

    @property
    def uuid(self) -> str:
        return self.vm.uuid

    @property
    def here(self) -> Orchestrator:
        return self.orchestrators[self.host]

    @property
    def elsewhere(self) -> str:
        return SECOND_HOST if self.host == HOST else HOST

    @property
    def there(self) -> Orchestrator:
        return self.orchestrators[self.elsewhere]

    def token_for(self, host: str) -> str:
        return issue_token(self.bed[GRID], NAME, host)

    def expect(self, token: str = "") -> pb.Vm:
        """The other host is told."""
        definition = self.here.stub.GetVm(pb.GetVmRequest(uuid=self.uuid), timeout=240).definition
        return self.there.stub.ExpectVm(pb.ExpectVmRequest(definition=definition, vm_auth_token=token), timeout=240).vm

    def send(self) -> None:
        """To the other host."""
        request = pb.MigrateVmRequest(uuid=self.uuid, destination=self.elsewhere)
        sent = self.here.stub.MigrateVm(request, timeout=MIGRATION).vm
        assert sent.state == pb.VM_STATE_AWAY
        self.follow()

    def follow(self) -> None:
        """It is on the other host now."""
        self.vm.guest.hang_up()
        self.host = self.elsewhere
        self.vm = replace(self.vm, guest=Guest(self.bed[self.host], NAME, self.vm.guest.address))
        self.vm.orchestrator = self.here
        self.vm.guest.wait_for("true", timeout=600)  # the connection that its agent's socket is brought over

    def must_be_the_same(self) -> None:
        """The guest was not booted since this test began."""
        assert self._boot_id() == self.began

    def _boot_id(self) -> str:
        return self.vm.guest.run("cat /proc/sys/kernel/random/boot_id").text

    def wait_until(self, host: str, *states: pb.VmState, timeout: float = 900) -> None:
        """The daemon of ``host`` sees the VM so."""
        deadline = time.monotonic() + timeout
        while (state := self.orchestrators[host].get(self.uuid).state) not in states:
            assert time.monotonic() < deadline, f"on {host} it is {pb.VmState.Name(state)}"
            time.sleep(1)
