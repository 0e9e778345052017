"""What a running grid says of itself, put together from its parts (``gose.running`` carries it to whoever asks)."""

from __future__ import annotations

import os

from gose.running import Latency, RunningCard, RunningGrid, RunningSession
from gose.sessions import SessionStore
from gose.slots.figures import Recent
from gose.slots.rack import Rack
from gose.slots.slot import Slot, SlotState
from secfunet import __version__


def report_of(rack: Rack, sessions: SessionStore, *, streams: int, started_at: float, now: float) -> RunningGrid:
    """The report at the time ``now`` (UTC seconds)."""
    return RunningGrid(
        pid=os.getpid(),
        version=__version__,
        started_at=started_at,
        time=now,
        streams=streams,
        cards=tuple(map(_card, rack.slots())),
        queues={bank.name: len(bank.queue) for bank in rack.banks()},
        refused={bank.name: bank.queue.refused for bank in rack.banks()},
        sessions=tuple(
            RunningSession(
                name=session.name,
                vmid=session.vmid,
                hvid=session.hvid,
                seid=session.seid,
                token_id=session.token_id,
                operations=tuple(sorted(session.operations)),
                created_at=session.created_at,
                expires_at=session.expires_at,
            )
            for session in sessions.live()
        ),
    )


def _card(slot: Slot) -> RunningCard:
    figures = slot.figures
    return RunningCard(
        seid=slot.seid,
        state=slot.state.value,
        cause="" if slot.state is SlotState.IN_SERVICE else slot.cause,
        queue=slot.queue_name,
        jobs_done=slot.jobs_done,
        operations=figures.operations,
        errors=dict(figures.errors),
        busy_seconds=figures.busy_seconds,
        waited=_latency(figures.waited),
        worked=_latency(figures.worked),
    )


def _latency(recent: Recent) -> Latency | None:
    found = recent.quantiles()
    return None if found is None else Latency(p50=found.p50, p99=found.p99)
