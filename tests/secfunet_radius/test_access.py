"""A client's RADIUS packets: the server's own answers are taken, and nothing else is: not one changed byte, not another request's."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gose.radius.packets import Reply, encode_reply, parse_request
from secfunet.radius.access import AccessAnswer, AccessClient, AccessRequest
from secfunet.radius.errors import RadiusFormatError
from secfunet.radius.wire import MAX_EAP, Code, split_attributes, vendor_values

SECRET = b"a secret of thirty-two bytes, ok"
EAP = bytes.fromhex("020700050d")
MSK = bytes(range(64))


def client(**how: Any) -> AccessClient:
    return AccessClient(how.pop("secret", SECRET), nas="here", mtu=1400, **how)


def ask(**how: Any) -> AccessRequest:
    return client(**how).request("alice", EAP, None)


def reply(request: AccessRequest, code: Code = Code.ACCESS_ACCEPT, eap: bytes = EAP, **how: Any) -> bytes:
    """What our server answers."""
    msk = MSK if code is Code.ACCESS_ACCEPT else None
    return encode_reply(parse_request(request.encoded, SECRET), Reply(code, eap, how.pop("state", None), msk, **how))


def by_hand(request: AccessRequest, code: int, attributes: bytes, *, signed: bool) -> bytes:
    """An answer made of these attributes, with a right Response Authenticator and, if wanted, a right Message-Authenticator in front."""
    asked = request.encoded[4:20]
    size = 20 + len(attributes) + (18 if signed else 0)
    head = bytes((code, request.encoded[1])) + size.to_bytes(2)
    if signed:
        digest = hmac.new(SECRET, head + asked + b"\x50\x12" + bytes(16) + attributes, "md5").digest()
        attributes = b"\x50\x12" + digest + attributes
    return head + hashlib.md5(head + asked + attributes + SECRET, usedforsecurity=False).digest() + attributes


@given(eap=st.binary(min_size=1, max_size=MAX_EAP), state=st.none() | st.binary(min_size=1, max_size=253))
def test_a_server_reads_what_the_client_writes(eap: bytes, state: bytes | None) -> None:
    request = parse_request(client().request("n" * 300, eap, state).encoded, SECRET)
    assert (request.eap, request.state) == (eap, state)
    assert [value for kind, value in split_attributes(client().request("a", eap, None).encoded) if kind == 12] == [
        (1400).to_bytes(4)
    ]


@given(code=st.sampled_from((Code.ACCESS_ACCEPT, Code.ACCESS_CHALLENGE, Code.ACCESS_REJECT)), data=st.data())
def test_answers_and_every_changed_byte(code: Code, data: st.DataObject) -> None:
    request = ask()
    raw = reply(request, code, state=b"state")
    msk = MSK if code is Code.ACCESS_ACCEPT else None
    assert request.answer(raw + b"padding") == AccessAnswer(code, EAP, b"state", msk)
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:place] + bytes((raw[place] ^ data.draw(st.integers(1, 255)),)) + raw[place + 1 :]
    with pytest.raises(RadiusFormatError):
        request.answer(changed)
    with pytest.raises(RadiusFormatError):
        request.answer(raw[: data.draw(st.integers(0, len(raw) - 1))])


@given(
    st.binary(max_size=400)
    | st.binary(max_size=80).map(lambda rest: b"\x02\x07" + (20 + len(rest)).to_bytes(2) + bytes(16) + rest)
)
def test_any_bytes_are_no_answer(untrusted: bytes) -> None:
    with pytest.raises(RadiusFormatError):
        ask().answer(untrusted)


@given(st.binary(max_size=120))
def test_any_attributes_that_are_signed_right(attributes: bytes) -> None:
    """Whoever has the secret may still err: an answer or RadiusFormatError, and no key of another size."""
    request = ask()
    for signed in (True, False):
        for code in (2, 3, 11):
            try:
                answer = request.answer(by_hand(request, code, attributes, signed=signed))
            except RadiusFormatError:
                continue
            assert answer.msk is None
            assert signed or answer.code is Code.ACCESS_REJECT


def test_what_needs_a_message_authenticator() -> None:
    """All but a bare Access-Reject, which is worth no more than silence to whoever forges it (CVE-2024-3596)."""
    request = ask()
    message = b"\x4f\x06\x04\x00\x00\x04"
    for code, attributes in ((2, b""), (2, message), (11, message), (11, b""), (3, message)):
        request.answer(by_hand(request, code, attributes, signed=True))
        with pytest.raises(RadiusFormatError):
            request.answer(by_hand(request, code, attributes, signed=False))
    bare = by_hand(request, 3, b"", signed=False)
    assert request.answer(bare) == AccessAnswer(Code.ACCESS_REJECT, b"", None)
    with pytest.raises(RadiusFormatError):
        request.answer(bare[:4] + bytes(16))
    with pytest.raises(RadiusFormatError):  # a Proxy-State that was not sent is the mark of that attack
        request.answer(by_hand(request, 3, b"\x21\x05abc", signed=False))
    twice = b"\x50\x12" + bytes(16)
    with pytest.raises(RadiusFormatError):
        request.answer(by_hand(request, 2, twice, signed=True))
    with pytest.raises(RadiusFormatError):
        request.answer(by_hand(request, 5, b"", signed=True))


def test_an_answer_to_another_request_or_under_another_secret() -> None:
    same_number = [ask(randbytes=lambda size, fill=fill: bytes((fill,)) * size) for fill in (1, 1, 2)]
    first, twin, other = same_number
    raw = reply(first)
    assert first.encoded == twin.encoded
    assert twin.answer(raw).msk == MSK
    with pytest.raises(RadiusFormatError):
        other.answer(raw)
    with pytest.raises(RadiusFormatError):
        ask(secret=SECRET + b"x", randbytes=lambda size: bytes((1,)) * size).answer(raw)


def test_keys_that_are_not_two_of_32_bytes() -> None:
    assert vendor_values([(26, (311).to_bytes(4) + b"\x11\x04ab\x10\x03c")], (311, 17)) == [b"ab"]
    assert vendor_values([(26, (311).to_bytes(4) + b"\x11\x04ab\x10\x03c")], (311, 16)) == [b"c"]
    assert vendor_values([(26, (9).to_bytes(4) + b"\x11\x04ab"), (26, b"\0"), (1, b"x")], (311, 17)) == []
    assert (
        vendor_values([(26, (311).to_bytes(4) + b"\x11\xffab"), (26, (311).to_bytes(4) + b"\x11\x00")], (311, 17)) == []
    )
    request = ask()
    raw = reply(request)
    keys = [value for kind, value in split_attributes(raw) if kind == 26]
    assert len(keys) == 2

    def again(*values: bytes) -> AccessAnswer:
        attributes = b"".join(bytes((26, len(value) + 2)) + value for value in values)
        return request.answer(by_hand(request, 2, attributes, signed=True))

    assert again(*keys).msk == MSK
    assert again(keys[0]).msk is None
    assert again(keys[0], *keys).msk is None
    with pytest.raises(RadiusFormatError):  # a key that is cut off
        again(keys[0][:-1].replace(bytes((len(keys[0]) - 4,)), bytes((len(keys[0]) - 5,)), 1), keys[1])


@pytest.mark.parametrize(("eap", "mtu"), [(b"", 1400), (bytes(MAX_EAP + 1), 1400), (EAP, 63), (EAP, MAX_EAP + 1)])
def test_what_does_not_fit(eap: bytes, mtu: int) -> None:
    with pytest.raises(RadiusFormatError):
        AccessClient(SECRET, nas="here", mtu=mtu).request("alice", eap, None)


def test_no_secret_is_shown() -> None:
    request = ask()
    answer = request.answer(reply(request))
    assert repr(MSK[:8])[2:-1] not in repr(answer)
    assert SECRET.decode() not in repr(request) + repr(client())
