"""Tokens of a user in the card: what is taken, what is refused, and that nothing of what is refused is kept."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from secfunet.apdu import PinError, StatusError
from secfunet.card import KeyAlgorithm, Segmentation
from secfunet.card.tokens import (
    StoredToken,
    TokenRefusedError,
    TokensFullError,
    TokenUnknownError,
    TrustedAuthority,
)
from secfunet.container import ContainerProfile
from secfunet.gose.v1 import operation_pb2
from secfunet.user_token import MAX_CONTAINER, MAX_PLAINTEXT, MAX_VALUE, UserToken, key_digest, public_key_der
from secure_element.card_os import CardOs
from secure_element.keys import KeyPair
from secure_element.store import StoreContents
from secure_element.tokens import MAX_TOKENS
from tests.secure_element.tokens import OAEP, V15, TokenCard, TokenMaker, run_openssl
from tests.support.local_card import administrator_client, open_store, ready_client

MAKER = TokenMaker()
STRANGER = TokenMaker()
BOTH = pytest.mark.parametrize("profile", [OAEP, V15])
REFUSED = b"\x6a\x80"
DONE = b"\x90\x00"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> TokenCard:
    """Key pairs are made once; each test has a copy of that card."""
    return await TokenCard.make(tmp_path_factory.mktemp("card"), MAKER)


@pytest.fixture
def card(made: TokenCard, tmp_path: Path) -> TokenCard:
    return made.copy(tmp_path)


async def refused(sw: int, awaitable: object) -> None:
    with pytest.raises(StatusError) as refusal:
        await awaitable  # type: ignore[misc]  # a coroutine of any kind
    assert refusal.value.sw == sw


def load_raw(card: CardOs, container: bytes, profile: int = OAEP) -> bytes:
    """The status word of Load-Token."""
    return card.process(bytes((0x80, 0x56, profile, 0, 0)) + len(container).to_bytes(2) + container)


# --- what is taken


@BOTH
@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_a_token_goes_in_and_comes_out(
    card: TokenCard, profile: ContainerProfile, segmentation: Segmentation
) -> None:
    key = await card.key()
    user = await card.user(segmentation=segmentation)
    assert await user.stored() == ()
    values = {"badge": os.urandom(MAX_VALUE), "empty": b"", "ticket": b"a ticket"}
    for counter, (name, value) in enumerate(values.items(), 7):
        await user.load(MAKER.token(key, counter, name=name, value=value, profile=profile), profile)
    assert await user.stored() == (
        StoredToken("badge", 7, MAX_VALUE),
        StoredToken("empty", 8, 0),
        StoredToken("ticket", 9, 8),
    )
    for name, value in values.items():
        assert await user.value(name) == value
    await user.delete("badge")
    assert [one.name for one in await user.stored()] == ["empty", "ticket"]
    for ask in (user.value, user.delete):
        with pytest.raises(TokenUnknownError):
            await ask("badge")


async def test_keys_of_every_size(tmp_path: Path) -> None:
    """The largest card's and the largest authority's key, and the longest token: that container is the longest there is."""
    maker = TokenMaker(4096)
    card = await TokenCard.make(tmp_path, maker)
    administrator = await administrator_client(card.card)
    await administrator.generate_key("large", KeyAlgorithm.RSA_4096)
    request = await administrator.certificate_signing_request("large", "large")
    await administrator.load_identity("large", b"large", card.ca.issue_for_request(request), (card.ca.der,))
    container = maker.token(await card.key("large"), 1, name="n" * 32, value=bytes(MAX_VALUE))
    assert len(container) == MAX_CONTAINER
    user = await card.user("large")
    await user.load(container, OAEP)
    assert await user.value("n" * 32) == bytes(MAX_VALUE)


async def test_a_newer_token_of_a_name_replaces_the_older_one(card: TokenCard) -> None:
    key, user = await card.key(), await card.user()
    await user.load(MAKER.token(key, 1, value=b"old"), OAEP)
    await user.load(MAKER.token(key, 2, value=b"new"), OAEP)
    assert await user.stored() == (StoredToken("badge", 2, 3),)
    assert await user.value("badge") == b"new"


async def test_tokens_belong_to_their_identity_and_go_with_it(card: TokenCard) -> None:
    user = await card.user("alice")
    await user.load(MAKER.token(await card.key("alice"), 1), OAEP)
    other = await card.user("bob")
    assert await other.stored() == ()
    with pytest.raises(TokenUnknownError):
        await other.value("badge")
    administrator = await administrator_client(card.card)
    await administrator.delete_identity("alice")
    assert "badge" not in card.contents.encode().decode()


# --- what is refused: one status word, and nothing is kept


@contextlib.contextmanager
def nothing_kept(card: TokenCard) -> Any:
    """Not in memory, not on disk."""
    before, on_disk = card.contents, (card.folder / "card.store").read_bytes()
    yield
    assert card.contents is before
    assert (card.folder / "card.store").read_bytes() == on_disk


async def test_every_bit_of_a_container_counts(card: TokenCard) -> None:
    container = MAKER.token(await card.key(), 1)
    await card.client()
    with nothing_kept(card):
        for place in range(len(container)):
            for bit in range(8):
                changed = bytearray(container)
                changed[place] ^= 1 << bit
                assert load_raw(card.card, bytes(changed)) == REFUSED, (place, bit)
    assert load_raw(card.card, container) == DONE


@BOTH
async def test_truncated_and_extended_containers(card: TokenCard, profile: ContainerProfile) -> None:
    container = MAKER.token(await card.key(), 1, profile=profile)
    await card.client()
    with nothing_kept(card):
        for size in range(1, len(container)):
            assert load_raw(card.card, container[:size], profile) == REFUSED
            assert load_raw(card.card, container[size:], profile) == REFUSED
        for more in (1, 15, 16, 256, 4096, 60000 - len(container)):
            for extended in (container + bytes(more), bytes(more) + container, container + container[:more]):
                assert load_raw(card.card, extended, profile) == REFUSED
        assert card.card.process(bytes((0x80, 0x56, profile, 0))) == REFUSED
    assert load_raw(card.card, container, profile) == DONE


@BOTH
async def test_parts_of_other_containers(card: TokenCard, profile: ContainerProfile) -> None:
    """Headers, bodies and trailers that are each sound, put together anew; and headers for another key, signed by the authority itself."""
    alice, bob = await card.key("alice"), await card.key("bob")
    one, two = (MAKER.token(alice, counter, profile=profile) for counter in (1, 2))
    strange = STRANGER.token(alice, 3, profile=profile)
    for_bob = MAKER.token(bob, 3, profile=profile)

    def parts(container: bytes) -> tuple[bytes, bytes, bytes]:
        return container[:256], container[256:-256], container[-256:]

    def confused(sealed_to: Any, named: Any) -> bytes:
        token = UserToken(9, key_digest(public_key_der(named)), "badge", b"")
        return MAKER.seal(token.encode(), sealed_to, profile)

    (header, body, trailer), bobs = parts(one), parts(for_bob)
    wrong = [
        strange,
        for_bob,
        bobs[0] + body + trailer,
        bobs[0] + body + bobs[2],
        header + bobs[1] + bobs[2],
        parts(two)[0] + body + trailer,
        header + parts(two)[1] + trailer,
        header + body + parts(two)[2],
        header + body + parts(strange)[2],
        trailer + body + header,
        body + header + trailer,
        confused(bob, alice),
        confused(alice, bob),
        confused(bob, bob),
    ]
    await card.client("alice")
    with nothing_kept(card):
        for container in wrong:
            assert load_raw(card.card, container, profile) == REFUSED
            # The other profile's paddings are none of this one's.
            assert load_raw(card.card, container, V15 if profile is OAEP else OAEP) == REFUSED
        assert load_raw(card.card, one, V15 if profile is OAEP else OAEP) == REFUSED
    assert load_raw(card.card, one, profile) == DONE


async def test_a_counter_is_taken_once(card: TokenCard) -> None:
    key, user = await card.key(), await card.user()
    old, first, second = (MAKER.token(key, counter, name=f"t{counter}") for counter in (4, 5, 6))
    await user.load(first, OAEP)
    again = MAKER.token(key, 5, name="another")
    with nothing_kept(card):
        for container in (first, old, again):
            with pytest.raises(TokenRefusedError):
                await user.load(container, OAEP)
    await user.load(second, OAEP)
    await user.delete("t6")
    await user.delete("t5")
    # Neither deleting, nor a reset, nor another process, nor an authority that goes and comes back makes them good again.
    for container in (first, second):
        with pytest.raises(TokenRefusedError):
            await user.load(container, OAEP)
    administrator = await card.administrator()
    digest = key_digest(MAKER.public)
    assert await administrator.authorities() == (TrustedAuthority(digest, 6),)
    await administrator.distrust(digest)
    assert await administrator.authorities() == ()
    await administrator.trust(MAKER.public)
    assert await administrator.authorities() == (TrustedAuthority(digest, 6),)
    card.card._channel._store.close()
    restarted = CardOs(open_store(card.folder))
    await ready_client(restarted, "alice")
    for container in (old, first, again, second):
        assert load_raw(restarted, container) == REFUSED
    assert load_raw(restarted, MAKER.token(key, 7)) == DONE


async def test_only_authorities_that_the_administrator_named(card: TokenCard) -> None:
    key, user = await card.key(), await card.user()
    with pytest.raises(TokenRefusedError):
        await user.load(STRANGER.token(key, 1), OAEP)
    administrator = await card.administrator()
    await administrator.trust(STRANGER.public)
    user = await card.user()
    await user.load(STRANGER.token(key, 1, name="theirs"), OAEP)
    await user.load(MAKER.token(key, 1, name="ours"), OAEP)  # counters are each authority's own
    administrator = await card.administrator()
    await administrator.distrust(key_digest(MAKER.public))
    with pytest.raises(TokenUnknownError):
        await administrator.distrust(key_digest(MAKER.public))
    user = await card.user()
    with nothing_kept(card), pytest.raises(TokenRefusedError):
        await user.load(MAKER.token(key, 2), OAEP)
    assert [one.name for one in await user.stored()] == ["theirs", "ours"]


async def test_what_an_authority_may_be(card: TokenCard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure_element.tokens.MAX_TOKEN_AUTHORITIES", 4)  # making keys is slow
    administrator = await card.administrator()
    weak = public_key_der(TokenMaker(1024).key.public_key())
    for wrong in (b"", b"no key", weak, MAKER.public[:-1], MAKER.public + b"\0", bytes(2000)):
        await refused(0x6A80, administrator.trust(wrong))
    await administrator.trust(MAKER.public)  # once more: nothing changes
    assert len(await administrator.authorities()) == 1
    others = [public_key_der(TokenMaker().key.public_key()) for _ in range(4)]
    for other in others[:-1]:
        await administrator.trust(other)
    await administrator.distrust(key_digest(others[0]))  # still remembered, for its counter
    with pytest.raises(TokensFullError):
        await administrator.trust(others[-1])
    await administrator.trust(others[0])


async def test_nothing_is_decrypted_before_the_trailer_is_verified(
    card: TokenCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwrapped = []
    unwrap = KeyPair.unwrap
    monkeypatch.setattr(KeyPair, "unwrap", lambda *these: unwrapped.append(these) or unwrap(*these))
    container = MAKER.token(await card.key(), 1)
    await card.client()
    for wrong in (container[:-1] + bytes((container[-1] ^ 1,)), STRANGER.token(await card.key(), 1), bytes(700)):
        assert load_raw(card.card, wrong) == REFUSED
    assert unwrapped == []
    assert load_raw(card.card, container) == DONE
    assert len(unwrapped) == 1


async def test_segments_that_are_lost_doubled_or_reordered(card: TokenCard) -> None:
    container = MAKER.token(await card.key(), 1)
    await card.client()
    size = 100
    pieces = [container[start : start + size] for start in range(0, len(container), size)]
    swapped = [*pieces[:2], pieces[3], pieces[2], *pieces[4:]]
    assert len(pieces) > 5

    def send(pieces: list[bytes]) -> bytes:
        for piece in pieces[:-1]:
            assert card.card.process(bytes((0x90, 0x56, OAEP, 0, len(piece))) + piece) == DONE
        return card.card.process(bytes((0x80, 0x56, OAEP, 0, len(pieces[-1]))) + pieces[-1])

    with nothing_kept(card):
        for wrong in (swapped, pieces[1:], pieces[:-1], pieces[::-1], [pieces[0], *pieces], pieces[2:] + pieces[:2]):
            assert send(wrong) == REFUSED
        # Another command in between: what had come is forgotten.
        assert card.card.process(bytes((0x90, 0x56, OAEP, 0, size)) + pieces[0]) == DONE
        assert card.card.process(bytes.fromhex("8058000000"))[-2] in (0x90, 0x6C)
        assert send(pieces[1:]) == REFUSED
        long = bytes(240)
        for _ in range(273):
            assert card.card.process(bytes((0x90, 0x56, OAEP, 0, 240)) + long) == DONE
        assert card.card.process(bytes((0x90, 0x56, OAEP, 0, 240)) + long) == b"\x67\x00"
    assert send(pieces) == DONE


async def test_what_an_authority_signs_that_is_no_token(card: TokenCard) -> None:
    """Whoever makes the trailer may err, or sign other things: too long, of another kind, or any bytes."""
    key = await card.key()
    recipient = key_digest(public_key_der(key))
    sound = UserToken(1, recipient, "badge", b"value").encode()
    results = operation_pb2.ResultSet(vmid="v" * 43, hvid="h" * 43, time=1).SerializeToString()
    too_long = sound[:-8] + (MAX_VALUE + 1).to_bytes(2) + bytes(MAX_VALUE + 1)
    await card.client()
    with nothing_kept(card):
        for plaintext in (b"", results, too_long, sound + b"\0", sound[:-1], sound + sound, bytes(MAX_PLAINTEXT + 500)):
            assert load_raw(card.card, MAKER.seal(plaintext, key)) == REFUSED

    @settings(max_examples=60, deadline=None)
    @given(
        st.binary(max_size=200)
        | st.tuples(st.integers(0, len(sound) - 1), st.integers(1, 255)).map(
            lambda change: sound[: change[0]] + bytes((sound[change[0]] ^ change[1],)) + sound[change[0] + 1 :]
        )
    )
    def sign_anything(plaintext: bytes) -> None:
        before = card.contents
        try:
            token = UserToken.decode(plaintext)
            is_token = token.recipient == recipient and token.counter > before.token_authorities[0].counter
        except Exception:  # noqa: BLE001 - whatever it raises is looked at in another test
            is_token = False
        assert load_raw(card.card, MAKER.seal(plaintext, key)) == (DONE if is_token else REFUSED)
        assert (card.contents is before) != is_token

    sign_anything()


async def test_any_bytes_are_refused(card: TokenCard) -> None:
    await card.client()

    @settings(max_examples=100, deadline=None)
    @given(st.binary(min_size=1, max_size=900), st.integers(0, 255))
    def ask(container: bytes, profile: int) -> None:
        known = profile in list(ContainerProfile)
        assert load_raw(card.card, container, profile) == (REFUSED if known else b"\x6b\x00")

    with nothing_kept(card):
        ask()


async def test_a_full_card_says_so_and_the_container_stays_good(card: TokenCard) -> None:
    key, bobs = await card.key("alice"), await card.key("bob")
    await card.client("alice")
    for number in range(1, MAX_TOKENS):
        assert load_raw(card.card, MAKER.token(key, number, name=f"t{number}")) == DONE
    await card.client("bob")
    assert load_raw(card.card, MAKER.token(bobs, MAX_TOKENS, name="bobs")) == DONE
    user = await card.user("alice")
    late = MAKER.token(key, 1000, name="late")
    with nothing_kept(card), pytest.raises(TokensFullError):
        await user.load(late, OAEP)
    with nothing_kept(card):
        assert load_raw(card.card, late[:-1] + b"\0") == REFUSED  # full or not: what is wrong is only wrong
    await user.load(MAKER.token(key, 500, name="t1", value=b"renewed"), OAEP)  # takes no room
    await user.delete("t2")
    await user.load(late, OAEP)
    assert len(await user.stored()) == MAX_TOKENS - 1


async def test_identities_that_take_no_token(card: TokenCard) -> None:
    container = MAKER.token(await card.key(), 1)
    await refused(0x6A81, (await card.user("ec")).load(container, OAEP))
    administrator = await administrator_client(card.card)
    certificate = card.ca.issue(MAKER.key.public_key(), "xen")
    await administrator.bind_identity("alice", 1, certificate.public_bytes(Encoding.DER))
    user = await card.user("alice")
    with nothing_kept(card):
        await refused(0x6985, user.load(container, OAEP))


async def test_who_may_do_what(card: TokenCard) -> None:
    """Without PIN nothing; with it, nothing of the administrator's; and the administrator does not see tokens."""
    container = MAKER.token(await card.key(), 1)
    user = await card.user()
    await user.load(container, OAEP)
    for administrators in (user.trust(STRANGER.public), user.distrust(key_digest(MAKER.public))):
        await refused(0x6982, administrators)
    assert await user.value("badge") == b"the token"
    administrator = await card.administrator()
    with nothing_kept(card):
        for users in (
            administrator.load(container, OAEP),
            administrator.stored(),
            administrator.value("badge"),
            administrator.delete("badge"),
        ):
            with pytest.raises(PinError):
                await users


async def test_a_token_is_nowhere_but_in_its_answer(card: TokenCard, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    value = os.urandom(64)
    user = await card.user()
    await user.load(MAKER.token(await card.key(), 1, value=value), OAEP)
    assert await user.value("badge") == value
    assert value not in (card.folder / "card.store").read_bytes()
    for record in caplog.records:
        text = json.dumps(record.__dict__, default=str)
        assert value.hex() not in text
        assert "badge" not in text
    assert repr(value) not in repr(card.contents)


async def test_a_store_of_before_has_no_tokens(card: TokenCard) -> None:
    document = json.loads(card.contents.encode())
    del document["token_authorities"]
    for identity in document["identities"]:
        del identity["tokens"]
    contents = StoreContents.decode(json.dumps(document).encode())
    assert contents.token_authorities == ()
    assert all(identity.tokens == () for identity in contents.identities)


@pytest.mark.interop
async def test_openssl_makes_a_container_that_the_card_takes(card: TokenCard, tmp_path: Path) -> None:
    """As docs/protocols.md has it, with nothing of this repository but the plaintext."""
    key = await card.key()
    token = UserToken(int(time.time()), key_digest(public_key_der(key)), "badge", b"by hand")
    container = await run_openssl(tmp_path, MAKER, key, token.encode())
    user = await card.user()
    await user.load(container, OAEP)
    assert await user.value("badge") == b"by hand"
