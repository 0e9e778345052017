"""EAP-TLS fragments: two channels in memory carry any flight, and broken rules raise the documented error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.eap import MAX_PACKET, EapCode, EapPacket, EapType
from secfunet.eap_tls import ACK, MAX_FRAGMENT, Asked, EapTlsChannel, EapTlsError, EapTlsMessage

messages = st.builds(
    EapTlsMessage,
    st.binary(max_size=200),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 0xFFFFFFFF),
)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ("20", EapTlsMessage(start=True)),
        ("00", ACK),
        ("8000000003AABBCC", EapTlsMessage(bytes.fromhex("AABBCC"), total_length=3)),
        ("C000000100AA", EapTlsMessage(b"\xaa", more=True, total_length=256)),
        ("40AA", EapTlsMessage(b"\xaa", more=True)),
    ],
)
def test_flags(encoded: str, message: EapTlsMessage) -> None:
    assert message.encode() == bytes.fromhex(encoded)
    assert EapTlsMessage.decode(bytes.fromhex(encoded)) == message


@given(messages)
def test_message_round_trip(message: EapTlsMessage) -> None:
    assert EapTlsMessage.decode(message.encode()) == message


@given(st.binary(max_size=100))
def test_any_bytes_give_a_message_or_the_error(untrusted: bytes) -> None:
    try:
        message = EapTlsMessage.decode(untrusted)
    except EapTlsError:
        assert not untrusted or (untrusted[0] & 0x80 and len(untrusted) < 5)
        return
    again = message.encode()
    # The five reserved bits are ignored (RFC 5216, 3.1).
    assert again[0] == untrusted[0] & 0xE0
    assert again[1:] == untrusted[1:]


def carry(sender: EapTlsChannel, receiver: EapTlsChannel, flight: bytes) -> tuple[bytes, int]:
    """What arrives, and in how many packets."""
    message, count = sender.send(flight), 1
    while True:
        received = receiver.receive(EapTlsMessage.decode(message.encode()))
        if isinstance(received, bytes):
            assert not sender.is_sending
            return received, count
        assert received is Asked.ACK
        assert receiver.is_receiving
        assert sender.receive(ACK) is Asked.FRAGMENT
        message, count = sender.next_fragment(), count + 1


@given(
    st.binary(min_size=1, max_size=3000),
    st.integers(16, 1000),
    st.binary(min_size=1, max_size=3000),
    st.integers(16, 1000),
)
def test_flights_both_ways(flight: bytes, size: int, answer: bytes, answer_size: int) -> None:
    one, other = EapTlsChannel(size), EapTlsChannel(answer_size)
    assert carry(one, other, flight) == (flight, -(-len(flight) // size))
    assert carry(other, one, answer) == (answer, -(-len(answer) // answer_size))
    assert not one.is_receiving
    assert one.receive(ACK) is Asked.NOTHING


@pytest.mark.parametrize("size", [64, 240, 1484, 16384, MAX_FRAGMENT])
def test_large_flights(size: int) -> None:
    flight = bytes(range(256)) * 400
    assert carry(EapTlsChannel(size), EapTlsChannel(64), flight)[0] == flight


def test_the_largest_fragment_fits_a_packet() -> None:
    message = EapTlsChannel(MAX_FRAGMENT, max_message=MAX_PACKET * 2).send(bytes(MAX_PACKET + 1))
    assert len(EapPacket(EapCode.REQUEST, 1, EapType.TLS, message.encode()).encode()) == MAX_PACKET


def test_one_packet_without_length_is_a_flight() -> None:
    # The six-byte prefix of the published bridge: 01 id len len 0D 00.
    assert EapTlsChannel(64).receive(EapTlsMessage(b"flight")) == b"flight"


@pytest.mark.parametrize(
    "broken",
    [
        [EapTlsMessage(b"a", more=True)],
        [EapTlsMessage(b"a", more=True, total_length=101)],
        [EapTlsMessage(b"a", total_length=2)],
        [EapTlsMessage(b"ab", total_length=1)],
        [EapTlsMessage(b"ab", more=True, total_length=2)],
        [EapTlsMessage(b"", more=True, total_length=2)],
        [EapTlsMessage(bytes(101))],
        [EapTlsMessage(start=True)],
        [EapTlsMessage(b"a", more=True, total_length=4), EapTlsMessage(b"b", more=True, total_length=5)],
        [EapTlsMessage(b"a", more=True, total_length=4), EapTlsMessage(b"bcde")],
        [EapTlsMessage(b"a", more=True, total_length=4), EapTlsMessage(b"b")],
        [EapTlsMessage(b"a", more=True, total_length=4), ACK],
        [EapTlsMessage(b"a", more=True, total_length=4), EapTlsMessage(b"", more=True)],
        [EapTlsMessage(b"a", more=True, total_length=4), EapTlsMessage(start=True)],
    ],
)
def test_broken_rules(broken: list[EapTlsMessage]) -> None:
    channel = EapTlsChannel(64, max_message=100)
    for message in broken[:-1]:
        assert channel.receive(message) is Asked.ACK
    with pytest.raises(EapTlsError):
        channel.receive(broken[-1])
    # What had come is forgotten: the next flight stands for itself.
    assert channel.receive(EapTlsMessage(b"next", total_length=4)) == b"next"


def test_an_acknowledgement_may_tell_its_length() -> None:
    assert EapTlsChannel(64).receive(EapTlsMessage(b"", total_length=0)) is Asked.NOTHING


def test_data_while_sending() -> None:
    channel = EapTlsChannel(16)
    channel.send(bytes(40))
    with pytest.raises(EapTlsError):
        channel.receive(EapTlsMessage(b"data"))


def test_sending_out_of_turn() -> None:
    channel = EapTlsChannel(16, max_message=100)
    with pytest.raises(EapTlsError):
        channel.next_fragment()
    with pytest.raises(EapTlsError):
        channel.send(b"")
    with pytest.raises(EapTlsError):
        channel.send(bytes(101))
    channel.send(bytes(40))
    with pytest.raises(EapTlsError):
        channel.send(b"again")
    for size in (15, MAX_FRAGMENT + 1):
        with pytest.raises(EapTlsError):
            EapTlsChannel(size)


@given(st.lists(messages | st.just(ACK), max_size=12))
def test_any_messages_keep_the_bound(untrusted: list[EapTlsMessage]) -> None:
    channel = EapTlsChannel(16, max_message=64)
    for message in untrusted:
        try:
            received = channel.receive(message)
        except EapTlsError:
            assert not channel.is_receiving
            continue
        assert not isinstance(received, bytes) or 0 < len(received) <= 64
        if isinstance(received, bytes):
            channel.send(received)
