"""One card through PC/SC: connected, locked for one user, and given back without anything that it was told (pyscard, blocking calls).

Exclusive access, and a transaction as long as the connection lives: a card whose PIN was verified is open for whoever reaches it, so nobody
else may in between. When the connection ends the card loses its power; pcscd itself resets it if this process is killed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from smartcard import scard

from secfunet.errors import SecFuNetError
from secfunet.pcsc.frames import ReaderSeen, choose_reader

PRESENCE_PATIENCE: Final = 0.6
"""Seconds that a reader is given to notice that a card was put in, or exchanged: it may look every 0.4 seconds only."""
BUSY_PATIENCE: Final = 0.2
"""Seconds for a user who is just leaving."""
_PAUSE: Final = 0.02

_PROTOCOLS: Final = scard.SCARD_PROTOCOL_T0 | scard.SCARD_PROTOCOL_T1
_SHORT_HEADER: Final = 5


class ReaderGoneError(SecFuNetError):
    """The card, its reader or pcscd is not there (any more)."""


class ReaderUnsettledError(ReaderGoneError):
    """Nothing that answers is in the reader now; that may be different in a moment."""


class ReaderBusyError(SecFuNetError):
    """Somebody else has the card."""


class ReaderCard:
    """The card in one reader, for one user at a time. ``reader`` is the full name of the reader, ``atr`` the answer to its last reset."""

    def __init__(self, wanted: str, where: str) -> None:
        """Connects and cold-starts it. Raises ReaderGoneError, ReaderBusyError; ``where`` names pcscd in their texts."""
        self._where = where
        self.reader = wanted
        self.atr = b""
        self._context = _establish(where)
        self._card: Any = None
        try:
            self.reader = self._find(wanted)
            until = time.monotonic() + PRESENCE_PATIENCE
            while not self._is_started(last_time=time.monotonic() > until):
                time.sleep(_PAUSE)
        except BaseException:
            self.close()
            raise

    def transmit(self, command: bytes) -> bytes:
        """One command APDU; returns the response APDU. Raises ReaderGoneError if the card has not answered it."""
        pci, sent = scard.SCARD_PCI_T1, command
        if self._protocol == scard.SCARD_PROTOCOL_T0:
            pci, sent = scard.SCARD_PCI_T0, for_t0(command)
        result, response = scard.SCardTransmit(self._card, pci, list(sent))
        self._check(result)
        if len(response) < 2:
            # What the virtual reader answers for a card that is pulled in the middle of a command.
            raise ReaderGoneError(f"the card was taken out of {self.reader}")
        return bytes(value & 0xFF for value in response)

    def reset(self, *, cold: bool) -> bytes:
        """Resets the card (warm), or takes its power away and gives it back (cold); returns the ATR. Raises ReaderGoneError."""
        self._protocol = self._restart(scard.SCARD_UNPOWER_CARD if cold else scard.SCARD_RESET_CARD)
        return self.atr

    def close(self) -> None:
        """Powers the card off and gives it back. Never fails."""
        self._disconnect()
        if self._context is not None:
            scard.SCardReleaseContext(self._context)
            self._context = None

    def _is_started(self, *, last_time: bool) -> bool:
        try:
            self._look()
            self._connect()
            self._protocol = self._restart(scard.SCARD_UNPOWER_CARD)
            self._check(scard.SCardBeginTransaction(self._card))
        except ReaderUnsettledError:
            self._disconnect()
            if last_time:
                raise
            return False
        return True

    def _disconnect(self) -> None:
        if self._card is not None:
            scard.SCardEndTransaction(self._card, scard.SCARD_LEAVE_CARD)
            scard.SCardDisconnect(self._card, scard.SCARD_UNPOWER_CARD)
            self._card = None

    def _find(self, wanted: str) -> str:
        names = _names(self._context, self._where)
        found = choose_reader(wanted, names)
        if found is None:
            known = ", ".join(f"'{name}'" for name in names) or "none"
            raise ReaderGoneError(f"{self._where} has no reader, or several, of the name '{wanted}'; it has: {known}")
        return found

    def _look(self) -> None:
        result, states = scard.SCardGetStatusChange(self._context, 0, [(self.reader, scard.SCARD_STATE_UNAWARE)])
        self._check(result)
        state = states[0][1]
        if not state & scard.SCARD_STATE_PRESENT:
            raise ReaderUnsettledError(f"no card is in {self.reader}")
        if state & scard.SCARD_STATE_MUTE:
            raise ReaderUnsettledError(f"the card in {self.reader} does not answer to a reset")

    def _connect(self) -> None:
        until = time.monotonic() + BUSY_PATIENCE
        while True:
            result, card, self._protocol = scard.SCardConnect(
                self._context, self.reader, scard.SCARD_SHARE_EXCLUSIVE, _PROTOCOLS
            )
            if result == scard.SCARD_S_SUCCESS:
                self._card = card
                return
            if result != scard.SCARD_E_SHARING_VIOLATION or time.monotonic() > until:
                self._check(result)
            time.sleep(_PAUSE)

    def _restart(self, how: int) -> int:
        result, protocol = scard.SCardReconnect(self._card, scard.SCARD_SHARE_EXCLUSIVE, _PROTOCOLS, how)
        self._check(result)
        result, _, _, _, atr = scard.SCardStatus(self._card)
        self._check(result)
        self.atr = bytes(value & 0xFF for value in atr)
        return int(protocol)

    def _check(self, result: int) -> None:
        if result != scard.SCARD_S_SUCCESS:
            raise _error(result, self.reader, self._where)


def for_t0(command: bytes) -> bytes:
    """``command`` as T=0 carries it (ISO 7816-3, 12.2): a command with data has no Le there; 61xx tells what may be fetched.

    Raises ReaderGoneError for an extended APDU: T=0 has none.
    """
    if len(command) <= _SHORT_HEADER:
        return command
    data = command[4]
    if data == 0:
        raise ReaderGoneError("this card speaks T=0, which carries no extended APDUs: set its segmentation to 'draft'")
    return command[: _SHORT_HEADER + data]


def seen_readers(where: str) -> tuple[ReaderSeen, ...]:
    """All readers of this process's pcscd. Raises ReaderGoneError if it does not answer."""
    context = _establish(where)
    try:
        names = _names(context, where)
        if not names:
            return ()
        result, states = scard.SCardGetStatusChange(context, 0, [(name, scard.SCARD_STATE_UNAWARE) for name in names])
        if result != scard.SCARD_S_SUCCESS:
            raise _error(result, names[0], where)
        return tuple(
            ReaderSeen(
                name,
                bool(state & scard.SCARD_STATE_PRESENT),
                bool(state & (scard.SCARD_STATE_EXCLUSIVE | scard.SCARD_STATE_INUSE)),
                bytes(value & 0xFF for value in atr) if state & scard.SCARD_STATE_PRESENT else b"",
            )
            for name, state, atr in states
        )
    finally:
        scard.SCardReleaseContext(context)


def _establish(where: str) -> Any:
    result, context = scard.SCardEstablishContext(scard.SCARD_SCOPE_SYSTEM)
    if result != scard.SCARD_S_SUCCESS:
        raise _error(result, "", where)
    return context


def _names(context: Any, where: str) -> tuple[str, ...]:
    result, names = scard.SCardListReaders(context, [])
    if result == scard.SCARD_E_NO_READERS_AVAILABLE:
        return ()
    if result != scard.SCARD_S_SUCCESS:
        raise _error(result, "", where)
    return tuple(names)


def _error(result: int, reader: str, where: str) -> ReaderGoneError | ReaderBusyError:
    code = result & 0xFFFFFFFF
    if code == scard.SCARD_E_SHARING_VIOLATION & 0xFFFFFFFF:
        return ReaderBusyError(f"the card in {reader} serves another client")
    said = _SENTENCES.get(code)
    if said is not None:
        kind, sentence = said
        return kind(sentence(reader, where))
    message = str(scard.SCardGetErrorMessage(result)).rstrip(".")
    return ReaderGoneError(f"the card in {reader} cannot be reached: {message} ({code:08X})")


def _sentences() -> dict[int, tuple[type[ReaderGoneError], Callable[[str, str], str]]]:
    no_daemon = "SCARD_E_NO_SERVICE", "SCARD_E_SERVICE_STOPPED", "SCARD_F_COMM_ERROR", "SCARD_E_INVALID_HANDLE"
    no_reader = "SCARD_E_UNKNOWN_READER", "SCARD_E_READER_UNAVAILABLE"
    removed = "SCARD_W_REMOVED_CARD", "SCARD_E_NO_SMARTCARD"
    silent = "SCARD_W_UNPOWERED_CARD", "SCARD_W_UNRESPONSIVE_CARD", "SCARD_W_UNSUPPORTED_CARD"
    texts: tuple[tuple[tuple[str, ...], type[ReaderGoneError], Callable[[str, str], str]], ...] = (
        (no_daemon, ReaderGoneError, lambda reader, where: f"{where} does not answer, or was restarted"),
        (no_reader, ReaderGoneError, lambda reader, where: f"{where} has no reader '{reader}' any more"),
        (removed, ReaderUnsettledError, lambda reader, where: f"the card was taken out of {reader}"),
        (
            ("SCARD_E_NOT_TRANSACTED",),
            ReaderUnsettledError,
            lambda reader, where: f"the card was taken out of {reader}, or broke the exchange off",
        ),
        (silent, ReaderUnsettledError, lambda reader, where: f"the card in {reader} does not answer to a reset"),
        (("SCARD_W_RESET_CARD",), ReaderUnsettledError, lambda reader, where: f"somebody reset the card in {reader}"),
    )
    return {getattr(scard, name) & 0xFFFFFFFF: (kind, text) for names, kind, text in texts for name in names}


_SENTENCES: Final = _sentences()
