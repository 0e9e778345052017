"""Authentications in work: State binds each to the card that it runs in.

A card is taken when the peer's first TLS bytes are there, not for a mere name: the Start before them needs none. It is given back when the
authentication is over, when the peer has let it wait for too long, or when the peer is silent and somebody else is entitled to the card.

Whatever comes from a client is answered. An EAP packet that cannot be what is due is ignored, and the answer asks for the same again
(RFC 3579, 2.2); the card does not see it, or has discarded it, and the peer gets no more time by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Final, Protocol

from gose.errors import GoseError
from gose.radius.packets import IGNORED, LINK_HEADER, STATE_SIZE, AccessRequest, Reply
from gose.settings import Limits
from secfunet.apdu import ApduError, StatusError
from secfunet.card.client import CardClient, tell_tls_parameters
from secfunet.card.errors import CardError
from secfunet.card.parameters import TlsParameters
from secfunet.eap import EapCode, EapFormatError, EapPacket, EapType
from secfunet.eap_tls import EapTlsMessage
from secfunet.radius.wire import MAX_EAP, MIN_MTU, Code
from secfunet.service.flood_log import FloodLog

log = logging.getLogger(__name__)

MAX_ROUNDS = 1024
"""Packets of one authentication: certificates of 16 KB at both ends, in the smallest fragments."""
MIN_EAP: Final = 4
"""Bytes of an EAP packet's header."""
SILENCE: Final = 0.5
"""Seconds, in all, that a peer may let its card wait if somebody else is entitled to the card."""
_LOOK_AGAIN: Final = 0.25
_SW_DISCARDED = 0x7000


class NotAdmittedError(GoseError):
    """The peer has the key of its certificate, and must not be let in: revoked, not enrolled, or of another role."""


class _Ignored(GoseError):
    """An EAP packet that is not what is due."""


Admit = Callable[[bytes], str]
"""Says who a certificate (DER) is that a card has accepted; raises NotAdmittedError."""


class Cards(Protocol):
    """The server cards for RADIUS, shared among its clients (gose.slots.shares.Part)."""

    def lease(self, *, timeout: float, holder: str) -> AbstractAsyncContextManager[CardClient]:
        """See gose.slots.shares.Part.lease."""
        ...

    def is_pressed(self, holder: str) -> bool:
        """See gose.slots.shares.Part.is_pressed."""
        ...


class Dialogue:
    """One authentication. ``asked``: the EAP request that its peer is to answer; ``until``: when it has to be answered;
    ``waited``: seconds that its card has waited for it.
    """

    def __init__(self, nas: str, identity: EapPacket, ends_at: float) -> None:
        self.nas = nas
        self.identity = identity
        self.start = EapPacket(
            EapCode.REQUEST, (identity.identifier + 1) & 0xFF, EapType.TLS, EapTlsMessage(start=True).encode()
        )
        self.asked = self.start.encode()
        self.mtu = MAX_EAP
        self.card: CardClient | None = None
        self.stack = AsyncExitStack()
        self.in_work: tuple[bytes, asyncio.Task[Reply]] | None = None
        self.rounds = 0
        self.waited = 0.0
        self.asked_at = 0.0
        self.ends_at = ends_at
        self.until = ends_at
        self.timer: asyncio.TimerHandle | None = None


class Dialogues:
    """All of them: at most ``limits.handshakes``. When they are all taken, a client that has fewer than another displaces the one of that
    other that has waited longest for its first TLS bytes.
    """

    def __init__(
        self,
        cards: Cards,
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
        self._places: Counter[str] = Counter()
        self._closing: set[asyncio.Task[None]] = set()
        self._log = FloodLog(log)

    def __len__(self) -> int:
        return len(self._open)

    async def close(self) -> None:
        """Gives back every card."""
        for state in list(self._open):
            await self._end(state)
        if self._closing:
            await asyncio.wait(self._closing)

    async def answer(self, nas: str, request: AccessRequest) -> Reply:
        """The answer to a request of the client ``nas``."""
        if request.code is Code.STATUS_SERVER:
            return Reply(Code.ACCESS_ACCEPT)  # RFC 5997, 3
        if request.fault or request.eap is None:
            self._log.info("unfit", "a request is rejected", {"nas": nas, "cause": request.fault or "it has no EAP"})
            return rejection(request)
        if not request.eap and request.state is None:
            return Reply(Code.ACCESS_CHALLENGE, EapPacket(EapCode.REQUEST, 0, EapType.IDENTITY).encode())
        if request.state is None:
            return self._begin(nas, request)
        dialogue = self._open.get(request.state)
        if dialogue is None or dialogue.nas != nas:
            self._log.info("unknown_state", "an authentication that is not in work", {"nas": nas})
            return rejection(request)
        if dialogue.in_work is not None:
            eap, work = dialogue.in_work
            if eap != request.eap:
                return self._ask_again(request.state, dialogue)
        else:
            work = asyncio.create_task(self._advance(request.state, dialogue, request))
            dialogue.in_work = request.eap, work
        # The same EAP packet in another request, a repetition that a NAS or proxy numbered anew, gets the answer of the first.
        return await asyncio.shield(work)

    def _begin(self, nas: str, request: AccessRequest) -> Reply:
        try:
            packet = EapPacket.decode(request.eap or b"")
        except EapFormatError as error:
            self._log.info("unfit", "a request is rejected", {"nas": nas, "cause": str(error)})
            return rejection(request)
        if packet.code is not EapCode.RESPONSE or packet.type != EapType.IDENTITY:
            self._log.info("unfit", "a request is rejected", {"nas": nas, "cause": "its EAP is not an identity"})
            return rejection(request)
        if len(self._open) >= self._limits.handshakes and not self._displace(nas):
            self._log.warning("busy", "too many authentications are in work", {"nas": nas})
            return rejection(request)
        state = self._randbytes(STATE_SIZE)
        now = asyncio.get_running_loop().time()
        dialogue = self._open[state] = Dialogue(nas, packet, now + self._limits.peer_patience)
        self._places[nas] += 1
        dialogue.mtu = min(dialogue.mtu, request.mtu or MAX_EAP)
        self._watch(state, dialogue)
        return Reply(Code.ACCESS_CHALLENGE, dialogue.asked, state)

    def _displace(self, nas: str) -> bool:
        """Ends the oldest dialogue without a card of the client that has the most, if ``nas`` has fewer. Returns whether it did."""
        most, count = self._places.most_common(1)[0]
        if count <= self._places[nas] + 1:
            return False
        for state, dialogue in self._open.items():
            if dialogue.nas == most and dialogue.card is None and dialogue.in_work is None:
                self._log.warning("displaced", "a client has too many authentications in work", {"nas": most})
                self._forget(state)
                return True
        return False

    def _ask_again(self, state: bytes, dialogue: Dialogue) -> Reply:
        return Reply(Code.ACCESS_CHALLENGE, dialogue.asked, state, error_cause=IGNORED)

    async def _advance(self, state: bytes, dialogue: Dialogue, request: AccessRequest) -> Reply:
        is_over = True
        try:
            reply = await self._exchange(state, dialogue, request)
            is_over = reply.code is not Code.ACCESS_CHALLENGE
            if not is_over:
                dialogue.asked = reply.eap
                now = dialogue.asked_at = asyncio.get_running_loop().time()
                dialogue.until = min(now + self._limits.peer_patience, dialogue.ends_at)
            return reply
        except _Ignored:
            is_over = False
            return self._ask_again(state, dialogue)
        except StatusError as error:
            if error.sw == _SW_DISCARDED:
                is_over = False
                return self._ask_again(state, dialogue)
            self._log.warning(
                "refused", "a server card refuses an authentication", {"nas": dialogue.nas, "cause": str(error)}
            )
            return rejection(request)
        except (CardError, ApduError, OSError, EapFormatError) as error:  # TimeoutError is an OSError
            self._log.warning("lost", "an authentication is lost", {"nas": dialogue.nas, "cause": str(error)})
            return rejection(request)
        finally:
            dialogue.in_work = None
            if is_over:
                await self._end(state)
            else:
                self._watch(state, dialogue)

    async def _exchange(self, state: bytes, dialogue: Dialogue, request: AccessRequest) -> Reply:
        try:
            packet = EapPacket.decode(request.eap or b"")
        except EapFormatError as error:
            raise _Ignored(str(error)) from None
        if packet.code is not EapCode.RESPONSE:
            raise _Ignored("that is not an EAP response")
        dialogue.rounds += 1
        if dialogue.rounds > MAX_ROUNDS:
            return rejection(request)
        dialogue.mtu = min(dialogue.mtu, request.mtu or MAX_EAP)
        if dialogue.card is None:
            if packet.type == EapType.NAK:
                return rejection(request)
            if packet.type != EapType.TLS or packet.identifier != dialogue.start.identifier:
                raise _Ignored("a ClientHello is due")
            dialogue.mtu = min(dialogue.mtu, request.room)
            if dialogue.mtu < MIN_MTU - LINK_HEADER:
                self._log.warning("proxies", "a request leaves no room for an answer", {"nas": dialogue.nas})
                return rejection(request)
            dialogue.card = await self._prepare(dialogue)
        else:
            if packet.type != EapType.TLS:
                raise _Ignored("TLS is due")  # an identity would have the card begin anew
            now = asyncio.get_running_loop().time()
            dialogue.waited += now - dialogue.asked_at
            dialogue.asked_at = now  # what is ignored below is not counted again
            if dialogue.waited > SILENCE and self._cards.is_pressed(dialogue.nas):
                self._log.info("slow", "an authentication is given up: its peer is slow", {"nas": dialogue.nas})
                return rejection(request)
        untrusted = await dialogue.card.process_eap(packet.encode())
        answer = EapPacket.decode(untrusted)
        if answer.code is EapCode.SUCCESS:
            return await self._accept(dialogue, dialogue.card, request, untrusted)
        if answer.code is EapCode.FAILURE:
            return Reply(Code.ACCESS_REJECT, untrusted)
        if len(untrusted) > dialogue.mtu:
            self._log.warning("mtu", "a server card's packet is too long for its peer's link", {"nas": dialogue.nas})
            return rejection(request)
        return Reply(Code.ACCESS_CHALLENGE, untrusted, state)

    async def _prepare(self, dialogue: Dialogue) -> CardClient:
        lease = self._cards.lease(timeout=self._limits.server_card_timeout, holder=dialogue.nas)
        card = await dialogue.stack.enter_async_context(lease)
        dialogue.ends_at = asyncio.get_running_loop().time() + self._limits.handshake_timeout
        mtu = dialogue.mtu if dialogue.mtu < MAX_EAP else None
        await tell_tls_parameters(card, TlsParameters(role="server", eap_mtu=mtu))
        start = await card.process_eap(dialogue.identity.encode(), int(self._clock()))
        if start != dialogue.start.encode():
            raise CardError("the card begins otherwise than it was announced")
        return card

    async def _accept(self, dialogue: Dialogue, card: CardClient, request: AccessRequest, success: bytes) -> Reply:
        certificates = await card.peer_certificates()
        try:
            if not certificates:
                raise NotAdmittedError("the card does not say whom it has authenticated")
            name = self._admit(certificates[0])
        except NotAdmittedError as error:
            log.warning("an authenticated peer is not admitted", extra={"nas": dialogue.nas, "cause": str(error)})
            return rejection(request)
        msk = (await card.session_key(extended=True))[:64]
        log.info("a peer is authenticated", extra={"nas": dialogue.nas, "user": name})
        return Reply(Code.ACCESS_ACCEPT, success, msk=msk, user_name=name)

    def _watch(self, state: bytes, dialogue: Dialogue) -> None:
        """The peer's turn. A dialogue that has a card is looked at earlier: the card may be due to somebody else."""
        if state not in self._open:
            return
        loop = asyncio.get_running_loop()
        at = dialogue.until
        if dialogue.card is not None:
            at = min(at, loop.time() + max(_LOOK_AGAIN, SILENCE - dialogue.waited))
        if dialogue.timer is not None:
            dialogue.timer.cancel()
        dialogue.timer = loop.call_at(at, self._look, state)

    def _look(self, state: bytes) -> None:
        dialogue = self._open.get(state)
        if dialogue is None or dialogue.in_work is not None:
            return
        is_late = asyncio.get_running_loop().time() >= dialogue.until
        if not is_late and not self._cards.is_pressed(dialogue.nas):
            self._watch(state, dialogue)
            return
        self._log.info("silent", "an authentication is given up: its peer is silent", {"nas": dialogue.nas})
        self._forget(state)

    def _forget(self, state: bytes) -> None:
        """Ends a dialogue; its State is unknown at once."""
        dialogue = self._pop(state)
        if dialogue is not None:
            task = asyncio.create_task(_give_back(dialogue))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _end(self, state: bytes) -> None:
        dialogue = self._pop(state)
        if dialogue is not None:
            await _give_back(dialogue)

    def _pop(self, state: bytes) -> Dialogue | None:
        dialogue = self._open.pop(state, None)
        if dialogue is None:
            return None
        self._places[dialogue.nas] -= 1
        if not self._places[dialogue.nas]:
            del self._places[dialogue.nas]
        if dialogue.timer is not None:
            dialogue.timer.cancel()
        return dialogue


async def _give_back(dialogue: Dialogue) -> None:
    if dialogue.in_work is not None and dialogue.in_work[1] is not asyncio.current_task():
        dialogue.in_work[1].cancel()
        await asyncio.wait([dialogue.in_work[1]])
    with contextlib.suppress(CardError, ApduError, OSError):
        await dialogue.stack.aclose()


def rejection(request: AccessRequest) -> Reply:
    """With EAP-Failure for the packet that the request carries, if it has an identifier (RFC 3579, 2.6.3)."""
    eap = request.eap or b""
    # What is shorter than an EAP packet leaves no room for one.
    failure = EapPacket(EapCode.FAILURE, eap[1]).encode() if len(eap) >= MIN_EAP else b""
    return Reply(Code.ACCESS_REJECT, failure)
