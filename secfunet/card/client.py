"""The commands of an EAP-TLS card as methods, above any port: lengths, segmentation and status words are dealt with here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from secfunet.apdu import MAX_RESPONSE, ApduError, CommandApdu, ResponseApdu, StatusError, status_error
from secfunet.card.binding import Binding, SealedAnswer, SealRequest
from secfunet.card.errors import CardError, CardFormatError, CardGoneError
from secfunet.card.instructions import (
    AID,
    CHAINING,
    MIN_PIN_SIZE,
    PIN_SIZE,
    SEGMENT_SIZE,
    Cla,
    Ins,
    KeyIns,
    KeyOperation,
    MethodFunction,
    PersonalisationTag,
)
from secfunet.card.parameters import (
    EapState,
    KeyAlgorithm,
    NegotiatedTls,
    Segmentation,
    TlsParameters,
    decode_certificates,
)
from secfunet.card.ports import CardPort, PipeliningPort
from secfunet.card.tlv import encode_tlv

_WRONG_DATA: Final = 0x6A80

KeyRequest = tuple[KeyOperation, int, bytes]
"""An operation with the key: what to do, the number of the scheme, and with which bytes."""

KeyOutcome = bytes | CardError | ApduError
"""What became of it."""

SHORT_DATA = 255
"""Bytes of data that a short APDU carries."""

_MAX_IDENTITIES = 256
_SW_OK = 0x9000
_SW_UNKNOWN_INSTRUCTION = 0x6D00
_SW_NO_IDENTITY = 0x6A88


class CardClient:
    """One card, through one port. Calls are not to overlap: a pool (``secfunet.card.pool``) sees to that.

    Every method raises StatusError (PinError for PINs) when the card refuses, CardGoneError when it is gone, and CardFormatError or
    ApduFormatError when its answer is not what the command promises.
    """

    def __init__(self, port: CardPort, *, segmentation: Segmentation = Segmentation.EXTENDED) -> None:
        self.port = port
        self.segmentation = segmentation

    # The applet and its PINs

    async def select(self, aid: bytes = AID) -> None:
        """Selects the applet; PINs and the state of EAP are as after power-on."""
        await self._send(Cla.ISO, Ins.SELECT, 0x04, 0x00, aid)

    async def verify_pin(self, pin: bytes) -> None:
        """Opens the user's commands until the next select or reset. Raises PinError."""
        await self._send(Cla.EAP, Ins.VERIFY_PIN, 0x00, 0x00, pad_pin(pin))

    async def change_pin(self, old: bytes, new: bytes) -> None:
        """Replaces the PIN; the old one is checked as by verify_pin. Raises PinError."""
        await self._send(Cla.EAP, Ins.CHANGE_PIN, 0x00, 0x00, pad_pin(old) + pad_pin(new))

    async def pin_attempts(self) -> int:
        """How many attempts are left; asking costs none."""
        response = await self._answer(CommandApdu(Cla.EAP, Ins.VERIFY_PIN, 0x00, 0x00))
        if response.sw >> 8 != 0x63:
            raise status_error(response.sw, Ins.VERIFY_PIN)
        return response.sw & 0x0F

    # Identities

    async def identities(self) -> tuple[str, ...]:
        """The names of all TLS-Ids on the card, complete or not, in the card's order."""
        try_first = CommandApdu(Cla.EAP, Ins.GET_NEXT_IDENTITY, 0x00, 0x02, le=self._le())
        response = await self._answer(try_first)
        if response.sw == _SW_NO_IDENTITY:
            return ()
        names = [_name(_data_of(response, Ins.GET_NEXT_IDENTITY))]
        while len(names) < _MAX_IDENTITIES:
            name = _name(await self._send(Cla.EAP, Ins.GET_NEXT_IDENTITY, 0x00, 0x01))
            if name == names[0]:
                break
            names.append(name)
        return tuple(names)

    async def current_identity(self) -> str:
        """The name of the TLS-Id that operations use: the one set, else the card's first."""
        return _name(await self._send(Cla.EAP, Ins.GET_CURRENT_IDENTITY, 0x00, 0x00))

    async def set_identity(self, name: str) -> None:
        """Chooses the TLS-Id. Raises StatusError 6985 if there is none of that name, or none with a certificate."""
        await self._send(Cla.EAP, Ins.SET_IDENTITY, 0x00, 0x80, name.encode())

    async def profile(self) -> bytes:
        """The profile of the current identity, BER (``secfunet.card.profile``)."""
        return await self._send(Cla.EAP, Ins.GET_PROFILE_DATA, 0x00, 0x00)

    async def certificate(self, name: str = "") -> bytes:
        """The certificate of the current identity, or of that name, DER. Raises StatusError 6985 if it is not complete, 6A88 if it is not
        there.
        """
        return await self._send(Cla.KEYS, KeyIns.GET_CERTIFICATE, 0x00, 0x00, name.encode())

    # EAP and TLS

    async def version(self, method: bool = False) -> tuple[int, int]:
        """Major and minor version of the EAP engine, or of the EAP-TLS method."""
        major, minor = await self._send_sized(Cla.EAP, Ins.GET_CURRENT_IDENTITY, 0x01 if method else 0x02, 0x00, 2)
        return major, minor

    async def reset_state(self) -> None:
        """Back to the start of EAP with the same identity."""
        await self._send(Cla.EAP, Ins.STATE, 0x10, 0x00)

    async def state(self) -> EapState:
        """Where EAP stands."""
        (value,) = await self._send_sized(Cla.EAP, Ins.STATE, 0x00, 0x00, 1)
        try:
            return EapState(value)
        except ValueError:
            raise CardFormatError(f"unknown state {value:02X}") from None

    async def process_eap(self, packet: bytes, unix_time: int | None = None) -> bytes:
        """One EAP packet in, the answering one out; empty if the card has nothing to say (EAP-Success).

        ``unix_time`` (UTC seconds) goes behind the packet: the card has no clock. Raises StatusError 7000 for a discarded packet, 7001 or
        6985 for a failed authentication.
        """
        suffix = b"" if unix_time is None else (unix_time & 0xFFFFFFFF).to_bytes(4)
        return await self._send(Cla.EAP, Ins.PROCESS_EAP, 0x00, 0x00, packet + suffix)

    async def session_key(self, *, extended: bool = False) -> bytes:
        """The 64-byte MSK in the card's order of halves; ``extended``: MSK ‖ EMSK, 128 bytes, in plain order."""
        size = 128 if extended else 64
        return await self._send_sized(Cla.EAP, Ins.GET_SESSION_KEY, 0x00, 0x00, size)

    async def exported_parameter(self, index: int) -> bytes:
        """Peer-ID (1), Server-ID (2), Method-ID (3), Session-ID (4), Key-Lifetime (5), channel bindings (6)."""
        return await self._send(Cla.EAP, Ins.GET_EXPORTED_PARAMETER, 0x00, 0x00, bytes((index,)))

    async def set_tls_parameters(self, parameters: TlsParameters) -> None:
        """How the next handshake is to run. Private extension."""
        await self._send_function(MethodFunction.SET_TLS_PARAMETERS, parameters.encode())

    async def cipher_suite(self) -> NegotiatedTls:
        """What the handshake became. Private extension; only in state AUTHENTICATED."""
        return NegotiatedTls.decode(await self._send_function(MethodFunction.CIPHER_SUITE))

    async def key_block(self) -> bytes:
        """The key block (TLS 1.2) or both application traffic secrets, client's first (TLS 1.3). Private extension; given out once."""
        return await self._send_function(MethodFunction.KEY_BLOCK)

    async def peer_certificates(self) -> tuple[bytes, ...]:
        """The peer's chain as the card accepted it: DER, leaf first. Private extension."""
        return decode_certificates(await self._send_function(MethodFunction.PEER_CERTIFICATES))

    # The key pair in use (user PIN)

    async def sign(self, scheme: int, digest: bytes) -> bytes:
        """Signs ``digest`` with the current identity's key; ``scheme`` is a number of secfunet.gose.v1 SignatureScheme."""
        return await self._operate(KeyOperation.SIGN, scheme, digest)

    async def decrypt(self, scheme: int, ciphertext: bytes) -> bytes:
        """Decrypts with the RSA key; ``scheme`` is a number of EncryptionScheme. A wrong v1.5 padding yields bytes, not an error."""
        return await self._operate(KeyOperation.DECRYPT, scheme, ciphertext)

    async def encrypt(self, scheme: int, plaintext: bytes) -> bytes:
        """Encrypts to the RSA key; ``scheme`` is a number of EncryptionScheme."""
        return await self._operate(KeyOperation.ENCRYPT, scheme, plaintext)

    async def operate(self, operations: Sequence[KeyRequest]) -> list[KeyOutcome]:
        """Several operations, one after another: the output of each, or why it has none. The list ends where the card was lost.

        Where port and segmentation allow it they are sent at once.
        """
        if isinstance(self.port, PipeliningPort) and self.segmentation is Segmentation.EXTENDED and len(operations) > 1:
            return await self._operate_at_once(self.port, operations)
        outcomes: list[KeyOutcome] = []
        for operation in operations:
            outcomes.append(await self._outcome_of(operation))
            if isinstance(outcomes[-1], CardGoneError):
                break
        return outcomes

    async def binding(self) -> Binding | None:
        """To whom the current identity is bound; None: to nobody, or the card does not know what that is."""
        try:
            return Binding.decode(await self._send(Cla.KEYS, KeyIns.GET_BINDING, 0x00, 0x00))
        except StatusError as error:
            if error.sw != _SW_UNKNOWN_INSTRUCTION:
                raise
            return None

    async def seal(self, request: SealRequest) -> SealedAnswer:
        """Operations of a bound identity, their outputs in a container."""
        data = request.encode()
        return SealedAnswer.decode(await self._send(Cla.KEYS, KeyIns.SEAL, 0x00, 0x00, data))

    async def unwrap_key(self, profile: int, header: bytes) -> bytes:
        """The 32-byte content key in a container's header. Raises StatusError 6A80 whatever is wrong with the header."""
        key = await self._operate(KeyOperation.UNWRAP_KEY, profile, header)
        if len(key) != 32:
            raise CardFormatError("a content key has 32 bytes")
        return key

    # Personalisation (through the administrator's secure channel, secfunet.card.administrator)

    async def generate_key(self, name: str, algorithm: KeyAlgorithm) -> None:
        """Makes a key pair in the card for the new identity ``name``. RSA may take seconds, RSA-4096 tens of them."""
        await self._send(Cla.KEYS, KeyIns.GENERATE_KEY, algorithm, 0x00, name.encode())

    async def certificate_signing_request(self, name: str, subject_cn: str) -> bytes:
        """A request for the key of ``name``, PKCS#10 in DER, signed by that key."""
        data = encode_tlv(((PersonalisationTag.NAME, name.encode()), (PersonalisationTag.SUBJECT, subject_cn.encode())))
        return await self._send(Cla.KEYS, KeyIns.REQUEST_CERTIFICATE, 0x00, 0x00, data)

    async def load_identity(self, name: str, eap_id: bytes, certificate: bytes, authorities: Sequence[bytes]) -> None:
        """Completes (or renews) the identity: certificate for the card's key and the authorities that it trusts, DER."""
        items = [
            (PersonalisationTag.NAME, name.encode()),
            (PersonalisationTag.EAP_ID, eap_id),
            (PersonalisationTag.CERTIFICATE, certificate),
            *((PersonalisationTag.AUTHORITY, authority) for authority in authorities),
        ]
        await self._send(Cla.KEYS, KeyIns.LOAD_IDENTITY, 0x00, 0x00, encode_tlv(items))

    async def unblock_pin(self, new_pin: bytes) -> None:
        """Gives the user a new PIN and all attempts."""
        await self._send(Cla.EAP, Ins.UNBLOCK_PIN, 0x00, 0x00, pad_pin(new_pin))

    async def bind_identity(self, name: str, profile: int, hypervisor: bytes = b"") -> None:
        """From now on the results of ``name`` go to the hypervisor of that certificate (DER) only; empty: to everybody again."""
        items = [(PersonalisationTag.NAME, name.encode())]
        if hypervisor:
            items.append((PersonalisationTag.HYPERVISOR, hypervisor))
        await self._send(Cla.KEYS, KeyIns.BIND_IDENTITY, profile, 0x00, encode_tlv(items))

    async def delete_identity(self, name: str) -> None:
        """Destroys the identity and its private key."""
        await self._send(Cla.KEYS, KeyIns.DELETE_IDENTITY, 0x00, 0x00, name.encode())

    async def close(self) -> None:
        """Powers the card off and gives it back."""
        await self.port.close()

    # Exchanges

    async def exchange(self, command: CommandApdu) -> ResponseApdu:
        """One command of any length, in segments if need be, and its whole answer, whatever its status word says."""
        if self.segmentation is Segmentation.EXTENDED:
            return await self._answer(command)
        cla, ins, p1, p2, rest = command.cla, command.ins, command.p1, command.p2, command.data
        while len(rest) > SHORT_DATA:
            segment, rest = rest[:SEGMENT_SIZE], rest[SEGMENT_SIZE:]
            if (cla, ins) == (Cla.EAP, Ins.PROCESS_EAP):
                part = CommandApdu(cla, ins, p1 | 0x01, p2, segment)
            else:
                part = CommandApdu(cla | CHAINING, ins, p1, p2, segment)
            response = await self._answer(part)
            if response.sw != _SW_OK:
                return response
        return await self._answer(CommandApdu(cla, ins, p1, p2, rest, None if rest else 256))

    async def _operate(self, operation: KeyOperation, number: int, data: bytes) -> bytes:
        return await self._send(Cla.KEYS, KeyIns.OPERATE, operation, number, data)

    async def _outcome_of(self, operation: KeyRequest) -> KeyOutcome:
        try:
            return await self._operate(*operation)
        except (CardError, ApduError) as error:
            return error

    async def _operate_at_once(self, port: PipeliningPort, operations: Sequence[KeyRequest]) -> list[KeyOutcome]:
        commands = [CommandApdu(Cla.KEYS, KeyIns.OPERATE, *operation, self._le()) for operation in operations]
        try:
            responses = await port.transmit_many([command.encode() for command in commands])
        except CardGoneError as error:
            return [error]
        outcomes: list[KeyOutcome] = []
        for operation, untrusted in zip(operations, responses, strict=False):
            try:
                response = ResponseApdu.decode(untrusted)
                if response.sw1 in (0x61, 0x6C, 0x9F):
                    # A card that gives its answers in pieces has dropped the rest of this one at the next command.
                    outcomes.append(await self._outcome_of(operation))
                else:
                    outcomes.append(_data_of(response, KeyIns.OPERATE))
            except ApduError as error:
                outcomes.append(error)
        if len(responses) < len(operations):
            outcomes.append(CardGoneError("the connection to the card was lost"))
        return outcomes

    async def _send_function(self, function: MethodFunction, data: bytes = b"") -> bytes:
        return await self._send(Cla.EAP, Ins.METHOD_FUNCTION, function, 0x00, data)

    async def _send_sized(self, cla: int, ins: int, p1: int, p2: int, size: int) -> bytes:
        data = _data_of(await self._answer(CommandApdu(cla, ins, p1, p2, le=size)), ins)
        if len(data) != size:
            raise CardFormatError(f"instruction {ins:02X} answered {len(data)} bytes in place of {size}")
        return data

    def _le(self) -> int:
        return MAX_RESPONSE if self.segmentation is Segmentation.EXTENDED else 256

    async def _send(self, cla: int, ins: int, p1: int, p2: int, data: bytes = b"") -> bytes:
        """The whole data of the answer to a command of any length."""
        return _data_of(await self.exchange(CommandApdu(cla, ins, p1, p2, data, self._le())), ins)

    async def _answer(self, command: CommandApdu) -> ResponseApdu:
        """One command, and whatever it takes to fetch its whole answer."""
        response = await self._transmit(command)
        if response.sw1 == 0x6C:
            le = response.sw2 or 256
            response = await self._transmit(
                CommandApdu(command.cla, command.ins, command.p1, command.p2, command.data, le)
            )
        data = bytearray(response.data)
        while response.sw1 in (0x61, 0x9F):
            ins = Ins.GET_RESPONSE if response.sw1 == 0x61 else Ins.FETCH
            response = await self._transmit(CommandApdu(Cla.EAP, ins, 0x00, 0x00, le=response.sw2 or 256))
            data += response.data
            if not response.data or len(data) > MAX_RESPONSE:
                break  # a card that promises more and more
        return ResponseApdu(bytes(data), response.sw)

    async def _transmit(self, command: CommandApdu) -> ResponseApdu:
        return ResponseApdu.decode(await self.port.transmit(command.encode()))


def pad_pin(pin: bytes) -> bytes:
    """A PIN as it travels: 4 to 8 bytes, none of them FF, filled up with FF to 8. Raises CardFormatError."""
    if not MIN_PIN_SIZE <= len(pin) <= PIN_SIZE or 0xFF in pin:
        raise CardFormatError("a PIN has 4 to 8 characters")
    return pin.ljust(PIN_SIZE, b"\xff")


def _data_of(response: ResponseApdu, ins: int) -> bytes:
    if response.sw != _SW_OK:
        raise status_error(response.sw, ins)
    return response.data


def _name(untrusted: bytes) -> str:
    try:
        return untrusted.decode("ascii")
    except UnicodeDecodeError:
        raise CardFormatError("the name of an identity is not ASCII") from None


async def tell_tls_parameters(card: CardClient, parameters: TlsParameters) -> bool:
    """Set-TLS-Parameters for a card of any version: one that knows none of ``report``, ``server_port`` and ``eap_mtu`` is told the others.

    Returns whether it was told all. Raises StatusError when it refuses those, too.
    """
    known = dataclasses.replace(parameters, report=False, server_port=0, eap_mtu=None)
    try:
        await card.set_tls_parameters(parameters)
    except StatusError as error:
        if error.sw != _WRONG_DATA or known == parameters:
            raise
        await card.set_tls_parameters(known)
        return False
    return True
