"""The card: takes command APDUs, gives response APDUs. One call after another; no IO but the store's.

A command passes: segments are joined, secure messaging is taken off, an application must be selected, the guard is satisfied (a PIN, or
the administrator's secure channel), then its handler runs, and the answer is cut to what the reader can take.
``secure_element.commands`` is the table.
"""

from __future__ import annotations

import logging
import os
from enum import Enum
from typing import Final

from secfunet.apdu import ApduFormatError, CommandApdu, ResponseApdu
from secfunet.card.instructions import AID, AID_OF_DOMAIN, AID_OF_DRAFT, CHAINING, Cla, DomainIns, Ins, KeyIns
from secfunet.scp03.channel import SECURE_MESSAGING
from secure_element.applet import CardOptions, EapApplet
from secure_element.commands import DOMAIN_GUARDS, GUARDS, NAMES, Guard
from secure_element.errors import CommandRefusedError, Sw
from secure_element.secure_channel import SecureChannel
from secure_element.security_domain import SecurityDomain
from secure_element.segmentation import Segments
from secure_element.store import CardStore, RandBytes
from secure_element.work import Work

log = logging.getLogger(__name__)

ATR: Final = bytes.fromhex("3B80800101")
"""T=1, extended lengths."""

_HEADER_SIZE: Final = 4
_SHORT_CASE_3: Final = 7
"""An APDU with an extended Lc is longer than that."""


class Application(Enum):
    """What can be selected."""

    APPLET = "applet"
    DOMAIN = "security domain"


_APPLICATIONS: Final = {
    AID: Application.APPLET,
    AID_OF_DRAFT: Application.APPLET,
    AID_OF_DOMAIN: Application.DOMAIN,
    b"": Application.DOMAIN,
}


class CardOs:
    """One card over one open store."""

    atr = ATR

    def __init__(self, store: CardStore, options: CardOptions | None = None, randbytes: RandBytes = os.urandom) -> None:
        options = options or CardOptions()
        self._applet = EapApplet(store, options, randbytes)
        self._channel = SecureChannel(store, randbytes)
        self._domain = SecurityDomain(store, self._channel)
        self._segments = Segments(options.answers)
        self._selected: Application | None = None

    @property
    def work(self) -> Work:
        """What it has done so far."""
        return self._applet.work

    def reset(self) -> None:
        """Everything volatile is forgotten: selection, secure channel, PINs, EAP, sessions to resume."""
        self._selected = None
        self._channel.close()
        self._applet.reset()
        self._segments.forget()

    def process(self, untrusted_command: bytes) -> bytes:
        """One command APDU in, one response APDU out; never raises."""
        ins = untrusted_command[1] if len(untrusted_command) > 1 else 0
        extended = len(untrusted_command) > _SHORT_CASE_3 and untrusted_command[_HEADER_SIZE] == 0
        try:
            return self._process(CommandApdu.decode(untrusted_command), extended=extended).encode()
        except ApduFormatError:
            sw = int(Sw.WRONG_LENGTH)
        except CommandRefusedError as error:
            sw = error.sw
        except OSError as error:
            log.error("the store cannot be written", extra={"errno": error.errno})
            sw = Sw.MEMORY_FAILURE
        except Exception as error:  # noqa: BLE001 - a card answers, whatever happens; the text of the error may hold a secret
            log.error("internal error", extra={"instruction": f"{ins:02X}", "kind": type(error).__name__})
            sw = Sw.INTERNAL
        return ResponseApdu(sw=sw).encode()

    @staticmethod
    def takes_long(command: bytes) -> bool:
        """Whether the command may take seconds (it makes a key pair), so that it is better run beside the event loop."""
        return len(command) >= 2 and _plain(command[0]) == Cla.KEYS and command[1] == KeyIns.GENERATE_KEY

    @staticmethod
    def name_of(command: bytes) -> str:
        """What to call the command in logs and metrics."""
        if len(command) < 2:
            return "unknown"
        return NAMES.get((_plain(command[0]), command[1]), "unknown")

    # From bytes to handlers

    def _process(self, command: CommandApdu, *, extended: bool) -> ResponseApdu:
        repeated = self._segments.repeat(command)
        if repeated is not None:
            return repeated
        if command.ins in (Ins.GET_RESPONSE, Ins.FETCH):
            return self._segments.fetch(command)
        self._segments.drop_answer()
        if _plain(command.cla) not in (Cla.ISO, Cla.EAP, Cla.KEYS):
            raise CommandRefusedError(Sw.UNKNOWN_CLASS)
        if command.cla & SECURE_MESSAGING:
            return self._process_protected(command, extended=extended)
        if command.ins == Ins.SELECT and _plain(command.cla) in (Cla.ISO, Cla.EAP):
            whole = self._segments.join(command)
            return ResponseApdu() if whole is None else self._segments.answer(whole, self._select(whole))
        self._check_guard(command, is_administrator=False)
        whole = self._segments.join(command)
        if whole is None:
            return ResponseApdu()
        return self._segments.answer(whole, self._handle(whole))

    def _process_protected(self, command: CommandApdu, *, extended: bool) -> ResponseApdu:
        """A command with secure messaging: who gave it is known only when it is whole."""
        if not self._channel.is_open and not self._channel.is_awaiting:
            raise CommandRefusedError(Sw.SECURITY_STATUS)
        whole = self._segments.join(command)
        if whole is None:
            return ResponseApdu()
        if self._channel.is_awaiting and (_plain(whole.cla), whole.ins) == (Cla.KEYS, DomainIns.EXTERNAL_AUTHENTICATE):
            self._channel.external_authenticate(whole, extended=extended)
            return ResponseApdu()
        plain = self._channel.unwrap(whole, extended=extended)
        try:
            self._check_guard(plain, is_administrator=True)
            data = self._handle(plain)
        except CommandRefusedError as error:
            if not self._channel.is_warning(error.sw):
                raise
            return ResponseApdu(self._channel.wrap(b"", error.sw), error.sw)
        return self._segments.answer(whole, self._channel.wrap(data))

    def _check_guard(self, command: CommandApdu, *, is_administrator: bool) -> None:
        if self._selected is None:
            raise CommandRefusedError(Sw.NOT_SELECTED)
        guards = GUARDS if self._selected is Application.APPLET else DOMAIN_GUARDS
        guard = guards.get((_plain(command.cla), command.ins))
        if guard is None:
            raise CommandRefusedError(Sw.UNKNOWN_INSTRUCTION)
        if self._channel.is_open and not is_administrator and command.ins != DomainIns.INITIALIZE_UPDATE:
            # Somebody else speaks in the administrator's session.
            self._channel.close()
            raise CommandRefusedError(Sw.SECURITY_STATUS)
        is_user = self._applet.is_user_verified
        allowed = {
            Guard.NOBODY: True,
            Guard.USER: is_user,
            Guard.EITHER: is_user or is_administrator,
            Guard.ADMINISTRATOR: is_administrator,
        }
        if allowed[guard]:
            return
        if guard is Guard.ADMINISTRATOR:
            raise CommandRefusedError(Sw.SECURITY_STATUS)
        raise self._applet.pin_needed()

    def _select(self, command: CommandApdu) -> bytes:
        if (command.p1, command.p2) != (0x04, 0x00):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        application = _APPLICATIONS.get(command.data)
        if application is None:
            raise CommandRefusedError(Sw.APPLICATION_NOT_FOUND)
        self._selected = application
        self._channel.close()
        self._segments.forget()
        self._applet.select()
        return self._domain.select() if application is Application.DOMAIN else b""

    def _handle(self, command: CommandApdu) -> bytes:
        if (command.cla, command.ins) == (Cla.KEYS, DomainIns.INITIALIZE_UPDATE):
            return self._channel.initialize_update(command)
        application = self._applet if self._selected is Application.APPLET else self._domain
        return application.handlers[command.cla, command.ins](command)


def _plain(cla: int) -> int:
    """The class without its bits for chaining and secure messaging."""
    return cla & ~(CHAINING | SECURE_MESSAGING)
