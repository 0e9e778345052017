"""Sockets at paths: what is not ours stays, what a dead process left does not hinder."""

import contextlib
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from secfunet.service.unix_socket import SocketInUse, SocketPathError, bind_unix, move_into_place


def leave_a_dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    file, folder, link, fifo = (tmp_path / name for name in ("file", "folder", "link", "fifo"))
    file.write_text("precious")
    folder.mkdir()
    link.symlink_to(file)
    os.mkfifo(fifo)
    for path in (file, folder, link, fifo):
        before = path.lstat()
        with pytest.raises(SocketPathError, match="is no socket"):
            bind_unix(path)
        assert path.lstat().st_ino == before.st_ino
    assert file.read_text() == "precious"


def test_a_live_socket_is_left_alone_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    leave_a_dead_socket(path)
    listener, own = bind_unix(path, mode=0o660)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with pytest.raises(SocketInUse):
        bind_unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    own.remove()
    own.remove()
    listener.close()
    assert not path.exists()


def test_a_full_backlog_counts_as_somebody_who_listens(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener, own = bind_unix(path, backlog=0)
    waiting = []
    for _ in range(3):
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect(str(path))
        waiting.append(client)
    with pytest.raises(SocketInUse):
        bind_unix(path)
    for each in (*waiting, listener):
        each.close()
    own.remove()


def test_at_the_end_only_what_was_made_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener, own = bind_unix(path)
    path.unlink()
    path.write_text("put there meanwhile")
    own.remove()
    assert path.read_text() == "put there meanwhile"
    listener.close()


def test_a_path_that_cannot_be_used_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SocketPathError, match="No such file"):
        bind_unix(tmp_path / "missing" / "s")
    with pytest.raises(SocketPathError, match="too long"):
        bind_unix(tmp_path / ("s" * 108))


def test_a_server_that_binds_by_itself_is_moved_into_place(tmp_path: Path) -> None:
    path, made = tmp_path / "s", tmp_path / ".made"
    path.write_text("precious")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(made))
        server.listen()
        with pytest.raises(SocketPathError, match="is no socket"):
            move_into_place(made, path)
        assert path.read_text() == "precious"
        path.unlink()
        leave_a_dead_socket(path)
        with move_into_place(made, path), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        assert not path.exists()


STARTER = """
import sys, time
from pathlib import Path
from secfunet.service.unix_socket import SocketInUse, bind_unix
print("ready", flush=True)
sys.stdin.readline()
for name in sys.argv[2:]:
    try:
        kept = bind_unix(Path(sys.argv[1]) / name)
        globals()[name] = kept
        print(name)
    except SocketInUse:
        pass
print("done", flush=True)
sys.stdin.read()
"""


def test_of_many_that_start_at_once_each_path_has_one(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(300)]
    for name in names:
        leave_a_dead_socket(tmp_path / name)
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, str(tmp_path), *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for starter in starters:
        assert starter.stdout is not None
        assert starter.stdout.readline() == "ready\n"
    for starter in starters:
        assert starter.stdin is not None
        starter.stdin.write("go\n")
        starter.stdin.flush()
    taken: list[str] = []
    for starter in starters:
        assert starter.stdout is not None
        for line in starter.stdout:
            if line == "done\n":
                break
            taken.append(line.strip())
    for starter in starters:
        starter.communicate("")
    assert sorted(taken) == sorted(names)
