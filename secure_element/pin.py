"""The user's PIN: compared as a salted slow hash, counted durably, and counted *before* it is compared."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import replace
from typing import Final

from secure_element.errors import CommandRefusedError, Sw
from secure_element.store import CardStore, PinRecord, RandBytes

ATTEMPTS: Final = 3
SALT_SIZE: Final = 16


def make_pin(padded_pin: bytes, randbytes: RandBytes) -> PinRecord:
    """The record of a new PIN (8 bytes, filled up with FF), with all its attempts."""
    salt = randbytes(SALT_SIZE)
    return PinRecord(salt, _verifier(padded_pin, salt), ATTEMPTS, ATTEMPTS)


def _verifier(padded_pin: bytes, salt: bytes) -> bytes:
    # About 10 ms: what protects a PIN is the counter, and behind it the encryption of the store; this is the third line.
    return hashlib.scrypt(padded_pin, salt=salt, n=2**12, r=8, p=1, dklen=32)


class PinKeeper:
    """Checks the PIN against the store. Who has been verified is the card's session to know."""

    def __init__(self, store: CardStore, randbytes: RandBytes) -> None:
        self._store = store
        self._randbytes = randbytes

    @property
    def attempts(self) -> int:
        """How many attempts are left; 0: blocked."""
        return self._store.contents.pin.attempts

    def verify(self, untrusted_pin: bytes) -> None:
        """Raises CommandRefusedError: 63 0n with the attempts left, 6983 if there were none.

        A power cut between count and comparison costs an attempt; it never gives one.
        """
        record = self._store.contents.pin
        if record.attempts <= 0:
            raise CommandRefusedError(Sw.PIN_BLOCKED)
        counted = replace(record, attempts=record.attempts - 1)
        self._write(counted)
        if not hmac.compare_digest(_verifier(untrusted_pin, record.salt), record.verifier):
            raise CommandRefusedError(Sw.PIN_ATTEMPTS | counted.attempts)
        self._write(replace(record, attempts=record.limit))

    def change(self, new_pin: bytes) -> None:
        """Replaces the PIN; whoever asks has been verified, or administers the card."""
        self._write(make_pin(new_pin, self._randbytes))

    def _write(self, record: PinRecord) -> None:
        self._store.replace(replace(self._store.contents, pin=record))
