"""Attacks on a running grid by those who have something: a hypervisor, a revoked one, a VM, somebody on the network; and bad days."""

from __future__ import annotations

import asyncio
import base64
import secrets
import sqlite3
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import aiohttp
import grpc
import grpc.aio
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gose.openid_provider import endpoint
from gose.server import GridService
from secfunet.gose.v1 import service_provider_pb2
from secfunet.identity import Holder, Role, der_of, pem_of
from secfunet.openid.association import Association, AssociationKind, AssociationType
from secfunet.openid.diffie_hellman import encode_number
from secfunet.openid.form import IDENTIFIER_SELECT, NAMESPACE, decode_key_values
from secfunet.openid.provider import SIGNED_FIELDS
from tests.gose.grid import Answer, TestGrid, sign_operation
from tests.gose.test_login import begin, query, with_field
from tests.gose.test_operations import exchange, execute, reason_of, refused, refused_stream, under

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def service(grid: TestGrid) -> AsyncIterator[GridService]:
    async with grid.running() as service:
        yield service


def channel_of(grid: TestGrid, role: Role, name: str) -> grpc.aio.Channel:
    """A connection with a certificate of this grid's CA, in another role than a hypervisor's."""
    key = rsa.generate_private_key(65537, 2048)
    certificate = der_of(
        grid.authority.certificate_authority.issue(
            Holder(role, name),
            key.public_key(),
            now=time.time(),
            valid=3600.0,
            server_names=("localhost",) if role is Role.SERVER else (),
        )
    )
    credentials = grpc.ssl_channel_credentials(
        grid.authority.ca_path.read_bytes(),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        pem_of(certificate),
    )
    return grpc.aio.secure_channel(
        f"localhost:{grid.settings.service_provider.grpc.port}",
        credentials,
        options=[("grpc.use_local_subchannel_pool", 1)],
    )


# --- those who have a certificate


async def test_a_vm_with_a_stolen_session(grid: TestGrid, service: GridService) -> None:
    stolen = await grid.session("vm-1", "hv-a")
    async with channel_of(grid, Role.VM, "vm-thief") as channel:
        stub = grid.stub(channel)
        expected = (grpc.StatusCode.PERMISSION_DENIED, "HYPERVISOR_MISMATCH")
        assert await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(stolen))) == expected
        assert await refused_stream(stub, under(stolen), sign_operation()) == expected


async def test_a_server_certificate_opens_no_client_connection(grid: TestGrid, service: GridService) -> None:
    stolen = await grid.session("vm-1", "hv-a")
    async with channel_of(grid, Role.SERVER, "web") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await grid.stub(channel).Execute(execute(sign_operation()), timeout=2, metadata=under(stolen))
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


async def test_health_is_for_hypervisors_in_good_standing(grid: TestGrid, service: GridService) -> None:
    """Neither a VM's certificate nor one that is in no registry gets an answer, and nothing of them stays open."""
    request = health_pb2.HealthCheckRequest()
    expected = (grpc.StatusCode.PERMISSION_DENIED, "HYPERVISOR_REFUSED")
    for role in (Role.VM, Role.HYPERVISOR):
        async with channel_of(grid, role, "stranger") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert await refused(stub.Check(request, timeout=5)) == expected
            assert {await refused(stub.Watch(request, timeout=5).read()) for _ in range(50)} == {expected}
    assert service.callers.calls == 0


async def test_a_revoked_hypervisor_finds_every_door_shut(grid: TestGrid, service: GridService) -> None:
    grid.hypervisor("hv-revoked")
    granted = await grid.session("vm-2", "hv-revoked")
    form = grid.session_form("vm-2", "hv-revoked")
    async with grid.browser("hv-revoked") as browser, grid.channel("hv-revoked") as channel:
        begun = await begin(grid, browser, "hv-revoked", vm="vm-2")
        page = await browser.get(begun.location)
        with grid.registry() as registry:
            registry.revoke_identity(Role.HYPERVISOR, "hv-revoked")
        answer = await browser.request("POST", f"{grid.sp}/v1/sessions", json=form)
        assert (answer.status, answer.reason) == (403, "HYPERVISOR_REFUSED")
        answer = await browser.get(page.location)
        assert (answer.status, answer.reason) == (403, "HYPERVISOR_REFUSED")
        stub = grid.stub(channel)
        expected = (grpc.StatusCode.PERMISSION_DENIED, "HYPERVISOR_REFUSED")
        health = health_pb2_grpc.HealthStub(channel)
        assert await refused(health.Check(health_pb2.HealthCheckRequest(), timeout=5)) == expected
        assert await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(granted))) == expected
        # The session is gone, not only refused.
        assert (await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(granted))))[1] == (
            "SESSION_UNKNOWN"
        )


async def test_a_request_id_of_another_hypervisor(grid: TestGrid, service: GridService) -> None:
    """The same VM on two hypervisors (a migration), the same request id: neither gets what was made for the other."""
    operation = sign_operation()
    containers = []
    for name in ("hv-a", "hv-b"):
        session = await grid.session("vm-1", name)
        async with grid.channel(name) as channel:
            answer = await grid.stub(channel).Execute(execute(operation), timeout=5, metadata=under(session))
        (container,) = answer.containers
        assert grid.open(name, container).hvid == grid.hypervisor(name).hvid
        containers.append(container)
    assert containers[0] != containers[1]
    with pytest.raises(Exception, match="refused"):
        grid.open("hv-b", containers[0])


async def test_a_vm_on_two_hypervisors_at_once(grid: TestGrid, service: GridService) -> None:
    """Both have good tokens; the one that was issued last, and used, is where the VM is."""
    grid.hypervisor("hv-b")
    old, unused = grid.session_form("vm-1", "hv-a"), grid.session_form("vm-1", "hv-a")
    new = grid.session_form("vm-1", "hv-b")

    async def log_in(form: dict[str, str], hypervisor: str) -> Answer:
        async with grid.browser(hypervisor) as browser:
            return await browser.follow("POST", f"{grid.sp}/v1/sessions", json=form)

    here = (await log_in(old, "hv-a")).json()
    # The token for the second hypervisor is out, but not used: nothing has changed.
    async with grid.channel("hv-a") as channel, grid.channel("hv-b") as other:
        stub = grid.stub(channel)
        stream = stub.ExecuteStream(metadata=under(here))
        assert (await exchange(stream, sign_operation())).containers
        there = (await log_in(new, "hv-b")).json()
        assert (await grid.stub(other).Execute(execute(sign_operation()), timeout=5, metadata=under(there))).containers
        assert (await refused(stub.Execute(execute(sign_operation()), timeout=5, metadata=under(here))))[1] == (
            "SESSION_UNKNOWN"
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await exchange(stream, sign_operation())
        for form in (old, unused):
            answer = await log_in(form, "hv-a")
            assert (answer.status, answer.reason) == (403, "VM_ELSEWHERE")
        assert (await grid.stub(other).Execute(execute(sign_operation()), timeout=5, metadata=under(there))).containers
        # It comes back, or its new hypervisor is lost: a token that is issued now.
        back = await grid.session("vm-1", "hv-a")
        assert (await stub.Execute(execute(sign_operation()), timeout=5, metadata=under(back))).containers
        assert (await refused(grid.stub(other).Execute(execute(sign_operation()), timeout=5, metadata=under(there))))[
            1
        ] == "SESSION_UNKNOWN"


async def test_a_login_under_way_does_not_take_a_vm_back(grid: TestGrid, service: GridService) -> None:
    """Begun before the VM moved, finished after."""
    grid.hypervisor("hv-b")
    async with grid.browser("hv-a") as browser:
        begun = await begin(grid, browser, "hv-a")
        page = await browser.follow("GET", begun.location, until=grid.sp)
        there = await grid.session("vm-1", "hv-b")
        answer = await browser.get(page.location)
        assert (answer.status, answer.reason) == (403, "VM_ELSEWHERE")
    async with grid.channel("hv-b") as channel:
        answer = await grid.stub(channel).Execute(execute(sign_operation()), timeout=5, metadata=under(there))
        assert answer.containers


async def test_a_kept_answer_needs_the_right_to_ask(grid: TestGrid, service: GridService) -> None:
    """Another session of the same VM and hypervisor, whose token allows less, does not get the answer that is kept."""
    operation = sign_operation()
    full = await grid.session("vm-1", "hv-a")
    less = await grid.session("vm-1", "hv-a", operations=("encrypt",))
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        assert (await stub.Execute(execute(operation), timeout=5, metadata=under(full))).containers
        answer = await stub.Execute(execute(operation), timeout=5, metadata=under(less))
    assert not answer.containers
    assert [failure.reason for failure in answer.failures] == ["OPERATION_NOT_ALLOWED"]


async def test_a_card_in_anothers_place_signs_for_nobody(grid: TestGrid) -> None:
    """Somebody exchanges the sockets of two VMs' cards: each would sign with the other's key."""
    elements = {element.seid: element for element in grid.settings.secure_elements}
    one, two = elements["se-vm-1"], elements["se-vm-2"]
    way = ("socket", "user_pin_file")
    exchanged = elements | {
        one.seid: one.model_copy(update={name: getattr(two, name) for name in way}),
        two.seid: two.model_copy(update={name: getattr(one, name) for name in way}),
    }
    settings = grid.settings.model_copy(update={"secure_elements": tuple(exchanged.values())})
    async with GridService(settings) as service:
        session = await grid.session("vm-1", "hv-a")
        async with grid.channel("hv-a") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await grid.stub(channel).Execute(execute(sign_operation()), timeout=5, metadata=under(session))
        assert reason_of(caught.value) == "CARD_UNAVAILABLE"
        causes = {slot.seid: slot.cause for slot in service.rack.slots() if slot.cause}
    assert causes == {
        "se-vm-1": "it does not hold the key of the vm 'vm-1'",
        "se-vm-2": "it does not hold the key of the vm 'vm-2'",
    }


# --- on the way to the OpenID provider


async def test_a_victim_finishes_a_login_that_another_began(grid: TestGrid, service: GridService) -> None:
    """hv-b begins, and brings hv-a's client to follow its link, even to send its cookie (session fixation): hv-a's login is true, but
    it is worth nothing to hv-b, who does not see it, nor to hv-a, whose connection did not begin it.
    """
    async with grid.browser("hv-b") as attacker, grid.browser("hv-a") as victim:
        begun = await begin(grid, attacker, "hv-b")
        page = await attacker.get(begun.location)
        refused_link = await victim.get(page.location)
        assert (refused_link.status, refused_link.reason) == (400, "LOGIN_UNKNOWN"), "without the cookie"
        victim.cookies.update(attacker.cookies)
        back = await victim.get(page.location)
        assert back.location.startswith(grid.sp)
        at_victim = await victim.get(back.location)
        assert (at_victim.status, at_victim.reason) == (403, "HYPERVISOR_MISMATCH")
        # Even if the attacker learns the whole answer.
        at_attacker = await attacker.get(back.location)
        assert (at_attacker.status, at_attacker.reason) == (403, "LOGIN_REFUSED")


async def test_a_stolen_login_cookie_opens_no_session(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as victim, grid.browser("hv-b") as thief:
        assert (await victim.follow("GET", (await begin(grid, victim)).location)).status == 200
        thief.cookies.update(victim.cookies)
        answer = await thief.follow("GET", (await begin(grid, thief, "hv-b")).location)
        assert (answer.status, answer.reason) == (403, "LOGIN_REFUSED"), "the assertion names hv-a"


def forged(grid: TestGrid, begun: str, association: Association, **changes: str) -> str:
    """An assertion about hv-a as an attacker would make it with a key that he knows, for the login of ``begun``."""
    asked = query(begun)
    claimed = f"{grid.op}/id/{grid.hypervisor('hv-a').hvid}"
    message = {
        "ns": NAMESPACE,
        "mode": "id_res",
        "op_endpoint": f"{grid.op}/openid",
        "claimed_id": claimed,
        "identity": claimed,
        "return_to": asked["openid.return_to"],
        "response_nonce": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) + secrets.token_hex(4),
        "assoc_handle": association.handle,
        "signed": SIGNED_FIELDS,
        **changes,
    }
    message["sig"] = association.sign(message, message["signed"])
    fields = urlencode({f"openid.{key}": value for key, value in message.items()})
    return f"{asked['openid.return_to']}&{fields}"


async def an_association(grid: TestGrid) -> Association:
    """Anybody gets one from the provider: with a key that he knows."""
    form = {
        "openid.ns": NAMESPACE,
        "openid.mode": "associate",
        "openid.assoc_type": "HMAC-SHA256",
        "openid.session_type": "no-encryption",
    }
    async with grid.browser(None) as browser:
        answer = decode_key_values((await browser.request("POST", f"{grid.op}/openid", data=form)).body)
    return Association(
        AssociationKind.SHARED,
        f"{grid.op}/openid",
        answer["assoc_handle"],
        AssociationType.HMAC_SHA256,
        base64.b64decode(answer["mac_key"]),
        time.time() + 3600,
    )


@pytest.mark.parametrize("how", ["own association", "the party's handle", "invalidated handle", "another provider"])
async def test_an_assertion_under_a_key_that_the_attacker_knows(grid: TestGrid, service: GridService, how: str) -> None:
    """hv-a itself cheats (or somebody in its place): it wants a session without its card's login."""
    known = await an_association(grid)
    async with grid.browser("hv-a") as browser:
        begun = (await begin(grid, browser)).location
        partys_handle = query(begun)["openid.assoc_handle"]
        assert partys_handle != known.handle
        match how:
            case "own association":
                url = forged(grid, begun, known)
            case "the party's handle":
                url = with_field(forged(grid, begun, known), "openid.assoc_handle", partys_handle)
            case "invalidated handle":
                url = forged(grid, begun, known, invalidate_handle=partys_handle)
            case _:
                url = forged(grid, begun, known, op_endpoint="https://localhost:1/openid")
        answer = await browser.get(url)
        assert (answer.status, answer.reason) == (403, "LOGIN_REFUSED")
        # It has not disturbed the association: the next login is signed with it.
        assert query((await begin(grid, browser)).location)["openid.assoc_handle"] == partys_handle


@pytest.mark.parametrize(
    "return_to",
    [
        "https://elsewhere.example/",
        "//elsewhere.example/",
        "{sp}@elsewhere.example/",
        "{sp}.elsewhere.example/",
        "{sp}\\@elsewhere.example/",
        "{sp}%2f@elsewhere.example/",
        "javascript:alert(1)",
        "{sp}/v1/openid/return#fragment",
        "{sp}/../elsewhere",
        "{sp}/%2e%2e/elsewhere",
        "{sp}/\r\nSet-Cookie: a=b",
        "https://localhost:1/",
        "http://localhost/",
        "",
        "x" * 4000,
    ],
)
async def test_nobody_is_sent_elsewhere(grid: TestGrid, service: GridService, return_to: str) -> None:
    """Open redirects: an error is not sent back either, since "back" is what is wrong."""
    for mode in ("checkid_setup", "checkid_immediate", "nonsense"):
        fields = {
            "openid.ns": NAMESPACE,
            "openid.mode": mode,
            "openid.claimed_id": IDENTIFIER_SELECT,
            "openid.identity": IDENTIFIER_SELECT,
            "openid.realm": f"{grid.sp}/",
            "openid.return_to": return_to.replace("{sp}", grid.sp),
        }
        async with grid.browser(None) as browser:
            answer = await browser.get(f"{grid.op}/openid?{urlencode(fields)}")
        assert answer.status == 400
        assert not answer.location
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("size", [9_000, 200_000])
async def test_huge_requests_end_with_an_answer(grid: TestGrid, service: GridService, size: int) -> None:
    huge = "a" * size
    async with grid.browser("hv-a") as browser:
        for answer in (
            await browser.request("POST", f"{grid.op}/openid", data={"openid.ns": huge}),
            await browser.request("POST", f"{grid.sp}/v1/sessions", json={"vm_certificate": huge}),
        ):
            assert 400 <= answer.status < 500
        try:
            answer = await browser.get(f"{grid.sp}/v1/openid/return?state={huge}")
        except aiohttp.ClientError:
            pass
        else:
            assert 400 <= answer.status < 500
        assert (await browser.follow("GET", (await begin(grid, browser)).location)).status == 200


async def test_a_flood_of_associations_does_not_stop_logins(grid: TestGrid, service: GridService) -> None:
    """The provider forgets the oldest associations: the service provider's own, too. It asks the provider then, and makes a new one."""
    async with grid.browser("hv-a") as browser:
        first = query((await begin(grid, browser)).location)["openid.assoc_handle"]
        with sqlite3.connect(grid.settings.state / "service.sqlite") as database:
            database.execute("DELETE FROM associations WHERE kind = 'shared'")
        assert (await browser.follow("GET", (await begin(grid, browser)).location)).status == 200
        browser.cookies.clear()
        assert (await browser.follow("GET", (await begin(grid, browser)).location)).status == 200
        assert query((await begin(grid, browser)).location)["openid.assoc_handle"] != first


async def test_associations_take_a_part_of_the_grid_however_many_addresses_ask(
    grid: TestGrid, service: GridService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exponentiation each, for whoever asks, and a /64 has more addresses than anybody can count."""
    addresses = iter(f"2001:db8:{number:x}::1" for number in range(10_000))
    monkeypatch.setattr(endpoint, "rate_key", lambda _: next(addresses))
    form = {
        "openid.ns": NAMESPACE,
        "openid.mode": "associate",
        "openid.assoc_type": "HMAC-SHA256",
        "openid.session_type": "DH-SHA256",
        "openid.dh_consumer_public": encode_number(5),
    }
    async with grid.browser("hv-a") as browser:
        larger = await browser.request(
            "POST", f"{grid.op}/openid", data={**form, "openid.dh_modulus": encode_number(2**2048 - 1)}
        )
        assert larger.status == 400
        outcomes: Counter[int] = Counter()
        for _ in range(endpoint.ALL_EXPONENTIATIONS + 20):
            outcomes[(await browser.request("POST", f"{grid.op}/openid", data=form)).status] += 1
        assert outcomes[429] >= 10, "all together have a bound"
        assert (await browser.follow("GET", (await begin(grid, browser)).location)).status == 200


async def test_one_address_does_not_get_associations_without_end(grid: TestGrid) -> None:
    """Not even the service provider at that address needs one: it asks the provider about the assertion instead."""
    async with grid.running(associations_per_minute=2):
        for _ in range(2):
            await an_association(grid)
        with sqlite3.connect(grid.settings.state / "service.sqlite") as database:
            database.execute("DELETE FROM associations")
        async with grid.browser("hv-a") as browser:
            answer = await browser.request(
                "POST", f"{grid.op}/openid", data={"openid.ns": NAMESPACE, "openid.mode": "associate"}
            )
            assert (answer.status, answer.reason) == (429, "TOO_MANY_LOGINS")
            begun = await begin(grid, browser)
            assert "openid.assoc_handle" not in query(begun.location)
            assert (await browser.follow("GET", begun.location)).status == 200


# --- who connects and says nothing


async def test_a_connection_that_never_speaks_is_not_kept(grid: TestGrid) -> None:
    async with grid.running(handshake_timeout=1.0, http_request_timeout=1.0):
        for address in (
            grid.settings.service_provider.https,
            grid.settings.service_provider.grpc,
            grid.settings.openid_provider.endpoint,
            grid.settings.openid_provider.login,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
            began = time.monotonic()
            await asyncio.wait_for(reader.read(), 6)
            assert time.monotonic() - began > 0.5
            writer.close()


# --- bad days


async def asked(grid: TestGrid, session: dict[str, Any], operation: Any) -> Any:
    async with grid.channel("hv-a") as channel:
        return await grid.stub(channel).Execute(execute(operation), timeout=10, metadata=under(session))


async def test_a_full_disk_is_said_and_passes(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    answers = service_answers(service)
    (pages,) = answers.execute("PRAGMA page_count").fetchone()
    answers.execute(f"PRAGMA max_page_count = {pages}")
    operation = sign_operation()
    failed = None
    for _ in range(40):  # what is left of the last pages is used up first
        operation = sign_operation()
        try:
            await asked(grid, session, operation)
        except grpc.aio.AioRpcError as error:
            failed = error
            break
    assert failed is not None
    assert (failed.code(), reason_of(failed)) == (grpc.StatusCode.UNAVAILABLE, "STATE_UNAVAILABLE")
    answers.execute("PRAGMA max_page_count = 1000000")
    assert len((await asked(grid, session, operation)).containers) == 1, "the same request, when there is room again"


async def test_a_locked_state_is_said_and_does_not_hold_up_the_grid(grid: TestGrid, service: GridService) -> None:
    session = await grid.session("vm-1", "hv-a")
    operation = sign_operation()
    with sqlite3.connect(grid.settings.state / "answers.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asked(grid, session, operation)
        assert time.monotonic() - began < 3
        assert reason_of(caught.value) == "STATE_UNAVAILABLE"
        other.execute("ROLLBACK")
    assert len((await asked(grid, session, operation)).containers) == 1
    with sqlite3.connect(grid.settings.state / "service.sqlite", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        async with grid.browser("hv-a") as browser:
            answer = await browser.follow("GET", (await begin(grid, browser)).location)
            assert (answer.status, answer.reason) == (503, "STATE_UNAVAILABLE")
            assert answer.headers["Retry-After"] == "1"
        other.execute("ROLLBACK")
    assert (await grid.session("vm-1", "hv-a"))["session"]


def service_answers(service: GridService) -> sqlite3.Connection:
    """The connection that the grid writes its answers through."""
    import gc

    from gose.answers import AnswerStore

    path = str(service.settings.state / "answers.sqlite")
    for store in gc.get_objects():
        if isinstance(store, AnswerStore):
            try:
                (_, _, file) = store._database.execute("PRAGMA database_list").fetchone()
            except sqlite3.ProgrammingError:
                continue  # of a grid that was closed
            if file == path:
                return store._database
    raise AssertionError("the grid has no answer store")


async def test_the_hour_of_the_grid_is_another_one(grid: TestGrid) -> None:
    """Two hours late: tokens are not valid yet. Two hours early: those of an hour have ended. Each is refused, none is believed."""
    for skew in (-7200.0, 7200.0):
        service = GridService(grid.settings, clock=lambda skew=skew: time.time() + skew)
        async with service, grid.browser("hv-a") as browser:
            answer = await begin(grid, browser)
            assert answer.status == 403
            assert answer.reason in ("TOKEN_REFUSED", "HYPERVISOR_REFUSED")


# --- giving up


@pytest.mark.parametrize("steps", range(12))
async def test_a_lease_that_is_given_up_at_any_moment(grid: TestGrid, service: GridService, steps: int) -> None:
    """Cancelled after so many turns of the loop; the card is free again afterwards."""

    async def borrow() -> None:
        async with service.rack.servers.lease(timeout=5) as card:
            while True:
                await card.state()

    task = asyncio.create_task(borrow())
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(3):
        async with service.rack.servers.lease(timeout=2) as card:
            await card.state()


@pytest.mark.parametrize("wait", [0.0, 0.001, 0.003, 0.006, 0.01, 0.02])
async def test_a_call_that_is_given_up_at_any_moment(grid: TestGrid, service: GridService, wait: float) -> None:
    """The same request again gets an answer, once executed, whatever became of the first."""
    session = await grid.session("vm-1", "hv-a")
    operation = sign_operation()
    slot = next(slot for slot in service.rack.slots() if slot.seid == "se-vm-1")
    async with grid.channel("hv-a") as channel:
        stub = grid.stub(channel)
        await stub.GetSession(service_provider_pb2.GetSessionRequest(), timeout=5, metadata=under(session))
        before = slot.jobs_done  # the card was asked for a sign of life
        call = stub.Execute(execute(operation), timeout=5, metadata=under(session))
        await asyncio.sleep(wait)
        call.cancel()
        answer = await stub.Execute(execute(operation), timeout=5, metadata=under(session))
    assert len(answer.containers) == 1
    assert slot.jobs_done - before == 1


async def test_half_open_tls_does_not_take_a_card(grid: TestGrid) -> None:
    """Clients at the login door that begin a handshake and leave it: more than there are cards, and a login goes on."""
    async with grid.running(peer_patience=0.5):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(grid.authority.ca_path)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            client.do_handshake()
        hello = outgoing.read()
        writers = []
        for _ in range(4):
            _, writer = await asyncio.open_connection("127.0.0.1", grid.settings.openid_provider.login.port)
            writer.write(hello)
            writers.append(writer)
        async with grid.browser("hv-a") as browser:
            answer = await browser.follow("GET", (await begin(grid, browser)).location)
            assert answer.status == 200
            assert urlsplit(browser.visited[-2]).netloc == urlsplit(grid.login).netloc
        for writer in writers:
            writer.close()
