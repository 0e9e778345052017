"""A whole grid for tests: an authority, cards that are processes, hypervisors with keys in software, and what a client does."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gose.authority import AuthorityFolder, CardAccess, EnrolmentOrder, create_authority, enrol
from gose.registry import Identity, Registry
from gose.server import GridService
from gose.settings import Address, GoseSettings
from secfunet.card.parameters import KeyAlgorithm
from secfunet.container import unwrap_content_key, verify_container
from secfunet.gose.v1 import operation_pb2, service_provider_pb2_grpc
from secfunet.identity import Holder, Role, der_of, pem_of, thumbprint
from secfunet.operation import parse_result_set
from tests.support.cards import CardProcess, running_card


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


async def restart(card: CardProcess) -> None:
    """Starts a killed card again, without a look whether it serves: the slot that waits for it may be first, and is the only one."""
    with card.log.open("ab") as log:
        card.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "secure_element.cli", "serve", "--config", str(card.config), stderr=log
        )


@dataclass
class Hypervisor:
    """A hypervisor whose key lies in files: what the tests that need no card of a hypervisor use."""

    name: str
    hvid: str
    certificate: bytes
    key: rsa.RSAPrivateKey = field(repr=False)
    pem: Path

    def context(self, authority: Path) -> ssl.SSLContext:
        """TLS with this hypervisor's certificate, trusting the grid's CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority)
        context.load_cert_chain(self.pem)
        return context


@dataclass
class TestGrid:
    """What a test needs to know of its grid."""

    __test__ = False

    folder: Path
    settings: GoseSettings
    authority: AuthorityFolder
    cards: dict[str, CardProcess]
    vms: dict[str, Identity]
    hypervisors: dict[str, Hypervisor] = field(default_factory=dict)
    service: GridService | None = None

    @property
    def sp(self) -> str:
        return self.settings.audience

    @property
    def op(self) -> str:
        return f"https://localhost:{self.settings.openid_provider.endpoint.port}"

    @property
    def login(self) -> str:
        return f"https://localhost:{self.settings.openid_provider.login.port}"

    def registry(self) -> Registry:
        """The registry, opened as an administrator's command would."""
        return Registry(self.settings.database)

    @contextlib.asynccontextmanager
    async def running(self, *, metrics_port: int | None = None, **limits: Any) -> AsyncIterator[GridService]:
        """The grid in this process, some limits changed."""
        settings = self.settings.model_copy(
            update={"limits": self.settings.limits.model_copy(update=limits), "metrics_port": metrics_port}
        )
        async with GridService(settings) as service:
            self.service = service
            yield service

    def hypervisor(self, name: str) -> Hypervisor:
        """Enrols a hypervisor (once)."""
        if name not in self.hypervisors:
            key = rsa.generate_private_key(65537, 2048)
            certificate = der_of(
                self.authority.certificate_authority.issue(
                    Holder(Role.HYPERVISOR, name), key.public_key(), now=time.time(), valid=86400.0
                )
            )
            hvid = thumbprint(certificate)
            with self.registry() as registry:
                registry.begin_enrolment(Role.HYPERVISOR, name, hvid, certificate, None, time.time() + 86400)
                registry.finish_enrolment(hvid)
            pem = self.folder / f"{name}.pem"
            pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + pem_of(certificate))
            self.hypervisors[name] = Hypervisor(name, hvid, certificate, key, pem)
        return self.hypervisors[name]

    def token(
        self,
        vm: str,
        hypervisor: str,
        *,
        operations: Sequence[str] = ("sign", "decrypt", "encrypt"),
        valid: float = 3600.0,
    ) -> str:
        """A VM-Auth-Token."""
        with self.registry() as registry:
            return self.authority.token_authority.issue(
                registry,
                vm=vm,
                hypervisor=hypervisor,
                audience=self.settings.audience,
                operations=operations,
                now=time.time(),
                valid=valid,
            )

    def session_form(self, vm: str, hypervisor: str, **token: Any) -> dict[str, str]:
        """The body of POST /v1/sessions."""
        return {
            "vm_certificate": pem_of(self.vms[vm].certificate).decode(),
            "hypervisor_certificate": pem_of(self.hypervisor(hypervisor).certificate).decode(),
            "vm_auth_token": self.token(vm, hypervisor, **token),
        }

    def browser(self, hypervisor: str | None) -> Browser:
        """Something like a browser that holds the hypervisor's key (None: no client certificate)."""
        context = (
            self.hypervisor(hypervisor).context(self.authority.ca_path)
            if hypervisor
            else ssl.create_default_context(cafile=str(self.authority.ca_path))
        )
        return Browser(context)

    async def session(self, vm: str, hypervisor: str, **token: Any) -> dict[str, Any]:
        """A whole login; returns the granted session."""
        form = self.session_form(vm, hypervisor, **token)
        async with self.browser(hypervisor) as browser:
            answer = await browser.follow("POST", f"{self.sp}/v1/sessions", json=form)
            assert answer.status == 200, answer
            return answer.json()

    def channel(self, hypervisor: str | None) -> grpc.aio.Channel:
        """A gRPC channel with the hypervisor's certificate."""
        pem = self.hypervisor(hypervisor).pem.read_bytes() if hypervisor else None
        credentials = grpc.ssl_channel_credentials(self.authority.ca_path.read_bytes(), pem, pem)
        return grpc.aio.secure_channel(
            f"localhost:{self.settings.service_provider.grpc.port}",
            credentials,
            # A channel of its own, not one shared with an earlier test.
            options=[("grpc.use_local_subchannel_pool", 1)],
        )

    def stub(self, channel: grpc.aio.Channel) -> Any:
        """The service on a channel."""
        return service_provider_pb2_grpc.ServiceProviderServiceStub(channel)

    def open(self, hypervisor: str, container: bytes) -> operation_pb2.ResultSet:
        """What the hypervisor and the agent do with a container together."""
        key = self.hypervisor(hypervisor).key
        verified = verify_container(container, self.authority.container_key.public_key(), 256)
        return parse_result_set(verified.open(unwrap_content_key(key, verified.header)))


@dataclass
class Answer:
    """An HTTP answer, read whole."""

    url: str
    status: int
    headers: Any
    body: bytes

    @property
    def location(self) -> str:
        return str(self.headers.get("Location", ""))

    @property
    def reason(self) -> str:
        return str(self.json()["reason"])

    def json(self) -> Any:
        import json

        return json.loads(self.body)


class Browser:
    """Follows redirects by hand, keeps cookies (not by port, as browsers do), keeps connections open."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        self.cookies: dict[str, str] = {}
        self.visited: list[str] = []

    async def __aenter__(self) -> Browser:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._context),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=20),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str, **arguments: Any) -> Answer:
        return await self.request("GET", url, **arguments)

    async def request(self, method: str, url: str, **arguments: Any) -> Answer:
        """One exchange."""
        from yarl import URL

        self.visited.append(url)
        async with self._session.request(
            method, URL(url, encoded=True), allow_redirects=False, cookies=self.cookies, **arguments
        ) as response:
            body = await response.read()
            for name, morsel in response.cookies.items():
                self.cookies[name] = morsel.value
            return Answer(url, response.status, response.headers, body)

    async def follow(self, method: str, url: str, *, until: str | None = None, **arguments: Any) -> Answer:
        """Follows 303s to the end, or up to an answer whose Location begins with ``until``."""
        answer = await self.request(method, url, **arguments)
        for _ in range(10):
            if answer.status != 303 or (until is not None and answer.location.startswith(until)):
                return answer
            answer = await self.get(answer.location)
        raise AssertionError("too many redirects")


@contextlib.asynccontextmanager
async def new_grid(
    folder: Path,
    *,
    vms: Sequence[str] = ("vm-1",),
    servers: int = 2,
    server_names: Sequence[str] = (),
    card_settings: str = "",
    vm_cards: str = "",
) -> AsyncIterator[TestGrid]:
    """Makes an authority, starts and personalises the cards: one a VM (SEID se-NAME), some server cards.

    ``server_names`` stand in the server cards' certificates as well; ``card_settings``: more lines of TOML for each card,
    ``vm_cards``: for those of VMs.
    """
    async with contextlib.AsyncExitStack() as stack:
        ports = free_ports(4)
        seids = {f"se-{name}": "vm" for name in vms} | {f"server-{number}": "server" for number in range(servers)}
        started = await asyncio.gather(
            *(
                stack.enter_async_context(
                    running_card(folder, name=seid, settings=card_settings + (vm_cards if role == "vm" else ""))
                )
                for seid, role in seids.items()
            )
        )
        cards = dict(zip(seids, started, strict=True))
        settings = GoseSettings.model_validate(
            {
                "state": folder / "state",
                "names": [
                    "LOCALHOST.",
                    "127.0.0.1",
                ],  # as somebody may write it: everything below works with the one spelling
                "service_provider": {"https": f"127.0.0.1:{ports[0]}", "grpc": f"127.0.0.1:{ports[1]}"},
                "openid_provider": {"endpoint": f"127.0.0.1:{ports[2]}", "login": f"127.0.0.1:{ports[3]}"},
                "secure_elements": [
                    {
                        "seid": seid,
                        "socket": cards[seid].socket,
                        "role": role,
                        "user_pin_file": cards[seid].user_pin_file,
                        "administrator_keys_file": cards[seid].keys_file,
                    }
                    for seid, role in seids.items()
                ],
            }
        )
        assert isinstance(settings.service_provider.grpc, Address)
        authority = create_authority(settings.authority, settings.names, now=time.time())
        grid = TestGrid(folder, settings, authority, cards, {})
        with grid.registry() as registry:
            for seid, role in seids.items():
                name = seid.removeprefix("se-")
                identity = await enrol(
                    EnrolmentOrder(
                        Holder(Role(role), name),
                        label=role,
                        algorithm=KeyAlgorithm.RSA_2048 if role == "vm" else KeyAlgorithm.P_256,
                        valid=86400.0,
                        seid=seid,
                        server_names=(*settings.names, *server_names) if role == "server" else (),
                    ),
                    CardAccess.at(cards[seid].socket, cards[seid].keys),
                    authority.certificate_authority,
                    registry,
                    clock=time.time,
                )
                if role == "vm":
                    grid.vms[name] = identity
        yield grid


def sign_operation(digest: bytes | None = None, *, request_id: bytes | None = None) -> operation_pb2.Operation:
    """RSASSA-PSS with SHA-256 over some digest."""
    return operation_pb2.Operation(
        request_id=request_id or secrets.token_bytes(16),
        sign=operation_pb2.SignOperation(
            scheme=operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256, digest=digest or secrets.token_bytes(32)
        ),
    )
