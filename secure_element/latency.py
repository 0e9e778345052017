"""How slow a card of hardware is: a model for planning and benchmarks, and nothing else.

A software card is some hundred times faster than a real one. With a ``[benchmark_latency]`` table it withholds each answer for as long as
a real card would have worked, so that a grid can be sized, and its queues be watched, without hundreds of real cards. It protects
nothing: answers are computed as ever, at once, and what the computation's own time tells of a secret it still tells whoever measures the
processor. Off unless the table is there; a card that has one says so in its log and in ``secure-element status``.

The defaults are of the order of an EAP-TLS smartcard with RSA-2048: 0.35 s for a private-key operation, 1.4 s for a full TLS handshake in
all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Final, Literal

from pydantic import Field

from secfunet.card.instructions import CHAINING, Cla, Ins
from secfunet.service.settings import Settings
from secure_element.work import Work

Seconds = Annotated[float, Field(ge=0, le=60, allow_inf_nan=False)]

NOTICE: Final = "benchmark_latency is on: this card pretends to be slow, for measurements; it protects nothing"

_PROCESS_EAP: Final = (Cla.EAP, Ins.PROCESS_EAP)
_FETCHES: Final = ((Cla.EAP, Ins.GET_RESPONSE), (Cla.EAP, Ins.FETCH))


class LatencySettings(Settings):
    """Seconds by class of command. ``distribution`` exponential: private-key operations and handshakes take that long on average, as the
    formulas of queueing theory have it; else exactly.
    """

    private_key: Seconds = 0.35  # each operation with a private key: sign, decrypt, unwrap, a trailer
    handshake: Seconds = 1.4  # all commands of a full TLS handshake together
    resumed_handshake: Seconds = 0.4
    key_pair: Seconds = 8.0
    command: Seconds = 0.01  # whatever else, and the least for any
    distribution: Literal["constant", "exponential"] = "constant"


class LatencyModel:
    """One card's. ``draw`` makes a random number of mean 1 (exponential distribution)."""

    def __init__(self, settings: LatencySettings, draw: Callable[[], float] = lambda: random.expovariate(1.0)) -> None:
        self._settings = settings
        self._draw = draw if settings.distribution == "exponential" else lambda: 1.0
        self._seen = Work()
        self._in_handshake = 0.0

    def seconds(self, command: bytes, done: Work) -> float:
        """How long ``command`` (an APDU that was just processed) takes from its arrival to its answer; ``done``: the card's counters now.

        The command that ends a handshake takes what the others of that handshake have left of its time.
        """
        settings, seen = self._settings, self._seen
        self._seen = replace(done)
        operations = done.private_operations - seen.private_operations
        seconds = sum(settings.private_key * self._draw() for _ in range(operations))
        seconds += settings.key_pair * (done.key_pairs - seen.key_pairs)
        seconds = max(seconds, settings.command)
        whole = 0.0
        if done.full_handshakes > seen.full_handshakes:
            whole = settings.handshake * self._draw()
        elif done.resumed_handshakes > seen.resumed_handshakes:
            whole = settings.resumed_handshake * self._draw()
        if whole:
            seconds = max(seconds, whole - self._in_handshake)
        kind = (command[0] & ~CHAINING, command[1]) if len(command) > 1 else None
        if whole or (kind != _PROCESS_EAP and kind not in _FETCHES):
            self._in_handshake = 0.0
        else:
            self._in_handshake += seconds
        return seconds
