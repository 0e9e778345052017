"""The ways to a grid's cards: a Unix socket or a PC/SC reader of this host, or RACS to a node on another."""

from __future__ import annotations

from pathlib import Path

from gose.racs.tls import client_side
from gose.settings import GoseSettings, RacsSettings, SecureElementSettings
from secfunet.card.place import connect_card
from secfunet.card.ports import CardPort
from secfunet.racs.card import connect_racs


class CardWays:
    """Connects cards as the settings say. ``authority``: the grid's own CA (PEM), which certifies nodes unless ``racs`` names another."""

    def __init__(self, racs: RacsSettings | None = None, authority: Path | None = None) -> None:
        self._racs = racs
        self._authority = authority

    @classmethod
    def of(cls, settings: GoseSettings) -> CardWays:
        """Those of a grid."""
        return cls(settings.racs, settings.authority / "ca.pem")

    async def connect(self, element: SecureElementSettings, *, timeout: float) -> CardPort:
        """The card, powered on, within ``timeout`` seconds.

        Raises CardGoneError, CardBusyError, and for RACS TlsFilesError, UnsafeFileError and OSError of its files.
        """
        if element.racs is None:
            if element.local_place is None:
                raise AssertionError("the settings give every card one place")
            return await connect_card(element.local_place, timeout=timeout)
        authority = self._authority if self._racs is None else self._racs.authority or self._authority
        if self._racs is None or authority is None:
            raise AssertionError("the settings have a table for RACS if a card needs it")
        # Anew for each connection: a certificate that was renewed counts without a restart.
        context = client_side(self._racs.key, self._racs.certificate, authority)
        return await connect_racs(
            *element.racs.address,
            element.racs.seid or element.seid,
            context,
            timeout=timeout,
            dead_peer_timeout=self._racs.dead_peer_timeout,
        )
