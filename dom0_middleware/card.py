"""The hypervisor's card: connected when it is first needed, and again after it was lost."""

from __future__ import annotations

from dom0_middleware.settings import CardSettings
from secfunet.apdu import PinError
from secfunet.card.client import CardClient
from secfunet.card.pool import SingleCard
from secfunet.card.unix import connect_unix
from secfunet.service.files import read_secret


def hypervisor_card(settings: CardSettings) -> SingleCard:
    """A pool of the one card. A lease raises CardError, PinError, or UnsafeFileError for the PIN's file.

    A PIN that the card refused is never tried again by this process: the attempts that are left are the administrator's.
    """
    refused: list[PinError] = []

    async def connect() -> CardClient:
        if refused:
            raise refused[0]
        pin = read_secret(settings.user_pin_file, limit=64).strip()
        card = CardClient(await connect_unix(settings.socket, timeout=settings.timeout))
        try:
            await card.select()
            await _verify(card, pin, refused)
            await card.set_identity(settings.identity)
        except BaseException:
            await card.close()
            raise
        return card

    return SingleCard(connect)


async def _verify(card: CardClient, pin: bytes, refused: list[PinError]) -> None:
    try:
        await card.verify_pin(pin)
    except PinError as error:
        refused.append(error)
        raise
