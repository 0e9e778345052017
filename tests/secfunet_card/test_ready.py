"""How a card is made ready, and what a PIN may cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from secfunet.apdu import PinError, StatusError
from secfunet.card import CardGoneError, CardOpener, PinWithheldError, Segmentation, ready_card
from secfunet.card.client import CardClient
from secure_element.card_os import CardOs
from tests.support.local_card import USER_PIN, LocalPort, new_store


async def attempts(card: CardOs) -> int:
    client = CardClient(LocalPort(card))
    await client.select()
    return await client.pin_attempts()


class ClosingPort(LocalPort):
    """Remembers that it was closed."""

    is_closed = False

    async def close(self) -> None:
        self.is_closed = True
        await super().close()


@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_the_pin_opens_the_card(tmp_path: Path, segmentation: Segmentation) -> None:
    port = ClosingPort(CardOs(new_store(tmp_path)))
    client = await ready_card(port, pin=USER_PIN, segmentation=segmentation)
    assert await client.identities() == ()
    assert not port.is_closed


async def test_the_last_attempt_is_left_to_a_person(tmp_path: Path) -> None:
    card = CardOs(new_store(tmp_path))
    for left in (2, 1):
        port = ClosingPort(card)
        with pytest.raises(PinError) as wrong:
            await ready_card(port, pin=b"9999")
        assert wrong.value.attempts_remaining == left
        assert not isinstance(wrong.value, PinWithheldError)
        assert port.is_closed
    for pin in (b"9999", USER_PIN):
        port = ClosingPort(card)
        with pytest.raises(PinWithheldError, match="last attempt") as withheld:
            await ready_card(port, pin=pin)
        assert withheld.value.attempts_remaining == 1
        assert port.is_closed
        assert await attempts(card) == 1
    with pytest.raises(PinError):
        await CardClient(LocalPort(card)).verify_pin(b"9999")
    with pytest.raises(PinWithheldError, match="blocked"):
        await ready_card(ClosingPort(card), pin=USER_PIN)


async def test_an_identity_that_is_not_there_leaves_no_open_card(tmp_path: Path) -> None:
    port = ClosingPort(CardOs(new_store(tmp_path)))
    with pytest.raises(StatusError) as refused:
        await ready_card(port, pin=USER_PIN, identity="nobody")
    assert refused.value.sw == 0x6985
    assert port.is_closed


async def test_a_refused_pin_costs_one_attempt_and_a_corrected_one_heals(tmp_path: Path) -> None:
    card = CardOs(new_store(tmp_path))
    connections: list[ClosingPort] = []
    pins = [b"9999"]

    async def connect() -> ClosingPort:
        connections.append(ClosingPort(card))
        return connections[-1]

    opener = CardOpener(connect, lambda: pins[-1])
    with pytest.raises(PinError) as wrong:
        await opener()
    for _ in range(3):
        with pytest.raises(PinWithheldError) as withheld:
            await opener()
        assert withheld.value.attempts_remaining == wrong.value.attempts_remaining == 2
        assert "9999" not in repr(withheld.value) + str(withheld.value) + repr(vars(opener))
    assert len(connections) == 1, "the card is not even asked"
    pins.append(USER_PIN)
    await opener()
    assert await attempts(card) == 3


async def test_a_card_that_is_gone_says_nothing_about_the_pin(tmp_path: Path) -> None:
    card = CardOs(new_store(tmp_path))
    is_there = False

    async def connect() -> LocalPort:
        if not is_there:
            raise CardGoneError("no card")
        return LocalPort(card)

    opener = CardOpener(connect, lambda: USER_PIN)
    with pytest.raises(CardGoneError):
        await opener()
    is_there = True
    assert await (await opener()).identities() == ()
