"""Peers of the grid's RADIUS server: ``eapol_test`` (wpa_supplicant), and a client whose packets a test can lose, repeat and bend."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyrad.packet import AuthPacket

from secfunet.card.parameters import TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.identity import load_certificate
from secfunet.radius.wire import Attribute, Code
from secure_element.eap_engine import EapEngine, TlsIdView
from tests.gose.grid import Hypervisor, TestGrid
from tests.secure_element_tls.cards import engine

SECRET = b"a secret of thirty-two bytes, ok"


@dataclass
class Outcome:
    """What eapol_test found out."""

    code: int
    text: str

    @property
    def is_success(self) -> bool:
        return self.code == 0 and self.text.rstrip().endswith("SUCCESS")

    @property
    def versions(self) -> list[str]:
        """TLS versions, one each authentication."""
        return re.findall(r"SSL: Using TLS version (\S+)", self.text)

    @property
    def resumed(self) -> list[str]:
        """Whether each handshake was resumed."""
        return re.findall(r"OpenSSL: Handshake finished - resumed=(\d)", self.text)

    @property
    def keys(self) -> tuple[int, int]:
        """MS-MPPE keys that were the peer's own, and those that were not."""
        match = re.search(r"MPPE keys OK: (\d+)\s+mismatch: (\d+)", self.text)
        assert match is not None, self.text
        return int(match[1]), int(match[2])


async def eapol_test(
    grid: TestGrid,
    port: int,
    hypervisor: Hypervisor,
    *,
    secret: bytes = SECRET,
    authority: Path | None = None,
    tls13: bool = False,
    again: int = 0,
    fragment: int = 1398,
    timeout: int = 15,
) -> Outcome:
    """One run; ``again``: how often it authenticates once more (with the session of before)."""
    config = grid.folder / f"peer-{secrets.token_hex(4)}.conf"
    config.write_text(
        "network={\n"
        "  key_mgmt=IEEE8021X\n  eap=TLS\n"
        f'  identity="{hypervisor.name}"\n'
        f'  ca_cert="{authority or grid.authority.ca_path}"\n'
        f'  client_cert="{hypervisor.pem}"\n  private_key="{hypervisor.pem}"\n'
        f'  phase1="tls_disable_tlsv1_3={0 if tls13 else 1}"\n'
        f"  fragment_size={fragment}\n"
        "}\n"
    )
    process = await asyncio.create_subprocess_exec(
        *("eapol_test", "-c", str(config), "-a", "127.0.0.1", "-p", str(port), "-s", secret.decode()),
        *("-r", str(again), "-t", str(timeout)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, output.decode(errors="replace"))


def engine_of(grid: TestGrid, hypervisor: Hypervisor, **parameters: Any) -> EapEngine:
    """An EAP-TLS peer in memory that holds the hypervisor's key."""
    identity = TlsIdView(
        name=hypervisor.name,
        eap_id=hypervisor.name.encode(),
        certificate=load_certificate(hypervisor.certificate),
        authorities=(grid.authority.ca_certificate,),
        private_key=hypervisor.key,
    )
    return engine(identity, TlsParameters(**parameters))


@dataclass
class Answer:
    """A packet from the server, checked."""

    code: int
    eap: bytes
    state: bytes | None
    packet: Any


class RadiusClient(asyncio.DatagramProtocol):
    """An access point: one request at a time."""

    def __init__(self, secret: bytes = SECRET) -> None:
        self.secret = secret
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self._transport: Any = None
        self._number = 0

    @classmethod
    async def connect(cls, port: int, secret: bytes = SECRET) -> RadiusClient:
        _, client = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: cls(secret), remote_addr=("127.0.0.1", port)
        )
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._arrived.put_nowait(data)

    def close(self) -> None:
        self._transport.close()

    def request(self, eap: bytes, state: bytes | None = None, *, signed: bool = True) -> tuple[AuthPacket, bytes]:
        """An Access-Request."""
        self._number = (self._number + 1) & 0xFF
        packet = AuthPacket(id=self._number, secret=self.secret, authenticator=secrets.token_bytes(16))
        packet[Attribute.USER_NAME.value] = [b"somebody"]
        packet[Attribute.EAP_MESSAGE.value] = [eap[start : start + 253] for start in range(0, len(eap) or 1, 253)]
        packet[Attribute.PROXY_STATE.value] = [b"one", b"two"]
        if state is not None:
            packet[Attribute.STATE.value] = [state]
        if signed:
            packet.add_message_authenticator()
        return packet, packet.RequestPacket()

    def send(self, raw: bytes) -> None:
        self._transport.sendto(raw)

    async def receive(self, request: AuthPacket, timeout: float = 10.0) -> Answer:
        """The answer to that request; its two authenticators are computed here, not by the library that made them."""
        raw = await asyncio.wait_for(self._arrived.get(), timeout)
        assert raw[1] == request.id
        asked = request.authenticator
        digest = hashlib.md5(raw[:4] + asked + raw[20:] + self.secret, usedforsecurity=False).digest()
        assert raw[4:20] == digest
        assert raw[20:22] == bytes((80, 18)), "Message-Authenticator comes first"
        zeroed = raw[:4] + asked + raw[20:22] + bytes(16) + raw[38:]
        assert raw[22:38] == hmac.new(self.secret, zeroed, "md5").digest()
        packet = AuthPacket(secret=self.secret, packet=raw)
        assert packet[Attribute.PROXY_STATE.value] == [b"one", b"two"]
        eap = b"".join(packet.get(Attribute.EAP_MESSAGE.value, []))
        return Answer(raw[0], eap, packet.get(Attribute.STATE.value, [None])[0], packet)

    async def nothing(self, timeout: float = 0.3) -> bool:
        """Whether no packet comes."""
        try:
            await asyncio.wait_for(self._arrived.get(), timeout)
        except TimeoutError:
            return True
        return False

    async def ask(self, eap: bytes, state: bytes | None = None) -> Answer:
        packet, raw = self.request(eap, state)
        self.send(raw)
        return await self.receive(packet)

    async def begin(self, name: str = "somebody") -> Answer:
        """EAP-Response/Identity."""
        return await self.ask(EapPacket(EapCode.RESPONSE, 7, EapType.IDENTITY, name.encode()).encode())

    async def authenticate(self, peer: EapEngine) -> Answer:
        """The whole of it."""
        answer = await self.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()))
        while answer.code == Code.ACCESS_CHALLENGE:
            answer = await self.ask(peer.process(answer.eap), answer.state)
        return answer


def mppe_key(answer: Answer, request_authenticator: bytes, kind: int, secret: bytes = SECRET) -> bytes:
    """A key of RFC 2548, 2.4.2, decrypted as the text says."""
    ((value),) = _vendor(answer, kind)
    salt, encrypted = value[:2], value[2:]
    assert salt[0] & 0x80
    plain = bytearray()
    last = request_authenticator + salt
    for start in range(0, len(encrypted), 16):
        block = encrypted[start : start + 16]
        stream = hashlib.md5(secret + last, usedforsecurity=False).digest()
        plain += bytes(a ^ b for a, b in zip(block, stream, strict=True))
        last = block
    return bytes(plain[1 : 1 + plain[0]])


def _vendor(answer: Answer, kind: int) -> list[bytes]:
    found = []
    for value in answer.packet.get(26, []):
        assert value[:4] == (311).to_bytes(4)
        if value[4] == kind:
            assert value[5] == len(value) - 4
            found.append(value[6:])
    return found
