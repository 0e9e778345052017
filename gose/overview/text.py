"""The picture for a person; times are UTC, and latencies are ``median / 99th percentile``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from gose.overview.picture import CardReport, Overview
from gose.overview.table import latency, table
from gose.registry import Identity
from secfunet.service.tables import moment


def as_text(overview: Overview) -> str:
    """For people; times are UTC."""
    names = overview.names
    parts = [
        f"authority: {overview.authority.path}, CA until {moment(overview.authority.ca_certificate.not_valid_after_utc.timestamp())}",
        grid_line(overview),
        table(
            "secure elements",
            ("SEID", "ROLE", "CARD", "HOLDER", "WAITING", "OPERATIONS", "ERRORS", "WAITED", "WORKED", "PLACE", "CAUSE"),
            (
                (
                    card.element.seid,
                    card.element.role,
                    card.state.value,
                    card.holder.name if card.holder else "-",
                    "-" if card.waiting is None else str(card.waiting),
                    "-" if card.running is None else str(card.running.operations),
                    "-" if card.running is None else _errors(card.running.errors),
                    "-" if card.running is None else latency(card.running.waited),
                    "-" if card.running is None else latency(card.running.worked),
                    card.element.place,
                    cause_of(overview, card),
                )
                for card in overview.cards
            ),
        ),
        *_sessions(overview, names),
        _identities(overview, "hypervisors", "HVID", overview.hypervisors),
        _identities(overview, "VMs", "VMID", overview.vms),
        _identities(overview, "servers", "THUMBPRINT", overview.servers),
        table(
            "tokens",
            ("JTI", "VM", "HYPERVISOR", "OPERATIONS", "UNTIL", "STANDING"),
            (
                (
                    token.jti,
                    names.get(token.vmid, token.vmid),
                    names.get(token.hvid, token.hvid),
                    ",".join(sorted(token.operations)),
                    moment(token.expires_at),
                    str(overview.standings[token.jti]),
                )
                for token in overview.tokens
            ),
        ),
        table(
            "revocations",
            ("KIND", "NAME", "SINCE"),
            (
                (revocation.kind.value, revocation.name, moment(revocation.revoked_at))
                for revocation in overview.revocations
            ),
        ),
    ]
    return "\n\n".join(parts)


def grid_line(overview: Overview) -> str:
    """Whether a grid runs, in one line."""
    running = overview.running
    if running is None:
        return "grid: not running"
    return (
        f"grid: running since {moment(running.started_at)} (process {running.pid}, version {running.version}), "
        f"{len(running.sessions)} sessions, {running.streams} streams"
    )


def cause_of(overview: Overview, card: CardReport) -> str:
    """Why a card is not in service; empty if it is."""
    if card.running is not None:
        return card.running.cause
    return "" if overview.running is None else "the running grid does not have it yet: send it SIGHUP"


def _sessions(overview: Overview, names: Mapping[str, str]) -> Iterator[str]:
    if overview.running is not None:
        yield table(
            "sessions",
            ("SESSION", "VM", "HYPERVISOR", "SEID", "OPERATIONS", "UNTIL", "STANDING"),
            (
                (
                    session.name,
                    names.get(session.vmid, session.vmid),
                    names.get(session.hvid, session.hvid),
                    session.seid,
                    ",".join(session.operations),
                    moment(session.expires_at),
                    str(overview.standings[session.name]),
                )
                for session in overview.running.sessions
            ),
        )


def _identities(overview: Overview, title: str, short_form: str, identities: Iterable[Identity]) -> str:
    return table(
        title,
        ("NAME", "STANDING", "UNTIL", "SEID", short_form),
        (
            (
                identity.name,
                str(overview.standings[identity.thumbprint]),
                moment(identity.expires_at),
                identity.seid or "-",
                identity.thumbprint,
            )
            for identity in identities
        ),
    )


def _errors(errors: Mapping[str, int]) -> str:
    """The number, and what they were."""
    if not errors:
        return "0"
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(errors.items()))
    return f"{sum(errors.values())} ({reasons})"
