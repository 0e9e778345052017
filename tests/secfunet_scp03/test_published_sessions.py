"""Both ends say, byte for byte, what real cards and their administrators said."""

from __future__ import annotations

import pytest

from secfunet.apdu import CommandApdu, ResponseApdu
from secfunet.scp03 import CardHandshake, HostHandshake, InitializeUpdateAnswer, SecurityLevel, key_check_value
from secfunet.scp03.handshake import pseudo_random_challenge
from tests.secfunet_scp03.vectors import EID, GET_EID, PLAIN, SESSIONS, Session, key_set

ISD_R = bytes.fromhex("A0000005591010FFFFFFFF8900000100")
"""The cards were eUICCs."""


def test_check_values() -> None:
    keys = key_set(16)
    assert [key_check_value(key).hex() for key in (keys.enc, keys.mac, keys.dek)] == ["c35280", "013808", "840de5"]


@pytest.mark.parametrize("session", SESSIONS, ids=str)
def test_the_administrators_end(session: Session) -> None:
    initialize_update = bytes.fromhex(session.initialize_update)
    handshake = HostHandshake(
        key_set(session.key_size), CommandApdu.decode(initialize_update).data, key_version=initialize_update[2]
    )
    assert handshake.initialize_update.encode() == initialize_update
    level = SecurityLevel(bytes.fromhex(session.external_authenticate)[2])
    authenticate = handshake.authenticate(bytes.fromhex(session.answer), level)
    assert authenticate.encode().hex() == session.external_authenticate
    channel = handshake.channel
    assert channel.wrap(CommandApdu.decode(GET_EID)).encode().hex() == session.get_eid
    assert channel.unwrap(ResponseApdu(bytes.fromhex(session.eid))).data == EID
    for plain, protected in zip(PLAIN, session.protected, strict=True):
        assert channel.wrap(CommandApdu.decode(plain)).encode().hex() == protected


@pytest.mark.parametrize("session", SESSIONS, ids=str)
def test_the_cards_end(session: Session) -> None:
    answer = InitializeUpdateAnswer.decode(bytes.fromhex(session.answer))
    assert answer.i & 0x10
    handshake = CardHandshake(
        key_set(session.key_size),
        answer.key_version,
        answer.key_data,
        CommandApdu.decode(bytes.fromhex(session.initialize_update)).data,
        answer.challenge,
        answer.i,
        answer.sequence,
    )
    assert handshake.answer.encode().hex() == session.answer
    channel = handshake.authenticate(CommandApdu.decode(bytes.fromhex(session.external_authenticate)))
    assert channel.unwrap(CommandApdu.decode(bytes.fromhex(session.get_eid))) == CommandApdu.decode(GET_EID)
    assert channel.wrap(EID).hex() == session.eid
    for plain, protected in zip(PLAIN, session.protected, strict=True):
        assert channel.unwrap(CommandApdu.decode(bytes.fromhex(protected))) == CommandApdu.decode(plain)


@pytest.mark.parametrize("session", SESSIONS, ids=str)
def test_the_cards_challenge(session: Session) -> None:
    """It is pseudo-random: derived from the sequence counter, and the AID of their security domain."""
    answer = InitializeUpdateAnswer.decode(bytes.fromhex(session.answer))
    made = pseudo_random_challenge(key_set(session.key_size), answer.sequence, ISD_R)
    assert answer.challenge == made
