"""What the testbed says of a machine that cannot carry it."""

from __future__ import annotations

import pytest

from testbed import TestbedError
from testbed.tools import DISK, MEMORY, require_machine


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"memory": MEMORY - 1, "disk": DISK}, "memory that is available"),
        ({"memory": MEMORY, "disk": DISK - 1}, "free disk"),
    ],
)
def test_what_there_is_too_little_of_is_named(there: dict[str, int], words: str) -> None:
    with pytest.raises(TestbedError, match=words):
        require_machine(**there)


def test_a_right_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(TestbedError, match="as root"):
        require_machine(memory=MEMORY, disk=DISK)
