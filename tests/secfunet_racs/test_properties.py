"""RACS between two ends in memory, and under bytes that nobody meant: a value, or the documented error."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.racs.client import ClientConnection
from secfunet.racs.commands import (
    Apdu,
    Command,
    CommandError,
    Echo,
    GetSen,
    GetVersion,
    ListCards,
    PowerOn,
    Reset,
    Sen,
    SetVersion,
    Shutdown,
    encode_command,
    parse_command,
)
from secfunet.racs.errors import RacsProtocolError, RacsValueError
from secfunet.racs.seids import MAX_SEIDS, decode_seids, encode_seids
from secfunet.racs.server import Answer, Request, ServerConnection
from secfunet.racs.status import Status, Verb, success
from secfunet.racs.syntax import MAX_ANSWER, MAX_COMMANDS, MAX_LINE, MAX_REQUEST

SEIDS = st.from_regex(r"(?:(?![\[\];])[!-~]){1,64}", fullmatch=True)
TOKENS = st.from_regex(r"[!-~]{1,64}", fullmatch=True)
APDUS = st.binary(min_size=4, max_size=300)
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.just(GetVersion()),
    st.just(ListCards()),
    st.builds(SetVersion, TOKENS),
    st.builds(PowerOn, SEIDS),
    st.builds(Reset, SEIDS, st.booleans()),
    st.builds(Shutdown, SEIDS),
    st.builds(Echo, TOKENS),
    st.builds(GetSen, SEIDS),
    st.builds(Sen, SEIDS),
    st.builds(Sen, SEIDS, TOKENS, st.none() | st.binary(min_size=1, max_size=16)),
    st.builds(
        Apdu,
        SEIDS,
        APDUS,
        st.none() | st.integers(0, 0xFFFF),
        st.none() | st.integers(0, 0xFF),
        st.binary(min_size=4, max_size=4),
    ),
)
# Text that looks like the protocol reaches deeper than bytes that do not.
LINES = st.one_of(
    st.sampled_from(
        [
            "BEGIN",
            "END",
            "BEGIN x",
            "LIST",
            "ECHO a APPEND",
            "+001 000",
            "-606 001 no",
            "APDU s 00A40400",
            "",
            " ",
            "END x",
        ]
    ),
    st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40),
    COMMANDS.map(encode_command),
)
STREAMS = st.one_of(
    st.binary(max_size=200),
    st.lists(LINES, max_size=12).map(lambda found: "".join(f"{line}\r\n" for line in found).encode()),
)


@given(command=COMMANDS, line=st.integers(1, 999), append=st.booleans())
def test_commands_there_and_back(command: Command, line: int, append: bool) -> None:
    step = parse_command(line, encode_command(command, append=append))
    assert step.command == command
    assert step.append or not append


@given(st.text(max_size=200))
def test_any_line_is_a_command_or_a_command_error(untrusted: str) -> None:
    problem = None
    try:
        step = parse_command(1, untrusted)
    except CommandError as error:
        problem = error.status(1)
    if problem is None:
        assert parse_command(1, encode_command(step.command, append=step.append)) == step
    else:
        assert Status.decode(problem.encode()) == problem


@given(st.lists(SEIDS, max_size=40) | st.lists(st.from_regex(r"[a-c]{0,2}[0-9]{1,3}", fullmatch=True), max_size=60))
def test_lists_there_and_back(seids: list[str]) -> None:
    assert set(decode_seids(encode_seids(seids))) == set(seids)


@given(st.lists(st.text(max_size=40), max_size=5) | st.lists(st.from_regex(r"[a-z\[\]0-9;-]{0,30}"), max_size=5))
def test_any_list_is_bounded_or_refused(untrusted: list[str]) -> None:
    with contextlib.suppress(RacsProtocolError):
        assert len(decode_seids(untrusted)) <= MAX_SEIDS


@pytest.mark.parametrize(
    "token", ["a[0-999999999]", "a[0-4095;0-4095]", "a[5-4]", "a[]", "a[1-]", "a[" + ";".join(["0-4000"] * 9000) + "]"]
)
def test_a_list_that_unfolds_without_end_is_refused(token: str) -> None:
    with pytest.raises(RacsProtocolError):
        decode_seids([token])


@given(st.text(max_size=100))
def test_any_status_line_is_a_value_or_refused(untrusted: str) -> None:
    try:
        status = Status.decode(untrusted)
    except RacsProtocolError:
        return
    assert Status.decode(status.encode()) == status


def take_all(server: ServerConnection, pieces: list[bytes]) -> list[Request]:
    requests = []
    for piece in pieces:
        server.receive(piece)
        while (request := server.next_request()) is not None:
            requests.append(request)
    return requests


def outcome_of(pieces: list[bytes]) -> tuple[list[Request], bytes | None]:
    """The requests that a server finds, and what it says before it closes."""
    server = ServerConnection()
    requests: list[Request] = []
    try:
        for piece in pieces:
            server.receive(piece)
            while (request := server.next_request()) is not None:
                Answer(request).encode()
                requests.append(request)
    except RacsProtocolError as error:
        return requests, error.answer
    return requests, None


@given(stream=STREAMS, cuts=st.lists(st.integers(0, 400), max_size=6), ends=st.booleans())
def test_a_server_takes_any_bytes_however_they_are_cut(stream: bytes, cuts: list[int], ends: bool) -> None:
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    pieces = [stream[begin:end] for begin, end in itertools.pairwise(places)]
    end = [b""] if ends else []
    requests, last_words = outcome_of([*([stream] if stream else []), *end])
    assert outcome_of([*pieces, *end]) == (requests, last_words)
    assert last_words is None or last_words.endswith(b"END\r\n")


@given(stream=STREAMS)
def test_a_client_takes_any_bytes(stream: bytes) -> None:
    client = ClientConnection()
    client.send([Echo("x"), ListCards()], append=True)
    try:
        response = client.receive(stream)
    except RacsProtocolError:
        assert client.is_closed
    else:
        assert response is None or response.statuses


@given(commands=st.lists(COMMANDS, max_size=8), identifier=st.none() | TOKENS, append=st.booleans())
def test_a_request_and_its_answer_arrive(commands: list[Command], identifier: str | None, append: bool) -> None:
    client, server = ClientConnection(), ServerConnection()
    (request,) = take_all(server, [client.send(commands, identifier=identifier, append=append)])
    assert request.identifier == identifier
    assert [step.command for step in request.steps] == commands
    answer = Answer(request)
    for step in request.steps:
        assert answer.add(step, success(step.command.verb, step.line, f"line {step.line}"))
    response = client.receive(answer.encode())
    assert response is not None
    assert response.failed is None
    if append:
        assert [status.text for status in response.statuses if commands] == [
            f"line {n + 1}" for n in range(len(commands))
        ]
    elif commands:
        assert response.statuses[-1].text == f"line {len(commands)}"


def test_the_longest_apdu_fits() -> None:
    command = Apdu("s" * 64, bytes(65544), 0x9000, 0x61, bytes.fromhex("A0C00000"))
    (request,) = take_all(ServerConnection(), [ClientConnection().send([command], append=True)])
    assert request.steps[0].command == command
    with pytest.raises(RacsValueError):
        ClientConnection().send([Apdu("s", bytes(65545))])


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"BEGIN\r\nECHO " + b"x" * MAX_LINE, id="a line without end"),
        pytest.param(b"x" * (MAX_LINE + 2), id="no line at all"),
        pytest.param(b"BEGIN\r\n" + b"ECHO x\r\n" * (MAX_COMMANDS + 2), id="commands without end"),
        pytest.param(b"BEGIN\r\n" + (b"DANCE " + b"x" * 130000 + b"\r\n") * 5, id="a request without end"),
    ],
)
def test_what_has_no_end_is_given_up(stream: bytes) -> None:
    server = ServerConnection()
    with pytest.raises(RacsProtocolError):
        take_all(server, [stream[begin : begin + 65536] for begin in range(0, len(stream), 65536)])


def test_a_request_with_every_command_that_it_may_have() -> None:
    commands: list[Command] = [Echo("x")] * MAX_COMMANDS
    (request,) = take_all(ServerConnection(), [ClientConnection().send(commands)])
    assert len(request.steps) == MAX_COMMANDS
    with pytest.raises(RacsValueError):
        ClientConnection().send([Echo("x")] * (MAX_COMMANDS + 1))
    with pytest.raises(RacsValueError):
        ClientConnection().send([Apdu("s", bytes(65000))] * (MAX_REQUEST // 130000 + 1))


def test_an_answer_that_grows_too_long_ends_with_an_error() -> None:
    client, server = ClientConnection(), ServerConnection()
    (request,) = take_all(server, [client.send([Echo("x")] * 20, append=True)])
    answer = Answer(request)
    outcomes = (answer.add(step, success(Verb.APDU, step.line, "00" * 60000)) for step in request.steps)
    assert 0 < len(list(itertools.takewhile(bool, outcomes))) < 10
    encoded = answer.encode()
    assert len(encoded) <= MAX_ANSWER
    response = client.receive(encoded)
    assert response is not None
    assert response.failed is not None
    assert response.failed.event == 9


def test_a_client_bounds_an_answer() -> None:
    client = ClientConnection()
    client.send([Echo("x")] * 20, append=True)
    with pytest.raises(RacsProtocolError):
        client.receive(b"BEGIN\r\n" + b"".join(b"+009 %03d %s\r\n" % (n, b"x" * 120000) for n in range(1, 20)))
