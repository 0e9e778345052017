"""The hypervisor's card: connected when it is first needed, and again after it was lost."""

from __future__ import annotations

from dom0_middleware.settings import CardSettings
from secfunet.card.place import connect_card
from secfunet.card.pool import SingleCard
from secfunet.card.ports import CardPort
from secfunet.card.ready import CardOpener


def hypervisor_card(settings: CardSettings) -> SingleCard:
    """A pool of the one card. A lease raises CardError, PinError, or UnsafeFileError for the PIN's file.

    A PIN that the card refused is not tried again before there is another: the attempts that are left are the administrator's.
    """

    async def connect() -> CardPort:
        return await connect_card(settings.place, timeout=settings.timeout)

    opener = CardOpener(connect, settings.read_pin, identity=settings.identity, segmentation=settings.card_segmentation)
    return SingleCard(opener)
