"""The corpus, replayed without the fuzzer: each target takes its real messages, and the inputs of every fault that was found once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import targets
from fuzz.__main__ import CORPUS
from fuzz.seeds import SEEDS
from fuzz.targets import TARGETS
from secfunet.container import ContainerError, VerifiedContainer


def test_every_target_begins_with_real_messages() -> None:
    assert SEEDS.keys() == TARGETS.keys()
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} == TARGETS.keys()
    assert all(list((CORPUS / name).glob("seed-*")) for name in TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_taken(name: str) -> None:
    run = TARGETS[name].make()
    for path in sorted((CORPUS / name).iterdir()):
        run(path.read_bytes())
        run(path.read_bytes()[:-1])
    run(b"")


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "card"])
def test_real_messages_are_accepted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus that every parser refuses would reach nothing: at least one message of each kind is taken without an error."""
    refused: list[Path] = []

    class Counting:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
            if kind is not None:
                refused.append(path)
            return kind is not None

    monkeypatch.setattr(targets, "suppress", Counting)
    run = TARGETS[name].make()
    seeds = sorted((CORPUS / name).glob("seed-*"))
    for path in seeds:
        run(path.read_bytes())
    assert set(refused) < set(seeds) or not refused


def test_a_body_shorter_than_a_block_is_the_one_error() -> None:
    for body in (b"", bytes(15), bytes(16)):
        with pytest.raises(ContainerError):
            VerifiedContainer(b"", body).open(bytes(32))
