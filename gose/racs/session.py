"""One user's session: each command is first permitted, then done. What it has of the node's cards ends with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from gose.racs.access import Grant, User
from gose.racs.hosted import HostedCard
from gose.racs.metrics import NodeMetrics
from secfunet.racs.apdu_run import ApduRun
from secfunet.racs.commands import (
    Apdu,
    Command,
    CommandError,
    Echo,
    GetSen,
    GetVersion,
    ListCards,
    PowerOn,
    Reset,
    Sen,
    SetVersion,
    Shutdown,
    Step,
)
from secfunet.racs.seids import encode_seids
from secfunet.racs.sen import describe_get_sen, describe_sen
from secfunet.racs.server import Answer, Request
from secfunet.racs.status import Event, Status, success
from secfunet.racs.syntax import VERSION
from secfunet.service.flood_log import FloodLog

_flood = FloodLog(logging.getLogger(__name__))  # one for all sessions: a user opens as many as it likes


class Session:
    """Requests are answered one after another."""

    def __init__(self, user: User, cards: Mapping[str, HostedCard], metrics: NodeMetrics) -> None:
        self.user = user
        self._cards = cards
        self._metrics = metrics

    async def answer(self, request: Request) -> bytes:
        """Does the commands up to the first that fails; returns the encoded answer."""
        answer = Answer(request)
        for step in request.steps:
            status = await self._do(step)
            self._metrics.statuses.labels(
                step.command.verb.name, status.event.name.lower() if not status.is_success else "ok"
            ).inc()
            if not answer.add(step, status):
                break
        return answer.encode()

    async def close(self) -> None:
        """Gives back every card that this session has."""
        for card in self._cards.values():
            if card.is_owned_by(self):
                await card.unlock()

    async def _do(self, step: Step) -> Status:
        try:
            return success(step.command.verb, step.line, await self._outcome(step.command))
        except CommandError as error:
            error.verb = step.command.verb
            if error.event is Event.UNAUTHORISED:
                _flood.warning(
                    f"refused {self.user.label}",
                    "command refused",
                    {"user": self.user.label, "verb": step.command.verb.name, "cause": error.text},
                )
            return error.status(step.line)

    async def _outcome(self, command: Command) -> str:
        match command:
            case GetVersion():
                return VERSION
            case SetVersion(version):
                if version != VERSION:
                    raise CommandError(Event.ILLEGAL_VALUE, f"RACS {version} is not supported")
                return f"RACS {VERSION} has been activated"
            case ListCards():
                return " ".join(encode_seids(seid for seid in self._cards if seid in self.user.grants))
            case Echo(token):
                return token
            case Sen():
                return self._name(command)
            case GetSen(seid):
                card = self._named(seid, Event.SYNTAX)  # the draft's example (2.3.13) has -511 here, and -410 at SEN
                return describe_get_sen(self._sen_of(card), card.aid)
            case Shutdown(seid):
                self._grant(seid)
                card = self._cards[seid]
                card.lock(self)
                await card.unlock()
                return f"{seid} has been powered down"
            case PowerOn(seid):
                card = self._locked(seid)
                return f"{seid} has been powered up" if await card.power_on() else f"{seid} was powered up already"
            case Reset(seid, warm):
                await self._locked(seid).reset(warm=warm)
                return f"{seid} {'Warm Reset' if warm else 'Reset'} Done"
            case Apdu():
                return await self._transmit(command)

    async def _transmit(self, command: Apdu) -> str:
        grant = self._grant(command.seid)
        run = ApduRun(command)
        # Before the card is taken, and before each one that the loop makes: FETCH, too, is a command that the user has written.
        self._permit(grant, command.apdu)
        card = self._locked(command.seid)
        await card.power_on()
        while (apdu := run.next_apdu) is not None:
            self._permit(grant, apdu)
            run.feed(await card.transmit(apdu))
        return run.result.hex().upper()

    def _permit(self, grant: Grant, apdu: bytes) -> None:
        if not grant.permits(apdu):
            raise CommandError(Event.UNAUTHORISED, f"the command {apdu[:4].hex().upper()} may not be sent")

    def _grant(self, seid: str) -> Grant:
        """A card that is another user's only, and one that does not exist, are refused alike."""
        grant = self.user.grants.get(seid)
        if grant is None:
            raise CommandError(Event.UNAUTHORISED, "unauthorized access")
        return grant

    def _locked(self, seid: str) -> HostedCard:
        self._grant(seid)
        card = self._cards[seid]
        card.lock(self)
        return card

    def _name(self, command: Sen) -> str:
        card = self._named(command.seid, Event.ILLEGAL_VALUE)
        if command.name is not None:
            if not self.user.grants[command.seid].may_name:
                raise CommandError(Event.UNAUTHORISED, "this user names no secure element")
            card.name(command.name, command.aid)
        return describe_sen(self._sen_of(card), card.aid)

    def _named(self, seid: str, event: Event) -> HostedCard:
        if seid not in self.user.grants:
            raise CommandError(event, f"invalid SEID ({seid})")
        return self._cards[seid]

    def _sen_of(self, card: HostedCard) -> str:
        if card.sen is None:
            raise CommandError(Event.EXECUTION, f"{card.seid} has no name")
        return card.sen
