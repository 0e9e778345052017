"""Cards in memory: engines that talk to each other as docking hosts would make them, and as EAP would."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from secfunet.card.parameters import EapState, TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.eap_tls import EapTlsMessage
from secure_element.eap_engine import EapEngine, TlsIdView

ACK = EapTlsMessage().encode()


def engine(
    tls_id: TlsIdView, parameters: TlsParameters, *, fragment: int = 16384, legacy_tls: bool = False
) -> EapEngine:
    card = EapEngine(randbytes=os.urandom, legacy_tls=legacy_tls, docking_fragment=fragment, eap_fragment=fragment)
    card.select_identity(tls_id)
    card.set_parameters(parameters)
    card.reset_state()
    return card


class Dock:
    """What a docking host does with a card: wraps flights, fetches fragments. ``fragment``: of what it sends; None: one packet."""

    def __init__(self, card: EapEngine, *, fragment: int | None = None, unix_time: int | None = None) -> None:
        self.card = card
        self.fragment = fragment
        self.unix_time = int(time.time()) if unix_time is None else unix_time
        self.identifier = 1
        self.code = EapCode.RESPONSE
        self.packets = 0

    def _exchange(self, data: bytes) -> EapTlsMessage:
        self.packets += 1
        packet = EapPacket(self.code, self.identifier, EapType.TLS, data)
        self.identifier = (self.identifier + 1) & 0xFF
        answer = EapPacket.decode(self.card.process(packet.encode(), self.unix_time))
        assert answer.type == EapType.TLS
        assert answer.code == (EapCode.RESPONSE if self.code is EapCode.REQUEST else EapCode.REQUEST)
        return EapTlsMessage.decode(answer.data)

    def start_code(self) -> None:
        """The card is the client; its handshake has begun."""
        self.code = EapCode.REQUEST

    def start(self) -> bytes:
        self.start_code()
        return self._collect(self._exchange(EapTlsMessage(start=True).encode()))

    def flight(self, records: bytes) -> bytes:
        """Gives a flight to the card; returns its flight, or nothing."""
        answer = EapTlsMessage()
        pieces = [*self._pieces(records)]
        for index, piece in enumerate(pieces):
            if index:
                assert answer.is_ack
            answer = self._exchange(piece.encode())
        return self._collect(answer)

    def ack(self) -> EapTlsMessage:
        return self._exchange(ACK)

    def _pieces(self, records: bytes) -> Iterator[EapTlsMessage]:
        size = self.fragment or len(records)
        for offset in range(0, len(records), size):
            more = offset + size < len(records)
            total = len(records) if self.fragment and not offset else None
            yield EapTlsMessage(records[offset : offset + size], more=more, total_length=total)

    def _collect(self, answer: EapTlsMessage) -> bytes:
        collected = bytearray(answer.data)
        total = answer.total_length
        while answer.more:
            answer = self.ack()
            collected += answer.data
        assert total is None or len(collected) == total
        return bytes(collected)


def handshake(client: Dock, server: Dock) -> None:
    """Two cards, each with its docking host, until both are through."""
    flight = client.start()
    for _ in range(6):
        if flight:
            flight = server.flight(flight)
        if client.card.state is EapState.AUTHENTICATED and server.card.state is EapState.AUTHENTICATED:
            break
        if flight:
            flight = client.flight(flight)
    assert client.card.state is EapState.AUTHENTICATED
    assert server.card.state is EapState.AUTHENTICATED
