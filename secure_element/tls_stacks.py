"""Makes the TLS handshakes of one card, and keeps what outlives them: Contexts with their server sessions, and client sessions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from secfunet.card.parameters import TlsParameters
from secure_element.tls_context import ContextCache, TlsIdView, fingerprint_of, profile_of
from secure_element.tls_sessions import ClientSession, SessionCache, SessionKey
from secure_element.tls_stack import TlsStack

_CLOCK_AGREEMENT: Final = 2
"""Seconds by which the host's time may differ from the process's clock for the latter to stand in ClientHello.random."""


class TlsStacks:
    """One for each card. ``clock`` gives UTC seconds, ``monotonic`` those by which sessions age."""

    def __init__(
        self,
        *,
        randbytes: Callable[[int], bytes],
        legacy_tls: bool,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._legacy_tls = legacy_tls
        self._clock = clock
        self._monotonic = monotonic
        self._contexts = ContextCache(randbytes)
        self._sessions = SessionCache()

    def check(self, parameters: TlsParameters) -> None:
        """Raises TlsParametersError for parameters that no handshake of this card can have."""
        profile_of(parameters, legacy_tls=self._legacy_tls)

    def start(self, tls_id: TlsIdView, parameters: TlsParameters, unix_time: int | None) -> TlsStack:
        """A handshake of this identity. ``unix_time``: the host's time, for the validity of certificates; None: the process's clock.

        Raises TlsParametersError.
        """
        profile = profile_of(parameters, legacy_tls=self._legacy_tls)
        fingerprint = fingerprint_of(tls_id)
        is_client = parameters.role == "client"
        context = self._contexts.context(
            tls_id, fingerprint, profile, with_alpn=bool(parameters.alpn) and not is_client
        )
        now = self._clock()
        reference_time = now if unix_time is None else float(unix_time)
        key = SessionKey(fingerprint, profile, parameters.server_name, parameters.server_port, parameters.alpn)
        offered = None
        if is_client and parameters.resume:
            offered = self._sessions.take(key, reference_time=reference_time, monotonic=self._monotonic())

        def keep_session(session: ClientSession) -> None:
            self._sessions.put(key, session)

        return TlsStack(
            context,
            parameters,
            reference_time=reference_time,
            send_time=unix_time is not None and abs(unix_time - now) <= _CLOCK_AGREEMENT,
            offered=offered,
            keep_session=keep_session if is_client and parameters.resume else None,
            monotonic=self._monotonic,
        )
