"""What a node counts and measures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_CARD = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0)


class NodeMetrics:
    """A registry of its own for each node."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.sessions = Gauge("gose_racs_sessions", "Sessions that are open", registry=registry)
        self.refused = Counter(
            "gose_racs_connections_refused",
            "Connections that became no session, by reason",
            ["reason"],
            registry=registry,
        )
        self.statuses = Counter(
            "gose_racs_commands", "Commands by verb and class of their status", ["verb", "event"], registry=registry
        )
        self.malformed = Counter("gose_racs_malformed", "Sessions that broke the protocol", registry=registry)
        self.cards_in_use = Gauge("gose_racs_cards_in_use", "Cards that a session has", registry=registry)
        self.card_seconds = Histogram(
            "gose_racs_apdu_seconds", "Time a card took for one APDU", buckets=_CARD, registry=registry
        )
