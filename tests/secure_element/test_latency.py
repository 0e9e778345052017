"""The model of a card's speed: what it reckons for each command, and that nobody gets it without asking for it by its name."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

import pytest

from secfunet.apdu import PinError
from secfunet.card import CardClient, KeyAlgorithm, connect_unix
from secfunet.card.parameters import TLS_1_3, TlsParameters
from secfunet.gose.v1 import operation_pb2
from secfunet.service.settings import SettingsError, validate_settings
from secure_element.card_os import CardOs
from secure_element.latency import NOTICE, LatencyModel, LatencySettings
from secure_element.server import CardServer
from secure_element.settings import CardSettings
from secure_element.work import Work
from tests.secure_element.test_process_handshake import DockingHost, handshake
from tests.support.cards import personalise, running_card
from tests.support.local_card import USER_PIN, LocalPort, administrator_client, new_store, personalised, ready_client
from tests.support.pki import CertificateAuthority

PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
OAEP = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256
SETTINGS = LatencySettings(private_key=0.35, handshake=1.4, resumed_handshake=0.4, key_pair=8, command=0.01)


class TimedPort(LocalPort):
    """Into a card in this process; ``seconds`` has what the model says of each command."""

    def __init__(self, card: CardOs, settings: LatencySettings = SETTINGS) -> None:
        super().__init__(card)
        self.model = LatencyModel(settings)
        self.model.seconds(b"\0\0\0\0", card.work)  # what the card has done before is no news
        self.seconds: list[float] = []

    async def transmit(self, command: bytes) -> bytes:
        response = await super().transmit(command)
        self.seconds.append(self.model.seconds(command, self.card.work))
        return response


async def test_a_private_key_costs_and_a_public_one_does_not(tmp_path: Path) -> None:
    card = await personalised(new_store(tmp_path), CertificateAuthority(), ("vm", KeyAlgorithm.RSA_2048))
    port = TimedPort(card)
    client = CardClient(port)
    await client.select()
    with pytest.raises(PinError):
        await client.verify_pin(b"9999")
    await client.verify_pin(USER_PIN)
    await client.set_identity("vm")
    ciphertext = await client.encrypt(OAEP, b"public")
    assert port.seconds == pytest.approx([0.01] * len(port.seconds)), "whatever else"
    await client.sign(PSS, bytes(32))
    await client.decrypt(OAEP, ciphertext)
    assert port.seconds[-2:] == pytest.approx([0.35, 0.35])
    with pytest.raises(Exception, match="6A81"):
        await client.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32))
    assert port.seconds[-1] == pytest.approx(0.01), "what is refused is refused at once"


async def test_a_key_pair(tmp_path: Path) -> None:
    card = CardOs(new_store(tmp_path))
    model = LatencyModel(SETTINGS)
    assert model.seconds(b"\0\0\0\0", card.work) == pytest.approx(0.01)
    await (await administrator_client(card)).generate_key("vm", KeyAlgorithm.P_256)
    assert model.seconds(b"\0\0\0\0", card.work) == pytest.approx(8)


async def test_a_handshake_takes_its_time_in_all(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    ports = []
    hosts = []
    for name in ("client", "server"):
        (tmp_path / name).mkdir()
        card = await personalised(new_store(tmp_path / name), authority, (name, KeyAlgorithm.P_256))
        client = await ready_client(card, name)
        port = TimedPort(card)
        client = CardClient(port, segmentation=client.segmentation)
        ports.append(port)
        hosts.append(DockingHost(client, is_client=name == "client"))
    for expected in (1.4, 0.4):
        await hosts[0].begin(TlsParameters(server_name="server", min_version=TLS_1_3))
        await hosts[1].begin(TlsParameters(role="server"))
        for port in ports:
            port.exchanges.clear()
            port.seconds.clear()
        await handshake(*hosts)
        for port in ports:
            process_eap = [
                seconds
                for (command, _), seconds in zip(port.exchanges, port.seconds, strict=True)
                if command[:2] == b"\xa0\x80"
            ]
            # To the command that ends it; tickets may come after that.
            end = process_eap.index(max(process_eap)) + 1
            assert sum(process_eap[:end]) == pytest.approx(expected)
            assert process_eap[end:] == pytest.approx([0.01] * len(process_eap[end:]))


def test_times_of_a_distribution_are_drawn() -> None:
    draws = iter((0.5, 3.0, 2.0))
    model = LatencyModel(SETTINGS.model_copy(update={"distribution": "exponential"}), lambda: next(draws))
    done = Work(private_operations=2)
    assert model.seconds(b"\x80\x2a\x9e\x04", done) == pytest.approx(0.35 * 3.5)
    done.full_handshakes = 1
    assert model.seconds(b"\xa0\x80\x00\x00", done) == pytest.approx(2.8)


async def test_a_served_card_withholds_its_answer_and_only_that(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    card = await personalised(store, CertificateAuthority(), ("vm", KeyAlgorithm.P_256))
    path = tmp_path / "card.sock"
    latency = LatencyModel(LatencySettings(private_key=0.2, command=0.0))
    async with CardServer(card, path, latency=latency):
        client = CardClient(await connect_unix(path, timeout=5))
        await client.select()
        await client.verify_pin(USER_PIN)
        await client.set_identity("vm")
        began = time.monotonic()
        await client.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32))
        assert time.monotonic() - began >= 0.2
        # A client that goes away takes the power with it: the next one need not wait for an answer that nobody wants.
        job = asyncio.create_task(client.sign(operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32)))
        await asyncio.sleep(0.02)
        job.cancel()
        await client.close()
        await (await connect_unix(path, timeout=5)).close()


async def test_it_is_off_unless_it_is_asked_for_by_name_and_then_says_so(tmp_path: Path) -> None:
    raw = {"socket": "s", "store": "t", "store_key": {"prompt": True}}
    assert validate_settings(CardSettings, raw, tmp_path / "card.toml").benchmark_latency is None
    for wrong in ({"latency": {}}, {"benchmark_latency": {"private_key": -1}}, {"benchmark_latency": {"jitter": 1}}):
        with pytest.raises(SettingsError):
            validate_settings(CardSettings, raw | wrong, tmp_path / "card.toml")
    assert "protects nothing" in NOTICE
    async with running_card(tmp_path, settings="[benchmark_latency]\nprivate_key = 0.05\ncommand = 0") as card:
        await personalise(card, CertificateAuthority(), "vm")
        assert NOTICE in card.log.read_text()
        status = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "secure_element.cli", "status", "--json", "--config", str(card.config)),
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await status.communicate()
        assert "pretends" in json.loads(output)["benchmark_latency"]
