"""A card as its administrator has it: every command of a client through a secure channel (SCP03), and the keys that open it.

::

    client = CardClient(await connect_unix(...))
    await client.select()                       # the applet, or AID_OF_DOMAIN
    card = await open_secure_channel(client, keys)
    await card.generate_key("vm", KeyAlgorithm.RSA_2048)    # nobody between here and the card reads or changes it
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Final

from secfunet.apdu import MAX_RESPONSE, ApduError, CommandApdu, ResponseApdu, status_error
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.ber import decode_elements, encode_element
from secfunet.card.client import CardClient
from secfunet.card.errors import CardError, CardFormatError, CardGoneError
from secfunet.card.instructions import AID_OF_DOMAIN, Cla, DomainIns
from secfunet.card.parameters import Segmentation
from secfunet.scp03 import (
    HostChannel,
    HostHandshake,
    PutKey,
    Scp03Error,
    Scp03FormatError,
    Scp03SecurityError,
    SecurityLevel,
)
from secfunet.scp03.put_key import FIRST_OF_SEVERAL

CHALLENGE_SIZE: Final = 8
_SW_OK: Final = 0x9000
_SW_NOT_FOUND: Final = 0x6A88
_SW_SECURITY_STATUS: Final = 0x6982


class AdministratorRefusedError(CardError):
    """Card and administrator do not have the same keys; neither has told the other its own."""


class SecurePort:
    """A CardPort through a secure channel: one APDU of any length in, one out. ``card`` sees to how both travel."""

    def __init__(self, card: CardClient, channel: HostChannel) -> None:
        self._card = card
        self._channel: HostChannel | None = channel

    async def transmit(self, command: bytes) -> bytes:
        """Raises CardGoneError when an answer is not the card's, or when an exchange before this one was not finished."""
        channel, self._channel = self._channel, None
        if channel is None:
            raise CardGoneError("the secure channel to the card is over")
        plain = CommandApdu.decode(command)
        # What a protected answer weighs more than a plain one is none of the caller's business.
        le = MAX_RESPONSE if self._card.segmentation is Segmentation.EXTENDED else 256
        try:
            wrapped = channel.wrap(CommandApdu(plain.cla, plain.ins, plain.p1, plain.p2, plain.data, le))
            response = channel.unwrap(await self._card.exchange(wrapped))
        except Scp03FormatError as error:
            raise CardFormatError(str(error)) from None
        except Scp03SecurityError:
            raise CardGoneError("an answer in the secure channel is not the card's") from None
        if response.sw != _SW_SECURITY_STATUS:
            self._channel = channel
        return response.encode()

    async def reset(self, *, cold: bool = False) -> bytes:
        """The channel is over."""
        self._channel = None
        return await self._card.port.reset(cold=cold)

    async def close(self) -> None:
        """The channel is over, and the card is given back."""
        self._channel = None
        await self._card.port.close()


async def open_secure_channel(
    client: CardClient,
    keys: AdministratorKeys,
    *,
    level: SecurityLevel = SecurityLevel.C_MAC_C_DEC_R_MAC_R_ENC,
    randbytes: Callable[[int], bytes] = os.urandom,
) -> CardClient:
    """A client of the same kind whose commands go through a secure channel to the application that ``client`` has selected.

    ``client`` itself is not to be used meanwhile: a word without protection ends the channel.

    Raises AdministratorRefusedError, CardFormatError, and what a card raises.
    """
    handshake = HostHandshake(keys.keys, randbytes(CHALLENGE_SIZE), key_version=keys.version)
    response = await client.exchange(handshake.initialize_update)
    if response.sw == _SW_NOT_FOUND:
        raise AdministratorRefusedError(f"the card has no administrator's keys of version {keys.version}")
    if response.sw != _SW_OK:
        raise status_error(response.sw, DomainIns.INITIALIZE_UPDATE)
    try:
        authenticate = handshake.authenticate(response.data, level)
    except Scp03SecurityError:
        raise AdministratorRefusedError("these are not the administrator's keys of this card") from None
    except Scp03Error as error:
        raise CardFormatError(str(error)) from None
    response = await client.exchange(authenticate)
    if response.sw == _SW_SECURITY_STATUS:
        raise AdministratorRefusedError("the card refuses these administrator's keys")
    if response.sw != _SW_OK:
        raise status_error(response.sw, DomainIns.EXTERNAL_AUTHENTICATE)
    secure = copy.copy(client)
    secure.port = SecurePort(client, handshake.channel)
    secure.segmentation = Segmentation.EXTENDED
    return secure


class CardAdministrator:
    """The commands of the security domain, through a secure channel of their own. Raises what CardClient raises."""

    def __init__(self, client: CardClient, keys: AdministratorKeys) -> None:
        self._client = client
        self._keys = keys

    @classmethod
    async def open(cls, client: CardClient, keys: AdministratorKeys) -> CardAdministrator:
        """Selects the security domain. Raises AdministratorRefusedError."""
        await client.select(AID_OF_DOMAIN)
        return cls(await open_secure_channel(client, keys), keys)

    async def put_keys(self, new: AdministratorKeys, *, replaced: int = 0) -> None:
        """Loads a key set in place of version ``replaced`` (0: beside the others). The channel goes on with the old one.

        Raises CardFormatError if the card has taken other keys than these.
        """
        put = PutKey(new.version, new.keys)
        answer = await self._send(DomainIns.PUT_KEY, replaced, FIRST_OF_SEVERAL, put.encode(self._keys.keys.dek))
        if answer != put.receipt:
            raise CardFormatError("the card's check values are not those of the new keys")

    async def delete_keys(self, version: int) -> None:
        """Destroys a key set; the last one stays (StatusError 6985)."""
        await self._send(DomainIns.DELETE, 0, 0, encode_element(0xD2, bytes((version,))))

    async def store_data(self, tag: int, value: bytes) -> None:
        """Keeps an element that GET DATA gives to anybody: 42 issuer's number, 45 card's number."""
        await self._send(DomainIns.STORE_DATA, 0x90, 0, encode_element(tag, value))

    async def get_data(self, tag: int) -> bytes:
        """The value of an element."""
        (element,) = decode_elements(await self._send(DomainIns.GET_DATA, tag >> 8, tag & 0xFF)) or (None,)
        if element is None or element.tag != tag:
            raise CardFormatError("the card answered with another element")
        return element.value

    async def applications(self) -> tuple[bytes, ...]:
        """AIDs of what is on the card, beside the security domain."""
        entries = decode_elements(await self._send(DomainIns.GET_STATUS, 0x40, 0x02, encode_element(0x4F, b"")))
        return tuple(
            part.value
            for entry in entries
            if entry.tag == 0xE3
            for part in decode_elements(entry.value)
            if part.tag == 0x4F
        )

    async def _send(self, ins: DomainIns, p1: int, p2: int, data: bytes = b"") -> bytes:
        response: ResponseApdu = await self._client.exchange(CommandApdu(Cla.KEYS, ins, p1, p2, data, MAX_RESPONSE))
        if response.sw != _SW_OK:
            error: ApduError = status_error(response.sw, ins)
            raise error
        return response.data
