"""An orchestrator outside: dom0's API by gRPC, over a Unix socket that ssh brings here, with the certificate that dom0 made for it."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from secfunet.middleware.v1 import orchestrator_pb2 as pb
from secfunet.middleware.v1 import orchestrator_pb2_grpc
from testbed import Host

STATE = "/var/lib/secfunet-middleware"
TIMEOUT = 240.0  # seconds for one call


class Orchestrator:
    """A context manager; ``folder`` is short: sockets lie in it."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._host = host
        self._socket = folder / f"{host.name}-api.sock"
        self._channel: grpc.Channel | None = None

    def __enter__(self) -> Orchestrator:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()

    def connect(self) -> None:
        """Once more after the host was booted anew, too."""
        self.disconnect()
        forward(self._host.ssh(), self._socket, f"{STATE}/orchestrator.sock")
        read = self._host.get
        credentials = grpc.ssl_channel_credentials(
            read(f"{STATE}/orchestrator-authority.pem"),
            read(f"{STATE}/orchestrators/admin.key"),
            read(f"{STATE}/orchestrators/admin.pem"),
        )
        options = (("grpc.ssl_target_name_override", "secure-middleware"), ("grpc.max_reconnect_backoff_ms", 2000))
        self._channel = grpc.secure_channel(f"unix:{self._socket}", credentials, options)
        self.stub = orchestrator_pb2_grpc.OrchestratorServiceStub(self._channel)

    def disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._socket.unlink(missing_ok=True)

    def create(self, name: str, certificate: bytes, *, address: str = "", memory_mib: int = 224) -> pb.Vm:
        request = pb.CreateVmRequest(
            name=name, vm_certificate=certificate, memory_mib=memory_mib, vcpus=1, address=address
        )
        return self.stub.CreateVm(request, timeout=TIMEOUT).vm

    def start(self, vm: str, token: str = "") -> pb.Vm:
        return self.stub.StartVm(pb.StartVmRequest(uuid=vm, vm_auth_token=token), timeout=TIMEOUT).vm

    def stop(self, vm: str, *, force: bool = True) -> pb.Vm:
        return self.stub.StopVm(pb.StopVmRequest(uuid=vm, force=force), timeout=TIMEOUT).vm

    def delete(self, vm: str) -> None:
        self.stub.DeleteVm(pb.DeleteVmRequest(uuid=vm), timeout=TIMEOUT)

    def get(self, vm: str) -> pb.Vm:
        return self.stub.GetVm(pb.GetVmRequest(uuid=vm), timeout=TIMEOUT, wait_for_ready=True).vm

    def list(self) -> dict[str, pb.Vm]:
        """By name."""
        vms = self.stub.ListVms(pb.ListVmsRequest(), timeout=TIMEOUT, wait_for_ready=True).vms
        return {vm.name: vm for vm in vms}

    def wait_until_enrolled(self, vm: str, *, enrolled: bool = True, timeout: float = 600) -> pb.Vm:
        """AssertionError if the agent has not (or has still) a certificate then."""
        deadline = time.monotonic() + timeout
        while (found := self.get(vm)).enrolled != enrolled:
            assert time.monotonic() < deadline, f"{found.name}: enrolled is {found.enrolled} after {timeout:g} s"
            time.sleep(0.3)
        return found


def forward(ssh: list[str], local: Path, remote: str) -> None:
    """A Unix socket here that leads to one there, over the shared connection. Raises CalledProcessError."""
    local.unlink(missing_ok=True)
    *words, destination = ssh
    # The shared connection has to be there before something can be asked of it.
    subprocess.run([*ssh, "--", "true"], capture_output=True, check=True)
    # An earlier one of the same name would win.
    for act, check in (("cancel", False), ("forward", True)):
        local.unlink(missing_ok=True)
        subprocess.run([*words, "-O", act, "-L", f"{local}:{remote}", destination], capture_output=True, check=check)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, words: str = "") -> Iterator[None]:
    """The call inside must be refused so."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    said: Any = caught.value  # every call error of grpc is also a grpc.Call
    assert said.code() is code, f"{said.code()}: {said.details()}"
    assert words in (said.details() or ""), said.details()
