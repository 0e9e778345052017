"""The handshake's questions to a card, as the published EAP-TLS bridge asks them (draft-urien-uta-tls-dtls-security-module, 5).

Client: Reset-State, Set-TLS-Parameters, EAP-Request/TLS Start with the Unix time; then each flight of the server in EAP-Requests.
Server: Reset-State, Set-TLS-Parameters; then each flight of the client in EAP-Responses, beginning with the ClientHello.
The EAP identity is not used. A flight goes in one packet if it fits (the client sends 6 bytes in front of it), else in fragments.
"""

from __future__ import annotations

import dataclasses
from typing import Final, Protocol

from secfunet.apdu import StatusError
from secfunet.card.client import CardClient, tell_tls_parameters
from secfunet.card.parameters import EapState, NegotiatedTls
from secfunet.eap import EapCode, EapError, EapPacket, EapType
from secfunet.eap_tls import ACK, Asked, EapTlsChannel, EapTlsMessage
from secfunet.tandem.errors import HandshakeRefusedError
from secfunet.tandem.parameters import TandemParameters
from secfunet.tls.flights import Role

_FRAGMENT: Final = 60_000
_MAX_FRAGMENTS: Final = 1024
"""More packets than a flight of 128 KiB needs at 128 bytes each."""

_NOT_IN_THIS_STATE: Final = 0x6985


class CardLink(Protocol):
    """A card that has been leased for one handshake."""

    @property
    def reports_unused(self) -> bool:
        """Whether it says what it did not use of the bytes that it was given; known when it has answered once."""
        ...

    async def start(self) -> bytes:
        """Client: return the ClientHello's record."""
        ...

    async def ask(self, flight: bytes) -> bytes:
        """Give it the peer's flight; return its own, or nothing when it has nothing to say (yet). Raises HandshakeRefusedError."""
        ...

    async def hand_over(self) -> tuple[NegotiatedTls, bytes, tuple[bytes, ...]] | None:
        """Return what was negotiated, the key block, and the peer's certificates; None if the card needs more of the peer first.

        Raises HandshakeRefusedError.
        """
        ...

    async def bring_tickets(self, records: bytes) -> None:
        """Client, TLS 1.3: give it the server's tickets, as they came."""
        ...


class EapCardLink:
    """A CardLink over an EAP-TLS card. CardGoneError and the like pass through; a card's refusal becomes HandshakeRefusedError."""

    def __init__(
        self, card: CardClient, role: Role, parameters: TandemParameters, server_name: str, server_port: int = 0
    ) -> None:
        """``server_name`` and ``server_port`` say whose session a client's card may resume (0: the port is not known)."""
        self._card = card
        self._tls = parameters.for_card(role, server_name, server_port)
        self._role = role
        self._clock = parameters.clock
        self.reports_unused = False
        self._channel = EapTlsChannel(_FRAGMENT)
        self._identifier = 0
        self._is_prepared = False

    async def start(self) -> bytes:
        """See CardLink."""
        await self._prepare()
        return await self._exchange(EapTlsMessage(start=True), with_time=True)

    async def ask(self, flight: bytes) -> bytes:
        """See CardLink."""
        is_first = not self._is_prepared
        if is_first:
            await self._prepare()
        first = self._channel.send(flight)
        if not first.more:
            # The bridge's 6-byte prefix: no length in front of a flight that is whole.
            first = EapTlsMessage(first.data)
        return await self._exchange(first, with_time=is_first)

    async def hand_over(self) -> tuple[NegotiatedTls, bytes, tuple[bytes, ...]] | None:
        """See CardLink."""
        try:
            negotiated = await self._card.cipher_suite()
            certificates = await self._card.peer_certificates()
            return negotiated, await self._card.key_block(), certificates
        except StatusError as error:
            state = await self._card.state()
            if error.sw == _NOT_IN_THIS_STATE and state is EapState.AUTHENTICATING:
                return None
            if state is EapState.NOT_AUTHENTICATED:
                reason = "it has refused the peer, and told it so; why is in the card's log"
                raise HandshakeRefusedError(reason, peer_is_told=True) from error
            raise HandshakeRefusedError(f"it hands over no keys ({error.sw:04X}, state {state:02X})") from error

    async def bring_tickets(self, records: bytes) -> None:
        """See CardLink."""
        await self._exchange(EapTlsMessage(records), with_time=False)

    async def _prepare(self) -> None:
        self._is_prepared = True
        await self._card.reset_state()
        self.reports_unused = await tell_tls_parameters(self._card, dataclasses.replace(self._tls, report=True))

    async def _exchange(self, message: EapTlsMessage, *, with_time: bool) -> bytes:
        """Send one message, exchange whatever fragments it takes, and return the card's flight."""
        code = EapCode.REQUEST if self._role == "client" else EapCode.RESPONSE
        unix_time = int(self._clock()) if with_time else None
        try:
            for _ in range(_MAX_FRAGMENTS):
                packet = EapPacket(code, self._identifier, EapType.TLS, message.encode()).encode()
                untrusted = await self._card.process_eap(packet, unix_time)
                unix_time = None
                if not untrusted:
                    return b""
                answer = EapPacket.decode(untrusted)
                # A client card answers under our number; a server card sets the number that we answer under.
                self._identifier = (answer.identifier + (self._role == "client")) & 0xFF
                if answer.code is EapCode.FAILURE:
                    raise HandshakeRefusedError("EAP-Failure")
                if answer.type != EapType.TLS:
                    raise HandshakeRefusedError(f"it answered with EAP type {answer.type}")
                got = self._channel.receive(EapTlsMessage.decode(answer.data))
                if isinstance(got, bytes):
                    return got
                if got is Asked.NOTHING:
                    return b""
                message = ACK if got is Asked.ACK else self._channel.next_fragment()
        except EapError as error:
            raise HandshakeRefusedError(f"its answer is not EAP-TLS ({error})") from error
        except StatusError as error:
            raise HandshakeRefusedError(f"status {error.sw:04X}") from error
        raise HandshakeRefusedError("it never ends its flight")
