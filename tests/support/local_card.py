"""A card in this process: the real card operating system over a real store, without the socket."""

from __future__ import annotations

import os
from pathlib import Path

from secfunet.card import CardClient, KeyAlgorithm, Segmentation
from secfunet.card.administrator import open_secure_channel
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.client import pad_pin
from secfunet.scp03 import KeySet
from secure_element.applet import CardOptions
from secure_element.card_os import CardOs
from secure_element.pin import make_pin
from secure_element.store import CardStore, DomainRecord, StoreContents, StoreSecret
from tests.support.pki import CertificateAuthority

USER_PIN = b"0000"
STORE_KEY = bytes(range(100, 132))
KEYS = AdministratorKeys(1, KeySet.split(bytes(range(150, 198))))
KEY_DATA = b"local card"


class LocalPort:
    """CardPort straight into a CardOs; keeps every exchange."""

    def __init__(self, card: CardOs) -> None:
        self.card = card
        self.exchanges: list[tuple[bytes, bytes]] = []

    async def transmit(self, command: bytes) -> bytes:
        response = self.card.process(command)
        self.exchanges.append((command, response))
        return response

    async def reset(self, *, cold: bool = False) -> bytes:
        self.card.reset()
        return self.card.atr

    async def close(self) -> None:
        self.card.reset()


def new_store(folder: Path) -> CardStore:
    """A fresh store with the PIN and the keys above."""
    pin = make_pin(pad_pin(USER_PIN), os.urandom)
    domain = DomainRecord(KEY_DATA, {KEYS.version: KEYS.keys})
    return CardStore.create(folder / "card.store", StoreSecret(STORE_KEY), StoreContents(pin, domain=domain))


def open_store(folder: Path) -> CardStore:
    """The same store again."""
    return CardStore.open(folder / "card.store", StoreSecret(STORE_KEY))


async def ready_client(
    card: CardOs, identity: str | None = None, *, segmentation: Segmentation = Segmentation.EXTENDED
) -> CardClient:
    """Selected, verified, identity set."""
    client = CardClient(LocalPort(card), segmentation=segmentation)
    await client.select()
    await client.verify_pin(USER_PIN)
    if identity is not None:
        await client.set_identity(identity)
    return client


async def administrator_client(card: CardOs, *, segmentation: Segmentation = Segmentation.EXTENDED) -> CardClient:
    """The applet selected, through the administrator's secure channel."""
    client = CardClient(LocalPort(card), segmentation=segmentation)
    await client.select()
    return await open_secure_channel(client, KEYS)


async def personalised(
    store: CardStore,
    authority: CertificateAuthority,
    *identities: tuple[str, KeyAlgorithm],
    options: CardOptions | None = None,
) -> CardOs:
    """A card with these identities."""
    card = CardOs(store, options)
    client = await administrator_client(card)
    for name, algorithm in identities:
        await client.generate_key(name, algorithm)
        certificate = authority.issue_for_request(await client.certificate_signing_request(name, name))
        await client.load_identity(name, name.encode(), certificate, (authority.der,))
    await client.close()
    return card
