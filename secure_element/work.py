"""What a card has done since it was started, in numbers that only grow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Work:
    """Counters of what is slow in a card of hardware."""

    private_operations: int = 0  # signatures, decryptions, unwrapped content keys, trailers; not those of handshakes
    key_pairs: int = 0  # made
    full_handshakes: int = 0  # that came to their end
    resumed_handshakes: int = 0
