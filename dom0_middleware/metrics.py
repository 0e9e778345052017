"""Prometheus metrics of one middleware (a registry of its own, so that several can live in one process)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.decisions = Counter(
            "secfunet_middleware_operations",
            "Decisions on operations of VMs",
            ["operation", "decision", "reason"],
            registry=self.registry,
        )
        self.refused_calls = Counter(
            "secfunet_middleware_refused_calls",
            "Calls that were refused before any operation was looked at",
            ["reason"],
            registry=self.registry,
        )
        self.batch_seconds = Histogram(
            "secfunet_middleware_batch_seconds",
            "Time from permission to the grid's answer, a batch",
            registry=self.registry,
        )
        self.guests = Gauge("secfunet_middleware_guests", "Domains with a channel", registry=self.registry)
        self.agents = Gauge(
            "secfunet_middleware_agents", "Domains whose agent is connected now", registry=self.registry
        )
        self.next_token_end = Gauge(
            "secfunet_middleware_next_token_end_seconds",
            "When the VM-Auth-Token that ends first does so, UTC seconds; 0: there is none",
            registry=self.registry,
        )
        self.tokens_ending = Gauge(
            "secfunet_middleware_tokens_ending",
            "VMs whose VM-Auth-Token has expired or will soon",
            registry=self.registry,
        )
        self.sessions = Gauge("secfunet_middleware_sessions", "Sessions with the grid", registry=self.registry)
