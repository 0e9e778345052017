"""The peer's end counts in every state: nothing is waited for that cannot come any more, and what came before it goes where it belongs."""

from __future__ import annotations

import pytest

from secfunet.tandem.card_link import EapCardLink
from secfunet.tandem.connection import AskCard, StartCard, TakeKeys, TandemConnection, TandemState
from secfunet.tls.cipher_suites import TLS_1_2, TLS_1_3
from secfunet.tls.errors import TruncatedStreamError
from tests.support.pki import CertificateAuthority
from tests.tandem.engine_card import EngineCard, Host, run
from tests.tandem.test_both_ends import VERSIONS, only

AUTHORITY = CertificateAuthority()
DATA = b"data before the end"


class Play:
    """One end, step by step; at moment ``stop`` the end of its peer comes. ``step`` returns False when nothing more happens."""

    def __init__(self, role: str, version: int, stop: int) -> None:
        parameters = only(version)
        other = "server" if role == "client" else "client"
        names = {"client": "localhost", "server": ""}
        self.core = TandemConnection(role, parameters, server_name=names[role])  # type: ignore[arg-type]
        self.peer = Host(TandemConnection(other, parameters, server_name=names[other]), EngineCard(AUTHORITY))  # type: ignore[arg-type]
        self.card = EngineCard(AUTHORITY)
        self.link = EapCardLink(self.card, self.core.role, parameters, names[role])  # type: ignore[arg-type]
        self.stop = stop
        self.moments = 0
        self.ended_in: TandemState | None = None

    def moment(self) -> None:
        if self.moments == self.stop:
            self.ended_in = self.core.state
            self.core.received_eof()
        self.moments += 1

    def run(self) -> None:
        self.moment()
        self.core.start()
        self.moment()
        while self.core.state is not TandemState.OPEN:
            command = self.core.next_command()
            if command is None:
                assert self.ended_in is None, "it waits for a peer that has closed"
                self.exchange()
                self.moment()
                self.core.received()
            else:
                self.moment()
                self.ask(command)
            self.moment()

    def exchange(self) -> None:
        """The peer gets what was sent, and answers; when it is through it sends data as well, at once."""
        peer = self.peer.core
        if peer.state is not TandemState.OPEN:
            peer.incoming.feed(self.core.take_output())
            peer.received()
            answer = self.peer.work()
            if peer.state is TandemState.OPEN:
                answer += peer.stream.seal(DATA)
            self.core.incoming.feed(answer)

    def ask(self, command: object) -> None:
        match command:
            case StartCard():
                flight = run(self.link.start())
                self.core.card_answered(flight, reports_unused=self.link.reports_unused)
            case AskCard(flight=flight):
                flight = run(self.link.ask(flight))
                self.core.card_answered(flight, reports_unused=self.link.reports_unused)
            case TakeKeys():
                taken = run(self.link.hand_over())
                assert taken is not None
                self.core.card_keys(*taken)


@VERSIONS
@pytest.mark.parametrize("role", ["client", "server"])
def test_the_end_of_the_peer_in_each_state(role: str, version: int) -> None:
    states = set()
    outcomes = []
    stop = 0
    while True:
        play = Play(role, version, stop)
        try:
            play.run()
        except TruncatedStreamError:
            outcomes.append("truncated")
            if play.ended_in is TandemState.OPEN:
                break
            assert play.core.state is TandemState.FAILED
            assert play.core.next_command() is None
            assert play.core.received() is None, "nothing happens any more"
        else:
            outcomes.append("open")
            has_data = role == "server" or version == TLS_1_2
            if has_data and play.peer.core.state is TandemState.OPEN:
                assert play.core.stream.receive() == DATA
            with pytest.raises(TruncatedStreamError):
                play.core.received_eof()
        assert play.ended_in is not None
        states.add(play.ended_in)
        stop += 1
    expected = {TandemState.IDLE, TandemState.WAIT_PEER, TandemState.WAIT_CARD, TandemState.WAIT_KEYS}
    assert states == expected
    # As soon as the peer's last flight is there, the handshake is completed; before, never.
    first_open = outcomes.index("open")
    assert set(outcomes[:first_open]) == {"truncated"}
    assert set(outcomes[first_open:-1]) == {"open"}


@pytest.mark.parametrize("role", ["client", "server"])
def test_no_question_is_asked_for_a_peer_that_closed_too_early(role: str) -> None:
    for stop in (0, 1):
        play = Play(role, TLS_1_3, stop)
        with pytest.raises(TruncatedStreamError):
            play.run()
        assert play.card.questions == 0
    server = Host(TandemConnection("server", only(TLS_1_3)), EngineCard(AUTHORITY))
    client = Host(TandemConnection("client", only(TLS_1_3), server_name="localhost"), EngineCard(AUTHORITY))
    server.core.incoming.feed(client.work())
    server.core.received()
    assert server.core.state is TandemState.WAIT_CARD
    with pytest.raises(TruncatedStreamError):
        server.core.received_eof()
    assert not server.work()
    assert server.card.questions == 0
