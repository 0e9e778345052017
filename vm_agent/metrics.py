"""Prometheus metrics of the agent: read from its objects when they are asked for. Imported only where ``metrics_port`` is set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from secfunet.service.metrics import MetricsServer


@dataclass(frozen=True, slots=True)
class Reading:
    """What the agent counts, at one moment."""

    connected: bool
    certificate_expires_at: float
    connections: int
    waiting: int
    operations: int
    batches: int
    resent: int
    streams: int
    refused_answers: int


class _AgentCollector(Collector):
    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._metrics(self._read())

    @staticmethod
    def _metrics(now: Reading) -> Iterator[Metric]:
        gauges = (
            (
                "vm_agent_connected",
                "Whether the Secure Middleware is reached and the identity known",
                float(now.connected),
            ),
            ("vm_agent_certificate_expires_seconds", "End of the agent's certificate, UTC", now.certificate_expires_at),
            ("vm_agent_local_connections", "Open connections of local programs", now.connections),
            ("vm_agent_operations_waiting", "Operations that wait for an answer", now.waiting),
        )
        counters = (
            ("vm_agent_operations", "Operations sent to the Secure Middleware", now.operations),
            ("vm_agent_batches", "Batches sent to the Secure Middleware", now.batches),
            ("vm_agent_operations_resent", "Operations sent again after a stream was lost", now.resent),
            ("vm_agent_streams", "Streams opened to the Secure Middleware", now.streams),
            ("vm_agent_answers_refused", "Answers whose container was not what it should be", now.refused_answers),
        )
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        for name, text, total in counters:
            yield CounterMetricFamily(name, text, value=total)


def serve_metrics(port: int, read: Callable[[], Reading]) -> MetricsServer:
    """Serves /metrics on 127.0.0.1 from now on; leaving the returned context ends it. Raises OSError."""
    registry = CollectorRegistry()
    registry.register(_AgentCollector(read))
    server = MetricsServer(registry, port)
    server.start()
    return server
