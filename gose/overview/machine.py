"""The picture for a program."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from gose.overview.picture import CardReport, Overview
from gose.overview.pulse import Pulse
from gose.registry import Identity
from gose.running import Latency


def as_json(overview: Overview) -> dict[str, Any]:
    """One JSON object; times are UTC seconds."""
    return {
        "time": math.floor(overview.now),
        "authority": {
            "folder": str(overview.authority.path),
            "token_issuer": overview.authority.token_issuer,
            "ca_expires_at": math.floor(overview.authority.ca_certificate.not_valid_after_utc.timestamp()),
        },
        "running": None
        if overview.running is None
        else {
            "pid": overview.running.pid,
            "version": overview.running.version,
            "started_at": math.floor(overview.running.started_at),
            "streams": overview.running.streams,
            "queues": overview.running.queues,
            "refused": overview.running.refused,
            "sessions": [
                {
                    "name": session.name,
                    "vmid": session.vmid,
                    "hvid": session.hvid,
                    "seid": session.seid,
                    "standing": str(overview.standings[session.name]),
                    "operations": list(session.operations),
                    "created_at": math.floor(session.created_at),
                    "expires_at": math.floor(session.expires_at),
                }
                for session in overview.running.sessions
            ],
        },
        "secure_elements": [_card(card) for card in overview.cards],
        "hypervisors": [_identity(overview, identity) for identity in overview.hypervisors],
        "vms": [_identity(overview, identity) for identity in overview.vms],
        "servers": [_identity(overview, identity) for identity in overview.servers],
        "tokens": [
            {
                "jti": token.jti,
                "vmid": token.vmid,
                "hvid": token.hvid,
                "operations": sorted(token.operations),
                "issued_at": math.floor(token.issued_at),
                "expires_at": math.floor(token.expires_at),
                "revoked_at": _whole(token.revoked_at),
                "standing": str(overview.standings[token.jti]),
            }
            for token in overview.tokens
        ],
        "revocations": [
            {
                "kind": revocation.kind.value,
                "name": revocation.name,
                "value": revocation.value,
                "revoked_at": math.floor(revocation.revoked_at),
            }
            for revocation in overview.revocations
        ],
    }


def with_pulse(overview: Overview, pulse: Pulse | None) -> dict[str, Any]:
    """Likewise, with what happened since the look before (``pulse``; None: there was none)."""
    return as_json(overview) | {"pulse": None if pulse is None else asdict(pulse)}


def _card(card: CardReport) -> dict[str, Any]:
    """Seconds; what only a running grid knows is None without one."""
    running = card.running
    return {
        "seid": card.element.seid,
        "role": card.element.role,
        "place": card.element.place,
        "state": card.state.value,
        "holder": None if card.holder is None else card.holder.name,
        "cause": "" if running is None else running.cause,
        "waiting": card.waiting,
        "jobs_done": None if running is None else running.jobs_done,
        "operations": None if running is None else running.operations,
        "errors": None if running is None else running.errors,
        "busy_seconds": None if running is None else running.busy_seconds,
        "waited": None if running is None else _latency(running.waited),
        "worked": None if running is None else _latency(running.worked),
    }


def _latency(latency: Latency | None) -> dict[str, float] | None:
    return None if latency is None else {"p50": latency.p50, "p99": latency.p99}


def _identity(overview: Overview, identity: Identity) -> dict[str, Any]:
    return {
        "name": identity.name,
        "thumbprint": identity.thumbprint,
        "seid": identity.seid,
        "enrolled_at": math.floor(identity.recorded_at),
        "expires_at": math.floor(identity.expires_at),
        "revoked_at": _whole(identity.revoked_at),
        "standing": str(overview.standings[identity.thumbprint]),
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else math.floor(seconds)
