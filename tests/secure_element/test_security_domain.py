"""The issuer security domain: keys, data, status; and secure messaging around every command. yubikit is the administrator where it can."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yubikit.core import TRANSPORT
from yubikit.core.smartcard import SW, ApduError, SmartCardConnection
from yubikit.core.smartcard.scp import KeyRef, Scp03KeyParams, ScpKid, StaticKeys
from yubikit.securitydomain import SecurityDomainSession

from secfunet.apdu import CommandApdu, ResponseApdu
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.ber import decode_elements
from secfunet.card.instructions import AID, AID_OF_DOMAIN
from secfunet.scp03 import HostChannel, HostHandshake, InitializeUpdateAnswer, KeySet, PutKey, SecurityLevel
from secure_element.card_os import CardOs
from tests.support.cards import CardProcess, running_card
from tests.support.local_card import KEY_DATA, KEYS, USER_PIN, new_store, open_store

ISO = 'segmentation = "iso"'


class VpcdConnection(SmartCardConnection):
    """yubikit's connection to a served card: the framing of vpcd, over its Unix socket."""

    def __init__(self, path: Path, transport: TRANSPORT) -> None:
        self._transport = transport
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._socket.sendall(b"\0\1\1")  # power on

    @property
    def transport(self) -> TRANSPORT:
        return self._transport

    def close(self) -> None:
        self._socket.close()

    def send_and_receive(self, apdu: bytes) -> tuple[bytes, int]:
        self._socket.sendall(len(apdu).to_bytes(2) + apdu)
        answer = self._read(int.from_bytes(self._read(2)))
        return answer[:-2], int.from_bytes(answer[-2:])

    def _read(self, size: int) -> bytes:
        read = b""
        while len(read) < size:
            piece = self._socket.recv(size - len(read))
            assert piece, "the card hung up"
            read += piece
        return read


def their_keys(keys: KeySet) -> StaticKeys:
    return StaticKeys(keys.enc, keys.mac, keys.dek)


def parameters(keys: AdministratorKeys) -> Scp03KeyParams:
    return Scp03KeyParams(KeyRef(ScpKid.SCP03, keys.version), their_keys(keys.keys))


def administer_with_yubikit(card: CardProcess, transport: TRANSPORT, keys: AdministratorKeys) -> AdministratorKeys:
    """A day of an administrator; returns the keys that the card has in the end."""
    connection = VpcdConnection(card.socket, transport)
    try:
        session = SecurityDomainSession(connection)
        assert session.get_key_information() == {KeyRef(kid, keys.version): {0x88: 16} for kid in (1, 2, 3)}
        assert session.get_card_recognition_data().startswith(bytes.fromhex("06072A864886FC6B01"))
        for refused in (lambda: session.store_data(b"\x45\x01A"), lambda: session.delete_key(kvn=1)):
            with pytest.raises(ApduError) as error:
                refused()
            assert error.value.sw == SW.SECURITY_CONDITION_NOT_SATISFIED
        with pytest.raises(ValueError, match="Incorrect SCP parameters"):
            session.authenticate(Scp03KeyParams(KeyRef(ScpKid.SCP03, keys.version), StaticKeys.default()))

        session.authenticate(parameters(keys))
        session.store_data(b"\x45\x0bcard number\x42\x03\x11\x22\x33")
        assert session.get_data(0x45) == b"card number"
        (entry,) = decode_elements(session.protocol.send_apdu(0x80, 0xF2, 0x80, 0x02, b"\x4f\x00"))
        assert [element.tag for element in decode_elements(entry.value)] == [0x4F, 0x9F70, 0xC5]
        assert decode_elements(entry.value)[0].value == AID_OF_DOMAIN

        # A second key set, then the first one goes; the last one does not.
        new = AdministratorKeys.generate(keys.version + 1, size=16)
        session.put_key(KeyRef(ScpKid.SCP03, new.version), their_keys(new.keys))
        assert len(session.get_key_information()) == 6
        session.delete_key(kvn=keys.version)
        with pytest.raises(ApduError) as error:
            session.delete_key(kvn=new.version, delete_last=True)
        assert error.value.sw == SW.CONDITIONS_NOT_SATISFIED

        # The new keys open the card, the old ones do not; then the set is replaced in its own place.
        session = SecurityDomainSession(connection)
        with pytest.raises(ValueError, match="Incorrect SCP parameters"):
            session.authenticate(parameters(keys))
        session.authenticate(parameters(new))
        newer = AdministratorKeys.generate(new.version, size=16)
        session.put_key(KeyRef(ScpKid.SCP03, newer.version), their_keys(newer.keys), replace_kvn=new.version)
        session = SecurityDomainSession(connection)
        session.authenticate(parameters(newer))
        return newer
    finally:
        connection.close()


@pytest.mark.interop
@pytest.mark.e2e
async def test_yubikit_administers_the_real_process(tmp_path: Path) -> None:
    keys = AdministratorKeys.generate(size=16)  # yubikit has AES-128
    keys.write(tmp_path / "card.keys")
    async with running_card(tmp_path, settings=ISO) as card:
        for transport in (TRANSPORT.USB, TRANSPORT.NFC):  # extended APDUs, then short ones in chains
            keys = administer_with_yubikit(card, transport, keys)
        await card.kill()
        await card.start()
        administer_with_yubikit(card, TRANSPORT.USB, keys)  # what was loaded is durable
        log = card.log.read_text()
    assert "key set loaded" in log
    assert keys.keys.enc.hex() not in log.lower()


# Our own end, in this process


class Administrator:
    """Says APDUs to a card in this process."""

    def __init__(self, card: CardOs, keys: AdministratorKeys = KEYS, *, aid: bytes = AID_OF_DOMAIN) -> None:
        self.card = card
        self._keys = keys
        assert self.plain(CommandApdu(0x00, 0xA4, 0x04, 0x00, aid, 65536)).sw == 0x9000
        self.channel: HostChannel | None = None

    def plain(self, command: CommandApdu) -> ResponseApdu:
        return ResponseApdu.decode(self.card.process(command.encode()))

    def open(self, level: SecurityLevel = SecurityLevel.C_MAC_C_DEC_R_MAC_R_ENC) -> HostChannel:
        handshake = HostHandshake(self._keys.keys, os.urandom(8), key_version=self._keys.version)
        answer = self.plain(handshake.initialize_update)
        assert answer.sw == 0x9000
        assert self.plain(handshake.authenticate(answer.data, level)).sw == 0x9000
        self.channel = handshake.channel
        return handshake.channel

    def send(self, cla: int, ins: int, p1: int, p2: int, data: bytes = b"") -> ResponseApdu:
        assert self.channel is not None
        return self.channel.unwrap(self.plain(self.channel.wrap(CommandApdu(cla, ins, p1, p2, data, 65536))))


GET_STATUS = (0x80, 0xF2, 0x40, 0x02, b"\x4f\x00")


@pytest.fixture
def card(tmp_path: Path) -> CardOs:
    return CardOs(new_store(tmp_path))


@pytest.mark.parametrize("level", [level for level in SecurityLevel if level is not SecurityLevel.NONE])
def test_every_level(card: CardOs, level: SecurityLevel) -> None:
    administrator = Administrator(card)
    administrator.open(level)
    answer = administrator.send(*GET_STATUS)
    assert AID in answer.data
    assert answer.sw == 0x9000


@pytest.mark.parametrize("size", [16, 24, 32])
def test_key_sets_of_every_size(card: CardOs, size: int) -> None:
    administrator = Administrator(card)
    administrator.open()
    new = AdministratorKeys.generate(2, size=size)
    put = PutKey(new.version, new.keys)
    answer = administrator.send(0x80, 0xD8, 0x00, 0x81, put.encode(KEYS.keys.dek))
    assert answer == ResponseApdu(put.receipt)
    Administrator(card, new).open()
    Administrator(card).open()


def test_what_the_card_says_of_itself(card: CardOs) -> None:
    administrator = Administrator(card)
    answer = administrator.plain(CommandApdu(0x80, 0xCA, 0x00, 0xE0, le=65536))
    (template,) = decode_elements(answer.data)
    assert template.tag == 0xE0
    assert [entry.value for entry in decode_elements(template.value)] == [
        bytes((kid, 1, 0x88, 16)) for kid in (1, 2, 3)
    ]
    assert administrator.plain(CommandApdu(0x00, 0xCA, 0x00, 0x45, le=256)).sw == 0x6A88
    administrator = Administrator(card, aid=b"")  # an empty AID means the security domain
    update = administrator.plain(CommandApdu(0x80, 0x50, 0x00, 0x00, bytes(8), 256))
    assert InitializeUpdateAnswer.decode(update.data).key_data == KEY_DATA
    again = administrator.plain(CommandApdu(0x80, 0x50, 0x00, 0x00, bytes(8), 256))
    assert InitializeUpdateAnswer.decode(again.data).challenge != InitializeUpdateAnswer.decode(update.data).challenge


def test_commands_that_are_refused(card: CardOs) -> None:
    administrator = Administrator(card)
    plain = administrator.plain
    assert plain(CommandApdu(0x80, 0x50, 0x09, 0x00, bytes(8), 256)).sw == 0x6A88
    assert plain(CommandApdu(0x80, 0x50, 0x00, 0x00, bytes(7), 256)).sw == 0x6700
    assert plain(CommandApdu(0x80, 0x50, 0x00, 0x01, bytes(8), 256)).sw == 0x6B00
    assert plain(CommandApdu(0x84, 0x82, 0x33, 0x00, bytes(16))).sw == 0x6982
    assert plain(CommandApdu(0x80, 0x82, 0x33, 0x00, bytes(16))).sw == 0x6D00
    assert plain(CommandApdu(0x80, 0xE4, 0x00, 0x00, b"\xd2\x01\x01")).sw == 0x6982
    for wrong in (bytes(16), bytes(15)):
        assert plain(CommandApdu(0x80, 0x50, 0x00, 0x00, bytes(8), 256)).sw == 0x9000
        assert plain(CommandApdu(0x84, 0x82, 0x33, 0x00, wrong)).sw == (0x6982 if len(wrong) == 16 else 0x6B00)
    # Nobody is without a MAC, and an attempt needs a challenge of its own.
    handshake = HostHandshake(KEYS.keys, os.urandom(8))
    handshake.authenticate(plain(handshake.initialize_update).data, SecurityLevel.NONE)
    none = handshake.authenticate(plain(handshake.initialize_update).data, SecurityLevel.NONE)
    assert plain(none).sw == 0x6B00
    assert plain(none).sw == 0x6982

    administrator.open()
    send = administrator.send
    put = PutKey(1, AdministratorKeys.generate().keys).encode(KEYS.keys.dek)
    assert send(0x80, 0xD8, 0x05, 0x81, put).sw == 0x6A88  # replaces a set that is not there
    assert send(0x80, 0xD8, 0x00, 0x81, put).sw == 0x6985  # takes the place of one without saying so
    assert send(0x80, 0xD8, 0x01, 0x01, put).sw == 0x6B00
    assert send(0x80, 0xD8, 0x01, 0x81, put[:-1] + bytes((put[-1] ^ 1,))).sw == 0x6A80  # a check value
    assert send(0x80, 0xD8, 0x01, 0x81, b"").sw == 0x6A80
    for version in (2, 3, 4):
        assert send(0x80, 0xD8, 0, 0x81, PutKey(version, KEYS.keys).encode(KEYS.keys.dek)).sw == 0x9000
    assert send(0x80, 0xD8, 0, 0x81, PutKey(5, KEYS.keys).encode(KEYS.keys.dek)).sw == 0x6A84
    for data, sw in ((b"\xd2\x01\x09", 0x6A88), (b"\x4f\x0a" + AID, 0x6985), (b"\xd0\x01\x01", 0x6985), (b"", 0x6A80)):
        assert send(0x80, 0xE4, 0, 0, data).sw == sw
    assert send(0x80, 0xE2, 0x90, 0x00, b"\x66\x01\x00").sw == 0x6A80  # what the card itself says of itself
    assert send(0x80, 0xE2, 0x10, 0x00, b"\x45\x01\x00").sw == 0x6B00
    assert send(0x80, 0xF2, 0x20, 0x02, b"\x4f\x00").sw == 0x6A88
    assert send(0x80, 0xF2, 0x40, 0x00, b"\x4f\x00").sw == 0x6B00
    assert send(0x80, 0xEE, 0x00, 0x00).sw == 0x6D00
    assert send(*GET_STATUS).sw == 0x9000


def test_another_voice_in_the_session_ends_it(card: CardOs) -> None:
    administrator = Administrator(card)
    channel = administrator.open()
    assert administrator.plain(CommandApdu(0x80, 0xF2, 0x40, 0x02, b"\x4f\x00", 256)).sw == 0x6982
    assert administrator.plain(channel.wrap(CommandApdu(*GET_STATUS, 256))).sw == 0x6982

    channel = administrator.open()
    wrapped = channel.wrap(CommandApdu(*GET_STATUS, 65536))
    assert administrator.plain(wrapped).sw == 0x9000
    assert administrator.plain(wrapped).sw == 0x6982  # a replay
    assert administrator.plain(channel.wrap(CommandApdu(*GET_STATUS, 256))).sw == 0x6982

    channel = administrator.open()
    card.reset()
    Administrator(card)
    assert administrator.plain(channel.wrap(CommandApdu(*GET_STATUS, 256))).sw == 0x6982


def test_the_applet_understands_its_administrator(card: CardOs, tmp_path: Path) -> None:
    """Secure messaging is around every command of the applet; a warning is protected like a success."""
    administrator = Administrator(card, aid=AID)
    administrator.open()
    assert administrator.send(0xA0, 0x20, 0x00, 0x00).sw == 0x6303
    assert administrator.send(0xA0, 0x20, 0x00, 0x00, USER_PIN.ljust(8, b"\xff")).sw == 0x9000
    assert administrator.send(0xA0, 0x19, 0x00, 0x00) == ResponseApdu(b"\1")
    assert administrator.send(0xA0, 0x16, 0x00, 0x80, b"nobody").sw == 0x6985
    assert administrator.send(0xA0, 0x17, 0x00, 0x02).sw == 0x6A88


def test_a_full_disk_takes_no_key_away(card: CardOs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    administrator = Administrator(card)
    administrator.open()
    put = PutKey(1, AdministratorKeys.generate().keys).encode(KEYS.keys.dek)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("secure_element.store.write_atomically", full)
        assert administrator.send(0x80, 0xD8, 0x01, 0x81, put).sw == 0x6581
    Administrator(card).open()


def test_an_older_store_is_refused_by_its_version(tmp_path: Path) -> None:
    new_store(tmp_path).close()
    path = tmp_path / "card.store"
    content = path.read_bytes()
    path.write_bytes(content[:5] + b"\1" + content[6:])
    with pytest.raises(Exception, match="no store of this version"):
        open_store(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.sampled_from((0x80, 0xD8, 0xE2, 0xE4, 0xF2, 0xCA, 0x50, 0x82)), st.binary(max_size=80)
        ),
        max_size=5,
    )
)
def test_any_bytes(card: CardOs, commands: list[tuple[bool, int, bytes]]) -> None:
    """Protected or not: a status word, and never a fault of the card."""
    administrator = Administrator(card)
    administrator.open()
    for protected, ins, data in commands:
        command = CommandApdu(0x80, ins, data[0] if data else 0, data[1] if len(data) > 1 else 0x81, data, 256)
        answer = (
            administrator.send(command.cla, ins, command.p1, command.p2, data)
            if protected
            else administrator.plain(command)
        )
        assert answer.sw not in (0x6F00, 0x6581)
        if not protected or ins in (0x50, 0x82):
            administrator = Administrator(card)
            administrator.open()
    for data in (data for _, _, data in commands):
        assert ResponseApdu.decode(card.process(data)).sw != 0x6F00
