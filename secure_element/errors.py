"""The errors of the secure element, and the status words that they become."""

from __future__ import annotations

from enum import IntEnum

from secfunet.errors import SecFuNetError


class Sw(IntEnum):
    """Status words that this card answers (ISO 7816-4, 5.1.3; draft-urien-eap-smartcard)."""

    OK = 0x9000
    PIN_ATTEMPTS = 0x6300  # + attempts left
    MEMORY_FAILURE = 0x6581
    WRONG_LENGTH = 0x6700
    SECURITY_STATUS = 0x6982
    PIN_BLOCKED = 0x6983
    CONDITIONS_NOT_SATISFIED = 0x6985
    NOT_SELECTED = 0x6999
    WRONG_DATA = 0x6A80
    NOT_SUPPORTED = 0x6A81
    APPLICATION_NOT_FOUND = 0x6A82
    FULL = 0x6A84
    NO_IDENTITY = 0x6A88
    NOT_FOUND = 0x6A88
    IDENTITY_EXISTS = 0x6A89
    WRONG_P1_P2 = 0x6B00
    WRONG_LE = 0x6C00  # + right Le
    UNKNOWN_INSTRUCTION = 0x6D00
    UNKNOWN_CLASS = 0x6E00
    INTERNAL = 0x6F00
    DISCARDED = 0x7000
    AUTHENTICATION_FAILED = 0x7001


class SecureElementError(SecFuNetError):
    """Root of the errors of this package."""


class CommandRefusedError(SecureElementError):
    """A command cannot be done; ``sw`` is what the card answers."""

    def __init__(self, sw: int) -> None:
        super().__init__(f"refused with {sw:04X}")
        self.sw = sw


class StoreError(SecureElementError):
    """The store cannot be used: it is missing, in use, damaged, or sealed with another key."""


class StoreExistsError(StoreError):
    """A file that would be made is there, and holds what would be lost."""
