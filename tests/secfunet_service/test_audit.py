"""The audit log: what a crash leaves, what a forger leaves, and what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import pwd
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.service.audit import (
    Actor,
    AuditBrokenError,
    AuditBusyError,
    AuditChain,
    AuditJournal,
    AuditLog,
    AuditUnavailableError,
    Decision,
    Head,
    Record,
    anchor_path,
    split_line,
)
from secfunet.service.audit_report import show_records
from secfunet.service.audit_verify import ProblemKind, rotated_files, verify

ZERO = "0" * 64


class Action(StrEnum):
    OPERATION = "operation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Record):
    vm: str = ""
    operation: str = ""
    scheme: str = ""
    request: str = ""
    batch: int | None = None


def operation(
    decision: Decision = "permitted", *, vm: str = "", request: str = "", name: str = "", detail: str = ""
) -> Operation:
    return Operation(Action.OPERATION, decision, vm=vm, request=request, name=name, detail=detail)


def written(path: Path, count: int, *, close: bool = True) -> AuditLog:
    log = AuditLog(path, clock=lambda: 1_700_000_000.5)
    log.open()
    for number in range(count):
        log.record(operation(vm="v", request=f"{number:032x}"))
    log.flush()
    if close:
        log.close()
    return log


def kinds(path: Path, anchor: bool = True) -> list[ProblemKind]:
    return [problem.kind for problem in verify([path], anchor_of=path if anchor else None).problems]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def test_an_untouched_log_is_sound_over_restarts(path: Path) -> None:
    written(path, 10)
    written(path, 5)
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert (verdict.records, verdict.first) == (15, 1)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_changed_record_is_found_wherever_it_is(path: Path) -> None:
    written(path, 20)
    good = path.read_bytes()
    for index in range(20):
        lines = good.splitlines(keepends=True)
        lines[index] = lines[index].replace(b"permitted", b"refused")
        path.write_bytes(b"".join(lines))
        assert ProblemKind.CHANGED in kinds(path)


def test_a_record_rewritten_with_a_new_hash_is_found(path: Path) -> None:
    written(path, 5)
    for index in range(5):
        records = [json.loads(line) for line in path.read_bytes().splitlines()]
        chain = AuditChain(Head(index, records[index]["prev"]))
        forged = chain.line(1.0, {"action": "operation", "decision": "refused"})
        lines = path.read_bytes().splitlines(keepends=True)
        lines[index] = forged
        forgery = path.with_name("forgery")
        forgery.write_bytes(b"".join(lines))
        found = [problem.kind for problem in verify([forgery], anchor_of=path).problems]
        assert ProblemKind.CHANGED in found, index


def test_missing_reordered_and_truncated(path: Path) -> None:
    written(path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    assert kinds(path) == [ProblemKind.MISSING]
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))
    assert ProblemKind.REORDERED in kinds(path)
    path.write_bytes(b"".join(lines[:-1]))
    assert kinds(path) == [ProblemKind.TRUNCATED]
    path.write_bytes(b"")
    assert kinds(path) == [ProblemKind.TRUNCATED]
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-20])
    assert kinds(path) == [ProblemKind.TRUNCATED]


def test_a_truncated_log_is_not_continued(path: Path) -> None:
    written(path, 6)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(AuditBrokenError, match="ends before record 6"):
        AuditLog(path, clock=time.time).open()
    # The way back: put it away; the chain goes on where the anchor left it, and the gap stays visible.
    path.rename(path.with_name("evidence"))
    written(path, 1)
    assert json.loads(path.read_bytes())["n"] == 7


def test_a_changed_last_record_is_not_continued(path: Path) -> None:
    written(path, 3)
    path.write_bytes(path.read_bytes().replace(b'"v"', b'"w"'))
    with pytest.raises(AuditBrokenError):
        AuditLog(path, clock=time.time).open()


@pytest.mark.parametrize("torn", [1, 60, 200])
def test_a_line_torn_by_a_crash_is_repaired_and_noted(path: Path, torn: int) -> None:
    written(path, 3)
    whole = path.read_bytes()
    tail = AuditChain(Head(3, ZERO)).line(1.0, {"action": "operation", "detail": "x" * 100})[:torn]
    path.write_bytes(whole + tail)
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert verdict.torn == torn
    written(path, 1)
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [record["action"] for record in records] == ["operation"] * 3 + ["audit.recovered", "operation"]
    assert kinds(path) == []


def test_records_after_the_anchor_survive_a_crash(path: Path) -> None:
    written(path, 3)
    log = written(path, 4, close=False)  # flushed, never synced: as after kill -9
    os.close(log._lock)
    log._lock = -1
    assert json.loads(anchor_path(path).read_bytes())["n"] == 3
    written(path, 1)
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert verdict.records == 8


def test_one_writer(path: Path) -> None:
    log = written(path, 1, close=False)
    with pytest.raises(AuditBusyError, match="another process"):
        AuditLog(path, clock=time.time).open()
    log.close()


def test_rotation_keeps_the_chain(path: Path) -> None:
    log = written(path, 3, close=False)
    path.rename(path.with_name("audit.jsonl.1"))
    log.record(operation())  # before anybody told us: it belongs to the old file
    log.reopen()
    log.record(operation())
    log.close()
    assert verify([path], anchor_of=path).first == 5
    files = rotated_files(path)
    assert [file.name for file in files] == ["audit.jsonl.1", "audit.jsonl"]
    verdict = verify(files, anchor_of=path)
    assert verdict.sound
    assert (verdict.first, verdict.records) == (1, 5)
    # The rotated file put away for good: the chain's own start is missing, which is said by `first`.
    assert verify([path], anchor_of=path).sound


def test_rotation_while_the_daemon_was_killed(path: Path) -> None:
    written(path, 3)
    log = written(path, 4, close=False)
    os.close(log._lock)
    log._lock = -1
    path.rename(path.with_name("audit.jsonl.1"))
    written(path, 1)
    verdict = verify(rotated_files(path), anchor_of=path)
    assert verdict.sound
    assert verdict.records == 8


def test_a_full_disk_refuses_and_leaves_no_half_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = written(path, 2, close=False)
    real = os.write
    room = [50]

    def full(descriptor: int, data: bytes) -> int:
        if room[0] <= 0:
            raise OSError(28, "No space left on device")
        done = real(descriptor, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(os, "write", full)
    log.record(operation())
    with pytest.raises(AuditUnavailableError, match="No space left"):
        log.flush()
    assert kinds(path) == []
    monkeypatch.setattr(os, "write", real)
    log.close()
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert verdict.records == 3


async def test_it_is_synced_within_the_interval(path: Path) -> None:
    async with AuditLog(path, clock=time.time, sync_interval=0.05) as log:
        log.record(operation())
        for _ in range(100):
            await asyncio.sleep(0.02)
            if anchor_path(path).exists():
                break
        assert json.loads(anchor_path(path).read_bytes()) == {"n": 1, "hash": log.head.hash}


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_it_is_synced_again_after_a_time_without_descriptors(path: Path) -> None:
    async with AuditLog(path, clock=time.time, sync_interval=0.02) as log:
        with no_descriptor_left():
            log.record(operation())
            await asyncio.sleep(0.2)
        for _ in range(100):
            await asyncio.sleep(0.02)
            if anchor_path(path).exists():
                break
        assert json.loads(anchor_path(path).read_bytes())["n"] == 1


def test_a_log_that_cannot_be_reopened_goes_on_in_the_old_file_until_it_can(path: Path) -> None:
    log = written(path, 3, close=False)
    path.rename(path.with_name("audit.jsonl.1"))
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        log.reopen()
    log.record(operation())
    log.flush()
    path.rmdir()
    log.reopen()
    log.record(operation())
    log.close()
    assert [len(file.read_bytes().splitlines()) for file in rotated_files(path)] == [4, 1]
    assert verify(rotated_files(path), anchor_of=path).sound


def test_a_record_costs_microseconds(path: Path) -> None:
    log = written(path, 0, close=False)
    begin = time.process_time()
    for batch in range(100):
        for number in range(50):
            log.record(
                Operation(
                    Action.OPERATION,
                    "permitted",
                    correlation="0123456789abcdef",
                    vm="6695eb01-f6a4-8304-79aa-97f2502e193f",
                    name="web",
                    operation="sign",
                    scheme="rsassa-pss-sha256",
                    request=f"{number:032x}",
                    batch=batch,
                )
            )
        log.flush()
    each = (time.process_time() - begin) / 5000
    log.close()
    assert each < 200e-6  # about 15 on a quiet machine


def test_a_log_of_before_is_verified_and_continued(path: Path) -> None:
    """Written by hand, without this program's code: fields are in the file, and the chain is over its bytes."""
    previous, lines = ZERO, []
    for n in (1, 2):
        body = f'{{"n":{n},"time":1.5,"action":"call","decision":"refused","caller":"x","prev":"{previous}"}}'
        previous = hashlib.sha256(body.encode()).hexdigest()
        lines.append(f'{body[:-1]},"hash":"{previous}"}}\n')
    path.write_text("".join(lines))
    anchor_path(path).write_text(json.dumps({"n": 2, "hash": previous}))
    assert verify([path], anchor_of=path).sound
    written(path, 2)
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert verdict.records == 4


def test_what_is_empty_is_not_written_and_what_is_long_is_cut(path: Path) -> None:
    actor = Actor(uid=0, user="root", sudo="alice")
    with closing_log(path) as log:
        log.record(Operation(Action.OPERATION, "noted", actor=actor, batch=0, detail="x" * 300))
    (record,) = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert record["actor"] == {"uid": 0, "user": "root", "sudo": "alice"}
    assert record["batch"] == 0
    assert record["detail"] == "x" * 256 + "…"
    assert set(record) == {"n", "time", "action", "decision", "actor", "batch", "detail", "prev", "hash"}


@contextlib.contextmanager
def closing_log(path: Path) -> Iterator[AuditLog]:
    log = AuditLog(path, clock=lambda: 1.0)
    log.open()
    yield log
    log.close()


# A journal: commands come and go, and several run at once.

APPEND = """
import sys
from enum import StrEnum
from pathlib import Path
from secfunet.service.audit import Actor, AuditJournal, Record

class Action(StrEnum):
    ACT = "act"

for number in range(int(sys.argv[2])):
    actor = Actor.of_this_process()
    AuditJournal(Path(sys.argv[1])).append(Record(Action.ACT, "permitted", name=f"{sys.argv[3]} {number}", actor=actor))
"""


def test_commands_of_several_processes_make_one_chain(path: Path) -> None:
    commands = [subprocess.Popen([sys.executable, "-c", APPEND, str(path), "10", f"command {n}"]) for n in range(4)]
    assert [command.wait(60) for command in commands] == [0] * 4
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert (verdict.records, verdict.first) == (40, 1)
    names = [json.loads(line)["name"] for line in path.read_bytes().splitlines()]
    assert sorted(names) == sorted(f"command {n} {number}" for n in range(4) for number in range(10))


def test_a_journal_waits_for_its_turn_and_not_for_ever(path: Path) -> None:
    with closing_log(path), pytest.raises(AuditBusyError, match="another process"):
        AuditJournal(path, patience=0.1).append(operation())
    AuditJournal(path, patience=0.1).append(operation())
    assert verify([path], anchor_of=path).records == 1


def test_a_journal_is_rotated_like_any_log(path: Path) -> None:
    journal = AuditJournal(path)
    journal.append(operation(), operation())
    path.rename(path.with_name("audit.jsonl.1"))
    journal.append(operation())
    verdict = verify(rotated_files(path), anchor_of=path)
    assert verdict.sound
    assert (verdict.first, verdict.records) == (1, 3)


def test_a_journal_on_a_full_disk_records_nothing_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = AuditJournal(path)
    journal.append(operation())

    def full(_: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(AuditUnavailableError, match="No space left on device"):
            journal.append(operation())
    journal.append(operation())
    verdict = verify([path], anchor_of=path)
    assert verdict.sound
    assert verdict.records == 2


def test_a_journal_in_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(AuditUnavailableError, match="nothing is done that is not on record"):
        AuditJournal(tmp_path / "nowhere" / "audit.jsonl").append(operation())


def test_a_changed_journal_is_not_continued(path: Path) -> None:
    journal = AuditJournal(path)
    journal.append(operation(vm="v"))
    path.write_bytes(path.read_bytes().replace(b'"v"', b'"w"'))
    with pytest.raises(AuditBrokenError, match="was changed"):
        journal.append(operation())


def test_an_actor_is_who_runs_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "alice")
    actor = Actor.of_this_process()
    assert (actor.uid, actor.sudo) == (os.getuid(), "alice")
    assert actor.user == pwd.getpwuid(os.getuid()).pw_name


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_any_line_is_a_record_or_a_value_error(line: bytes) -> None:
    try:
        body, claimed = split_line(line)
    except ValueError:
        return
    assert len(claimed) == 64
    assert body.endswith(b"}")


@given(st.binary(max_size=2000))
@settings(max_examples=100)
def test_any_file_gives_a_verdict(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("any") / "log"
    file.write_bytes(content)
    verdict = verify([file], anchor_of=None)
    assert verdict.records == 0


@given(st.text(max_size=600), st.text(max_size=50))
@settings(max_examples=100)
def test_any_text_makes_a_record_that_verifies(
    tmp_path_factory: pytest.TempPathFactory, detail: str, name: str
) -> None:
    file = tmp_path_factory.mktemp("any") / "log"
    log = AuditLog(file, clock=lambda: 1.0)
    log.open()
    log.record(operation("refused", detail=detail, name=name))
    log.close()
    assert verify([file], anchor_of=file).sound


def test_records_are_shown_and_followed_over_a_rotation(path: Path) -> None:
    log = written(path, 30, close=False)
    program = (
        "import sys; from pathlib import Path; from secfunet.service.audit_report import show_records\n"
        "show_records([Path(sys.argv[1])], Path, last=2, follow=True, as_json=True)"
    )
    command = [sys.executable, "-u", "-c", program, str(path)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as shown:
        assert shown.stdout is not None
        try:

            def next_number() -> int:
                assert shown.stdout is not None
                return int(json.loads(shown.stdout.readline())["n"])

            assert (next_number(), next_number()) == (29, 30)
            time.sleep(0.7)
            log.record(operation())
            log.flush()
            assert next_number() == 31
            path.rename(path.with_name(path.name + ".1"))
            log.reopen()
            log.record(operation())
            log.flush()
            assert next_number() == 32
        finally:
            shown.kill()
    log.close()


def test_what_is_shown_does_nothing_to_a_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = written(path, 0, close=False)
    log.record(operation(name="\x1b[2Jweb", detail="\rfine\n     2  a line of its own\u202e"))
    log.close()
    with path.open("ab") as file:
        file.write(b'[1]\n{"n":1,"time":[],"action":{}}\n{"n":1e999,"time":1e999}\n' + b"[" * 30_000 + b"\n\x1b[2J\n")
    show_records([path], lambda: path, last=10, follow=False, as_json=False)
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 6
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b[2Jweb" in text
