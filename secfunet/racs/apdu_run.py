"""The loop behind one APDU command (draft-urien-core-racs-15, 2.3.8): a wrong Le is corrected, and what is left is fetched."""

from __future__ import annotations

from secfunet.apdu import MAX_RESPONSE, ApduFormatError, ResponseApdu
from secfunet.racs.commands import Apdu, CommandError
from secfunet.racs.status import Event, Verb

_SHORT_WITH_LE = 5
_WRONG_LE = 0x6C


class ApduRun:
    """``next_apdu`` is to be sent to the card, and its response fed in, until it is None; then ``result`` is there.

    Every one of them is a command to the card in its own right: whoever filters commands must look at each.
    """

    def __init__(self, command: Apdu) -> None:
        self._command = command
        self._body = bytearray()
        self._is_first = True
        self._sw = 0
        self.next_apdu: bytes | None = command.apdu

    def feed(self, untrusted: bytes) -> None:
        """The card's response. Raises CommandError (hardware) if it is none, or if the card has more and more to fetch."""
        sent, self.next_apdu = self.next_apdu, None
        try:
            response = ResponseApdu.decode(untrusted)
        except ApduFormatError as error:
            raise CommandError(Event.HARDWARE, f"the card's answer is no response: {error}", Verb.APDU) from None
        is_first, self._is_first = self._is_first, False
        if (
            is_first
            and sent is not None
            and len(sent) == _SHORT_WITH_LE
            and not response.data
            and response.sw1 == _WRONG_LE
        ):
            self.next_apdu = sent[:4] + bytes((response.sw2,))
            return
        self._sw = response.sw
        self._body += response.data
        if len(self._body) > MAX_RESPONSE:
            raise CommandError(Event.HARDWARE, "the card's answer is too long", Verb.APDU)
        if response.sw1 == self._command.more:
            if not is_first and not response.data and sent is not None and sent[:4] == self._command.fetch:
                raise CommandError(Event.HARDWARE, "the card promises more and gives nothing", Verb.APDU)
            self.next_apdu = self._command.fetch + bytes((response.sw2,))

    @property
    def result(self) -> bytes:
        """All bodies, then the last status word. Raises CommandError (execution) if CONTINUE wanted another."""
        wanted = self._command.continue_sw
        if wanted is not None and wanted != self._sw:
            raise CommandError(Event.EXECUTION, f"wrong SW {self._sw:04X}", Verb.APDU)
        return bytes(self._body) + self._sw.to_bytes(2)
