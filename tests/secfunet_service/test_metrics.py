"""The metrics port: any local user may connect to it."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, Counter

from secfunet.service.doorkeeper import DoorBounds
from secfunet.service.metrics import MetricsServer


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("things", "Things that were counted", registry=registry).inc(7)
    return registry


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def test_a_scrape_beside_silent_connections(registry: CollectorRegistry) -> None:
    port = free_port()
    with MetricsServer(registry, port, bounds=DoorBounds(silent=200, talking=60, silence=2.0, handshake=2.0)):
        before = threading.active_count()
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(400)]
        for number, one in enumerate(held):
            if number % 2:
                one.send(b"GET /metrics HTTP/1.1\r\n")
        assert "things_total 7.0" in scrape(port)
        assert threading.active_count() <= before + 1
        for one in held:
            one.settimeout(5)
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b"", "nobody stays"
            one.close()
        assert "things_total 7.0" in scrape(port)
    with pytest.raises(OSError):
        scrape(port)


def test_only_metrics_are_there(registry: CollectorRegistry) -> None:
    port = free_port()
    with MetricsServer(registry, port):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(port, "/secrets")
        with socket.create_connection(("127.0.0.1", port)) as greedy:
            greedy.settimeout(5)
            greedy.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 10_000)
            with contextlib.suppress(ConnectionError):
                assert greedy.recv(1) == b"", "a head has 8 KiB at most"


def test_without_a_port_nothing_listens(registry: CollectorRegistry) -> None:
    before = threading.active_count()
    with MetricsServer(registry, None):
        assert threading.active_count() == before


def test_a_port_in_use_is_said(registry: CollectorRegistry) -> None:
    port = free_port()
    with MetricsServer(registry, port), pytest.raises(OSError), MetricsServer(registry, port):
        pass
