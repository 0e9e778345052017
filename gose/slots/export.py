"""The cards' figures for Prometheus: read when they are asked for, the same that ``gose status`` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from gose.slots.connect import ReadyCard
from gose.slots.queue import JobQueue
from gose.slots.slot import Slot, SlotState

_SHOWN_STATES = (SlotState.CONNECTING, SlotState.IN_SERVICE, SlotState.OUT_OF_SERVICE)


class CardCollector(Collector):
    """Of the slots and queues that the two functions yield. It is asked from the thread of the metrics' port: it only reads."""

    def __init__(
        self, slots: Callable[[], Iterable[Slot]], queues: Callable[[], Iterable[JobQueue[ReadyCard]]]
    ) -> None:
        self._slots = slots
        self._queues = queues

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        state = GaugeMetricFamily("gose_card_state", "1 for the state that the card is in", labels=["seid", "state"])
        operations = CounterMetricFamily("gose_card_operations", "Operations a card was given", labels=["seid"])
        errors = CounterMetricFamily("gose_card_errors", "Those that failed, by reason", labels=["seid", "reason"])
        busy = CounterMetricFamily("gose_card_busy_seconds", "Time that jobs occupied a card", labels=["seid"])
        waited = GaugeMetricFamily(
            "gose_card_wait_seconds", "Time the last jobs waited for their card", labels=["seid", "quantile"]
        )
        worked = GaugeMetricFamily(
            "gose_card_work_seconds", "Time the last operations took in their card", labels=["seid", "quantile"]
        )
        for slot in self._slots():
            seid, figures = slot.seid, slot.figures
            for one in _SHOWN_STATES:
                state.add_metric([seid, one.value], float(slot.state is one))
            operations.add_metric([seid], figures.operations)
            for reason, count in sorted(dict(figures.errors).items()):
                errors.add_metric([seid, reason], count)
            busy.add_metric([seid], figures.busy_seconds)
            for family, recent in ((waited, figures.waited), (worked, figures.worked)):
                quantiles = recent.quantiles()
                if quantiles is not None:
                    family.add_metric([seid, "0.5"], quantiles.p50)
                    family.add_metric([seid, "0.99"], quantiles.p99)
        refused = CounterMetricFamily(
            "gose_queue_refused", "Jobs refused because the queue was too long", labels=["queue"]
        )
        for queue in self._queues():
            refused.add_metric([queue.name], queue.refused)
        yield from (state, operations, errors, busy, waited, worked, refused)
