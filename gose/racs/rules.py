"""Which commands to a card a rule means: ``prefix/mask`` in hexadecimal, as in the APDU-Table of draft-urien-core-racs-15, 5.3.3.

A rule means a command if *command AND mask* is *prefix*, over as many bytes as the prefix has: at least the header (CLA INS P1 P2), and so
much of what follows as is wanted (an AID, say). A mask that is left out is all ones. A rule also has the names below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from secfunet.card.instructions import AID, AID_OF_DOMAIN, Cla, DomainIns, Ins, KeyIns, KeyOperation, MethodFunction
from secfunet.errors import SecFuNetError

HEADER: Final = 4
MAX_PREFIX: Final = 64
"""Bytes of the longest prefix."""

_SECURE: Final = 0x04  # bit of CLA: secure messaging


class RuleError(SecFuNetError):
    """A rule that is none."""


@dataclass(frozen=True)
class ApduRule:
    """``prefix`` and ``mask`` are equally long."""

    prefix: bytes
    mask: bytes

    def means(self, apdu: bytes) -> bool:
        """Whether the rule is about this command. A command that is shorter than the prefix is not meant."""
        head = apdu[: len(self.prefix)]
        return (
            len(head) == len(self.prefix) and bytes(a & b for a, b in zip(head, self.mask, strict=True)) == self.prefix
        )

    def forbids(self, apdu: bytes) -> bool:
        """Whether the rule, one of what is denied, is about this command in any of its forms (ISO 7816-4, 5.4.1).

        They are: on another logical channel, under secure messaging, as a part of a chain. In the last two what follows the header cannot
        be seen, so the header decides. The length of the data may be short or extended.
        """
        if self.means(apdu):
            return True
        if len(apdu) < HEADER or not self._is_plain or not self._means_header(apdu):
            return False
        return (
            len(self.prefix) == HEADER or _hides_data(apdu[0]) or any(self._means_data(form) for form in _forms(apdu))
        )

    @property
    def _is_plain(self) -> bool:
        """Whether it is about a class of commands, not about a way of sending them (all that are chained, say)."""
        return self.prefix[0] == _family(self.prefix[0]) and (self.mask[0] == 0 or bool(self.mask[0] & 0xE0))

    def _means_header(self, apdu: bytes) -> bool:
        cla = (_family(apdu[0]) ^ self.prefix[0]) & self.mask[0] & 0xE0 == 0
        return cla and all(a & b == c for a, b, c in zip(apdu[1:HEADER], self.mask[1:], self.prefix[1:], strict=False))

    def _means_data(self, apdu: bytes) -> bool:
        rest, mask, prefix = apdu[HEADER:], self.mask[HEADER:], self.prefix[HEADER:]
        return len(rest) >= len(prefix) and all(a & b == c for a, b, c in zip(rest, mask, prefix, strict=False))


def _family(cla: int) -> int:
    """CLA without what says only how the command is sent: chaining, secure messaging, logical channel."""
    if cla == 0xFF or cla & 0x60 == 0x20:
        return cla  # not a class, or reserved
    return cla & (0x80 if cla & 0x40 else 0xE0)


def _hides_data(cla: int) -> bool:
    return bool(cla & (0x30 if cla & 0x40 else 0x1C))


def _forms(apdu: bytes) -> tuple[bytes, ...]:
    """The command with its data's length short and extended, where it has data."""
    header, body = apdu[:HEADER], apdu[HEADER:]
    if len(body) > 3 and body[0] == 0:
        length = int.from_bytes(body[1:3])
        return (apdu, header + bytes((length,)) + body[3:]) if length < 256 else (apdu,)
    if len(body) > 1 and body[0]:
        return apdu, header + bytes((0, 0, body[0])) + body[1:]
    return (apdu,)


def parse_rules(text: str) -> tuple[ApduRule, ...]:
    """The rules that a name or ``PREFIX[/MASK]`` stands for. Raises RuleError."""
    if text in NAMED_RULES:
        return NAMED_RULES[text]
    prefix_text, separator, mask_text = text.partition("/")
    try:
        prefix = bytes.fromhex(prefix_text)
        mask = bytes.fromhex(mask_text) if separator else b"\xff" * len(prefix)
    except ValueError:
        raise RuleError(f"'{text}' is neither PREFIX/MASK in hexadecimal nor one of {', '.join(NAMED_RULES)}") from None
    if not HEADER <= len(prefix) <= MAX_PREFIX or len(mask) != len(prefix):
        raise RuleError(f"'{text}': prefix and mask have {HEADER} to {MAX_PREFIX} bytes, both as many")
    if any(value & ~kept for value, kept in zip(prefix, mask, strict=True)):
        raise RuleError(f"'{text}' means no command: the prefix has bits that the mask takes away")
    return (ApduRule(prefix, mask),)


def _rule(cla: int, ins: int, p1: int, p2: int | None = 0, *, may_chain: bool = False) -> ApduRule:
    mask = bytes((0xEF if may_chain else 0xFF, 0xFF, 0xFF, 0x00 if p2 is None else 0xFF))
    return ApduRule(bytes((cla, ins, p1, p2 or 0)), mask)


def _select(aid: bytes) -> tuple[ApduRule, ...]:
    """SELECT of that application, its length short or extended."""
    header = bytes((Cla.ISO, Ins.SELECT, 0x04, 0x00))
    prefixes = (header + bytes((len(aid),)) + aid, header + bytes((0, 0, len(aid))) + aid)
    return tuple(ApduRule(prefix, b"\xff" * len(prefix)) for prefix in prefixes)


_PREPARE: Final = (
    *_select(AID),
    _rule(Cla.EAP, Ins.VERIFY_PIN, 0x00, 0x00),
    _rule(Cla.EAP, Ins.SET_IDENTITY, 0x00, 0x80, may_chain=True),
    _rule(Cla.EAP, Ins.STATE, 0x00),
    _rule(Cla.KEYS, KeyIns.GET_CERTIFICATE, 0x00),
    _rule(Cla.EAP, Ins.GET_RESPONSE, 0x00),
    _rule(Cla.EAP, Ins.FETCH, 0x00),
)

NAMED_RULES: Final[dict[str, tuple[ApduRule, ...]]] = {
    # A VM's card in a slot of a grid: made ready, asked for signs of life, its key used.
    "operate": (
        *_PREPARE,
        *(
            _rule(Cla.KEYS, KeyIns.OPERATE, operation, None, may_chain=True)
            for operation in (KeyOperation.SIGN, KeyOperation.DECRYPT, KeyOperation.ENCRYPT)
        ),
        _rule(Cla.KEYS, KeyIns.GET_BINDING, 0x00),
        _rule(Cla.KEYS, KeyIns.SEAL, 0x00, may_chain=True),
    ),
    # A card that opens TLS connections.
    "tls": (
        *_PREPARE,
        ApduRule(bytes((Cla.EAP, Ins.PROCESS_EAP, 0x00, 0x00)), b"\xef\xff\xfe\xff"),
        _rule(Cla.EAP, Ins.STATE, 0x10),
        _rule(Cla.EAP, Ins.GET_SESSION_KEY, 0x00),
        _rule(Cla.EAP, Ins.GET_EXPORTED_PARAMETER, 0x00),
        *(_rule(Cla.EAP, Ins.METHOD_FUNCTION, function, may_chain=True) for function in MethodFunction),
    ),
    # An administrator of the card.
    "personalise": (
        *_PREPARE,
        _rule(Cla.EAP, Ins.CHANGE_PIN, 0x00, 0x00),
        _rule(Cla.EAP, Ins.GET_NEXT_IDENTITY, 0x00, None),
        _rule(Cla.EAP, Ins.GET_CURRENT_IDENTITY, 0x00, None),
        _rule(Cla.EAP, Ins.GET_PROFILE_DATA, 0x00),
        # Through a secure channel: what such a command is, the node cannot see; the card takes it from who has its SCP03 keys.
        *_select(AID_OF_DOMAIN),
        ApduRule(bytes((Cla.KEYS, DomainIns.INITIALIZE_UPDATE, 0x00, 0x00)), b"\xff\xff\x00\xff"),
        *(ApduRule(bytes((cla | _SECURE, 0x00, 0x00, 0x00)), b"\xef\x00\x00\x00") for cla in Cla),
    ),
}
