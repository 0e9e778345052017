"""Would this card be served? Asked by ``secure-element check``; ``serve`` refuses for the same reasons."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Final

from cryptography import x509

from secfunet.card.errors import CardBusyError, CardError
from secfunet.card.place import connect_card
from secfunet.errors import SecFuNetError
from secfunet.service.findings import Finding, Weight
from secfunet.service.tables import moment
from secure_element.errors import StoreError
from secure_element.settings import CardSettings
from secure_element.store import CardStore, StoreContents

NEAR_END: Final = 30 * 86400.0  # seconds
_TIMEOUT: Final = 2.0


async def look(settings: CardSettings) -> list[Finding]:
    """Everything; a card that is served is not disturbed, and its store is not opened beside it."""
    place = await _place(settings)
    return [place, *_store(settings, is_served=place.message.startswith("served"))]


def _store(settings: CardSettings, *, is_served: bool) -> Iterator[Finding]:
    if settings.store_key.prompt:
        yield Finding("store_key", Weight.WARNING, "a passphrase that is typed at each start: not tried")
        return
    try:
        secret = settings.store_key.read()
    except (SecFuNetError, OSError) as error:
        yield Finding("store_key", Weight.WRONG, str(error))
        return
    yield Finding("store_key")
    if is_served:
        yield Finding("store", message=f"{settings.store}, in use by the daemon")
        return
    try:
        store = CardStore.open(settings.store, secret)
    except (StoreError, SecFuNetError, OSError) as error:
        yield Finding("store", Weight.WRONG, str(error))
        return
    try:
        yield Finding("store", message=str(settings.store))
        yield from _identities(store.contents, time.time())
    finally:
        store.close()


def _identities(contents: StoreContents, now: float) -> Iterator[Finding]:
    if not contents.identities:
        yield Finding("identities", Weight.WARNING, "none: the card has to be enrolled before anybody can use it")
    for identity in contents.identities:
        what = f"identity {identity.name}"
        if not identity.certificate:
            yield Finding(what, Weight.WARNING, "it has a key and no certificate yet")
            continue
        end = x509.load_der_x509_certificate(identity.certificate).not_valid_after_utc.timestamp()
        weight = Weight.OK if end > now + NEAR_END else Weight.WARNING
        yield Finding(what, weight, f"its certificate {'is good until' if end > now else 'has ended at'} {moment(end)}")


async def _place(settings: CardSettings) -> Finding:
    if settings.socket is None:
        return await _reader(settings)
    folder = settings.socket.parent
    try:
        card = await connect_card(settings.socket, timeout=_TIMEOUT)
        await card.close()
        return Finding("socket", message=f"served at {settings.socket}")
    except CardBusyError:
        return Finding("socket", message=f"served at {settings.socket}, by a daemon that has a client")
    except CardError as error:
        if isinstance(error.__cause__, PermissionError):
            return Finding("socket", Weight.WRONG, str(error))
    if not folder.is_dir():
        return Finding("socket", Weight.WRONG, f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding("socket", Weight.WRONG, f"this user may not make a socket in {folder}")
    return Finding("socket", message=f"{settings.socket}, not served now")


async def _reader(settings: CardSettings) -> Finding:
    address = settings.reader_address
    if address is None:
        return Finding("attach", Weight.WRONG, "the settings name no place for this card")
    try:
        async with asyncio.timeout(_TIMEOUT):
            _, writer = await asyncio.open_connection(*address)
    except (OSError, TimeoutError):
        return Finding("attach", Weight.AWAY, f"no virtual reader listens at {settings.attach}: is pcscd running?")
    writer.close()
    return Finding("attach", message=f"a virtual reader listens at {settings.attach}")
