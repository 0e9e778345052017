"""The tokens of a card's user, as a terminal and an administrator have them (``secfunet.user_token``; docs/protocols.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from secfunet.apdu import MAX_RESPONSE, CommandApdu, StatusError, status_error
from secfunet.card.client import CardClient
from secfunet.card.errors import CardError, CardFormatError
from secfunet.card.instructions import Cla, KeyIns
from secfunet.card.parameters import Segmentation
from secfunet.card.tlv import decode_tlv
from secfunet.user_token import DIGEST_SIZE, MAX_NAME

_ENTRY: Final = 1
_COUNTER_SIZE: Final = 8
_SIZE_SIZE: Final = 2
_TRUST, _DISTRUST = 0x01, 0x00
_SW_OK: Final = 0x9000
_SW_WRONG_DATA: Final = 0x6A80
_SW_FULL: Final = 0x6A84
_SW_NOT_FOUND: Final = 0x6A88


class TokenRefusedError(CardError):
    """The card does not take this container, and does not say why."""


class TokensFullError(CardError):
    """The card has no room for another token (or authority): the container is still good when one was deleted."""


class TokenUnknownError(CardError):
    """The card has no token (or trusts no authority) of that name."""


@dataclass(frozen=True)
class StoredToken:
    """What the card says of a token; ``size`` is that of its value, bytes."""

    name: str
    counter: int
    size: int


@dataclass(frozen=True)
class TrustedAuthority:
    """Whose tokens the card takes: SHA-256 of the public key, and the counter of the last token that it took; 0: none yet."""

    digest: bytes
    counter: int


class CardTokens:
    """The tokens of the current identity. ``client`` has verified the user's PIN; for trust and distrust it is the administrator's.

    Methods raise what a CardClient raises, and what they name.
    """

    def __init__(self, client: CardClient) -> None:
        self._client = client

    async def load(self, container: bytes, profile: int) -> None:
        """Gives the card a container. When this returns, the token is durable, and the container is worth nothing any more.

        Raises TokenRefusedError, TokensFullError.
        """
        try:
            await self._send(KeyIns.LOAD_TOKEN, profile, container)
        except StatusError as error:
            if error.sw == _SW_WRONG_DATA:
                raise TokenRefusedError(
                    "the card refuses this token: it was changed on its way, it is for another card or identity, its authority "
                    "is not one that the card trusts, or it (or a later one) was loaded before"
                ) from None
            if error.sw == _SW_FULL:
                raise TokensFullError("the card has no room for another token: delete one") from None
            raise

    async def stored(self) -> tuple[StoredToken, ...]:
        """All tokens, oldest first."""
        found = []
        for tag, value in decode_tlv(await self._send(KeyIns.LIST_TOKENS)):
            name = value[_COUNTER_SIZE + _SIZE_SIZE :]
            if tag != _ENTRY or not 1 <= len(name) <= MAX_NAME or not all(0x20 < byte < 0x7F for byte in name):
                raise CardFormatError("a token in the list has a counter, a size and a name")
            counter, size = value[:_COUNTER_SIZE], value[_COUNTER_SIZE : _COUNTER_SIZE + _SIZE_SIZE]
            found.append(StoredToken(name.decode("ascii"), int.from_bytes(counter), int.from_bytes(size)))
        return tuple(found)

    async def value(self, name: str) -> bytes:
        """The token itself. Raises TokenUnknownError."""
        return await self._of(KeyIns.GET_TOKEN, name)

    async def delete(self, name: str) -> None:
        """Forgets it; its container cannot be loaded again. Raises TokenUnknownError."""
        await self._of(KeyIns.DELETE_TOKEN, name)

    async def authorities(self) -> tuple[TrustedAuthority, ...]:
        """Whose tokens the card takes."""
        found = []
        for tag, value in decode_tlv(await self._send(KeyIns.GET_TOKEN_AUTHORITIES)):
            if tag != _ENTRY or len(value) != DIGEST_SIZE + _COUNTER_SIZE:
                raise CardFormatError("an authority in the list has a digest and a counter")
            found.append(TrustedAuthority(value[:DIGEST_SIZE], int.from_bytes(value[DIGEST_SIZE:])))
        return tuple(found)

    async def trust(self, public_key_der: bytes) -> None:
        """Has the card take this authority's tokens (administrator). Raises TokensFullError; StatusError 6A80: no key for that."""
        try:
            await self._send(KeyIns.TRUST_TOKEN_AUTHORITY, _TRUST, public_key_der)
        except StatusError as error:
            if error.sw == _SW_FULL:
                raise TokensFullError("the card remembers as many authorities as it can") from None
            raise

    async def distrust(self, digest: bytes) -> None:
        """Has the card take them no longer (administrator); those that it has stay. Raises TokenUnknownError."""
        try:
            await self._send(KeyIns.TRUST_TOKEN_AUTHORITY, _DISTRUST, digest)
        except StatusError as error:
            if error.sw == _SW_NOT_FOUND:
                raise TokenUnknownError("the card does not trust this authority") from None
            raise

    async def _of(self, ins: KeyIns, name: str) -> bytes:
        try:
            return await self._send(ins, data=name.encode())
        except StatusError as error:
            if error.sw == _SW_NOT_FOUND:
                raise TokenUnknownError(f"the card has no token '{name}' under this identity") from None
            raise

    async def _send(self, ins: KeyIns, p1: int = 0, data: bytes = b"") -> bytes:
        le = MAX_RESPONSE if self._client.segmentation is Segmentation.EXTENDED else 256
        response = await self._client.exchange(CommandApdu(Cla.KEYS, ins, p1, 0, data, le))
        if response.sw != _SW_OK:
            raise status_error(response.sw, ins)
        return response.data
