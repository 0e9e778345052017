"""The hypervisor's card: connected when it is first needed, and again after it was lost."""

from __future__ import annotations

from dom0_middleware.settings import CardSettings
from secfunet.card.pool import SingleCard
from secfunet.card.ports import CardPort
from secfunet.card.ready import CardOpener
from secfunet.card.unix import connect_unix
from secfunet.service.files import read_secret


def hypervisor_card(settings: CardSettings) -> SingleCard:
    """A pool of the one card. A lease raises CardError, PinError, or UnsafeFileError for the PIN's file.

    A PIN that the card refused is not tried again before the file has another: the attempts that are left are the administrator's.
    """

    async def connect() -> CardPort:
        return await connect_unix(settings.socket, timeout=settings.timeout)

    def read_pin() -> bytes:
        return read_secret(settings.user_pin_file, limit=64).strip()

    return SingleCard(CardOpener(connect, read_pin, identity=settings.identity))
