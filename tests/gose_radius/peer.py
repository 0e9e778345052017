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

from gose.server import GridService
from gose.settings import Address, RadiusClientSettings, RadiusSettings
from secfunet.card.parameters import TlsParameters
from secfunet.eap import EapCode, EapPacket, EapType
from secfunet.identity import load_certificate
from secfunet.radius.wire import Attribute, Code
from secure_element.eap_engine import EapEngine, TlsIdView
from tests.gose.grid import Hypervisor, TestGrid, free_ports
from tests.secure_element_tls.cards import engine

SECRET = b"a secret of thirty-two bytes, ok"


def serve_radius(grid: TestGrid, *clients: str, host: str = "127.0.0.1") -> None:
    """Makes the grid a RADIUS server on a free port of ``host``, for these clients (127.0.0.1 if none is named)."""
    secret = grid.folder / "radius.secret"
    secret.touch(0o600)
    secret.write_bytes(SECRET + b"\n")
    settings = RadiusSettings(
        listen=Address(host, free_ports(1)[0]),
        clients=tuple(RadiusClientSettings(address=one, secret_file=secret) for one in clients or ("127.0.0.1",)),
    )
    grid.settings = grid.settings.model_copy(update={"radius": settings})


def port_of(grid: TestGrid) -> int:
    """The grid's RADIUS port."""
    assert grid.settings.radius is not None
    return grid.settings.radius.listen.port


def metric(service: GridService, name: str, **labels: str) -> float:
    """A value of the grid's metrics; 0 if nothing was counted yet."""
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


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
    arguments: tuple[str, ...] = (),
    address: str = "127.0.0.1",
) -> Outcome:
    """One run; ``again``: how often it authenticates once more (with the session of before); ``arguments``: more of the program's own."""
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
        *("eapol_test", "-c", str(config), "-a", address, "-p", str(port), "-s", secret.decode()),
        *("-r", str(again), "-t", str(timeout), *arguments),
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


def signed_packet(
    code: int,
    attributes: list[tuple[int, bytes]],
    rest: bytes = b"",
    *,
    identifier: int = 7,
    authenticator: bytes = b"request authenti",
    secret: bytes = SECRET,
) -> bytes:
    """A packet with a right Message-Authenticator around any attributes and, behind them, any bytes."""
    body = bytes((80, 18)) + bytes(16)
    body += b"".join(bytes((kind, len(value) + 2)) + value for kind, value in attributes) + rest
    packet = bytes((code, identifier)) + (20 + len(body)).to_bytes(2) + authenticator + body
    return packet[:22] + hmac.new(secret, packet, "md5").digest() + packet[38:]


class RadiusClient(asyncio.DatagramProtocol):
    """An access point: one request at a time."""

    def __init__(self, secret: bytes = SECRET) -> None:
        self.secret = secret
        self.arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self._transport: Any = None
        self._number = 0

    @classmethod
    async def connect(
        cls, port: int, secret: bytes = SECRET, *, host: str = "127.0.0.1", local: str | None = None
    ) -> RadiusClient:
        _, client = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: cls(secret), remote_addr=(host, port), local_addr=(local, 0) if local else None
        )
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.arrived.put_nowait(data)

    def close(self) -> None:
        self._transport.close()

    def request(
        self, eap: bytes, state: bytes | None = None, *, signed: bool = True, mtu: int | None = None
    ) -> tuple[AuthPacket, bytes]:
        """An Access-Request; ``mtu``: its Framed-MTU."""
        self._number = (self._number + 1) & 0xFF
        packet = AuthPacket(id=self._number, secret=self.secret, authenticator=secrets.token_bytes(16))
        packet[Attribute.USER_NAME.value] = [b"somebody"]
        packet[Attribute.EAP_MESSAGE.value] = [eap[start : start + 253] for start in range(0, len(eap) or 1, 253)]
        packet[Attribute.PROXY_STATE.value] = [b"one", b"two"]
        if state is not None:
            packet[Attribute.STATE.value] = [state]
        if mtu is not None:
            packet[Attribute.FRAMED_MTU.value] = [mtu.to_bytes(4)]
        if signed:
            packet.add_message_authenticator()
        return packet, packet.RequestPacket()

    def send(self, raw: bytes) -> None:
        self._transport.sendto(raw)

    async def receive(self, request: AuthPacket, timeout: float = 10.0) -> Answer:
        """The answer to that request; its two authenticators are computed here, not by the library that made them."""
        raw = await asyncio.wait_for(self.arrived.get(), timeout)
        assert raw[1] == request.id
        asked = request.authenticator
        digest = hashlib.md5(raw[:4] + asked + raw[20:] + self.secret, usedforsecurity=False).digest()
        assert raw[4:20] == digest
        assert raw[20:22] == bytes((80, 18)), "Message-Authenticator comes first"
        zeroed = raw[:4] + asked + raw[20:22] + bytes(16) + raw[38:]
        assert raw[22:38] == hmac.new(self.secret, zeroed, "md5").digest()
        assert len(raw) <= 4096
        packet = AuthPacket(secret=self.secret, packet=raw)
        assert packet.get(Attribute.PROXY_STATE.value, []) == request.get(Attribute.PROXY_STATE.value, [])
        eap = b"".join(packet.get(Attribute.EAP_MESSAGE.value, []))
        return Answer(raw[0], eap, packet.get(Attribute.STATE.value, [None])[0], packet)

    async def nothing(self, timeout: float = 0.3) -> bool:
        """Whether no packet comes."""
        try:
            await asyncio.wait_for(self.arrived.get(), timeout)
        except TimeoutError:
            return True
        return False

    async def ask(self, eap: bytes, state: bytes | None = None, *, mtu: int | None = None) -> Answer:
        packet, raw = self.request(eap, state, mtu=mtu)
        self.send(raw)
        return await self.receive(packet)

    async def ask_raw(self, code: int, attributes: list[tuple[int, bytes]], rest: bytes = b"") -> Answer:
        """Any signed packet."""
        self._number = (self._number + 1) & 0xFF
        asked = secrets.token_bytes(16)
        raw = signed_packet(code, attributes, rest, identifier=self._number, authenticator=asked, secret=self.secret)
        request = AuthPacket(id=self._number, secret=self.secret, authenticator=asked)
        if proxies := [value for kind, value in attributes if kind == Attribute.PROXY_STATE]:
            request[Attribute.PROXY_STATE.value] = proxies
        self.send(raw)
        return await self.receive(request)

    async def begin(self, name: str = "somebody") -> Answer:
        """EAP-Response/Identity."""
        return await self.ask(EapPacket(EapCode.RESPONSE, 7, EapType.IDENTITY, name.encode()).encode())

    async def authenticate(
        self, peer: EapEngine, *, mtu: int | None = None, lengths: list[int] | None = None
    ) -> Answer:
        """The whole of it; ``lengths`` gets the lengths of the server's EAP packets."""
        answer = await self.ask(peer.process(EapPacket(EapCode.REQUEST, 7, EapType.IDENTITY).encode()), mtu=mtu)
        while answer.code == Code.ACCESS_CHALLENGE:
            if lengths is not None:
                lengths.append(len(answer.eap))
            answer = await self.ask(peer.process(answer.eap), answer.state, mtu=mtu)
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
