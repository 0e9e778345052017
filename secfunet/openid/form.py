"""The two encodings of OpenID messages: key-value form (§4.1.1) and HTTP encoding (§4.1.2).

A message is a mapping from key to value, the keys without their "openid." prefix. Both decoders are bounded and total: any input gives a
mapping or OpenIdFormatError. A key that occurs twice is refused, since two readers might each believe another one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from secfunet.openid.errors import OpenIdFormatError

NAMESPACE = "http://specs.openid.net/auth/2.0"
IDENTIFIER_SELECT = "http://specs.openid.net/auth/2.0/identifier_select"
FORM_CONTENT_TYPE = "application/x-www-form-urlencoded"
KEY_VALUE_CONTENT_TYPE = "text/plain"

MAX_MESSAGE = 16384  # bytes; an assertion with its return_to is far below 4 KiB
MAX_FIELDS = 100
PREFIX = "openid."

_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def encode_key_values(fields: Iterable[tuple[str, str]]) -> bytes:
    """Key-value form: what is signed, and the body of direct answers. Raises OpenIdFormatError for a pair that it cannot carry."""
    lines: list[str] = []
    for key, value in fields:
        if ":" in key or "\n" in key or "\n" in value:
            raise OpenIdFormatError(f"the field {key!r:.80} does not fit the key-value form")
        lines.append(f"{key}:{value}\n")
    try:
        return "".join(lines).encode("utf-8")
    except UnicodeEncodeError:
        raise OpenIdFormatError("a field is no Unicode text") from None


def decode_key_values(untrusted: bytes) -> dict[str, str]:
    """The inverse of encode_key_values."""
    text = _bounded_text(untrusted)
    if not text:
        return {}
    if not text.endswith("\n"):
        raise OpenIdFormatError("a key-value form ends with a newline")
    fields: dict[str, str] = {}
    for line in text[:-1].split("\n"):
        key, colon, value = line.partition(":")
        if not colon:
            raise OpenIdFormatError("a line of a key-value form has no colon")
        _add(fields, key, value)
    return fields


def decode_form(untrusted: bytes | str) -> dict[str, str]:
    """Decodes application/x-www-form-urlencoded: all fields, prefix and others included."""
    text = _bounded_text(untrusted)
    # parse_qsl leaves a broken escape as it is; two decoders could then disagree about what was signed.
    if _BAD_ESCAPE.search(text):
        raise OpenIdFormatError("a form has a broken percent escape")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except ValueError:
        raise OpenIdFormatError("a form has too many fields, or is not UTF-8") from None
    fields: dict[str, str] = {}
    for key, value in pairs:
        _add(fields, key, value)
    return fields


def decode_query(untrusted_url: str) -> dict[str, str]:
    """The fields of a URL's query."""
    try:
        query = urlsplit(untrusted_url).query
    except ValueError:
        raise OpenIdFormatError("this is no URL") from None
    return decode_form(query)


def encode_message(message: Mapping[str, str]) -> str:
    """HTTP encoding of a message: each key gets its prefix."""
    try:
        return urlencode([(PREFIX + key, value) for key, value in message.items()], errors="strict")
    except UnicodeEncodeError:
        raise OpenIdFormatError("a field is no Unicode text") from None


def message_of(fields: Mapping[str, str]) -> dict[str, str]:
    """The OpenID message among the fields of a request, and that it is one of version 2.0 (openid.ns, §4.1.2)."""
    message = {key.removeprefix(PREFIX): value for key, value in fields.items() if key.startswith(PREFIX)}
    if message.get("ns") != NAMESPACE:
        raise OpenIdFormatError("this is no OpenID 2.0 message (openid.ns)")
    if any("\n" in value or "\n" in key or ":" in key for key, value in message.items()):
        raise OpenIdFormatError("an OpenID message has a key or a value that cannot be signed")
    return message


def url_with_message(url: str, message: Mapping[str, str]) -> str:
    """``url``, its own query kept, with the message behind it (§5.2.1)."""
    parts = urlsplit(url)
    query = encode_message(message)
    return urlunsplit(parts._replace(query=f"{parts.query}&{query}" if parts.query else query, fragment=""))


def _bounded_text(untrusted: bytes | str) -> str:
    if len(untrusted) > MAX_MESSAGE:
        raise OpenIdFormatError(f"a message is longer than {MAX_MESSAGE} bytes")
    if isinstance(untrusted, str):
        return untrusted
    try:
        return untrusted.decode("utf-8")
    except UnicodeDecodeError:
        raise OpenIdFormatError("a message is not UTF-8") from None


def _add(fields: dict[str, str], key: str, value: str) -> None:
    if key in fields:
        raise OpenIdFormatError(f"the field {key!r:.80} occurs twice")
    if len(fields) == MAX_FIELDS:
        raise OpenIdFormatError(f"a message has more than {MAX_FIELDS} fields")
    fields[key] = value
