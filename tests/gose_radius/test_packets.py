"""Any bytes give a request or RadiusDiscard; what is answered is bounded."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gose.radius.dialogue import rejection
from gose.radius.packets import RadiusDiscard, Reply, ReplyTooLongError, encode_reply, parse_request
from secfunet.radius.wire import MAX_EAP, MAX_PACKET, MIN_MTU, Attribute, Code
from tests.gose_radius.peer import SECRET, RadiusClient, signed_packet


@given(
    st.binary(max_size=400)
    | st.binary(max_size=60).map(lambda rest: b"\x01\x07" + (20 + len(rest)).to_bytes(2) + bytes(16) + rest)
)
def test_any_bytes(untrusted: bytes) -> None:
    with contextlib.suppress(RadiusDiscard):
        parse_request(untrusted, SECRET)


@given(eap=st.binary(max_size=MAX_EAP), state=st.none() | st.binary(min_size=1, max_size=253), data=st.data())
def test_requests_and_every_changed_byte(eap: bytes, state: bytes | None, data: st.DataObject) -> None:
    raw = RadiusClient().request(eap, state)[1]
    request = parse_request(raw + b"padding", SECRET)
    assert (request.eap, request.state) == (eap, state)
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = raw[:place] + bytes((raw[place] ^ data.draw(st.integers(1, 255)),)) + raw[place + 1 :]
    with pytest.raises(RadiusDiscard):
        parse_request(changed, SECRET)
    with pytest.raises(RadiusDiscard) as caught:
        parse_request(raw, SECRET + b"x")
    assert caught.value.reason == "wrong_secret"


@given(eap=st.binary(min_size=4, max_size=MAX_EAP), msk=st.none() | st.binary(min_size=64, max_size=64))
def test_an_answer_fits(eap: bytes, msk: bytes | None) -> None:
    request = parse_request(RadiusClient().request(b"\x02\x07\x00\x05\x01")[1], SECRET)
    encoded = encode_reply(request, Reply(Code.ACCESS_CHALLENGE, eap, bytes(16), msk, "n" * 64))
    assert len(encoded) == int.from_bytes(encoded[2:4]) <= MAX_PACKET


PROXY_STATES = st.lists(st.binary(max_size=253), max_size=20)


@given(proxies=PROXY_STATES, eap=st.none() | st.binary(max_size=300))
def test_an_answer_has_at_most_4096_bytes_whatever_it_must_repeat(proxies: list[bytes], eap: bytes | None) -> None:
    attributes = [(Attribute.PROXY_STATE.value, value) for value in proxies]
    if eap is not None:
        attributes += [(79, eap[at : at + 253]) for at in range(0, len(eap) or 1, 253)]
    raw = signed_packet(1, attributes)
    if len(raw) > MAX_PACKET:
        return
    request = parse_request(raw, SECRET)
    rejected = encode_reply(request, rejection(request))
    assert len(rejected) == int.from_bytes(rejected[2:4]) <= MAX_PACKET
    if request.room > 0:
        whole = Reply(Code.ACCESS_CHALLENGE, bytes(request.room), bytes(16), error_cause=202)
        assert MAX_PACKET - 20 <= len(encode_reply(request, whole)) <= MAX_PACKET
    with pytest.raises(ReplyTooLongError):
        encode_reply(
            request, Reply(Code.ACCESS_CHALLENGE, bytes(max(request.room, 0) + 20), bytes(16), error_cause=202)
        )


@pytest.mark.parametrize(
    ("attributes", "fault"),
    [
        ([], ""),
        ([(24, b"one"), (24, b"two"), (79, b"\2\7\0\5\1")], "there is more than one State"),
        ([(79, bytes(250))] * 13, f"an EAP packet has at most {MAX_EAP} bytes"),
        ([(26, b"")], ""),
        ([(26, b"\0\0\1")], ""),
        ([(0, b"x"), (255, b"")], ""),
    ],
)
def test_what_is_authentic_is_a_request(attributes: list[tuple[int, bytes]], fault: str) -> None:
    request = parse_request(signed_packet(1, attributes), SECRET)
    assert request.fault == fault
    assert rejection(request).code is Code.ACCESS_REJECT


@given(st.binary(max_size=60))
def test_any_attributes_behind_a_right_signature_are_a_request(rest: bytes) -> None:
    with contextlib.suppress(RadiusDiscard):  # a second Message-Authenticator
        request = parse_request(signed_packet(1, [], rest), SECRET)
        assert request.code is Code.ACCESS_REQUEST


@pytest.mark.parametrize(
    ("values", "mtu"),
    [
        ([], None),
        ([600], 596),
        ([1500, 600, 1400], 596),
        ([MIN_MTU], MIN_MTU - 4),
        ([0], MIN_MTU - 4),
        ([1], MIN_MTU - 4),
        ([2**32 - 1], 2**32 - 5),
    ],
)
def test_framed_mtu(values: list[int], mtu: int | None) -> None:
    attributes = [(Attribute.FRAMED_MTU.value, value.to_bytes(4)) for value in values]
    assert parse_request(signed_packet(1, attributes), SECRET).mtu == mtu
    assert parse_request(signed_packet(1, [(12, b""), (12, b"\0\0"), *attributes]), SECRET).mtu == mtu
