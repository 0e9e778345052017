"""What the grid counts and measures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """A registry of its own for each grid, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.operations = Counter(
            "gose_operations",
            "Operations by kind and outcome (OK or reason)",
            ["operation", "outcome"],
            registry=registry,
        )
        self.refusals = Counter("gose_refusals", "Refused calls by reason", ["reason"], registry=registry)
        self.logins = Counter("gose_logins", "Logins at the OpenID provider by outcome", ["outcome"], registry=registry)
        self.sessions_granted = Counter("gose_sessions_granted", "Sessions granted", registry=registry)
        self.sessions = Gauge("gose_sessions", "Sessions that live", registry=registry)
        self.streams = Gauge("gose_streams", "Streams of operations that are open", registry=registry)
        self.card_in_service = Gauge(
            "gose_card_in_service", "1 while a card is in service", ["seid"], registry=registry
        )
        self.queue_length = Gauge("gose_queue_length", "Jobs that wait for a card", ["queue"], registry=registry)
        self.slot_waited = Histogram(
            "gose_slot_wait_seconds", "Time a job waited for its card", buckets=_FAST, registry=registry
        )
        self.slot_worked = Histogram(
            "gose_slot_work_seconds", "Time a job occupied its card", buckets=_FAST, registry=registry
        )
        self.sealed = Histogram("gose_seal_seconds", "Time to seal a container", buckets=_FAST, registry=registry)
        self.batch = Histogram(
            "gose_batch_operations", "Operations in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
