"""The sessions that a client card may resume, by identity, profile, server name and port. They are kept as bytes, in memory only.

A session holds secrets that decrypt its connections: it is not written to the store, and dies with the card process.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from secure_element.tls_context import SESSION_LIFETIME, TlsProfile

MAX_SESSIONS: Final = 64


@dataclass(frozen=True)
class SessionKey:
    """Whose session with whom: a session is offered only under the very same key."""

    fingerprint: bytes
    profile: TlsProfile
    server_name: str
    server_port: int
    alpn: tuple[str, ...]


@dataclass(frozen=True)
class ClientSession:
    """A session that can be resumed. ``chain`` is the peer's, as it was verified when the session was made (DER, leaf first)."""

    session: bytes = field(repr=False)
    chain: tuple[bytes, ...]
    not_before: float
    not_after: float
    """UTC seconds: the window in which every certificate of the verified chain is valid."""
    made_at: float
    """Seconds of the monotonic clock."""


class SessionCache:
    """At most 64 sessions; the one that was not used for longest goes first."""

    def __init__(self) -> None:
        self._sessions: OrderedDict[SessionKey, ClientSession] = OrderedDict()

    def put(self, key: SessionKey, session: ClientSession) -> None:
        """Keep a session in place of an older one. A server without a name has none kept: nothing would tell it from another."""
        if not key.server_name:
            return
        self._sessions[key] = session
        self._sessions.move_to_end(key)
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)

    def take(self, key: SessionKey, *, reference_time: float, monotonic: float) -> ClientSession | None:
        """The session to offer now, or None. It is taken out: a session that works is put back, or replaced by the server's new one
        (TLS 1.3 tickets are best used once, RFC 8446, C.4)."""
        session = self._sessions.pop(key, None)
        if session is None or monotonic - session.made_at >= SESSION_LIFETIME:
            return None
        return session if session.not_before <= reference_time <= session.not_after else None

    def __len__(self) -> int:
        return len(self._sessions)
