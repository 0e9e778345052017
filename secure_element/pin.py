"""PINs: compared as salted slow hashes, counted durably, and counted *before* they are compared."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace
from typing import Final

from secfunet.card.parameters import PinRole
from secure_element.errors import CommandRefusedError, Sw
from secure_element.store import CardStore, PinRecord, RandBytes

ATTEMPTS: Final = {PinRole.USER: 3, PinRole.OPERATOR: 10}
SALT_SIZE: Final = 16


def make_pin(role: PinRole, padded_pin: bytes, randbytes: RandBytes) -> PinRecord:
    """The record of a new PIN (8 bytes, filled up with FF), with all its attempts."""
    salt = randbytes(SALT_SIZE)
    return PinRecord(salt, _verifier(padded_pin, salt), ATTEMPTS[role], ATTEMPTS[role])


def _verifier(padded_pin: bytes, salt: bytes) -> bytes:
    # About 10 ms: what protects a PIN is the counter, and behind it the encryption of the store; this is the third line.
    return hashlib.scrypt(padded_pin, salt=salt, n=2**12, r=8, p=1, dklen=32)


class PinKeeper:
    """Checks PINs against the store. Who has been verified is the card's session to know."""

    def __init__(self, store: CardStore, randbytes: RandBytes) -> None:
        self._store = store
        self._randbytes = randbytes

    def attempts(self, role: PinRole) -> int:
        """How many attempts are left; 0: blocked."""
        return self._store.contents.pins[role].attempts

    def verify(self, role: PinRole, untrusted_pin: bytes) -> None:
        """Raises CommandRefusedError: 63 0n with the attempts left, 6983 if there were none.

        A power cut between count and comparison costs an attempt; it never gives one.
        """
        record = self._store.contents.pins[role]
        if record.attempts <= 0:
            raise CommandRefusedError(Sw.PIN_BLOCKED)
        counted = replace(record, attempts=record.attempts - 1)
        self._store.replace(self._store.contents.with_pin(role, counted))
        if not hmac.compare_digest(_verifier(untrusted_pin, record.salt), record.verifier):
            raise CommandRefusedError(Sw.PIN_ATTEMPTS | counted.attempts)
        contents = self._store.contents.with_pin(role, replace(record, attempts=record.limit))
        if role is PinRole.OPERATOR:
            user = contents.pins[PinRole.USER]
            contents = contents.with_pin(PinRole.USER, replace(user, attempts=user.limit))
        self._store.replace(contents)

    def change(self, role: PinRole, new_pin: bytes) -> None:
        """Replaces a PIN; whoever asks has been verified."""
        record = make_pin(role, new_pin, self._randbytes)
        self._store.replace(self._store.contents.with_pin(role, record))
