"""Health at the service provider's gRPC door: one look, no watching, since a watch is a stream that stands outside every batch's bounds."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped] # has no types
from grpc_health.v1.health import aio as health_aio  # type: ignore[import-untyped] # has no types


class CheckOnlyHealth(health_aio.HealthServicer):  # type: ignore[misc] # as above
    """grpc.health.v1.Health without Watch."""

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]) -> None:  # noqa: N802 - gRPC's name
        """UNIMPLEMENTED: a client then takes the server for healthy (the protocol's own rule), and may ask Check."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "health is not watched here: ask Check")
