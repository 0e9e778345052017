"""APDUs: the cases of ISO 7816-4, 5.1, and any bytes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.apdu import (
    ApduFormatError,
    CommandApdu,
    PinError,
    ResponseApdu,
    StatusError,
    status_error,
)

byte = st.integers(0, 255)
commands = st.builds(
    CommandApdu,
    byte,
    byte,
    byte,
    byte,
    st.one_of(st.binary(max_size=300), st.integers(65000, 65535).map(bytes)),
    st.one_of(st.none(), st.integers(1, 300), st.integers(65000, 65536)),
)


@pytest.mark.parametrize(
    ("command", "encoded"),
    [
        (CommandApdu(0xA0, 0x19, 0x10, 0x00), "A0191000"),
        (CommandApdu(0xA0, 0x18, 0x00, 0x00, le=256), "A018000000"),
        (CommandApdu(0xA0, 0x18, 0x00, 0x00, le=4), "A018000004"),
        (CommandApdu(0xA0, 0x16, 0x00, 0x80, b"abcd"), "A01600800461626364"),
        (CommandApdu(0x00, 0xA4, 0x04, 0x00, b"ab", 256), "00A4040002616200"),
        (CommandApdu(0x00, 0xB0, 0x00, 0x00, le=65536), "00B00000000000"),
        (CommandApdu(0x00, 0xB0, 0x00, 0x00, le=257), "00B00000000101"),
        (CommandApdu(0x00, 0xD6, 0x00, 0x00, b"a", 257), "00D60000000001610101"),
        (CommandApdu(0x00, 0xD6, 0x00, 0x00, bytes(256)), "00D60000000100" + "00" * 256),
    ],
)
def test_every_case(command: CommandApdu, encoded: str) -> None:
    assert command.encode().hex().upper() == encoded
    assert CommandApdu.decode(bytes.fromhex(encoded)) == command


@given(commands)
def test_round_trip(command: CommandApdu) -> None:
    assert CommandApdu.decode(command.encode()) == command


@given(st.binary(max_size=400))
def test_any_bytes_are_a_command_or_the_error(untrusted: bytes) -> None:
    with contextlib.suppress(ApduFormatError):
        command = CommandApdu.decode(untrusted)
        assert CommandApdu.decode(command.encode()) == command


@given(st.binary(max_size=400))
def test_any_bytes_are_a_response_or_the_error(untrusted: bytes) -> None:
    if len(untrusted) < 2:
        with pytest.raises(ApduFormatError):
            ResponseApdu.decode(untrusted)
    else:
        response = ResponseApdu.decode(untrusted)
        assert response.encode() == untrusted
        assert (response.sw1, response.sw2) == tuple(untrusted[-2:])


def test_values_out_of_range() -> None:
    for make in (
        lambda: CommandApdu(256, 0, 0, 0),
        lambda: CommandApdu(0, 0, 0, 0, bytes(65536)),
        lambda: CommandApdu(0, 0, 0, 0, le=0),
        lambda: CommandApdu(0, 0, 0, 0, le=65537),
        lambda: ResponseApdu(sw=0x10000),
        lambda: ResponseApdu(bytes(65537)),
    ):
        with pytest.raises(ApduFormatError):
            make()


def test_status_words_become_errors_with_their_facts() -> None:
    for sw, attempts in ((0x6302, 2), (0x63C1, 1), (0x6300, 0), (0x6983, 0)):
        error = status_error(sw, 0x20)
        assert isinstance(error, PinError)
        assert (error.attempts_remaining, error.sw, error.ins) == (attempts, sw, 0x20)
    error = status_error(0x6A80, 0x2A)
    assert type(error) is StatusError
    assert "wrong data" in str(error)
    assert "Le 40" in str(status_error(0x6C40, 0xA6))


def test_data_is_no_part_of_a_repr() -> None:
    assert "secret" not in repr(CommandApdu(0, 0x20, 0, 0, b"secret"))
    assert "secret" not in repr(ResponseApdu(b"secret"))
