"""Authentications in work: State binds each to the card that it runs in.

A card is taken when the peer's first TLS bytes are there, not for a mere name: the Start before them needs none. It is given back when the
authentication is over, or when the peer has let it wait for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack

from gose.errors import GoseError
from gose.radius.packets import AccessRequest, RadiusDiscard, Reply
from gose.settings import Limits
from secfunet.apdu import ApduError, StatusError
from secfunet.card.client import CardClient
from secfunet.card.errors import CardError
from secfunet.card.parameters import TlsParameters
from secfunet.card.pool import CardPool
from secfunet.eap import EapCode, EapFormatError, EapPacket, EapType
from secfunet.eap_tls import EapTlsMessage
from secfunet.radius.wire import Code

log = logging.getLogger(__name__)

MAX_ROUNDS = 1024
"""Packets of one authentication: certificates of 16 KB at both ends, in the smallest fragments."""
_STATE_SIZE = 16
_SW_DISCARDED = 0x7000


class NotAdmittedError(GoseError):
    """The peer has the key of its certificate, and must not be let in: revoked, not enrolled, or of another role."""


Admit = Callable[[bytes], str]
"""Says who a certificate (DER) is that a card has accepted; raises NotAdmittedError."""


class Dialogue:
    """One authentication."""

    def __init__(self, nas: str, identity: EapPacket) -> None:
        self.nas = nas
        self.identity = identity
        self.start = EapPacket(
            EapCode.REQUEST, (identity.identifier + 1) & 0xFF, EapType.TLS, EapTlsMessage(start=True).encode()
        )
        self.card: CardClient | None = None
        self.stack = AsyncExitStack()
        self.is_in_work = False
        self.rounds = 0
        self.ends_at = float("inf")
        self.timer: asyncio.TimerHandle | None = None


class Dialogues:
    """All of them: at most ``limits.handshakes``."""

    def __init__(
        self,
        cards: CardPool,
        admit: Admit,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.time,
        randbytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._cards = cards
        self._admit = admit
        self._limits = limits
        self._clock = clock
        self._randbytes = randbytes
        self._open: dict[bytes, Dialogue] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    async def close(self) -> None:
        """Gives back every card."""
        for state in list(self._open):
            await self._end(state)
        if self._closing:
            await asyncio.wait(self._closing)

    async def answer(self, nas: str, request: AccessRequest) -> Reply:
        """The answer to a request of the client ``nas``. Raises RadiusDiscard for what is not answered."""
        if not request.eap and request.state is None:
            return Reply(Code.ACCESS_CHALLENGE, EapPacket(EapCode.REQUEST, 0, EapType.IDENTITY).encode())
        try:
            packet = EapPacket.decode(request.eap)
        except EapFormatError as error:
            raise RadiusDiscard("malformed", str(error)) from None
        if packet.code is not EapCode.RESPONSE:
            raise RadiusDiscard("malformed", "that is no EAP response")
        if request.state is None:
            return self._begin(nas, packet)
        dialogue = self._open.get(request.state)
        if dialogue is None or dialogue.nas != nas:
            log.info("an authentication that is not in work", extra={"nas": nas})
            return _rejection(packet)
        if dialogue.is_in_work:
            raise RadiusDiscard("in_work", "the last packet of this authentication is not answered yet")
        dialogue.is_in_work = True
        try:
            return await self._advance(request.state, dialogue, packet)
        finally:
            dialogue.is_in_work = False

    def _begin(self, nas: str, packet: EapPacket) -> Reply:
        if packet.type != EapType.IDENTITY:
            raise RadiusDiscard("malformed", "an authentication begins with an identity")
        if len(self._open) >= self._limits.handshakes:
            raise RadiusDiscard("busy", "too many authentications are in work")
        state = self._randbytes(_STATE_SIZE)
        dialogue = self._open[state] = Dialogue(nas, packet)
        self._wait(state, dialogue)
        return Reply(Code.ACCESS_CHALLENGE, dialogue.start.encode(), state)

    async def _advance(self, state: bytes, dialogue: Dialogue, packet: EapPacket) -> Reply:
        if dialogue.timer is not None:
            dialogue.timer.cancel()
        is_over = True
        try:
            reply = await self._exchange(state, dialogue, packet)
            is_over = reply.code is not Code.ACCESS_CHALLENGE
            return reply
        except RadiusDiscard:
            is_over = False
            raise
        except StatusError as error:
            if error.sw == _SW_DISCARDED:
                is_over = False
                raise RadiusDiscard("out_of_order", "the card expects another packet") from None
            log.warning("a server card refuses an authentication", extra={"nas": dialogue.nas, "cause": str(error)})
            return _rejection(packet)
        except (CardError, ApduError, OSError, EapFormatError) as error:  # TimeoutError is an OSError
            log.warning("an authentication is lost", extra={"nas": dialogue.nas, "cause": str(error)})
            return _rejection(packet)
        finally:
            if is_over:
                await self._end(state)
            else:
                self._wait(state, dialogue)

    async def _exchange(self, state: bytes, dialogue: Dialogue, packet: EapPacket) -> Reply:
        if dialogue.card is None:
            if packet.type == EapType.NAK:
                return _rejection(packet)
            if packet.type != EapType.TLS or packet.identifier != dialogue.start.identifier:
                raise RadiusDiscard("out_of_order", "a ClientHello is due")
            dialogue.card = await self._prepare(dialogue)
        dialogue.rounds += 1
        if dialogue.rounds > MAX_ROUNDS:
            return _rejection(packet)
        untrusted = await dialogue.card.process_eap(packet.encode())
        answer = EapPacket.decode(untrusted)
        if answer.code is EapCode.SUCCESS:
            return await self._accept(dialogue, dialogue.card, packet, untrusted)
        if answer.code is EapCode.FAILURE:
            return Reply(Code.ACCESS_REJECT, untrusted)
        return Reply(Code.ACCESS_CHALLENGE, untrusted, state)

    async def _prepare(self, dialogue: Dialogue) -> CardClient:
        card = await dialogue.stack.enter_async_context(self._cards.lease(timeout=self._limits.server_card_timeout))
        dialogue.ends_at = asyncio.get_running_loop().time() + self._limits.handshake_timeout
        await card.set_tls_parameters(TlsParameters(role="server"))
        start = await card.process_eap(dialogue.identity.encode(), int(self._clock()))
        if start != dialogue.start.encode():
            raise CardError("the card begins otherwise than it was announced")
        return card

    async def _accept(self, dialogue: Dialogue, card: CardClient, packet: EapPacket, success: bytes) -> Reply:
        certificates = await card.peer_certificates()
        try:
            if not certificates:
                raise NotAdmittedError("the card does not say whom it has authenticated")
            name = self._admit(certificates[0])
        except NotAdmittedError as error:
            log.warning("an authenticated peer is not admitted", extra={"nas": dialogue.nas, "cause": str(error)})
            return _rejection(packet)
        msk = (await card.session_key(extended=True))[:64]
        log.info("a peer is authenticated", extra={"nas": dialogue.nas, "user": name})
        return Reply(Code.ACCESS_ACCEPT, success, msk=msk, user_name=name)

    def _wait(self, state: bytes, dialogue: Dialogue) -> None:
        """The peer's turn: as long as its patience lasts, and not longer than a whole handshake may take."""
        if state not in self._open:
            return
        loop = asyncio.get_running_loop()
        until = min(loop.time() + self._limits.peer_patience, dialogue.ends_at)
        if dialogue.timer is not None:
            dialogue.timer.cancel()
        dialogue.timer = loop.call_at(until, self._give_up, state)

    def _give_up(self, state: bytes) -> None:
        task = asyncio.create_task(self._end(state))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _end(self, state: bytes) -> None:
        dialogue = self._open.pop(state, None)
        if dialogue is None:
            return
        if dialogue.timer is not None:
            dialogue.timer.cancel()
        with contextlib.suppress(CardError, ApduError, OSError):
            await dialogue.stack.aclose()


def _rejection(packet: EapPacket) -> Reply:
    return Reply(Code.ACCESS_REJECT, EapPacket(EapCode.FAILURE, packet.identifier).encode())
