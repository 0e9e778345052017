"""EAP packets: published bytes, round trips, and any bytes give a packet or the documented error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.eap import MAX_PACKET, EapCode, EapFormatError, EapPacket, EapType

bodies = st.binary(max_size=300)
packets = st.one_of(
    st.builds(EapPacket, st.sampled_from([EapCode.SUCCESS, EapCode.FAILURE]), st.integers(0, 255)),
    st.builds(
        EapPacket,
        st.sampled_from([EapCode.REQUEST, EapCode.RESPONSE]),
        st.integers(0, 255),
        st.integers(1, 255),
        bodies,
    ),
)


@pytest.mark.parametrize(
    ("encoded", "packet"),
    [
        # draft-urien-eap-smartcard, annex 5: the identity, and a NAK-worthy MD5 challenge; annex 6: the EAP-TLS Start.
        ("01A5000501", EapPacket(EapCode.REQUEST, 0xA5, EapType.IDENTITY)),
        ("02A5000901" + "61626364", EapPacket(EapCode.RESPONSE, 0xA5, EapType.IDENTITY, b"abcd")),
        ("01A6000804021234", EapPacket(EapCode.REQUEST, 0xA6, 4, bytes.fromhex("021234"))),
        ("011400060D20", EapPacket(EapCode.REQUEST, 0x14, EapType.TLS, b"\x20")),
        ("031A0004", EapPacket(EapCode.SUCCESS, 0x1A)),
        ("041A0004", EapPacket(EapCode.FAILURE, 0x1A)),
    ],
)
def test_published_packets(encoded: str, packet: EapPacket) -> None:
    assert packet.encode() == bytes.fromhex(encoded)
    assert EapPacket.decode(bytes.fromhex(encoded)) == packet


@given(packets)
def test_round_trip(packet: EapPacket) -> None:
    assert EapPacket.decode(packet.encode()) == packet


@given(packets, st.binary(min_size=1, max_size=20))
def test_bytes_behind_the_length_are_padding(packet: EapPacket, padding: bytes) -> None:
    assert EapPacket.decode(packet.encode() + padding) == packet


@given(st.binary(max_size=400))
def test_any_bytes_give_a_packet_or_the_error(untrusted: bytes) -> None:
    try:
        packet = EapPacket.decode(untrusted)
    except EapFormatError:
        return
    assert untrusted.startswith(packet.encode())


@pytest.mark.parametrize(
    "untrusted",
    ["", "010100", "01010003", "0101000601", "05010004", "00010005FF", "0101000500", "01010004", "03010005FF"],
)
def test_malformed(untrusted: str) -> None:
    with pytest.raises(EapFormatError):
        EapPacket.decode(bytes.fromhex(untrusted))


def test_values_that_do_not_fit() -> None:
    with pytest.raises(EapFormatError):
        EapPacket(EapCode.REQUEST, 256, 1)
    with pytest.raises(EapFormatError):
        EapPacket(EapCode.SUCCESS, 1, 13)
    with pytest.raises(EapFormatError):
        EapPacket(EapCode.REQUEST, 1)
    with pytest.raises(EapFormatError):
        EapPacket(EapCode.REQUEST, 1, 13, bytes(MAX_PACKET - 4))
    assert len(EapPacket(EapCode.REQUEST, 1, 13, bytes(MAX_PACKET - 5)).encode()) == MAX_PACKET
