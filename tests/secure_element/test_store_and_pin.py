"""What must hold on disk: sealed, bound to its header, whole after kill -9; and PIN counters that come before the comparison."""

from __future__ import annotations

import asyncio
import random
import stat
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secfunet.card import KeyAlgorithm
from secfunet.card.client import pad_pin
from secfunet.scp03 import KeySet
from secure_element import pin as pin_module
from secure_element.card_os import CardOs
from secure_element.errors import CommandRefusedError, StoreError
from secure_element.pin import ATTEMPTS, PinKeeper
from secure_element.store import (
    HEADER_SIZE,
    CardStore,
    DomainRecord,
    IdentityRecord,
    PinRecord,
    StoreContents,
    StoreSecret,
)
from tests.support.cards import personalise, running_card
from tests.support.local_card import STORE_KEY, USER_PIN, new_store, open_store
from tests.support.pki import CertificateAuthority

# Writes states one after another, as fast as it can, and says each one's number before it begins it and after it is done.
WRITER = """
import dataclasses, pathlib, sys
from secfunet.card import KeyAlgorithm
from secure_element.store import CardStore, DomainRecord, IdentityRecord, StoreSecret
store = CardStore.open(pathlib.Path(sys.argv[1]), StoreSecret(bytes(range(100, 132))))
number = int(sys.argv[2])
while True:
    number += 1
    record = IdentityRecord(str(number), KeyAlgorithm.P_256, bytes([number % 256]) * (number * 997 % 20000))
    sys.stdout.write(f"begin {number}\\n"); sys.stdout.flush()
    store.replace(dataclasses.replace(store.contents, identities=(record,)))
    sys.stdout.write(f"done {number}\\n"); sys.stdout.flush()
"""


def leftovers(folder: Path) -> list[Path]:
    return list(folder.glob(".card.store.*"))


async def test_kill_at_any_moment_leaves_the_old_or_the_new_state(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    chance = random.Random(20131)  # noqa: S311 - moments, not secrets
    number = 0
    for _ in range(12):
        writer = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", WRITER, str(tmp_path / "card.store"), str(number)), stdout=asyncio.subprocess.PIPE
        )
        assert writer.stdout is not None
        heard = b"".join([await writer.stdout.readline() for _ in range(chance.randrange(1, 9))])
        await asyncio.sleep(chance.random() * 0.005)
        writer.kill()
        lines = (heard + await writer.stdout.read()).decode().splitlines(keepends=True)
        await writer.wait()
        done = [int(line.split()[1]) for line in lines if line.startswith("done") and line.endswith("\n")]
        begun = [int(line.split()[1]) for line in lines if line.startswith("begin") and line.endswith("\n")]
        store = open_store(tmp_path)
        (record,) = store.contents.identities or (IdentityRecord("0", KeyAlgorithm.P_256, b""),)
        store.close()
        last_done = done[-1] if done else number
        assert last_done <= int(record.name) <= begun[-1]
        kept = int(record.name)
        assert record.private_key == bytes([kept % 256]) * (kept * 997 % 20000)
        number = kept
        assert leftovers(tmp_path) == []  # opening cleans up
    assert number > 12


@pytest.mark.e2e
async def test_kill_of_the_card_during_personalisation(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    chance = random.Random(7)  # noqa: S311 - moments, not secrets
    async with running_card(tmp_path) as card:
        certificate = await personalise(card, authority, "keeper")
        left_before: set[str] = set()
        for number in range(4):
            in_hand: list[str] = []

            async def churn(turn: int, in_hand: list[str]) -> None:
                administrator = await card.administer()
                for step in range(10000):
                    in_hand[:] = [f"{turn}-{step}"]
                    await administrator.generate_key(in_hand[0], KeyAlgorithm.P_256)
                    await administrator.delete_identity(in_hand[0])

            work = asyncio.create_task(churn(number, in_hand))
            await asyncio.sleep(0.1 + chance.random() * 0.1)
            await card.kill()
            with pytest.raises(Exception, match="lost"):
                await work
            await card.start()
            client = await card.connect("keeper")
            kept = set(await client.identities()) - {"keeper"}
            assert await client.certificate() == certificate
            await client.close()
            assert kept <= left_before | set(in_hand)  # the one that was being made or deleted is there, or is not
            assert kept >= left_before
            left_before = kept
            assert await card.stop() == 0
            await card.start()


def test_the_file_is_sealed_and_private(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    path = tmp_path / "card.store"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert b"key_sets" not in content
    assert STORE_KEY not in content
    store.replace(store.contents)
    assert path.read_bytes()[HEADER_SIZE:] != content[HEADER_SIZE:]  # another key for every write


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    path = tmp_path / "card.store"
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes((content[at] ^ 1,)) + content[at + 1 :])
        with pytest.raises(StoreError):
            open_store(tmp_path)
    for cut in (0, 1, HEADER_SIZE - 1, HEADER_SIZE, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(StoreError):
            open_store(tmp_path)
    path.write_bytes(content)
    open_store(tmp_path).close()


def test_another_key_and_a_second_process_are_refused(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    with pytest.raises(StoreError, match="in use"):
        open_store(tmp_path)
    store.close()
    with pytest.raises(StoreError, match="another key"):
        CardStore.open(tmp_path / "card.store", StoreSecret(bytes(32)))
    with pytest.raises(StoreError, match="opened by a key"):
        CardStore.open(tmp_path / "card.store", StoreSecret(b"a passphrase", is_passphrase=True))
    with pytest.raises(StoreError, match="exists already"):
        CardStore.create(tmp_path / "card.store", StoreSecret(STORE_KEY), StoreContents(NO_PIN))
    with pytest.raises(StoreError, match="at least 32"):
        StoreSecret(bytes(31))
    with pytest.raises(StoreError, match="init"):
        CardStore.open(tmp_path / "none", StoreSecret(STORE_KEY))


def test_a_passphrase_opens_its_store(tmp_path: Path) -> None:
    path = tmp_path / "card.store"
    secret = StoreSecret(b"correct horse", is_passphrase=True)
    CardStore.create(path, secret, StoreContents(NO_PIN)).close()
    CardStore.open(path, secret).close()
    with pytest.raises(StoreError):
        CardStore.open(path, StoreSecret(b"wrong horse", is_passphrase=True))


NO_PIN = PinRecord(b"", b"", 0, 0)
pins = st.builds(PinRecord, st.binary(max_size=16), st.binary(max_size=32), st.integers(0, 10), st.integers(1, 10))
identities = st.builds(
    IdentityRecord,
    st.text(max_size=10),
    st.sampled_from(list(KeyAlgorithm)),
    st.binary(max_size=50),
    st.binary(max_size=10),
    st.binary(max_size=50),
    st.lists(st.binary(max_size=20), max_size=3).map(tuple),
)


key_sets = st.sampled_from((48, 72, 96)).flatmap(lambda size: st.binary(min_size=size, max_size=size)).map(KeySet.split)
domains = st.builds(
    DomainRecord,
    st.binary(min_size=10, max_size=10),
    st.dictionaries(st.integers(1, 127), key_sets, max_size=4),
    st.dictionaries(st.sampled_from((0x42, 0x45)), st.binary(min_size=1, max_size=20)),
)


@given(pins, st.lists(identities, max_size=4).map(tuple), domains)
def test_contents_round_trip(pin: PinRecord, records: tuple[IdentityRecord, ...], domain: DomainRecord) -> None:
    contents = StoreContents(pin, records, domain)
    decoded = StoreContents.decode(contents.encode())
    assert decoded == contents
    assert list(decoded.domain.key_sets) == list(domain.key_sets)  # the newest is the last


@given(st.one_of(st.binary(max_size=60), st.sampled_from([b"{}", b'{"pin": []}', b'{"pin": {}, "identities": [1]}'])))
def test_any_bytes_are_contents_or_the_error(content: bytes) -> None:
    with pytest.raises(StoreError):
        StoreContents.decode(content)


def test_no_secret_in_a_repr(tmp_path: Path) -> None:
    record = IdentityRecord("name", KeyAlgorithm.P_256, b"private-key-bytes")
    contents = StoreContents(new_store(tmp_path).contents.pin, (record,))
    assert "private-key-bytes" not in repr(contents)
    assert str(STORE_KEY) not in repr(StoreSecret(STORE_KEY))
    assert str(contents.pin.verifier) not in repr(contents)


# PINs


def refused(keeper: PinKeeper, pin: bytes) -> int:
    with pytest.raises(CommandRefusedError) as refusal:
        keeper.verify(pad_pin(pin))
    return refusal.value.sw


def keeper_of(store: CardStore) -> PinKeeper:
    return PinKeeper(store, bytes)


def test_attempts_are_counted_and_survive(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    assert ATTEMPTS == 3
    assert [refused(keeper_of(store), b"9999") for _ in range(2)] == [0x6302, 0x6301]
    store.close()
    store = open_store(tmp_path)
    keeper = keeper_of(store)
    assert keeper.attempts == 1
    keeper.verify(pad_pin(USER_PIN))
    assert keeper.attempts == 3
    assert [refused(keeper, b"9999") for _ in range(3)] == [0x6302, 0x6301, 0x6300]
    assert refused(keeper, USER_PIN) == 0x6983  # the right one, too late
    store.close()
    store = open_store(tmp_path)
    keeper = keeper_of(store)
    assert refused(keeper, USER_PIN) == 0x6983
    keeper.change(pad_pin(b"4711"))  # an administrator's right
    keeper.verify(pad_pin(b"4711"))
    assert keeper.attempts == 3


def test_the_count_is_durable_before_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that dies while it compares has lost the attempt, even if the PIN was right."""
    store = new_store(tmp_path)

    def die(padded_pin: bytes, salt: bytes) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pin_module, "_verifier", die)
        with pytest.raises(KeyboardInterrupt):
            keeper_of(store).verify(pad_pin(USER_PIN))
    store.close()
    assert keeper_of(open_store(tmp_path)).attempts == 2


def test_no_attempt_without_a_durable_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the counter cannot be written (full disk, read-only), the PIN is not even looked at."""
    store = new_store(tmp_path)
    card = CardOs(store)
    card.process(bytes.fromhex("00A404000711223344556601"))

    def full(contents: StoreContents) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "replace", full)
    assert card.process(bytes.fromhex("A0200000083030303039393939")).hex() == "6581"
    assert card.process(bytes.fromhex("A02000000830303030FFFFFFFF")).hex() == "6581"
    assert card.process(bytes.fromhex("A018000000")).hex() == "6303"
