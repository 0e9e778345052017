"""Every example of draft-urien-core-racs-15, at both ends, and what the one public server says otherwise."""

from __future__ import annotations

import pytest

from secfunet.racs.apdu_run import ApduRun
from secfunet.racs.client import ClientConnection, Response, response_apdu
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
from secfunet.racs.errors import RacsProtocolError, RacsRefusedError
from secfunet.racs.seids import decode_seids, encode_seids
from secfunet.racs.server import Answer, Request, ServerConnection
from secfunet.racs.status import Event, Status, Verb, failure, success

SELECT = bytes.fromhex("00A4040006010203040500")


def lines(*text: str) -> bytes:
    return "".join(f"{line}\r\n" for line in text).encode()


def request(*text: str) -> Request:
    connection = ServerConnection()
    connection.receive(lines(*text))
    found = connection.next_request()
    assert found is not None
    return found


def answer(request: Request, *statuses: Status) -> bytes:
    gathered = Answer(request)
    for step, status in zip(request.steps, statuses, strict=False):
        if not gathered.add(step, status):
            break
    return gathered.encode()


def asked(commands: list[Command], *text: str, identifier: str | None = None) -> Response:
    client = ClientConnection()
    client.send(commands, identifier=identifier)
    response = client.receive(lines(*text))
    assert response is not None
    return response


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("GET-VERSION", GetVersion()),
        ("SET-VERSION 1.0", SetVersion("1.0")),
        ("LIST", ListCards()),
        ("RESET device#45", Reset("device#45")),
        ("RESET device#45 WARM", Reset("device#45", warm=True)),
        ("APDU 100 00A4040006010203040500", Apdu("100", SELECT)),
        ("APDU 100 00A4040006010203040500 CONTINUE=9000", Apdu("100", SELECT, continue_sw=0x9000)),
        (
            "APDU 100 00A4040006010203040500 CONTINUE=9000 MORE=9F FETCH=A0120000",
            Apdu("100", SELECT, 0x9000, 0x9F, bytes.fromhex("A0120000")),
        ),
        ("SHUTDOWN device#45", Shutdown("device#45")),
        ("POWERON device#45", PowerOn("device#45")),
        ("ECHO Hello", Echo("Hello")),
        ("SEN mySEID", Sen("mySEID")),
        ("SEN mySEID key1.com", Sen("mySEID", "key1.com")),
        ("SEN mySEID key1.com 010203040500", Sen("mySEID", "key1.com", bytes.fromhex("010203040500"))),
        ("GET-SEN mySEID", GetSen("mySEID")),
    ],
)
def test_the_commands_of_the_draft(line: str, command: Command) -> None:
    step = parse_command(7, line)
    assert (step.line, step.command, step.append) == (7, command, False)
    assert encode_command(command) == line
    assert parse_command(1, f"{line} APPEND").append


def test_an_empty_request() -> None:
    assert answer(request("BEGIN", "END")) == lines("BEGIN", "+001 000 Success", "END")


def test_the_identifier_is_echoed_and_the_last_status_is_returned() -> None:
    found = request("BEGIN SanchoPanza", "APDU 100 00A40400", "APDU 100 00A40400", "END")
    statuses = success(Verb.APDU, 1, "9001"), success(Verb.APDU, 2, "9002")
    assert answer(found, *statuses) == lines("BEGIN SanchoPanza", "+006 002 9002", "END")


def test_append_returns_each() -> None:
    found = request("BEGIN DonQuichotte", "APDU 100 00A40400 APPEND", "APDU 100 00A40400 APPEND", "END")
    statuses = success(Verb.APDU, 1, "9001"), success(Verb.APDU, 2, "9002")
    assert answer(found, *statuses) == lines("BEGIN DonQuichotte", "+006 001 9001", "+006 002 9002", "END")


def test_processing_stops_at_the_first_error() -> None:
    found = request("BEGIN", "APDU S 00A40400 CONTINUE=9000", "APDU S 00B00000", "END")
    wrong = failure(Event.EXECUTION, Verb.APDU, 1, "wrong SW 6A82")
    assert answer(found, wrong, success(Verb.APDU, 2, "9000")) == lines("BEGIN", "-006 001 wrong SW 6A82", "END")


def test_an_unknown_command_is_line_2s_error_and_line_1_is_done() -> None:
    found = request("BEGIN", "ECHO one", "DANCE", "ECHO three", "END")
    assert [step.command for step in found.steps] == [Echo("one")]
    assert answer(found, success(Verb.ECHO, 1, "one")) == lines("BEGIN", "-100 002 Unknown command at line 2", "END")
    appended = request("BEGIN", "ECHO one APPEND", "DANCE", "END")
    assert answer(appended, success(Verb.ECHO, 1, "one")) == lines(
        "BEGIN", "+009 001 one", "-100 002 Unknown command at line 2", "END"
    )


def test_begin_inside_a_request_is_301_and_ends_the_connection() -> None:
    connection = ServerConnection()
    connection.receive(lines("BEGIN moon1969", *["ECHO x"] * 6, "BEGIN again"))
    with pytest.raises(RacsProtocolError) as caught:
        connection.next_request()
    assert caught.value.answer.startswith(b"BEGIN moon1969\r\n-301 007 ")
    assert caught.value.answer.endswith(b"\r\nEND\r\n")
    assert connection.next_request() is None
    assert connection.is_closed


def test_a_command_before_begin_is_300() -> None:
    connection = ServerConnection()
    connection.receive(lines("LIST"))
    with pytest.raises(RacsProtocolError) as caught:
        connection.next_request()
    assert caught.value.answer.startswith(b"BEGIN\r\n-300 ")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("dance", 100),
        ("list", 100),
        ("QUIT", 100),
        ("POWERON", 508),
        ("SHUTDOWN", 507),
        ("RESET", 505),
        ("RESET a COLD", 405),
        ("APDU a", 506),
        ("APDU a 00A404", 506),
        ("APDU a 00A4040", 506),
        ("APDU a 00A40400 CONTINUE=90", 506),
        ("APDU a 00A40400 MORE=61 MORE=9F", 506),
        ("APDU a 00A40400 NOINDEX", 506),
        ("APDU a APPEND", 506),
        ("ECHO", 509),
        ("ECHO APPEND", 509),
        ("ECHO one two", 509),
        ("SET-VERSION", 503),
        ("LIST all", 504),
        ("SEN a[1]", 510),
        ("GET-SEN", 511),
        ("", 500),
    ],
)
def test_a_malformed_command_has_the_class_of_the_draft(line: str, code: int) -> None:
    with pytest.raises(CommandError) as caught:
        parse_command(1, line)
    assert caught.value.status(1).code == code


def test_lists_are_compressed_as_the_draft_says() -> None:
    seids = [
        *(f"Device{number}" for number in range(1000, 2001)),
        "SerialNumber567",
        "SerialNumber789",
        "SerialNumber243",
    ]
    assert encode_seids(seids) == ["Device[1000-2000]", "SerialNumber[243;567;789]"]
    assert decode_seids(["Device[1000-2000]", "SerialNumber[567;789;243]"]) == seids
    assert encode_seids(["SEID1", "b", "card007"]) == ["b", "SEID1", "card007"]
    assert encode_seids(["SEID1", "SEID2"]) == ["SEID[1;2]"]


# --- the loop of an APDU


def run(command: Apdu, *responses: str) -> tuple[ApduRun, list[str]]:
    loop = ApduRun(command)
    sent = []
    for response in responses:
        assert loop.next_apdu is not None
        sent.append(loop.next_apdu.hex().upper())
        loop.feed(bytes.fromhex(response))
    assert loop.next_apdu is None
    return loop, sent


def test_what_is_left_is_fetched_and_joined() -> None:
    loop, sent = run(Apdu("s", SELECT, 0x9000, 0x61), "AA6102", "BBCC9000")
    assert sent == [SELECT.hex().upper(), "00C0000002"]
    assert loop.result == bytes.fromhex("AABBCC9000")


def test_fetch_of_eap_cards() -> None:
    command = Apdu("s", bytes.fromhex("A080000006011400060D20"), 0x9000, 0x9F, bytes.fromhex("A0120000"))
    loop, sent = run(command, "9F00", "01029F02", "03049000")
    assert sent[1:] == ["A012000000", "A012000002"]
    assert loop.result == bytes.fromhex("010203049000")


def test_a_wrong_le_is_corrected_once_and_only_where_the_draft_says() -> None:
    loop, sent = run(Apdu("s", bytes.fromhex("A018000000")), "6C04", "616263649000")
    assert sent == ["A018000000", "A018000004"]
    assert loop.result == bytes.fromhex("616263649000")
    assert run(Apdu("s", bytes.fromhex("A018000000")), "6C04", "6C05")[0].result == bytes.fromhex("6C05")
    assert run(Apdu("s", SELECT), "6C04")[0].result == bytes.fromhex("6C04")


def test_another_status_word_than_continue_wants() -> None:
    loop, _ = run(Apdu("s", SELECT, continue_sw=0x9000), "6A82")
    with pytest.raises(CommandError, match="6A82") as caught:
        _ = loop.result
    assert caught.value.status(1).code == 6


def test_a_card_that_promises_more_and_more_is_given_up() -> None:
    loop = ApduRun(Apdu("s", SELECT, more=0x61))
    loop.feed(bytes.fromhex("6100"))
    with pytest.raises(CommandError) as caught:
        loop.feed(bytes.fromhex("6100"))
    assert caught.value.event is Event.HARDWARE
    loop = ApduRun(Apdu("s", SELECT, more=0x61))
    for _ in range(256):
        loop.feed(bytes(256) + b"\x61\x00")
    with pytest.raises(CommandError):
        loop.feed(bytes(256) + b"\x61\x00")


# --- the client, and what the public server says


def test_answers_of_the_draft() -> None:
    select = Apdu("X", SELECT)
    assert response_apdu(asked([select], "BEGIN", "+006 001 9000", "END").statuses[0]) == b"\x90\x00"
    with pytest.raises(RacsRefusedError, match="-706") as caught:
        asked([select], "BEGIN", "-706 001 error SEID is already used", "END").raise_failure()
    assert caught.value.code == 706
    response = asked([Sen("mySEID")], "BEGIN", "+010 001 SEN= key1.com AID= default", "END")
    assert response.statuses[0].text == "SEN= key1.com AID= default"
    assert asked([GetVersion()], "BEGIN", "+002 001 1.0", "END").statuses[0].text == "1.0"


@pytest.mark.parametrize(
    ("commands", "text"),
    [
        pytest.param([], ("BEGIN ", "+001 000 No error", "END"), id="a space behind BEGIN"),
        pytest.param([SetVersion("0.2")], ("BEGIN ", "+002 001 RACS 0.2", "END"), id="the number of GET-VERSION"),
        pytest.param([Echo("x")], ("BEGIN ", "-900 001 unknown command", "END"), id="-900 for an unknown command"),
        pytest.param([PowerOn("s")], ("BEGIN ", "+008 001 warning: already on", "END"), id="powered twice"),
        pytest.param([ListCards()], ("BEGIN ", "+004 001 ", "END"), id="an empty list"),
        pytest.param([Reset("s"), Echo("x")], ("BEGIN ", "-905 001 ", "END"), id="no text"),
    ],
)
def test_what_the_public_server_says_otherwise_is_accepted(commands: list[Command], text: tuple[str, ...]) -> None:
    assert asked(commands, *text).statuses


def test_an_error_before_the_identifier_was_understood() -> None:
    assert asked([Echo("x")], "BEGIN", "-302 000 ", "END", identifier="r1").failed is not None


def test_an_error_before_end_was_sent_ends_the_request() -> None:
    client = ClientConnection()
    client.send([PowerOn("s"), Apdu("s", SELECT)])
    assert client.receive(b"BEGIN \r\n-708 001 busy\r\n") is None
    response = client.receive(b"END\r\n")
    assert response is not None
    assert response.failed is not None
    client.send([Echo("x")])


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(lines("+009 001 x", "END"), id="no BEGIN"),
        pytest.param(lines("BEGIN other", "+009 001 x", "END"), id="another identifier"),
        pytest.param(lines("BEGIN", "+009 001 x", "END"), id="a success without identifier"),
        pytest.param(lines("BEGIN r1", "END"), id="no status"),
        pytest.param(lines("BEGIN r1", "+009 003 x", "END"), id="a line that was not sent"),
        pytest.param(lines("BEGIN r1", "+009 001 x", "+009 001 x", "END"), id="a line twice"),
        pytest.param(lines("BEGIN r1", "-009 001 x", "+001 002 x", "END"), id="more behind an error"),
        pytest.param(lines("BEGIN r1", "+109 001 x", "END"), id="success and failure"),
        pytest.param(lines("BEGIN r1", "BEGIN r1", "END"), id="BEGIN twice"),
        pytest.param(lines("BEGIN r1", "+009 001 x", "END", "BEGIN r1"), id="more than was asked for"),
        pytest.param(lines("BEGIN r1", "+009 001 x", "END") + b"B", id="a piece more than was asked for"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n", id="another protocol"),
        pytest.param(b"BEGIN r1\n", id="no carriage return"),
        pytest.param(b"", id="closed"),
    ],
)
def test_what_answers_something_else_is_refused(text: bytes) -> None:
    client = ClientConnection()
    client.send([Echo("x")], identifier="r1")
    with pytest.raises(RacsProtocolError):
        client.receive(text)
    assert client.is_closed
    with pytest.raises(RacsProtocolError):
        client.receive(b"BEGIN\r\n")
