"""A daemon's life, seen from outside: readiness, SIGTERM, no core dump, errors as sentences."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import contextlib, ctypes, sys
from pathlib import Path
import typer
from secfunet.errors import SecFuNetError
from secfunet.service import cli
from secfunet.service.daemon import run_daemon

app = typer.Typer()

@contextlib.asynccontextmanager
async def service():
    try:
        yield
    finally:
        print("dumpable:", ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
        print("clean", flush=True)

async def make():
    return service()

@app.command()
def serve() -> None:
    run_daemon(make)

@app.command()
def fail() -> None:
    raise SecFuNetError("the card is not there: insert it")

@app.command()
def fault() -> None:
    1 / 0

@app.command()
def missing() -> None:
    Path("/nonexistent/file").read_text()

cli.run(app)
"""


def test_life_of_a_daemon(tmp_path: Path) -> None:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    address = str(tmp_path / "notify")
    notify.bind(address)
    notify.settimeout(20)
    with (
        notify,
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "serve"],
            stdout=subprocess.PIPE,
            env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"},
        ) as daemon,
    ):
        states = {notify.recv(100).decode() for _ in range(3)}
        assert states == {"READY=1", "WATCHDOG=1"}
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        daemon.send_signal(signal.SIGTERM)
        output, _ = daemon.communicate(timeout=20)
        assert output == b"dumpable: 0\nclean\n"
        assert daemon.returncode == 0
        notify.settimeout(1)
        while (state := notify.recv(100)) == b"WATCHDOG=1":
            pass
        assert state == b"STOPPING=1"


def test_an_error_is_a_sentence_and_an_exit_code() -> None:
    failed = subprocess.run([sys.executable, "-c", PROGRAM, "fail"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (1, "error: the card is not there: insert it\n")
    fault = subprocess.run([sys.executable, "-c", PROGRAM, "fault"], capture_output=True, text=True, check=False)
    assert fault.returncode == 70
    assert fault.stderr == "error: a fault in this program, please report it: ZeroDivisionError: division by zero\n"
    missing = subprocess.run([sys.executable, "-c", PROGRAM, "missing"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr == "error: No such file or directory: /nonexistent/file\n"
