"""A full disk, and keys that are to be gone."""

from __future__ import annotations

import gc
import resource
import weakref
from pathlib import Path

import pytest

from secfunet.apdu import PinError, StatusError
from secfunet.card import CardClient, KeyAlgorithm, connect_unix
from secfunet.card.administrator import open_secure_channel
from secure_element.card_os import CardOs
from tests.support.cards import CardProcess, personalise, running_card
from tests.support.local_card import KEYS, new_store, personalised, ready_client
from tests.support.pki import CertificateAuthority

MEMORY_FAILURE = 0x6581


def limit_disk(card: CardProcess, size: int) -> None:
    """No file of the card process may grow beyond ``size`` bytes: what a full disk means to it (EFBIG in place of ENOSPC)."""
    assert card.process is not None
    resource.prlimit(card.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def leftovers(folder: Path) -> list[Path]:
    """What writes that failed have left behind."""
    return list(folder.glob(".card.store*"))


async def test_a_full_disk_takes_nothing_away(tmp_path: Path) -> None:
    """Nothing is half written, no attempt at a PIN is free, operations go on, and room heals it."""
    authority = CertificateAuthority("CA")
    async with running_card(tmp_path) as card:
        await personalise(card, authority, "vm")
        user = await card.connect("vm")
        store = tmp_path / "card.store"
        limit_disk(card, 16)
        assert await user.sign(7, bytes(32))
        for pin in (card.user_pin, b"99999999"):
            with pytest.raises(StatusError) as refused:
                await user.verify_pin(pin)
            assert refused.value.sw == MEMORY_FAILURE, "no count, no comparison"
        assert await user.pin_attempts() == 3
        with pytest.raises(PinError):
            await user.sign(7, bytes(32))  # the failed check took back what the first had opened
        await user.close()
        client = CardClient(await connect_unix(card.socket, timeout=5))
        await client.select()
        administrator = await open_secure_channel(client, card.keys)  # needs no room
        before = store.read_bytes()
        for change in (
            administrator.generate_key("new", KeyAlgorithm.P_256),
            administrator.delete_identity("vm"),
            administrator.unblock_pin(b"87654321"),
        ):
            with pytest.raises(StatusError) as refused:
                await change
            assert refused.value.sw == MEMORY_FAILURE
        assert store.read_bytes() == before
        assert not leftovers(tmp_path)
        limit_disk(card, resource.RLIM_INFINITY)
        assert await administrator.identities() == ("vm",)
        await administrator.generate_key("new", KeyAlgorithm.P_256)
        await administrator.close()
        await card.kill()
        await card.start()
        user = await card.connect("vm")
        assert await user.identities() == ("vm", "new")
        assert await user.pin_attempts() == 3
        await user.close()


async def test_a_destroyed_key_is_gone_from_memory(tmp_path: Path) -> None:
    """Deleted, or made anew before it had a certificate: nothing in the process keeps the key, nor the Contexts that used it."""
    card: CardOs = await personalised(new_store(tmp_path), CertificateAuthority("CA"), ("vm", KeyAlgorithm.P_256))
    user = await ready_client(card, "vm")
    await user.reset_state()
    assert await user.process_eap(bytes.fromhex("010000060D20"))  # a Context with the key is built
    administrator = await open_secure_channel(user, KEYS)
    await administrator.generate_key("other", KeyAlgorithm.P_256)
    keys = card._applet._identities
    gone = [weakref.ref(keys.key_of(record)) for record in keys.records] + [weakref.ref(card._applet._engine._stacks)]
    await administrator.generate_key("other", KeyAlgorithm.P_256)
    await administrator.delete_identity("vm")
    gc.collect()
    assert [reference() for reference in gone] == [None, None, None]
    with pytest.raises(StatusError):
        await administrator.process_eap(bytes.fromhex("010000060D20"))
