"""Every path of a Unix socket works with gRPC, or is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from secfunet.service.unix_socket import SocketPathError, unix_target


@pytest.mark.parametrize(
    "name", ["plain", "a b", "é", "a%20b", "a%2Fb", "100%", "a#b", "a?b", "a:b", "a[b]", "a+b", "a\\b"]
)
async def test_a_server_is_reached_where_it_listens(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "s"
    path.parent.mkdir()
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    server.add_insecure_port(unix_target(path))
    await server.start()
    try:
        assert path.is_socket()
        async with grpc.aio.insecure_channel(unix_target(path)) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    finally:
        await server.stop(0)


def test_a_comma_is_refused() -> None:
    with pytest.raises(SocketPathError, match="comma"):
        unix_target(Path("/run/a,b/s"))
