"""No command, answer, log or file yields a private key: every instruction is tried, with and without PINs, and every answer is searched."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from secfunet.apdu import ApduFormatError, CommandApdu, ResponseApdu
from secfunet.card import KeyAlgorithm
from secfunet.card.client import pad_pin
from secfunet.card.tlv import encode_tlv
from secfunet.card.tokens import CardTokens
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.scp03 import HostChannel, HostHandshake
from secfunet.service.logs import JsonFormatter
from secure_element.card_os import CardOs
from secure_element.commands import GUARDS, Guard
from secure_element.store import CardStore
from tests.secure_element.tokens import TokenMaker
from tests.support.local_card import KEYS, STORE_KEY, USER_PIN, administrator_client, new_store, personalised
from tests.support.pki import CertificateAuthority

WINDOW = 12
"""So many bytes of a secret in a row are a leak; by chance it happens once in 2^96."""

PIN_INSTRUCTIONS = {0x20, 0x2A, 0x24, 0x2C}


def secrets_of(store: CardStore) -> list[bytes]:
    """Private components of all keys, in both byte orders, the keys as they are stored, the store key, the PINs' hashes, the
    administrators' keys.
    """
    found = [STORE_KEY, store.contents.pin.verifier]
    for keys in store.contents.domain.key_sets.values():
        found += [keys.enc, keys.mac, keys.dek]
    for record in store.contents.identities:
        # The end of a PKCS#8 is private; its beginning names the algorithm and, for RSA, holds the public modulus.
        key = load_der_private_key(record.private_key, None)
        if isinstance(key, rsa.RSAPrivateKey):
            numbers = key.private_numbers()
            values = [numbers.d, numbers.p, numbers.q, numbers.dmp1, numbers.dmq1, numbers.iqmp]
        else:
            assert isinstance(key, ec.EllipticCurvePrivateKey)
            values = [key.private_numbers().private_value]
        for value in values:
            size = (value.bit_length() + 7) // 8
            found += [value.to_bytes(size), value.to_bytes(size, "little"), f"{value:x}".encode(), str(value).encode()]
    return found


class Searcher:
    """Finds any WINDOW bytes of any secret."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._windows: set[bytes] = set()
        self.add(secrets)

    def add(self, secrets: Iterable[bytes]) -> None:
        self._windows |= {secret[at : at + WINDOW] for secret in secrets for at in range(len(secret) - WINDOW + 1)}

    def check(self, haystack: bytes) -> None:
        for at in range(len(haystack) - WINDOW + 1):
            assert haystack[at : at + WINDOW] not in self._windows, "a secret came out"


def random_commands(chance: random.Random, classes: Iterable[int]) -> Iterator[bytes]:
    """Each of the classes with every instruction; then every P1 and every P2 of the known ones."""

    def body() -> bytes:
        kind = chance.randrange(4)
        if kind == 0:
            return b""
        data = chance.choice(
            [b"rsa", b"ec", chance.randbytes(chance.randrange(1, 40)), bytes(32), chance.randbytes(255)]
        )
        if kind == 1:
            return bytes((chance.randrange(256),))
        if kind == 2:
            return bytes((len(data),)) + data
        return b"\0" + len(data).to_bytes(2) + data + b"\0\0"

    for cla in classes:
        for ins in range(256):
            if ins not in PIN_INSTRUCTIONS or cla == 0x80:
                yield bytes((cla, ins, chance.randrange(256), chance.randrange(256))) + body()
    for cla, ins in GUARDS:
        if ins in PIN_INSTRUCTIONS and cla != 0x80:
            continue
        for value in range(256):
            for other in (0, chance.randrange(256)):
                yield bytes((cla, ins, value, other)) + body()
                yield bytes((cla, ins, other, value)) + body()


def useful_commands(containers: Sequence[bytes] = ()) -> Iterator[bytes]:
    """What a lawful user would ask, each with the largest answer wanted; and tokens that he loads."""

    def apdu(cla: int, ins: int, p1: int, p2: int, data: bytes = b"") -> bytes:
        return bytes((cla, ins, p1, p2, 0)) + (len(data).to_bytes(2) + data if data else b"") + b"\0\0"

    for name in (b"rsa", b"ec"):
        for container in containers:
            yield apdu(0x80, 0x56, 1, 0, container)
        for ins in (0x54, 0x58):
            yield apdu(0x80, ins, 0, 0)
        yield apdu(0x80, 0x5A, 0, 0, b"badge")
        yield apdu(0xA0, 0x16, 0, 0x80, name)
        yield apdu(0xA0, 0x18, 0, 0)
        yield apdu(0xA0, 0x17, 0, 1)
        yield apdu(0xA0, 0x1A, 0, 0)
        yield apdu(0x80, 0xCA, 0, 0)
        yield apdu(0x80, 0x48, 0, 0, encode_tlv(((1, name), (5, b"subject"))))
        for scheme in range(10):
            for size in (32, 48, 64):
                yield apdu(0x80, 0x2A, 0x9E, scheme, bytes(size))
            yield apdu(0x80, 0x2A, 0x86, scheme, bytes(16))
            yield apdu(0x80, 0x2A, 0x80, scheme, bytes(255) + b"\1")
            yield apdu(0x80, 0x2A, 0x82, scheme, bytes(255) + b"\2")
        yield apdu(0xA0, 0x19, 0x10, 0)
        yield apdu(0xA0, 0x80, 0, 0, bytes.fromhex("0114 0006 0D20 3FAA2B6A"))
        yield apdu(0xA0, 0xA6, 0, 0)
        for function in range(256):
            yield apdu(0xA0, 0x82, function, 0)


async def test_no_command_yields_a_private_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = new_store(tmp_path)
    card = await personalised(store, CertificateAuthority(), ("rsa", KeyAlgorithm.RSA_2048), ("ec", KeyAlgorithm.P_384))
    searcher = Searcher(secrets_of(store))
    maker = TokenMaker()
    administrator = await administrator_client(card)
    await CardTokens(administrator).trust(maker.public)
    key = rsa_key_of(load_certificate(store.contents.identities[0].certificate))
    containers = [maker.token(key, 1), maker.token(key, 2)[:-1] + b"\0"]
    chance = random.Random(7816)  # noqa: S311 - tries, not secrets
    succeeded = 0
    known = [record.private_key for record in store.contents.identities]

    def note_keys() -> None:
        if known != [record.private_key for record in store.contents.identities]:
            known[:] = [record.private_key for record in store.contents.identities]
            searcher.add(secrets_of(store))  # a key was made

    def ask(command: bytes) -> None:
        nonlocal succeeded
        response = card.process(command)
        succeeded += response[-2:] == b"\x90\0"
        note_keys()
        searcher.check(response)
        while response[-2] in (0x61, 0x9F):
            response = card.process(bytes((0xA0, 0xC0, 0, 0, response[-1])))
            searcher.check(response)

    channel: HostChannel | None = None

    def ask_as_administrator(command: bytes) -> None:
        nonlocal succeeded, channel
        if channel is None:
            prepare(card, is_user=False)
            handshake = HostHandshake(KEYS.keys, chance.randbytes(8))
            update = card.process(handshake.initialize_update.encode())
            assert card.process(handshake.authenticate(update[:-2]).encode()) == b"\x90\0"
            channel = handshake.channel
        try:
            plain = CommandApdu.decode(command)
            wrapped = channel.wrap(CommandApdu(plain.cla & 0xEF, *command[1:4], plain.data, 65536))
        except ApduFormatError:
            return
        answer = ResponseApdu.decode(card.process(wrapped.encode()))
        note_keys()
        if answer.sw == 0x6982 or plain.ins in (0x50, 0xC0, 0x12):
            channel = None
            return
        succeeded += answer.sw == 0x9000
        searcher.check(channel.unwrap(answer).data)

    for is_user in (False, True):
        prepare(card, is_user=is_user)
        for command in useful_commands(containers):
            ask(command)
        for command in random_commands(chance, range(256)):
            ask(command)
            if command[1] == 0xA4:
                prepare(card, is_user=is_user)
    # The administrator, who speaks through the channel: what comes out is searched as he reads it.
    for command in (*useful_commands(), *random_commands(chance, (0x00, 0x10, 0x80, 0x90, 0xA0))):
        ask_as_administrator(command)
    assert card.process(bytes.fromhex("00A4040008A000000151000000"))[-2] in (0x61, 0x90)
    for command in random_commands(chance, (0x00, 0x80, 0x84)):
        ask(command)
    prepare(card, is_user=False)
    for _ in range(40):  # the PIN instructions, until nothing is left
        ins = chance.choice(sorted(PIN_INSTRUCTIONS))
        size = chance.choice((8, 16))
        ask(bytes((0xA0, ins, 0, chance.randrange(2), size)) + chance.randbytes(size))
    assert any(record.message == "token loaded" for record in caplog.records)
    assert succeeded > 300  # the search looked at answers, not only at refusals
    searcher.check((tmp_path / "card.store").read_bytes())
    formatter = JsonFormatter()
    assert caplog.records
    for record in caplog.records:
        searcher.check(formatter.format(record).encode())
        assert "internal error" not in record.getMessage()


def prepare(card: CardOs, *, is_user: bool) -> None:
    assert card.process(bytes.fromhex("00A404000711223344556601")) == b"\x90\0"
    if is_user:
        assert card.process(bytes((0xA0, 0x20, 0, 0, 8)) + pad_pin(USER_PIN)) == b"\x90\0"


async def test_the_search_would_find_a_leak(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    await personalised(store, CertificateAuthority(), ("ec", KeyAlgorithm.P_256))
    searcher = Searcher(secrets_of(store))
    with pytest.raises(AssertionError, match="a secret came out"):
        searcher.check(b"some bytes" + store.contents.identities[0].private_key)


async def test_every_command_but_the_pins_needs_one(tmp_path: Path) -> None:
    card = await personalised(new_store(tmp_path), CertificateAuthority(), ("ec", KeyAlgorithm.P_256))
    for is_user in (False, True):
        for (cla, ins), guard in GUARDS.items():
            if guard is Guard.NOBODY:
                continue
            prepare(card, is_user=is_user)
            response = card.process(bytes((cla, ins, 0xEE, 0xEE, 0)))
            is_allowed = is_user and guard is not Guard.ADMINISTRATOR
            refusal = b"\x69\x82" if guard is Guard.ADMINISTRATOR else b"\x63\x03"
            assert (response != refusal) == is_allowed, (is_user, hex(cla), hex(ins))
