"""The EAP-TLS applet: PINs, identities, EAP, and what can be asked of a key. Who may ask was looked at before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from cryptography import x509

from secfunet.apdu import CommandApdu
from secfunet.card.errors import CardFormatError
from secfunet.card.instructions import MIN_PIN_SIZE, PIN_SIZE, Cla, Ins, KeyIns, KeyOperation, MethodFunction
from secfunet.card.parameters import EapState, TlsParameters, encode_certificates
from secfunet.card.profile import CardProfile
from secure_element.binding import Bindings
from secure_element.commands import VERIFY_PIN_ALIAS
from secure_element.eap_engine import EAP_FRAGMENT, EapDiscarded, EapEngine, EapFailure, TlsIdView
from secure_element.errors import CommandRefusedError, Sw
from secure_element.identities import Identities
from secure_element.keys import KeyPair
from secure_element.pin import PinKeeper
from secure_element.segmentation import AnswerStyle
from secure_element.store import CardStore, IdentityRecord, RandBytes
from secure_element.tokens import UserTokens
from secure_element.work import Work

log = logging.getLogger(__name__)

VERSION: Final = b"\x01\x00"

_UNIX_TIME_SIZE: Final = 4
_SESSION_KEY_SIZE: Final = 64
_EXTENDED_SESSION_KEY_SIZE: Final = 128


class SessionKeyOrder(Enum):
    """In which order Get-Session-Key gives the halves of the MSK."""

    TRACE = "trace"  # MSK[32:64] ‖ MSK[0:32], as the published EAP-TLS trace does (what RADIUS calls Send ‖ Recv)
    RFC = "rfc"  # as RFC 5216 has them


@dataclass(frozen=True)
class CardOptions:
    """What an administrator may decide about a card."""

    answers: AnswerStyle = AnswerStyle.DRAFT
    session_key_order: SessionKeyOrder = SessionKeyOrder.TRACE
    legacy_tls: bool = False
    eap_fragment: int = EAP_FRAGMENT
    """Most TLS bytes in a packet of full EAP."""


class EapApplet:
    """One applet over one open store."""

    def __init__(self, store: CardStore, options: CardOptions, randbytes: RandBytes) -> None:
        self._options = options
        self._randbytes = randbytes
        self._pin = PinKeeper(store, randbytes)
        self._identities = Identities(store)
        self.work = Work()
        self._bindings = Bindings(self._identities, randbytes, self.work)
        self._tokens = UserTokens(store, self._identities)
        self.handlers: dict[tuple[int, int], Callable[[CommandApdu], bytes]] = {
            (Cla.EAP, Ins.VERIFY_PIN): self._verify_pin,
            (Cla.EAP, VERIFY_PIN_ALIAS): self._verify_pin,
            (Cla.EAP, Ins.CHANGE_PIN): self._change_pin,
            (Cla.EAP, Ins.UNBLOCK_PIN): self._unblock_pin,
            (Cla.EAP, Ins.SET_IDENTITY): self._set_identity,
            (Cla.EAP, Ins.GET_NEXT_IDENTITY): self._get_next_identity,
            (Cla.EAP, Ins.GET_CURRENT_IDENTITY): self._get_current_identity,
            (Cla.EAP, Ins.GET_PROFILE_DATA): self._get_profile_data,
            (Cla.EAP, Ins.STATE): self._state,
            (Cla.EAP, Ins.PROCESS_EAP): self._process_eap,
            (Cla.EAP, Ins.METHOD_FUNCTION): self._method_function,
            (Cla.EAP, Ins.GET_EXPORTED_PARAMETER): self._get_exported_parameter,
            (Cla.EAP, Ins.GET_SESSION_KEY): self._get_session_key,
            (Cla.KEYS, KeyIns.OPERATE): self._operate,
            (Cla.KEYS, KeyIns.GET_CERTIFICATE): self._get_certificate,
            (Cla.KEYS, KeyIns.GENERATE_KEY): self._generate_key,
            (Cla.KEYS, KeyIns.REQUEST_CERTIFICATE): self._request_certificate,
            (Cla.KEYS, KeyIns.LOAD_IDENTITY): self._load_identity,
            (Cla.KEYS, KeyIns.DELETE_IDENTITY): self._delete_identity,
            (Cla.KEYS, KeyIns.BIND_IDENTITY): self._bind_identity,
            (Cla.KEYS, KeyIns.GET_BINDING): self._get_binding,
            (Cla.KEYS, KeyIns.SEAL): self._seal,
            (Cla.KEYS, KeyIns.TRUST_TOKEN_AUTHORITY): self._trust_token_authority,
            (Cla.KEYS, KeyIns.GET_TOKEN_AUTHORITIES): self._get_token_authorities,
            (Cla.KEYS, KeyIns.LOAD_TOKEN): self._load_token,
            (Cla.KEYS, KeyIns.LIST_TOKENS): self._list_tokens,
            (Cla.KEYS, KeyIns.GET_TOKEN): self._get_token,
            (Cla.KEYS, KeyIns.DELETE_TOKEN): self._delete_token,
        }
        self.reset()

    def reset(self) -> None:
        """Everything volatile is forgotten: PINs, EAP, sessions to resume."""
        self._forget_tls()
        self._forget_session()
        self._bindings.forget()

    def select(self) -> None:
        """PINs, identity and EAP state are as after power-on; TLS sessions to resume stay."""
        self._forget_session()
        self._engine.select_identity(None)

    def _forget_session(self) -> None:
        self.is_user_verified = False
        self._chosen: str | None = None
        self._cursor: str | None = None

    # PINs

    def pin_needed(self) -> CommandRefusedError:
        """What the card answers to whom it does not know."""
        return CommandRefusedError(Sw.PIN_ATTEMPTS | self._pin.attempts)

    def _verify_pin(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        if not command.data:
            raise self.pin_needed()
        if len(command.data) != PIN_SIZE:
            raise CommandRefusedError(Sw.WRONG_LENGTH)
        self._check_pin(command.data)
        self.is_user_verified = True
        return b""

    def _change_pin(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        if len(command.data) != 2 * PIN_SIZE:
            raise CommandRefusedError(Sw.WRONG_LENGTH)
        old, new = command.data[:PIN_SIZE], command.data[PIN_SIZE:]
        _check_new_pin(new)
        self._check_pin(old)
        self._pin.change(new)
        log.info("PIN changed")
        return b""

    def _unblock_pin(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        if len(command.data) != PIN_SIZE:
            raise CommandRefusedError(Sw.WRONG_LENGTH)
        _check_new_pin(command.data)
        self.is_user_verified = False
        self._pin.change(command.data)
        log.info("PIN replaced by the administrator")
        return b""

    def _check_pin(self, untrusted_pin: bytes) -> None:
        """A failed check takes back what an earlier one opened."""
        self.is_user_verified = False
        try:
            self._pin.verify(untrusted_pin)
        except CommandRefusedError:
            log.warning("PIN refused", extra={"attempts_left": self._pin.attempts})
            raise

    # Identities

    def _current(self) -> IdentityRecord:
        """The identity that was set, else the first."""
        records = self._identities.records
        if self._chosen is not None:
            records = [record for record in records if record.name == self._chosen]
        if not records:
            raise CommandRefusedError(Sw.NO_IDENTITY)
        return records[0]

    def _current_complete(self) -> IdentityRecord:
        record = self._current()
        if not record.is_complete:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        return record

    def _set_identity(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x80)
        record = self._identities.find(command.data)
        if record is None or not record.is_complete:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        view = TlsIdView(
            name=record.name,
            eap_id=record.eap_id,
            certificate=x509.load_der_x509_certificate(record.certificate),
            authorities=tuple(x509.load_der_x509_certificate(authority) for authority in record.authorities),
            private_key=self._identities.key_of(record).private_key,
        )
        self._engine.select_identity(view)
        self._chosen = record.name
        return b""

    def _get_next_identity(self, command: CommandApdu) -> bytes:
        if command.p1 != 0 or command.p2 not in (0x01, 0x02):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        names = [record.name for record in self._identities.records]
        if not names:
            raise CommandRefusedError(Sw.NO_IDENTITY)
        follow = command.p2 == 0x01 and self._cursor in names
        name = names[(names.index(self._cursor or "") + 1) % len(names)] if follow else names[0]
        self._cursor = name
        return name.encode()

    def _get_current_identity(self, command: CommandApdu) -> bytes:
        if command.p2 == 0 and command.p1 in (0x01, 0x02):
            return VERSION
        _expect(command, 0x00, 0x00)
        return self._current().name.encode()

    def _get_profile_data(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        record = self._current_complete()
        return CardProfile(record.eap_id, (record.certificate,), record.authorities).encode()

    def _get_certificate(self, command: CommandApdu) -> bytes:
        """Of the current identity, or of the one that is named."""
        _expect(command, 0x00, 0x00)
        if not command.data:
            return self._current_complete().certificate
        record = self._identities.find(command.data)
        if record is None:
            raise CommandRefusedError(Sw.NO_IDENTITY)
        if not record.is_complete:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)
        return record.certificate

    # EAP and TLS

    def _state(self, command: CommandApdu) -> bytes:
        if command.p2 != 0 or command.p1 not in (0x00, 0x10):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        if command.p1 == 0x10:
            self._engine.reset_state()
            return b""
        return bytes((self._engine.state,))

    def _process_eap(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        if any(record.recipient and record.name == self._chosen for record in self._identities.records):
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)  # nobody speaks TLS in the name of a bound identity
        if len(command.data) < 4:
            raise CommandRefusedError(Sw.DISCARDED)
        length = int.from_bytes(command.data[2:4])
        packet, suffix = command.data[:length], command.data[length:]
        if length < 4 or length > len(command.data) or len(suffix) not in (0, _UNIX_TIME_SIZE):
            raise CommandRefusedError(Sw.DISCARDED)
        before = self._engine.state
        answer = self._ask_engine(lambda: self._engine.process(packet, int.from_bytes(suffix) if suffix else None))
        if self._engine.state is EapState.AUTHENTICATED and before is not EapState.AUTHENTICATED:
            if self._engine.negotiated().resumed:
                self.work.resumed_handshakes += 1
            else:
                self.work.full_handshakes += 1
        return answer

    def _get_session_key(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        key = self._ask_engine(self._engine.session_key)
        if command.le == _EXTENDED_SESSION_KEY_SIZE:
            return key
        msk = key[:_SESSION_KEY_SIZE]
        if self._options.session_key_order is SessionKeyOrder.TRACE:
            return msk[32:] + msk[:32]
        return msk

    def _get_exported_parameter(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        if len(command.data) != 1:
            raise CommandRefusedError(Sw.WRONG_LENGTH)
        return self._ask_engine(lambda: self._engine.exported_parameter(command.data[0]))

    def _method_function(self, command: CommandApdu) -> bytes:
        if command.p2 != 0:
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        if command.p1 == MethodFunction.SET_TLS_PARAMETERS:
            try:
                parameters = TlsParameters.decode(command.data)
            except CardFormatError:
                raise CommandRefusedError(Sw.WRONG_DATA) from None
            return self._ask_engine(lambda: self._set_parameters(parameters))
        if command.p1 == MethodFunction.CIPHER_SUITE:
            return self._ask_engine(lambda: self._engine.negotiated().encode())
        if command.p1 == MethodFunction.KEY_BLOCK:
            return self._ask_engine(self._engine.key_block)
        if command.p1 == MethodFunction.PEER_CERTIFICATES:
            return self._ask_engine(lambda: encode_certificates(self._engine.peer_certificates()))
        raise CommandRefusedError(Sw.WRONG_P1_P2)

    def _set_parameters(self, parameters: TlsParameters) -> bytes:
        self._engine.set_parameters(parameters)
        return b""

    @staticmethod
    def _ask_engine(ask: Callable[[], bytes]) -> bytes:
        try:
            return ask()
        except EapDiscarded:
            raise CommandRefusedError(Sw.DISCARDED) from None
        except EapFailure as failure:
            raise CommandRefusedError(failure.sw) from None

    # The key pair

    def _operate(self, command: CommandApdu) -> bytes:
        record = self._current_complete()
        if record.recipient:
            raise CommandRefusedError(Sw.CONDITIONS_NOT_SATISFIED)  # its results are not for everybody to see
        key = self._identities.key_of(record)
        operations: dict[int, Callable[[KeyPair, int, bytes], bytes]] = {
            KeyOperation.SIGN: KeyPair.sign,
            KeyOperation.DECRYPT: KeyPair.decrypt,
            KeyOperation.ENCRYPT: KeyPair.encrypt,
            KeyOperation.UNWRAP_KEY: KeyPair.unwrap,
        }
        operation = operations.get(command.p1)
        if operation is None:
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        output = operation(key, command.p2, command.data)
        self.work.private_operations += command.p1 != KeyOperation.ENCRYPT
        return output

    def _generate_key(self, command: CommandApdu) -> bytes:
        _expect(command, command.p1, 0x00)
        self._identities.generate(command.p1, command.data)
        self.work.key_pairs += 1
        log.info("key pair generated")
        return b""

    def _request_certificate(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        return self._identities.request_certificate(command.data)

    def _load_identity(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        self._identities.load(command.data)
        self._forget_tls()
        log.info("identity loaded")
        return b""

    def _delete_identity(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        self._identities.delete(command.data)
        self._forget_tls()
        log.info("identity deleted")
        return b""

    def _bind_identity(self, command: CommandApdu) -> bytes:
        _expect(command, command.p1, 0x00)
        name = self._bindings.bind(command.p1, command.data)
        self._forget_tls()
        log.info("binding changed", extra={"identity": name})
        return b""

    def _get_binding(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        binding = self._bindings.binding_of(self._current_complete())
        return binding.encode() if binding is not None else b""

    def _seal(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        return self._bindings.seal(self._current_complete(), command.data)

    # Tokens of the user

    def _trust_token_authority(self, command: CommandApdu) -> bytes:
        if command.p2 != 0 or command.p1 not in (0x00, 0x01):
            raise CommandRefusedError(Sw.WRONG_P1_P2)
        if command.p1 == 0x01:
            self._tokens.trust(command.data)
        else:
            self._tokens.distrust(command.data)
        log.info("authorities of tokens changed")
        return b""

    def _get_token_authorities(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        return self._tokens.authorities()

    def _load_token(self, command: CommandApdu) -> bytes:
        _expect(command, command.p1, 0x00)
        self._tokens.load(self._current_complete(), command.p1, command.data)
        self.work.private_operations += 1
        log.info("token loaded")
        return b""

    def _list_tokens(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        return self._tokens.listing(self._current_complete())

    def _get_token(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        return self._tokens.value(self._current_complete(), command.data)

    def _delete_token(self, command: CommandApdu) -> bytes:
        _expect(command, 0x00, 0x00)
        self._tokens.delete(self._current_complete(), command.data)
        log.info("token deleted")
        return b""

    def _forget_tls(self) -> None:
        """An identity was changed: no identity is set, and whatever TLS kept of one (its key in Contexts, its sessions) is gone."""
        self._chosen = None
        self._engine = EapEngine(
            randbytes=self._randbytes,
            legacy_tls=self._options.legacy_tls,
            eap_fragment=self._options.eap_fragment,
        )


def _expect(command: CommandApdu, p1: int, p2: int) -> None:
    if (command.p1, command.p2) != (p1, p2):
        raise CommandRefusedError(Sw.WRONG_P1_P2)


def _check_new_pin(untrusted: bytes) -> None:
    """A PIN that can be typed again: 4 to 8 bytes before the FFs."""
    pin = untrusted.rstrip(b"\xff")
    if len(pin) < MIN_PIN_SIZE or 0xFF in pin:
        raise CommandRefusedError(Sw.WRONG_DATA)
