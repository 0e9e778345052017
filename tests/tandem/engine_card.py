"""The card's real EAP engine in this process, under the link that the docking host uses: handshakes without a socket or a process."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from datetime import timedelta
from typing import TypeVar, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import DNSName

from secfunet.apdu import status_error
from secfunet.card import CardClient
from secfunet.card.parameters import EapState, NegotiatedTls, TlsParameters
from secfunet.tandem.card_link import EapCardLink
from secfunet.tandem.connection import AskCard, StartCard, TakeKeys, TandemConnection
from secure_element.eap_engine import EapDiscarded, EapEngine, EapFailure, EapNotReady, TlsIdView
from tests.support.pki import CertificateAuthority

T = TypeVar("T")


class EngineCard:
    """The methods of CardClient that a handshake needs, on an engine of our own."""

    def __init__(self, authority: CertificateAuthority, *, name: str = "localhost", expired: bool = False) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = authority.issue(
            key.public_key(),
            name,
            names=[DNSName(name)],
            not_before=timedelta(hours=-2),
            not_after=timedelta(hours=-1 if expired else 1),
        )
        self.engine = EapEngine(randbytes=os.urandom, legacy_tls=True)
        self.engine.select_identity(TlsIdView("id", b"id", certificate, (authority.certificate,), key))
        self.questions = 0

    async def reset_state(self) -> None:
        self.engine.reset_state()

    async def set_tls_parameters(self, parameters: TlsParameters) -> None:
        self.engine.set_parameters(parameters)

    async def process_eap(self, packet: bytes, unix_time: int | None = None) -> bytes:
        self.questions += 1
        try:
            return self.engine.process(packet, unix_time)
        except EapDiscarded:
            raise status_error(0x7000, 0x80) from None
        except EapFailure:
            raise status_error(0x7001, 0x80) from None

    async def state(self) -> EapState:
        return self.engine.state

    async def cipher_suite(self) -> NegotiatedTls:
        return self._ready(self.engine.negotiated)

    async def key_block(self) -> bytes:
        return self._ready(self.engine.key_block)

    async def peer_certificates(self) -> tuple[bytes, ...]:
        return self._ready(self.engine.peer_certificates)

    def _ready(self, answer):  # type: ignore[no-untyped-def]
        try:
            return answer()
        except EapNotReady:
            raise status_error(0x6985, 0x82) from None


def run(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("T", stop.value)
    raise AssertionError("it waited")


class Host:
    """A docking host without a network: a core and its card."""

    def __init__(self, core: TandemConnection, card: EngineCard) -> None:
        self.core = core
        self.card = card
        self.link = EapCardLink(
            cast("CardClient", card), core.role, core.parameters, core.server_name, core.server_port
        )
        self.core.start()

    def work(self) -> bytes:
        """Do what the core wants of the card; return what it wants sent."""
        while (command := self.core.next_command()) is not None:
            match command:
                case StartCard():
                    self.core.card_answered(run(self.link.start()), reports_unused=self.link.reports_unused)
                case AskCard(flight=flight):
                    answer = run(self.link.ask(flight))
                    self.core.card_answered(answer, reports_unused=self.link.reports_unused)
                case TakeKeys():
                    taken = run(self.link.hand_over())
                    if taken is None:
                        self.core.card_waits()
                    else:
                        self.core.card_keys(*taken)
        return self.core.take_output()
