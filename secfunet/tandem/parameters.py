"""How a TLS-Tandem connection is to be made."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from typing import Final

from secfunet.card.parameters import TlsParameters
from secfunet.tls.cipher_suites import SUITES, TLS_1_2, TLS_1_3
from secfunet.tls.errors import UnsupportedSuiteError
from secfunet.tls.flights import Role

DEFAULT_PATIENCE: Final = 5.0


@dataclasses.dataclass(frozen=True)
class TandemParameters:
    """What the docking host asks of the card, and allows itself. The defaults are what production uses.

    ``suites`` empty means the card's defaults: forward-secret AEAD. A suite of the paper's era (RSA key exchange, CBC) must be named in
    ``suites`` and allowed with ``allow_legacy``; the card must allow it, too.
    """

    alpn: tuple[str, ...] = ()
    min_version: int = TLS_1_2
    max_version: int = TLS_1_3
    suites: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    allow_legacy: bool = False
    resume: bool = True
    """Whether sessions are resumed, and (client, TLS 1.3) tickets brought to the card."""
    verify_peer: Callable[[tuple[bytes, ...]], None] | None = None
    """Called with the peer's certificates (DER, leaf first), which the card has verified; raises to refuse the peer."""
    clock: Callable[[], float] = time.time
    """UTC seconds: the wall time that the card, which has no clock, is told."""
    randbytes: Callable[[int], bytes] = secrets.token_bytes
    record_limit: int | None = None
    """Records under one key before a KeyUpdate; None for the limits of RFC 8446, 5.5."""
    patience: float = DEFAULT_PATIENCE
    """Seconds, in all, that a leased card waits for the peer: a peer that stalls does not keep the card for the whole deadline. Of a
    server that itself waits for a free card a client should expect a little more than that wait."""

    def __post_init__(self) -> None:
        """Raises UnsupportedSuiteError for a suite that is unknown, or legacy and not allowed."""
        if not TLS_1_2 <= self.min_version <= self.max_version <= TLS_1_3:
            raise ValueError("TLS-Tandem knows TLS 1.2 and 1.3")
        for number in self.suites:
            suite = SUITES.get(number)
            if suite is None:
                raise UnsupportedSuiteError(number, "is unknown here")
            if suite.is_legacy and not self.allow_legacy:
                raise UnsupportedSuiteError(number, f"({suite.name}) is legacy and not configured")

    def for_card(self, role: Role, server_name: str, server_port: int = 0) -> TlsParameters:
        """Return what the card is told of it."""
        return TlsParameters(
            role=role,
            server_name=server_name,
            alpn=self.alpn,
            min_version=self.min_version,
            max_version=self.max_version,
            suites=self.suites,
            groups=self.groups,
            resume=self.resume,
            server_port=server_port,
        )
