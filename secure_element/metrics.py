"""What a card tells Prometheus: which commands, how they ended, how long they took. Loopback only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secfunet.service.metrics import MetricsServer


class CardMetrics:
    """Counts commands; serves http://127.0.0.1:port/metrics if there is a port."""

    def __init__(self, port: int | None) -> None:
        self._server: MetricsServer | None = None
        if port is None:
            return
        # Late: a card without a port starts without the web server's imports.
        from prometheus_client import CollectorRegistry, Counter, Histogram

        from secfunet.service.metrics import MetricsServer

        registry = CollectorRegistry()
        self._commands = Counter(
            "secure_element_commands",
            "Commands by name and first byte of the status word",
            ["command", "sw1"],
            registry=registry,
        )
        self._seconds = Histogram(
            "secure_element_command_seconds",
            "Time inside the card",
            ["command"],
            buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1, 10, 60),
            registry=registry,
        )
        self._server = MetricsServer(registry, port)
        self._server.start()

    def observe(self, command: str, sw: int, seconds: float) -> None:
        """One command is done."""
        if self._server is not None:
            self._commands.labels(command, f"{sw >> 8:02X}").inc()
            self._seconds.labels(command).observe(seconds)

    def close(self) -> None:
        """Stops serving."""
        if self._server is not None:
            self._server.close()
