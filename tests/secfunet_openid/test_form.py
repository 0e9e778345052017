"""Key-value form and HTTP encoding: round trips, and any bytes give a mapping or the one error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.openid.errors import OpenIdFormatError
from secfunet.openid.form import (
    MAX_FIELDS,
    MAX_MESSAGE,
    NAMESPACE,
    decode_form,
    decode_key_values,
    decode_query,
    encode_key_values,
    encode_message,
    message_of,
    url_with_message,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
keys = text.filter(lambda key: ":" not in key and "\n" not in key)
values = text.filter(lambda value: "\n" not in value)


def test_the_example_of_the_specification() -> None:
    """§4.1.3."""
    assert encode_key_values([("mode", "error"), ("error", "This is an example message")]) == (
        b"mode:error\nerror:This is an example message\n"
    )


@given(st.dictionaries(keys, values, max_size=20))
def test_key_values_come_back(fields: dict[str, str]) -> None:
    assert decode_key_values(encode_key_values(fields.items())) == fields


@given(st.dictionaries(text, text, max_size=20))
def test_a_message_comes_back_through_a_url(fields: dict[str, str]) -> None:
    decoded = decode_form(encode_message(fields))
    assert decoded == {f"openid.{key}": value for key, value in fields.items()}
    assert decode_query(url_with_message("https://a.test/?state=1", fields)) == {"state": "1", **decoded}


@given(st.binary(max_size=300))
def test_any_bytes_are_a_mapping_or_the_error(untrusted: bytes) -> None:
    for decode in (decode_key_values, decode_form):
        try:
            fields = decode(untrusted)
        except OpenIdFormatError:
            continue
        assert all(isinstance(part, str) for pair in fields.items() for part in pair)


@pytest.mark.parametrize(
    "untrusted",
    [b"a:1\na:2\n", b"a", b"a:1", b"\xff:1\n", b"x" * (MAX_MESSAGE + 1), b"\n" * 2, b"a:1\n" + b"b\n"],
)
def test_key_values_that_are_none(untrusted: bytes) -> None:
    with pytest.raises(OpenIdFormatError):
        decode_key_values(untrusted)


@pytest.mark.parametrize(
    "untrusted",
    ["a=1&a=2", "a=%zz", "a=%ff", "&".join(f"k{n}=" for n in range(MAX_FIELDS + 1)), "x" * (MAX_MESSAGE + 1), "a=%4"],
)
def test_forms_that_are_none(untrusted: str) -> None:
    with pytest.raises(OpenIdFormatError):
        decode_form(untrusted)


@pytest.mark.parametrize("pair", [("a:b", "c"), ("a\n", "c"), ("a", "b\nc"), ("a", "\ud800")])
def test_what_cannot_be_signed_is_not_encoded(pair: tuple[str, str]) -> None:
    with pytest.raises(OpenIdFormatError):
        encode_key_values([pair])


def test_only_messages_of_version_2_are_read() -> None:
    assert message_of({"openid.ns": NAMESPACE, "openid.mode": "x", "state": "1"}) == {"ns": NAMESPACE, "mode": "x"}
    for fields in ({}, {"openid.mode": "x"}, {"openid.ns": "http://openid.net/signon/1.1"}):
        with pytest.raises(OpenIdFormatError):
            message_of(fields)
    with pytest.raises(OpenIdFormatError):
        message_of({"openid.ns": NAMESPACE, "openid.identity": "a\nassoc_handle:b"})
