"""``--out``: whatever kind of file a user names is written as that, and a regular file keeps whose it is."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from secfunet.service.files import UnsafeFileError
from secfunet.service.results import NotWrittenError, write_result

ROOT = Path(__file__).parents[2]
WRITER = (
    "import sys; from pathlib import Path; from secfunet.service.results import write_result; "
    "write_result(b'result', Path(sys.argv[1]))"
)


def write_in_a_process(out: str, **how: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", WRITER, out]
    return subprocess.run(command, capture_output="stdout" not in how, check=False, timeout=30, **how)  # type: ignore[call-overload, no-any-return]


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_result(b"secret", tmp_path / "new")
    assert (tmp_path / "new").read_bytes() == b"secret"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600
    before = os.umask(0o022)
    try:
        write_result(b"public", tmp_path / "public", mode=0o666)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "public").stat().st_mode) == 0o644


def test_a_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    file.chmod(0o640)
    if os.getuid() == 0:
        os.chown(file, 1234, 1235)
    was = file.stat()
    write_result(b"after", file)
    now = file.stat()
    assert file.read_bytes() == b"after"
    assert (now.st_mode, now.st_uid, now.st_gid) == (was.st_mode, was.st_uid, was.st_gid)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_links_are_followed_also_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"before")
    for name, target in (("link", "target"), ("chain", "link"), ("dangling", "later")):
        (tmp_path / name).symlink_to(target)
    for name in ("chain", "dangling"):
        write_result(name.encode(), tmp_path / name)
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "target").read_bytes() == b"chain"
    assert (tmp_path / "later").read_bytes() == b"dangling"


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_result(b"through", pipe)
    reader.join(10)
    assert got == [b"through"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


@pytest.mark.skipif(os.getuid() != 0, reason="makes devices")
def test_devices_are_written_into(tmp_path: Path) -> None:
    """Devices of our own: these tests run as root."""
    for name, minor in (("null", 3), ("full", 7)):
        os.mknod(tmp_path / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
    try:
        write_result(b"gone", tmp_path / "null")
    except NotWrittenError as error:
        if error.errno == 13:
            pytest.skip("devices do not work in this folder (nodev)")
        raise
    with pytest.raises(NotWrittenError, match="full: No space left on device"):
        write_result(b"gone", tmp_path / "full")
    for name in ("null", "full"):
        assert stat.S_ISCHR((tmp_path / name).lstat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/dev//stdout", "-"])
def test_a_descriptor_is_written_at_its_place(name: str, tmp_path: Path) -> None:
    assert write_in_a_process(name).stdout == b"result"
    with (tmp_path / "all").open("wb") as file:
        file.write(b"before ")
        file.flush()
        assert write_in_a_process(name, stdout=file).returncode == 0
        file.seek(0, os.SEEK_END)
        file.write(b" after")
    assert (tmp_path / "all").read_bytes() == b"before result after"


def test_errors_name_the_path_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "nope" / "file", tmp_path / "folder", tmp_path / "loop", Path("/dev/fd/999999")):
        with pytest.raises(NotWrittenError) as caught:
            write_result(b"x", path)
        assert str(caught.value).startswith(f"{path}: ")
        assert ".unfinished" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "loop"]


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_file_in_a_folder_of_somebody_else_is_written_in_place(tmp_path: Path) -> None:
    base = Path(tempfile.mkdtemp(prefix="sf-"))
    base.chmod(0o755)
    try:
        file = base / "file"
        file.write_bytes(b"a longer text that was there before")
        os.chown(file, 65534, 65534)
        readonly = base / "readonly"
        readonly.write_bytes(b"not yours")
        readonly.chmod(0o644)
        package = base / "secfunet"
        for part in ("errors.py", "service/files.py", "service/results.py"):
            (package / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "secfunet" / part, package / part)
        python = shutil.which("python3", path="/usr/bin") or sys.executable
        for path, code in ((file, 0), (readonly, 1)):
            command = ["runuser", "-u", "nobody", "--", python, "-c", WRITER, str(path)]
            assert subprocess.run(command, check=False, capture_output=True, cwd=base).returncode == code
        assert file.read_bytes() == b"result"
        assert readonly.read_bytes() == b"not yours"
    finally:
        shutil.rmtree(base)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("mounts")
    script = f"""
    mount -t tmpfs -o size=64k tmpfs {tmp_path} && echo before > {tmp_path}/file && head -c 100000 /dev/zero > {tmp_path}/rest 2>/dev/null
    {sys.executable} -c "
from pathlib import Path
from secfunet.service.results import write_result
write_result(bytes(50000), Path('{tmp_path}/file'))" 2>&1 | tail -1; cat {tmp_path}/file; ls -A {tmp_path}
    """
    command = ["unshare", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert "file: No space left on device" in done.stdout
    assert done.stdout.splitlines()[1:] == ["before", "file", "rest"]


USER, GROUP = 64123, 64124
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make files and links of other users")


def made_by(user: int, link: Path, target: Path) -> Path:
    link.symlink_to(target)
    os.chown(link, user, user, follow_symlinks=False)
    return link


@as_root
def test_what_root_writes_into_a_folder_of_somebody_else_is_his(tmp_path: Path) -> None:
    os.chown(tmp_path, USER, GROUP)
    write_result(b"x", tmp_path / "new")
    status = (tmp_path / "new").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (USER, GROUP, 0o600)


@as_root
def test_a_link_that_was_planted_is_not_followed(tmp_path: Path) -> None:
    """Else its maker would choose what root overwrites: a file, one that is not there yet, one in another folder, a device."""
    theirs, etc = tmp_path / "theirs", tmp_path / "etc"
    theirs.mkdir()
    etc.mkdir()
    os.chown(theirs, USER, GROUP)
    precious = etc / "precious"
    precious.write_bytes(b"precious")
    for number, target in enumerate((precious, etc / "new", etc, Path("/dev/null"))):
        link = made_by(USER, theirs / str(number), target)
        out = link / "file" if target == etc else link
        with pytest.raises(UnsafeFileError, match="symbolic link of another user"):
            write_result(b"x", out)
    assert precious.read_bytes() == b"precious"
    assert [entry.name for entry in etc.iterdir()] == ["precious"]
    # His own file, by his own link, is his affair; and so is a link of root's.
    (theirs / "his").write_bytes(b"old")
    os.chown(theirs / "his", USER, GROUP)
    write_result(b"new", made_by(USER, theirs / "link", theirs / "his"))
    assert (theirs / "his").read_bytes() == b"new"
    write_result(b"by root's", made_by(0, tmp_path / "link", precious))
    assert precious.read_bytes() == b"by root's"


def test_a_link_that_comes_into_the_place_of_a_pipe_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the path and its opening: the owner of the folder chooses the moment."""
    pipe, precious = tmp_path / "pipe", tmp_path / "precious"
    precious.write_bytes(b"precious")
    os.mkfifo(pipe)
    real = os.open

    def late(path: object, *how: object, **more: object) -> int:
        if str(path).endswith("pipe") and not pipe.is_symlink():
            pipe.unlink()
            pipe.symlink_to(precious)
        return real(path, *how, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(NotWrittenError):
        write_result(b"xxx", pipe)
    assert precious.read_bytes() == b"precious"
