"""What waits to be sent leaves in order, whole, and in bounded pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from secfunet.tandem.write_queue import CHUNK, WriteQueue

sizes = st.one_of(st.integers(1, 100), st.integers(CHUNK - 2, 3 * CHUNK + 2))


@given(st.lists(sizes, max_size=8))
def test_pieces_are_what_was_put_in(lengths: list[int]) -> None:
    queue, expected, taken = WriteQueue(), bytearray(), bytearray()
    for number, length in enumerate(lengths):
        data = bytearray(bytes((number,)) * length)
        queue.append(data)
        expected += data
        data[:] = bytes(length)  # a caller may use its buffer again
    assert len(queue) == len(expected)
    while queue:
        piece = queue.take()
        assert 0 < len(piece) <= CHUNK
        taken += piece
        assert len(queue) == len(expected) - len(taken)
    assert taken == expected


def test_small_writes_leave_together_and_clear_forgets() -> None:
    queue = WriteQueue()
    for _ in range(1000):
        queue.append(b"x" * 10)
    assert len(queue.take()) == 10_000
    queue.append(b"rest")
    queue.clear()
    assert not queue
