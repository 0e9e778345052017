"""Tokens of a user in the card: what is taken, what is refused, and that nothing of what is refused is kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.apdu import StatusError
from secfunet.card import Segmentation
from secfunet.card.tlv import encode_tlv
from secfunet.card.tokens import (
    CardTokens,
    StoredToken,
    TokenRefusedError,
    TokensFullError,
    TokenUnknownError,
    TrustedAuthority,
)
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.user_token import (
    MAX_CONTAINER,
    MAX_PLAINTEXT,
    MAX_VALUE,
    UserToken,
    UserTokenError,
    key_digest,
    load_authority_key,
    public_key_der,
)
from secure_element.card_os import CardOs
from secure_element.tokens import MAX_TOKEN_AUTHORITIES, MAX_TOKENS
from tests.secure_element.tokens import OAEP, V15, TokenCard, TokenMaker
from tests.support.local_card import administrator_client, open_store, ready_client
from tests.support.pki import CertificateAuthority

MAKER = TokenMaker()
STRANGER = TokenMaker()
BOTH = pytest.mark.parametrize("profile", [OAEP, V15])


@pytest.fixture
async def card(tmp_path: Path) -> TokenCard:
    return await TokenCard.make(tmp_path, MAKER)


async def refused(sw: int, awaitable: object) -> None:
    with pytest.raises(StatusError) as refusal:
        await awaitable  # type: ignore[misc]  # a coroutine of any kind
    assert refusal.value.sw == sw


def load_raw(card: CardOs, container: bytes, profile: int = OAEP) -> bytes:
    """The status word of Load-Token."""
    return card.process(bytes((0x80, 0x56, profile, 0, 0)) + len(container).to_bytes(2) + container)


# --- what is taken


@BOTH
@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_a_token_goes_in_and_comes_out(
    card: TokenCard, profile: ContainerProfile, segmentation: Segmentation
) -> None:
    key = await card.key()
    user = await card.user(segmentation=segmentation)
    assert await user.stored() == ()
    values = {"badge": os.urandom(MAX_VALUE), "empty": b"", "ticket": b"a ticket"}
    for counter, (name, value) in enumerate(values.items(), 7):
        await user.load(MAKER.token(key, counter, name=name, value=value, profile=profile), profile)
    assert await user.stored() == (
        StoredToken("badge", 7, MAX_VALUE),
        StoredToken("empty", 8, 0),
        StoredToken("ticket", 9, 8),
    )
    for name, value in values.items():
        assert await user.value(name) == value
    await user.delete("badge")
    assert [one.name for one in await user.stored()] == ["empty", "ticket"]
    for ask in (user.value, user.delete):
        with pytest.raises(TokenUnknownError):
            await ask("badge")
