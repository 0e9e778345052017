"""INITIALIZE UPDATE and EXTERNAL AUTHENTICATE: both ends prove that they have the key set (Amendment D, 5.1 and 7.1).

::

    80 50 kvn 00  host challenge                       → key data (10), kvn, 03, i, card challenge, card cryptogram [, sequence (3)]
    84 82 level 00  host cryptogram, MAC               → 9000

``i`` says what the card does: 01 S16, 10 its challenge is pseudo-random (then with a sequence counter), 20 R-MAC, 40 R-MAC and R-ENC.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Final

from secfunet.apdu import CommandApdu
from secfunet.scp03.channel import CardChannel, HostChannel, SecurityLevel, command_mac, header_of
from secfunet.scp03.errors import Scp03FormatError, Scp03SecurityError
from secfunet.scp03.keys import BLOCK, Derivation, KeySet, ScpMode, SessionKeys, derive

CLA: Final = 0x80
CLA_PROTECTED: Final = 0x84
INS_INITIALIZE_UPDATE: Final = 0x50
INS_EXTERNAL_AUTHENTICATE: Final = 0x82
SCP03: Final = 0x03

I_S16: Final = 0x01
I_PSEUDO_RANDOM: Final = 0x10
I_RANDOM_R_MAC_R_ENC: Final = 0x60
"""A card with random challenges that can do every level, in S8."""

_KEY_DATA_SIZE: Final = 10
_INFORMATION_SIZE: Final = 3
_SEQUENCE_SIZE: Final = 3


@dataclass(frozen=True)
class InitializeUpdateAnswer:
    """The card's answer to INITIALIZE UPDATE. ``key_data`` (10 bytes) tells one card's keys from another's; ``sequence`` is 3 bytes, or
    none if the challenge is random.
    """

    key_data: bytes
    key_version: int
    i: int
    challenge: bytes
    cryptogram: bytes
    sequence: bytes = b""

    def __post_init__(self) -> None:
        size = self.mode.value
        if (
            len(self.key_data) != _KEY_DATA_SIZE
            or not 0 <= self.key_version <= 0xFF
            or not 0 <= self.i <= 0xFF
            or len(self.challenge) != size
            or len(self.cryptogram) != size
            or len(self.sequence) not in (0, _SEQUENCE_SIZE)
        ):
            raise Scp03FormatError("this is no answer to INITIALIZE UPDATE")

    @property
    def mode(self) -> ScpMode:
        """How long challenges, cryptograms and MACs are."""
        return ScpMode.S16 if self.i & I_S16 else ScpMode.S8

    def encode(self) -> bytes:
        """29 or 32 bytes (S8), 45 or 48 (S16)."""
        information = bytes((self.key_version, SCP03, self.i))
        return self.key_data + information + self.challenge + self.cryptogram + self.sequence

    @classmethod
    def decode(cls, untrusted: bytes) -> InitializeUpdateAnswer:
        """Raises Scp03FormatError, also for another protocol than SCP03."""
        rest = untrusted[_KEY_DATA_SIZE + _INFORMATION_SIZE :]
        if len(untrusted) < _KEY_DATA_SIZE + _INFORMATION_SIZE:
            raise Scp03FormatError("the answer to INITIALIZE UPDATE is cut off")
        version, protocol, i = untrusted[_KEY_DATA_SIZE : _KEY_DATA_SIZE + _INFORMATION_SIZE]
        if protocol != SCP03:
            raise Scp03FormatError(f"the card speaks SCP{protocol:02X}, not SCP03")
        size = BLOCK if i & I_S16 else ScpMode.S8.value
        return cls(untrusted[:_KEY_DATA_SIZE], version, i, rest[:size], rest[size : 2 * size], rest[2 * size :])


class HostHandshake:
    """The administrator's end. ``challenge``: 8 random bytes (16 for a card in S16), fresh each time.

    ``initialize_update`` goes out, its answer into ``authenticate``, which gives the command to send next; when the card has answered 9000,
    ``channel`` is the session.
    """

    def __init__(self, keys: KeySet, challenge: bytes, *, key_version: int = 0) -> None:
        if len(challenge) not in (ScpMode.S8.value, ScpMode.S16.value) or not 0 <= key_version <= 0xFF:
            raise Scp03FormatError("a host challenge has 8 or 16 bytes, a key version is one byte")
        self._keys = keys
        self._challenge = challenge
        self._key_version = key_version
        self._channel: HostChannel | None = None

    @property
    def initialize_update(self) -> CommandApdu:
        """The first command."""
        return CommandApdu(CLA, INS_INITIALIZE_UPDATE, self._key_version, 0x00, self._challenge, 256)

    def authenticate(
        self, untrusted_answer: bytes, level: SecurityLevel = SecurityLevel.C_MAC_C_DEC_R_MAC_R_ENC
    ) -> CommandApdu:
        """EXTERNAL AUTHENTICATE for a card that has proved itself.

        Raises Scp03FormatError, and Scp03SecurityError if the card has other keys: it is not told what ours would say.
        """
        answer = InitializeUpdateAnswer.decode(untrusted_answer)
        if len(answer.challenge) != len(self._challenge):
            raise Scp03FormatError("the card's challenge is not as long as the host's")
        if self._key_version not in (0, answer.key_version):
            raise Scp03FormatError("the card answered with another key set than it was asked for")
        session = self._keys.session_keys(self._challenge, answer.challenge)
        context = self._challenge + answer.challenge
        if not hmac.compare_digest(_cryptogram(session, Derivation.CARD_CRYPTOGRAM, context), answer.cryptogram):
            raise Scp03SecurityError("the card does not have this key set")
        data = _cryptogram(session, Derivation.HOST_CRYPTOGRAM, context)
        header = bytes((CLA_PROTECTED, INS_EXTERNAL_AUTHENTICATE, level, 0x00))
        mac = command_mac(session, bytes(BLOCK), header, data, answer.mode.value, extended=False)
        self._channel = HostChannel(session, level, answer.mode, mac)
        return CommandApdu(CLA_PROTECTED, INS_EXTERNAL_AUTHENTICATE, level, 0x00, data + mac[: answer.mode.value])

    @property
    def channel(self) -> HostChannel:
        """The session, once the card has answered EXTERNAL AUTHENTICATE with 9000. Raises Scp03FormatError before its time."""
        if self._channel is None:
            raise Scp03FormatError("no card has proved itself yet")
        return self._channel


@dataclass(frozen=True)
class CardHandshake:
    """The card's end, from its answer to INITIALIZE UPDATE on; it serves one attempt. ``challenge`` is the card's, fresh and random."""

    keys: KeySet = field(repr=False)
    key_version: int
    key_data: bytes
    host_challenge: bytes
    challenge: bytes
    i: int = I_RANDOM_R_MAC_R_ENC
    sequence: bytes = b""

    def __post_init__(self) -> None:
        if len(self.host_challenge) != len(self.challenge):
            raise Scp03FormatError("both challenges are equally long")

    @property
    def answer(self) -> InitializeUpdateAnswer:
        """To INITIALIZE UPDATE."""
        cryptogram = _cryptogram(self._session(), Derivation.CARD_CRYPTOGRAM, self.host_challenge + self.challenge)
        return InitializeUpdateAnswer(
            self.key_data, self.key_version, self.i, self.challenge, cryptogram, self.sequence
        )

    def authenticate(self, untrusted: CommandApdu, *, extended: bool = False) -> CardChannel:
        """Takes EXTERNAL AUTHENTICATE; returns the session. ``extended``: its Lc was so on the wire.

        Raises Scp03FormatError (level or length), Scp03SecurityError (cryptogram or MAC: the same error for both).
        """
        mode = self.answer.mode
        size = mode.value
        try:
            level = SecurityLevel(untrusted.p1)
        except ValueError:
            raise Scp03FormatError("no such security level") from None
        if untrusted.p2 != 0 or len(untrusted.data) != 2 * size:
            raise Scp03FormatError("EXTERNAL AUTHENTICATE has a cryptogram and a MAC")
        session = self._session()
        data, mac = untrusted.data[:size], untrusted.data[size:]
        chaining = command_mac(session, bytes(BLOCK), header_of(untrusted), data, size, extended)
        expected = _cryptogram(session, Derivation.HOST_CRYPTOGRAM, self.host_challenge + self.challenge)
        is_right = hmac.compare_digest(mac, chaining[:size]) & hmac.compare_digest(data, expected)
        if not is_right:
            raise Scp03SecurityError("whoever asks does not have this key set")
        return CardChannel(session, level, mode, chaining)

    def _session(self) -> SessionKeys:
        return self.keys.session_keys(self.host_challenge, self.challenge)


def pseudo_random_challenge(keys: KeySet, sequence: bytes, aid: bytes, mode: ScpMode = ScpMode.S8) -> bytes:
    """The challenge of a card whose ``i`` has bit 10: derived from a sequence counter (3 bytes) and the AID (Amendment D, 6.2.2.1)."""
    return derive(keys.enc, Derivation.CARD_CHALLENGE, 8 * mode.value, sequence + aid)


def _cryptogram(session: SessionKeys, constant: Derivation, context: bytes) -> bytes:
    """As long as one challenge."""
    return derive(session.mac, constant, 8 * (len(context) // 2), context)
