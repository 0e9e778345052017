"""Any bytes give a request or RadiusDiscard; what is answered is bounded."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gose.radius.packets import RadiusDiscard, Reply, encode_reply, parse_request
from secfunet.radius.wire import MAX_EAP, MAX_PACKET, Code
from tests.gose_radius.peer import SECRET, RadiusClient


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


def test_an_oversized_packet_of_eap() -> None:
    with pytest.raises(RadiusDiscard):
        parse_request(RadiusClient().request(bytes(MAX_EAP + 1))[1], SECRET)
