"""State files: the old content or the new one, and for their owner only."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secfunet.service.files import (
    UnsafeFileError,
    make_private,
    naming,
    open_private,
    private_folder,
    read_secret,
    refuse_planted_link,
    write_atomically,
)

WRITER = """
import sys
from pathlib import Path
from secfunet.service.files import write_atomically
path, number = Path(sys.argv[1]), 0
print("go", flush=True)
while True:
    number = (number + 1) % 10
    write_atomically(path, str(number).encode() * 50_000)
"""


def test_written_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]


def test_kill_at_any_moment_leaves_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"0" * 50_000)
    for attempt in range(6):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(0.01 + attempt * 0.007)
            writer.send_signal(signal.SIGKILL)
        content = path.read_bytes()
        assert len(content) == 50_000
        assert len(set(content)) == 1


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")  # type: ignore[arg-type]  # the failure that is wanted
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666, 0o620])
def test_a_secret_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pin"
    write_atomically(path, b"0000", mode=mode)
    with pytest.raises(UnsafeFileError, match="chmod 600"):
        read_secret(path)


def test_a_credential_of_systemd_may_show_the_mask_of_its_acl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.key"
    write_atomically(path, b"secret", mode=0o440)
    with pytest.raises(UnsafeFileError):
        read_secret(path)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert read_secret(path) == b"secret"
    for mode in (0o444, 0o460, 0o442):
        path.chmod(mode)
        with pytest.raises(UnsafeFileError):
            read_secret(path)


def test_bounds_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "pin"
    write_atomically(path, b"x" * 101)
    with pytest.raises(UnsafeFileError, match="larger than 100"):
        read_secret(path, limit=100)
    assert read_secret(path, limit=101) == b"x" * 101
    with pytest.raises(UnsafeFileError, match="no regular file"):
        read_secret(Path("/dev/null"))


def test_what_is_replaced_keeps_its_mode_and_never_gets_a_wider_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for before, asked, after in (
        (0o400, 0o600, 0o400),
        (0o640, 0o644, 0o640),
        (0o664, 0o644, 0o644),
        (0o644, 0o600, 0o600),
    ):
        path.write_bytes(b"old")
        path.chmod(before)
        write_atomically(path, b"new", mode=asked)
        assert stat.S_IMODE(path.stat().st_mode) == after
        path.unlink()


@pytest.mark.parametrize("refused", ["nowhere/file", "file/file"])
def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path, refused: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    for act in (lambda path: write_atomically(path, b""), open_private, make_private):
        with pytest.raises(OSError, match=refused) as caught:
            act(tmp_path / refused)
        assert caught.value.filename == str(tmp_path / refused)


def test_an_error_without_a_file_gets_one() -> None:
    with pytest.raises(PermissionError, match=r"'a\.pem'"), naming(Path("a.pem")):
        raise PermissionError(13, "Permission denied")


# Root in a folder of another user.

USER, GROUP = 64123, 64124
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, USER, GROUP)
    return folder


def owner(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_uid, status.st_gid


@as_root
def test_what_root_makes_in_a_service_users_folder_is_that_users(theirs: Path) -> None:
    write_atomically(theirs / "new", b"x")
    os.close(open_private(theirs / "lock"))
    make_private(theirs / "database")
    private_folder(theirs / "one" / "two")
    for name in ("new", "lock", "database", "one", "one/two"):
        assert owner(theirs / name) == (USER, GROUP), name


@as_root
def test_what_root_replaces_keeps_its_owner(theirs: Path, tmp_path: Path) -> None:
    for folder in (theirs, tmp_path):
        path = folder / "file"
        path.write_bytes(b"old")
        os.chown(path, USER + 1, GROUP + 1)
        write_atomically(path, b"new")
        assert (path.read_bytes(), owner(path)) == (b"new", (USER + 1, GROUP + 1))


@as_root
def test_root_replaces_a_planted_link_and_not_what_it_leads_to(theirs: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (theirs / "file").symlink_to(precious)
    os.chown(theirs / "file", USER, GROUP, follow_symlinks=False)
    with pytest.raises(OSError, match="file"):
        open_private(theirs / "file")
    with pytest.raises(UnsafeFileError, match="symbolic link of another user"):
        refuse_planted_link(theirs / "file")
    make_private(theirs / "file")
    write_atomically(theirs / "file", b"new")
    assert precious.read_bytes() == b"precious"
    assert owner(precious) == (0, 0)
    assert owner(theirs / "file") == (USER, GROUP)
    assert not (theirs / "file").is_symlink()


@as_root
@pytest.mark.parametrize("act", [lambda path: write_atomically(path, b""), open_private, make_private])
def test_root_is_not_led_into_a_folder_of_others(theirs: Path, tmp_path: Path, act: Callable[[Path], object]) -> None:
    target = tmp_path / "etc"
    target.mkdir()
    (theirs / "folder").symlink_to(target)
    os.chown(theirs / "folder", USER, GROUP, follow_symlinks=False)
    with pytest.raises(UnsafeFileError, match="symbolic link of another user"):
        act(theirs / "folder" / "file")
    with pytest.raises(UnsafeFileError, match="symbolic link of another user"):
        private_folder(theirs / "folder" / "new")
    assert list(target.iterdir()) == []


@as_root
def test_root_follows_its_own_links_and_those_to_what_is_their_makers(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "roots").symlink_to("theirs")
    (theirs / "inner").mkdir()
    os.chown(theirs / "inner", USER, GROUP)
    (theirs / "link").symlink_to(theirs / "inner")
    os.chown(theirs / "link", USER, GROUP, follow_symlinks=False)
    write_atomically(tmp_path / "roots" / "link" / ".." / "inner" / "file", b"x")
    assert owner(theirs / "inner" / "file") == (USER, GROUP)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="circle"):
        write_atomically(tmp_path / "circle" / "file", b"x")
