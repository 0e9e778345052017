"""State files: the old content or the new one, and for their owner only."""

import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from secfunet.service.files import UnsafeFileError, read_secret, write_atomically

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
