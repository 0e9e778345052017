"""One borrower's time with a card: it ends when its pool says so, and leaves nothing to the next borrower.

What a borrower may leave behind, and what is done about it:

- a handshake, begun or over, with its keys and parameters: Reset-State, and the default parameters;
- half an exchange (a cancelled command, segments that were not finished, an answer that was not fetched), another applet, PIN or
  identity, a reset, a lost connection: that connection is of no use to anybody else, and the pool makes a new one.
"""

from __future__ import annotations

import asyncio
from typing import Final

from secfunet.apdu import ApduError
from secfunet.card.client import CardClient
from secfunet.card.errors import CardError, CardGoneError, LeaseEndedError
from secfunet.card.instructions import CHAINING, Cla, DomainIns, Ins, MethodFunction
from secfunet.card.parameters import TlsParameters
from secfunet.card.ports import CardPort

TIDY_TIMEOUT: Final = 2.0
"""Seconds for the two commands that take a handshake back."""

_REMAKES_CARD: Final = frozenset((Ins.SELECT, Ins.VERIFY_PIN, Ins.CHANGE_PIN, Ins.UNBLOCK_PIN, Ins.SET_IDENTITY))
_HEADER: Final = 4
_SHORT_LE: Final = 1


class _LeasedPort:
    """The port that the borrower's client uses; it watches what goes through."""

    def __init__(self, port: CardPort) -> None:
        self._port = port
        self._has_ended = False
        self.is_spent = False
        self.is_in_exchange = False
        self.has_used_tls = False

    def end(self) -> None:
        self._has_ended = True

    async def transmit(self, command: bytes) -> bytes:
        self._check()
        self._note_command(command)
        self.is_in_exchange = True
        try:
            response = await self._port.transmit(command)
        except CardGoneError:
            self.is_spent = True
            raise
        self._note_response(command, response)
        return response

    async def reset(self, *, cold: bool = False) -> bytes:
        self._check()
        self.is_spent = True
        return await self._port.reset(cold=cold)

    async def close(self) -> None:
        self._has_ended = True

    def _check(self) -> None:
        if self._has_ended:
            raise LeaseEndedError("the lease of this card has ended")

    def _note_command(self, command: bytes) -> None:
        if len(command) < _HEADER:
            return
        cla, ins, p1 = command[0] & ~CHAINING, command[1], command[2]
        if (cla, ins) == (Cla.KEYS, DomainIns.INITIALIZE_UPDATE):
            self.is_spent = True  # an administrator's channel is nobody else's
        if cla not in (Cla.ISO, Cla.EAP):
            return
        # Verify-PIN without a PIN only asks how many attempts are left.
        if ins in _REMAKES_CARD and len(command) > _HEADER + _SHORT_LE:
            self.is_spent = True
        if ins == Ins.PROCESS_EAP or (ins == Ins.METHOD_FUNCTION and p1 == MethodFunction.SET_TLS_PARAMETERS):
            self.has_used_tls = True

    def _note_response(self, command: bytes, response: bytes) -> None:
        has_more_segments = bool(command[0] & CHAINING) or (command[:2] == _PROCESS_EAP and bool(command[2] & 1))
        sw1 = response[-2] if len(response) > 1 else 0
        self.is_in_exchange = has_more_segments or sw1 in (0x61, 0x6C, 0x9F)
        if sw1 == 0x63 and command[1] != Ins.VERIFY_PIN:
            self.is_spent = True  # the card no longer knows the PIN that it was given when it was connected


_PROCESS_EAP: Final = bytes((Cla.EAP, Ins.PROCESS_EAP))


class Lease:
    """``client`` is the borrower's; the pool keeps ``card``, and calls ``end``."""

    def __init__(self, card: CardClient) -> None:
        self._card = card
        self._port = _LeasedPort(card.port)
        self.client = CardClient(self._port, segmentation=card.segmentation)

    async def end(self) -> bool:
        """Takes the card back. Returns whether its connection can serve the next borrower; if not, the pool makes a new one."""
        port = self._port
        port.end()
        if port.is_spent or port.is_in_exchange:
            return False
        if not port.has_used_tls:
            return True
        try:
            async with asyncio.timeout(TIDY_TIMEOUT):
                await self._card.reset_state()
                await self._card.set_tls_parameters(TlsParameters())
        except (CardError, ApduError, OSError):  # TimeoutError is an OSError
            return False
        return True
