"""Two builds at once: one builds, the other waits, and nothing that is in work or in use is removed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from secfunet.service.lock import process_lock
from testbed import build as module
from testbed import places


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A testbed's folder of our own; images are one file, which takes a moment to build."""
    monkeypatch.setenv("SECFUNET_TESTBED", str(tmp_path))
    monkeypatch.setattr(module, "key", lambda: "0123456789abcdef")
    monkeypatch.setattr(module, "require_tools", lambda *, install: None)
    return tmp_path


def test_of_two_builds_at_once_one_builds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def slow(target: Path, _: module.Say) -> None:
        builds.append(target)
        target.mkdir(parents=True)
        time.sleep(0.3)
        (target / "host.ext4").touch()
        (target / "complete").touch()

    monkeypatch.setattr(module, "_build", slow)
    said: list[str] = []
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(module.build(said.append))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(builds) == 1
    assert made == [places.images("0123456789abcdef")] * 3
    assert (made[0] / "host.ext4").exists()
    assert any("another build runs (pid" in line for line in said)


def test_what_an_interrupted_build_left_is_built_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = places.images("0123456789abcdef")
    half.mkdir(parents=True)
    (half / "rest").touch()

    def bootstrap(*_: object) -> None:
        raise module.TestbedError("no network")

    monkeypatch.setattr(module, "run", bootstrap)
    with pytest.raises(module.TestbedError, match="no network"):
        module.build(lambda _: None)
    assert not (half / "rest").exists()
    assert module.built() is None


def test_what_is_in_work_or_in_use_is_not_removed(folder: Path) -> None:
    in_work, used, old = (places.images(name) for name in ("1" * 16, "2" * 16, "3" * 16))
    for images in (in_work, used, old):
        images.mkdir(parents=True)
    bed = places.bed("runs")
    bed.mkdir(parents=True)
    (bed / "bed.json").write_text(json.dumps({"images": str(used), "hosts": [], "switches": []}))
    said: list[str] = []
    with process_lock(module._lock_of(in_work)):
        module.clean(said.append)
    assert in_work.exists()
    assert used.exists()
    assert not old.exists()
    assert any("'runs' runs on it" in line for line in said)
