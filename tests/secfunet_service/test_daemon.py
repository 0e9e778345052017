"""A daemon's life, seen from outside: readiness, SIGTERM, no core dump, errors as sentences."""

import re
import signal
import socket
import subprocess
import sys
import time
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


HANGUPS = """
import asyncio, logging, os, signal, sys
from secfunet.errors import SecFuNetError
from secfunet.service.daemon import run_daemon

logging.basicConfig(level="INFO", format="%(levelname)s %(message)s", stream=sys.stdout)

class Service:
    reloads = 0

    async def __aenter__(self):
        os.kill(os.getpid(), signal.SIGHUP)  # while it starts
        await asyncio.sleep(0.1)
        print("started", flush=True)
        return self

    async def __aexit__(self, *_):
        os.kill(os.getpid(), signal.SIGHUP)  # while it stops
        await asyncio.sleep(0.1)
        print("clean", flush=True)

    async def reload(self):
        Service.reloads += 1
        print("reload", Service.reloads, flush=True)
        if Service.reloads == 2:
            raise SecFuNetError("the file is not there")
        if Service.reloads == 3:
            1 / 0

class Deaf(Service):
    reload = None

async def make():
    return Deaf() if sys.argv[1:] else Service()

run_daemon(make)
"""


def test_a_hangup_is_no_end_and_has_the_service_read_again(tmp_path: Path) -> None:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(20)
    with (
        notify,
        subprocess.Popen(
            [sys.executable, "-u", "-c", HANGUPS],
            stdout=subprocess.PIPE,
            text=True,
            env={"NOTIFY_SOCKET": str(tmp_path / "notify")},
        ) as daemon,
    ):
        assert daemon.stdout is not None
        assert [daemon.stdout.readline() for _ in range(2)] == ["started\n", "reload 1\n"]
        assert notify.recv(100) == b"READY=1"
        assert notify.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert notify.recv(100) == b"READY=1"
        daemon.send_signal(signal.SIGHUP)
        assert daemon.stdout.readline() == "reload 2\n"
        assert daemon.stdout.readline() == "ERROR the settings could not be read again: the file is not there\n"
        daemon.send_signal(signal.SIGHUP)
        assert daemon.stdout.readline() == "reload 3\n"
        while "ZeroDivisionError" not in daemon.stdout.readline():
            pass
        daemon.send_signal(signal.SIGHUP)
        assert daemon.stdout.readline() == "reload 4\n"
        daemon.send_signal(signal.SIGTERM)
        assert daemon.communicate(timeout=20)[0] == "clean\n"
        assert daemon.returncode == 0


def test_a_hangup_does_not_end_what_has_nothing_to_read() -> None:
    with subprocess.Popen([sys.executable, "-u", "-c", HANGUPS, "deaf"], stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "started\n"
        assert daemon.stdout.readline() == "INFO SIGHUP: there is nothing to read again\n"
        daemon.send_signal(signal.SIGTERM)
        assert daemon.communicate(timeout=20)[0] == "clean\n"
        assert daemon.returncode == 0


def test_hangups_while_it_stops_do_not_end_it() -> None:
    """Up to the end of the process: a program may have things to do when its loop has closed."""
    end = "run_daemon(make, ready=lambda: print('ready', flush=True))\nimport time; time.sleep(0.2)"
    program = PROGRAM.replace("cli.run(app)", end)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as daemon:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        try:
            assert daemon.stdout.readline() == b"ready\n"
            daemon.send_signal(signal.SIGTERM)
            while daemon.poll() is None:
                daemon.send_signal(signal.SIGHUP)
                time.sleep(0.001)
            assert (daemon.returncode, daemon.stderr.read()) == (0, b"")
        finally:
            daemon.kill()


def test_an_error_is_a_sentence_and_an_exit_code() -> None:
    failed = subprocess.run([sys.executable, "-c", PROGRAM, "fail"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (1, "error: the card is not there: insert it\n")
    fault = subprocess.run([sys.executable, "-c", PROGRAM, "fault"], capture_output=True, text=True, check=False)
    assert fault.returncode == 70
    assert fault.stderr == "error: a fault in this program, please report it: ZeroDivisionError: division by zero\n"
    missing = subprocess.run([sys.executable, "-c", PROGRAM, "missing"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr == "error: /nonexistent/file: No such file or directory\n"


def test_a_daemon_has_the_descriptors_that_its_bounds_come_to() -> None:
    program = """
import logging, resource, sys
from secfunet.service.daemon import want_descriptors
logging.basicConfig(format="%(message)s %(limit)s %(needed)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000))
want_descriptors(900)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
want_descriptors(5000)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "(900, 1000)\n(1000, 1000)\n"
    assert "LimitNOFILE" in done.stderr
    assert done.stderr.strip().endswith("1000 5000")


def test_the_units_have_room_for_the_bounds() -> None:
    from dom0_middleware.cli import DESCRIPTORS
    from gose.settings import GoseSettings

    root = Path(__file__).parents[2]

    def limit(unit: str) -> int:
        return int(re.findall(r"^LimitNOFILE=([0-9]+)$", (root / unit).read_text(), re.MULTILINE)[0])

    units = [
        *root.glob("ansible/roles/*/templates/*.service.j2"),
        *root.glob("packaging/deb/tree/lib/systemd/system/*.service"),
    ]
    assert len(units) == 4
    for unit in units:
        text = unit.read_text()
        assert all(f"\n{key}=" in text for key in ("LimitNOFILE", "MemoryMax", "TasksMax")), unit
    assert limit("ansible/roles/gose/templates/gose.service.j2") >= GoseSettings().descriptors
    assert limit("ansible/roles/dom0_middleware/templates/secure-middleware.service.j2") >= DESCRIPTORS
