"""The card's end of the administrator's secure channel: one at most, gone with a select, a reset, or anything that is wrong in it."""

from __future__ import annotations

import logging
from typing import Final

from secfunet.apdu import CommandApdu
from secfunet.scp03 import CardChannel, CardHandshake, KeySet, Scp03FormatError, Scp03SecurityError, SecurityLevel
from secure_element.errors import CommandRefusedError, Sw
from secure_element.store import CardStore, RandBytes

log = logging.getLogger(__name__)

CHALLENGE_SIZE: Final = 8
MAX_WARNING: Final = 0x63FF
MIN_WARNING: Final = 0x6200


class SecureChannel:
    """INITIALIZE UPDATE, EXTERNAL AUTHENTICATE, and what they open."""

    def __init__(self, store: CardStore, randbytes: RandBytes) -> None:
        self._store = store
        self._randbytes = randbytes
        self.close()

    def close(self) -> None:
        """Forgets session keys and whatever was begun."""
        self._handshake: CardHandshake | None = None
        self._channel: CardChannel | None = None
        self._keys: KeySet | None = None

    @property
    def is_open(self) -> bool:
        """Whether an administrator has proved himself."""
        return self._channel is not None

    @property
    def is_awaiting(self) -> bool:
        """Whether the next step is EXTERNAL AUTHENTICATE."""
        return self._handshake is not None

    @property
    def keys(self) -> KeySet:
        """The static key set that opened the channel. Raises CommandRefusedError if none did."""
        if self._keys is None or self._channel is None:
            raise CommandRefusedError(Sw.SECURITY_STATUS)
        return self._keys

    def initialize_update(self, command: CommandApdu) -> bytes:
        """P1: the version of the key set, 00 for the newest. Raises CommandRefusedError."""
        self.close()
        if command.p2 != 0:
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        if len(command.data) != CHALLENGE_SIZE:
            raise CommandRefusedError(Sw.WRONG_LENGTH)
        domain = self._store.contents.domain
        version = command.p1 or [0, *domain.key_sets][-1]
        keys = domain.key_sets.get(version)
        if keys is None:
            raise CommandRefusedError(Sw.NOT_FOUND)
        self._keys = keys
        self._handshake = CardHandshake(keys, version, domain.key_data, command.data, self._randbytes(CHALLENGE_SIZE))
        return self._handshake.answer.encode()

    def external_authenticate(self, command: CommandApdu, *, extended: bool) -> None:
        """Opens the channel. One attempt for each INITIALIZE UPDATE. Raises CommandRefusedError."""
        handshake, self._handshake = self._handshake, None
        if handshake is None:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        if command.p1 == SecurityLevel.NONE:
            raise CommandRefusedError(Sw.WRONG_P1_P2)  # what an administrator says is never without a MAC
        try:
            self._channel = handshake.authenticate(command, extended=extended)
        except Scp03FormatError:
            raise CommandRefusedError(Sw.WRONG_P1_P2) from None
        except Scp03SecurityError:
            log.warning("an administrator was refused", extra={"key_version": handshake.key_version})
            raise CommandRefusedError(Sw.SECURITY_STATUS) from None
        log.info(
            "secure channel opened", extra={"key_version": handshake.key_version, "security_level": f"{command.p1:02X}"}
        )

    def unwrap(self, command: CommandApdu, *, extended: bool) -> CommandApdu:
        """The command that the administrator meant. Raises CommandRefusedError 6982, and then the channel is closed."""
        if self._channel is None:
            raise CommandRefusedError(Sw.SECURITY_STATUS)
        try:
            return self._channel.unwrap(command, extended=extended)
        except Scp03SecurityError:
            self.close()
            log.warning("secure channel closed: a command was not the administrator's")
            raise CommandRefusedError(Sw.SECURITY_STATUS) from None

    def wrap(self, data: bytes, sw: int = Sw.OK) -> bytes:
        """The answer as it is sent; without a channel (the command closed it) as it is."""
        return data if self._channel is None else self._channel.wrap(data, sw)

    @staticmethod
    def is_warning(sw: int) -> bool:
        """Whether an answer with this status word is protected though it is no success."""
        return MIN_WARNING <= sw <= MAX_WARNING
