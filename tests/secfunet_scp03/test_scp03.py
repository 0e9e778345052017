"""Our two ends against each other: every size, mode and level; and any bytes."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.apdu import CommandApdu, ResponseApdu
from secfunet.scp03 import (
    CardChannel,
    CardHandshake,
    HostChannel,
    HostHandshake,
    InitializeUpdateAnswer,
    KeySet,
    PutKey,
    Scp03Error,
    Scp03FormatError,
    Scp03SecurityError,
    ScpMode,
    SecurityLevel,
    key_check_value,
)

sizes = st.sampled_from((16, 24, 32))
modes = st.sampled_from(ScpMode)
levels = st.sampled_from(SecurityLevel)
commands = st.builds(
    CommandApdu,
    st.sampled_from((0x00, 0x80, 0xA0)),
    st.integers(0, 255),
    st.integers(0, 255),
    st.integers(0, 255),
    st.binary(max_size=600),
    st.none() | st.sampled_from((1, 256, 65536)),
)


def key_set(size: int) -> KeySet:
    return KeySet.split(os.urandom(3 * size))


def is_extended(encoded: bytes) -> bool:
    return len(encoded) > 7 and encoded[4] == 0


def ends(
    size: int = 16,
    mode: ScpMode = ScpMode.S8,
    level: SecurityLevel = SecurityLevel.C_MAC_C_DEC_R_MAC_R_ENC,
) -> tuple[HostChannel, CardChannel]:
    keys = key_set(size)
    host = HostHandshake(keys, os.urandom(mode.value), key_version=7)
    i = 0x61 if mode is ScpMode.S16 else 0x60
    card = CardHandshake(keys, 7, b"serial num", host.initialize_update.data, os.urandom(mode.value), i)
    authenticate = host.authenticate(card.answer.encode(), level)
    return host.channel, card.authenticate(CommandApdu.decode(authenticate.encode()))


@given(sizes, modes, levels, st.lists(st.tuples(commands, st.binary(max_size=300)), min_size=1, max_size=4))
def test_commands_and_answers(
    size: int, mode: ScpMode, level: SecurityLevel, exchanges: list[tuple[CommandApdu, bytes]]
) -> None:
    host, card = ends(size, mode, level)
    for command, answer in exchanges:
        encoded = host.wrap(command).encode()
        assert card.unwrap(CommandApdu.decode(encoded), extended=is_extended(encoded)) == command
        response = ResponseApdu(card.wrap(answer))
        if level & 0x20 and answer:
            assert answer not in response.data or len(answer) < 4
        assert host.unwrap(response) == ResponseApdu(answer)
        assert host.unwrap(ResponseApdu(b"", 0x6A80)).sw == 0x6A80


@given(sizes, commands, st.data())
def test_any_changed_bit_of_a_command_is_noticed(size: int, command: CommandApdu, data: st.DataObject) -> None:
    host, card = ends(size)
    wrapped = host.wrap(command)
    whole = bytearray(bytes((wrapped.cla, wrapped.ins, wrapped.p1, wrapped.p2)) + wrapped.data)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    changed = CommandApdu(*whole[:4], bytes(whole[4:]), wrapped.le)
    with pytest.raises(Scp03SecurityError):
        card.unwrap(changed, extended=is_extended(wrapped.encode()))


@given(st.binary(max_size=100), st.data())
def test_any_changed_bit_of_an_answer_is_noticed(answer: bytes, data: st.DataObject) -> None:
    host, card = ends()
    card.unwrap(CommandApdu.decode(host.wrap(CommandApdu(0x80, 0xF2, 0, 0)).encode()))
    sent = bytearray(card.wrap(answer))
    bit = data.draw(st.integers(0, 8 * len(sent) - 1))
    sent[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Scp03SecurityError):
        host.unwrap(ResponseApdu(bytes(sent)))
    with pytest.raises(Scp03SecurityError):
        host.unwrap(ResponseApdu(b"smuggled", 0x6A80))


def test_replay_order_and_omission() -> None:
    host, card = ends()
    first = host.wrap(CommandApdu(0x80, 0xE2, 0, 0, b"data"))
    assert card.unwrap(first).p2 == 0
    with pytest.raises(Scp03SecurityError):
        card.unwrap(first)
    host, card = ends()
    first, _, third = (host.wrap(CommandApdu(0x80, 0xE2, 0, number, b"data")) for number in range(3))
    assert card.unwrap(first).p2 == 0
    with pytest.raises(Scp03SecurityError):
        card.unwrap(third)


def test_an_answer_of_before_is_not_taken_again() -> None:
    host, card = ends()
    answers = []
    for _ in range(2):
        card.unwrap(host.wrap(CommandApdu(0x80, 0xF2, 0, 0)))
        answers.append(card.wrap(b"state"))
    assert host.unwrap(ResponseApdu(answers[1])).data == b"state"
    with pytest.raises(Scp03SecurityError):
        host.unwrap(ResponseApdu(answers[0]))


def test_either_end_with_other_keys() -> None:
    ours, theirs = key_set(16), key_set(16)
    host = HostHandshake(ours, os.urandom(8))
    card = CardHandshake(theirs, 1, bytes(10), host.initialize_update.data, os.urandom(8))
    with pytest.raises(Scp03SecurityError):
        host.authenticate(card.answer.encode())
    with pytest.raises(Scp03FormatError):
        _ = host.channel
    same = CardHandshake(ours, 1, bytes(10), host.initialize_update.data, os.urandom(8))
    authenticate = host.authenticate(same.answer.encode())
    # A level that was changed on its way: the MAC covers it.
    lower = CommandApdu(authenticate.cla, authenticate.ins, 0x01, 0x00, authenticate.data)
    with pytest.raises(Scp03SecurityError):
        same.authenticate(lower)
    same.authenticate(authenticate)
    # Every session has keys of its own.
    again = CardHandshake(ours, 1, bytes(10), host.initialize_update.data, os.urandom(8))
    with pytest.raises(Scp03SecurityError):
        again.authenticate(authenticate)


def test_what_does_not_fit() -> None:
    with pytest.raises(Scp03FormatError):
        KeySet(bytes(16), bytes(16), bytes(24))
    with pytest.raises(Scp03FormatError):
        HostHandshake(key_set(16), bytes(7))
    host, _ = ends()
    with pytest.raises(Scp03FormatError):
        host.wrap(CommandApdu(0x80, 0xE2, 0, 0, bytes(65535)))
    keys = key_set(16)
    host_end = HostHandshake(keys, bytes(8), key_version=1)
    other = CardHandshake(keys, 2, bytes(10), bytes(8), bytes(8))
    with pytest.raises(Scp03FormatError):
        host_end.authenticate(other.answer.encode())
    assert "KeySet()" in repr(keys)


@given(sizes, sizes, st.integers(1, 127))
def test_a_new_key_set_travels(size: int, dek_size: int, version: int) -> None:
    new, dek = PutKey(version, key_set(size)), os.urandom(dek_size)
    encoded = new.encode(dek)
    assert PutKey.decode(encoded, dek) == new
    assert new.receipt == bytes((version,)) + b"".join(
        key_check_value(key) for key in (new.keys.enc, new.keys.mac, new.keys.dek)
    )
    with pytest.raises(Scp03SecurityError):
        PutKey.decode(encoded, os.urandom(dek_size))
    for end in range(len(encoded)):
        with pytest.raises(Scp03FormatError):
            PutKey.decode(encoded[:end], dek)


@given(st.binary(max_size=200))
def test_any_bytes(untrusted: bytes) -> None:
    with contextlib.suppress(Scp03Error):
        InitializeUpdateAnswer.decode(untrusted)
    with contextlib.suppress(Scp03Error):
        PutKey.decode(untrusted, bytes(16))
    with contextlib.suppress(Scp03Error):
        HostHandshake(key_set(16), bytes(8)).authenticate(untrusted)
    host, card = ends()
    with pytest.raises(Scp03SecurityError):
        card.unwrap(CommandApdu(0x84, 0xE2, 0, 0, untrusted))
    with pytest.raises(Scp03SecurityError):
        host.unwrap(ResponseApdu(untrusted))
    with contextlib.suppress(Scp03Error):
        CardHandshake(key_set(16), 1, bytes(10), bytes(8), bytes(8)).authenticate(
            CommandApdu(0x84, 0x82, 0x33, 0x00, untrusted)
        )


@given(st.binary(min_size=10, max_size=10), st.integers(0, 255), modes, st.booleans(), st.data())
def test_the_answer_to_initialize_update(
    key_data: bytes, version: int, mode: ScpMode, counted: bool, data: st.DataObject
) -> None:
    part = st.binary(min_size=mode.value, max_size=mode.value)
    i = (0x01 if mode is ScpMode.S16 else 0) | (0x70 if counted else 0x60)
    answer = InitializeUpdateAnswer(
        key_data, version, i, data.draw(part), data.draw(part), b"\0\0\1" if counted else b""
    )
    encoded = answer.encode()
    assert len(encoded) in (29, 32, 45, 48)
    assert InitializeUpdateAnswer.decode(encoded) == answer
    assert repr(answer.mode)
