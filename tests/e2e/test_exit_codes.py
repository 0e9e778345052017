"""The same mistake has the same answer in all four programs: a sentence on standard error, and the exit code of docs/operations.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.processes import COMMANDS
from secfunet.service.cli import ExitCode

ROOT = Path(__file__).parents[2]
PROGRAMS = ("secure-element", "gose", "secure-middleware", "vm-agent")
ASK = {
    "secure-element": ("status",),
    "gose": ("status",),
    "secure-middleware": ("vm", "list"),
    "vm-agent": ("serve",),
}
pytestmark = [pytest.mark.e2e, pytest.mark.walk]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Settings of all four, made as a user makes them; nothing runs."""
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    path.chmod(0o755)
    (path / "card.toml").write_text('socket = "card.sock"\nstore = "card.store"\n[store_key]\nfile = "store.key"\n')
    (path / "user.pin").write_text("12345678\n")
    (path / "user.pin").chmod(0o600)
    (path / "gose.toml").write_text(
        'state = "grid"\nnames = ["localhost"]\n'
        + "".join(
            f'[[secure_elements]]\nseid = "{seid}"\nrole = "{role}"\nsocket = "{seid}.sock"\n'
            f'user_pin_file = "user.pin"\nadministrator_keys_file = "card.keys"\n'
            for seid, role in (("op-1", "server"), ("web", "vm"))
        )
    )
    (path / "host.toml").write_text(
        'state = "host"\npolicy = "policy.toml"\n[card]\nsocket = "card.sock"\nuser_pin_file = "user.pin"\n[grid]\n'
        'service_provider = "https://localhost:8443"\noperations = "localhost:8444"\n'
        'openid_provider = "https://localhost:9443"\nopenid_login = "https://localhost:9444"\n'
        'authority = "grid/authority/ca.pem"\n'
    )
    (path / "agent.toml").write_text('join = "join.json"\nsocket = "agent.sock"\n')
    for command in (
        ("secure-element", "init", "--config", "card.toml", "--user-pin-file", "user.pin"),
        ("gose", "init", "--config", "gose.toml"),
        ("secure-middleware", "init", "--config", "host.toml"),
    ):
        done = run(path, *command)
        assert done.returncode == 0, done.stderr
    yield path
    shutil.rmtree(path)


CONFIG = {
    "secure-element": "card.toml",
    "gose": "gose.toml",
    "secure-middleware": "host.toml",
    "vm-agent": "agent.toml",
}


def run(place: Path, program: str, *words: str, user: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(COMMANDS / program), *words]
    if user:
        command = ["setpriv", f"--reuid={user}", "--clear-groups", *command]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, check=False, timeout=60)


def says(done: subprocess.CompletedProcess[str], code: ExitCode, words: str = "") -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert not re.search(r"\[Errno", done.stderr), done.stderr
    assert words in done.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_settings_that_are_not_there_or_wrong(place: Path, program: str) -> None:
    says(
        run(place, program, *ASK[program], "--config", "nope.toml"), ExitCode.CONFIG, "name the settings with --config"
    )
    (place / "broken.toml").write_text("a = [1,\n")
    says(run(place, program, *ASK[program], "--config", "broken.toml"), ExitCode.CONFIG, "broken.toml")
    (place / "wrong.toml").write_text((place / CONFIG[program]).read_text().replace('socket = "', 'socket = 7 # "'))
    found = run(place, program, *ASK[program], "--config", "wrong.toml")
    says(found, ExitCode.CONFIG, "must be a path, as text in quotes")
    assert re.search(r"wrong\.toml:\d+: ", found.stderr)


@pytest.mark.parametrize("program", PROGRAMS)
def test_wrong_arguments(place: Path, program: str) -> None:
    for words in (("nonsense",), (*ASK[program], "--nonsense")):
        assert run(place, program, *words).returncode == ExitCode.USAGE
    assert run(place, program, "--version").stdout.startswith(f"{program} 0.")
    assert "-h" in run(place, program, "-h").stdout
    assert "<bool>" not in run(place, program, "--help").stdout


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("secure-element", ("status", "--config", "card.toml")),
        ("secure-middleware", ("vm", "list", "--config", "host.toml")),
        ("vm-agent", ("sign", "card.toml", "--config", "agent.toml")),
        ("gose", ("enrol-vm", "web", "--seid", "web", "--out", "web.pem", "--config", "gose.toml")),
    ],
)
def test_what_does_not_run_is_unavailable(place: Path, program: str, words: tuple[str, ...]) -> None:
    says(run(place, program, *words), ExitCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("gose", ("revoke", "vm", "nobody", "--config", "gose.toml")),
        ("gose", ("enrol-vm", "web", "--seid", "nothing", "--out", "web.pem", "--config", "gose.toml")),
        ("gose", ("enrol-vm", "web", "--seid", "op-1", "--out", "web.pem", "--config", "gose.toml")),
        ("gose", ("token", "show", "card.toml")),
        ("secure-middleware", ("vm", "create", "--name", "x", "--certificate", "card.toml", "--config", "host.toml")),
    ],
)
def test_what_is_unknown_or_wrong_is_data(place: Path, program: str, words: tuple[str, ...]) -> None:
    says(run(place, program, *words), ExitCode.DATA)


@pytest.mark.parametrize(
    "words",
    [
        ("secure-element", "init", "--config", "card.toml", "--user-pin-file", "user.pin"),
        ("gose", "init", "--config", "gose.toml"),
    ],
)
def test_what_would_be_destroyed_is_refused(place: Path, words: tuple[str, ...]) -> None:
    says(run(place, *words), ExitCode.REFUSED, "already")


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("program", PROGRAMS)
def test_what_this_user_may_not_read_is_not_permitted(place: Path, program: str) -> None:
    (place / "secret.toml").write_text((place / CONFIG[program]).read_text())
    (place / "secret.toml").chmod(0o600)
    if run(place, program, "--version", user="65534").returncode:
        pytest.skip("this environment is not readable by others")
    says(run(place, program, *ASK[program], "--config", "secret.toml", user="65534"), ExitCode.REFUSED, "secret.toml")


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_card_that_this_user_may_not_speak_to_is_not_called_down(place: Path) -> None:
    if run(place, "secure-element", "--version", user="65534").returncode:
        pytest.skip("this environment is not readable by others")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "card.sock"))
        (place / "card.sock").chmod(0o600)
        try:
            found = run(place, "secure-element", "status", "--config", "card.toml", user="65534")
        finally:
            (place / "card.sock").unlink()
    says(found, ExitCode.REFUSED, "may not speak to the card")
    assert "down" not in found.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_with_json_an_error_is_json(place: Path, program: str) -> None:
    if program == "vm-agent":
        words: tuple[str, ...] = ("status", "--json", "--config", "agent.toml")
    else:
        words = (*ASK[program], "--json", "--config", "nope.toml")
    done = run(place, program, *words)
    error = json.loads(done.stderr)["error"]
    assert error["exit_code"] == done.returncode != 0
    assert error["message"]


@pytest.mark.parametrize("stream", ["<&-", ">&-", "2>&-"])
def test_a_closed_standard_stream_is_no_fault(place: Path, stream: str) -> None:
    for words in ("vm-agent sign - --config agent.toml", "gose status --config gose.toml", "vm-agent --version"):
        script = f"PATH={COMMANDS}:$PATH; {words} {stream}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=place, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode in {ExitCode.OK, ExitCode.USAGE, ExitCode.UNAVAILABLE, ExitCode.FAILED}, done
        assert "fault" not in done.stderr
        assert "Traceback" not in done.stderr


def test_a_reader_that_had_enough_is_no_fault(place: Path) -> None:
    script = f"set -o pipefail; PATH={COMMANDS}:$PATH; gose status --config gose.toml | head -c 0"
    done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in done.stderr
    assert "fault" not in done.stderr


def test_the_page_has_every_code() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {int(code) for code in ExitCode}
