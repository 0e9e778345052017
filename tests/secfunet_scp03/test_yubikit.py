"""The other end is yubikit, which nobody here wrote: it knows AES-128, S8, and the level 33."""

from __future__ import annotations

import os

import pytest
from yubikit.core import TRANSPORT, BadResponseError, Version
from yubikit.core.smartcard import SmartCardConnection, SmartCardProtocol
from yubikit.core.smartcard.scp import KeyRef as YubiKeyRef
from yubikit.core.smartcard.scp import Scp03KeyParams, ScpKid, ScpState, StaticKeys, _init_cipher

from secfunet.apdu import CommandApdu, ResponseApdu
from secfunet.scp03 import CardChannel, CardHandshake, HostHandshake, KeySet, Scp03SecurityError

KEYS = KeySet.split(bytes(range(48)))
THEIRS = StaticKeys(KEYS.enc, KEYS.mac, KEYS.dek)


class Card(SmartCardConnection):
    """Our card's end behind their connection: it answers each command with what it was asked, backwards."""

    def __init__(self, transport: TRANSPORT) -> None:
        self._transport = transport
        self._handshake: CardHandshake | None = None
        self._channel: CardChannel | None = None
        self.heard: list[CommandApdu] = []

    @property
    def transport(self) -> TRANSPORT:
        return self._transport

    def close(self) -> None:
        pass

    def send_and_receive(self, apdu: bytes) -> tuple[bytes, int]:
        command, extended = CommandApdu.decode(apdu), len(apdu) > 7 and apdu[4] == 0
        if command.ins == 0x50:
            self._handshake = CardHandshake(KEYS, 1, bytes(10), command.data, os.urandom(8))
            return self._handshake.answer.encode(), 0x9000
        try:
            if self._channel is None:
                assert self._handshake is not None
                self._channel = self._handshake.authenticate(command, extended=extended)
                return b"", 0x9000
            plain = self._channel.unwrap(command, extended=extended)
        except Scp03SecurityError:
            return b"", 0x6982
        self.heard.append(plain)
        if plain.ins == 0xEE:
            return b"", 0x6A80
        return self._channel.wrap(plain.data[::-1]), 0x9000


def their_session(card: Card, keys: StaticKeys = THEIRS) -> SmartCardProtocol:
    protocol = SmartCardProtocol(card)
    protocol.configure(Version(5, 7, 0))
    protocol.init_scp(Scp03KeyParams(YubiKeyRef(ScpKid.SCP03, 1), keys))
    return protocol


@pytest.mark.interop
@pytest.mark.parametrize("transport", [TRANSPORT.USB, TRANSPORT.NFC])  # extended APDUs, and short ones
def test_their_administrator_and_our_card(transport: TRANSPORT) -> None:
    card = Card(transport)
    protocol = their_session(card)
    for size in (0, 1, 15, 16, 17, 200, 231):
        data = os.urandom(size)
        assert protocol.send_apdu(0x80, 0xE2, 0x90, 0x00, data) == data[::-1]
        assert (card.heard[-1].data, card.heard[-1].cla) == (data, 0x80)
    with pytest.raises(Exception, match="6a80"):
        protocol.send_apdu(0x80, 0xEE, 0, 0, b"refused")
    assert protocol.send_apdu(0x80, 0xE2, 0x90, 0x01, b"goes on") == b"no seog"


@pytest.mark.interop
def test_wrong_keys_are_noticed_by_both() -> None:
    with pytest.raises((ValueError, BadResponseError)):
        their_session(Card(TRANSPORT.USB), StaticKeys(KEYS.enc, bytes(16), KEYS.dek))


@pytest.mark.interop
def test_our_administrator_and_their_keys() -> None:
    """They have no card's end: their session keys, MAC chain and ciphers stand in for one."""
    handshake = HostHandshake(KEYS, os.urandom(8))
    host_challenge, card_challenge = handshake.initialize_update.data, os.urandom(8)
    sent: list[bytes] = []

    def answer(*command: object) -> bytes:
        sent.append(bytes(10) + b"\1\3\x60" + card_challenge + real_cryptogram)
        return sent[-1]

    real_cryptogram = CardHandshake(KEYS, 1, bytes(10), host_challenge, card_challenge).answer.cryptogram
    # They check the card's cryptogram, and say what the host's is.
    their_host, host_cryptogram = ScpState.scp03_init(
        answer, Scp03KeyParams(YubiKeyRef(ScpKid.SCP03, 1), THEIRS), host_challenge=host_challenge
    )
    authenticate = handshake.authenticate(sent[0])
    assert authenticate.data[:8] == host_cryptogram
    assert authenticate.data[8:] == their_host.mac(authenticate.encode()[:-8])

    channel = handshake.channel
    session = THEIRS.derive(host_challenge + card_challenge)
    for counter, size in enumerate((0, 1, 15, 16, 100, 231), 1):
        data = os.urandom(size)
        wrapped = channel.wrap(CommandApdu(0x80, 0xE2, 0x90, 0x00, data))
        encoded = wrapped.encode()
        assert wrapped.data[-8:] == their_host.mac(encoded[:-8])
        body = wrapped.data[:-8]
        if body:
            decryptor = _init_cipher(session.key_senc, counter).decryptor()
            padded = decryptor.update(body) + decryptor.finalize()
            assert padded.rstrip(b"\0")[:-1] == data
        # ... and our administrator reads what their ciphers answer.
        padded = data[::-1] + b"\x80"
        encryptor = _init_cipher(session.key_senc, counter, True).encryptor()
        answered = encryptor.update(padded + bytes(-len(padded) % 16)) + encryptor.finalize() if data else b""
        rmac = ScpState(session._replace(key_smac=session.key_srmac), their_host._mac_chain).mac(answered + b"\x90\0")
        assert channel.unwrap(ResponseApdu(answered + rmac)).data == data[::-1]
