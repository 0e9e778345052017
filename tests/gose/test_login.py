"""Logging in: service provider and OpenID provider with something like a browser, over real TLS, against real server cards."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
import time
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlencode, urlsplit

import aiohttp
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gose.server import GridService
from secfunet.identity import Holder, Role, der_of, load_certificate, pem_of
from secfunet.openid.discovery import SERVICE_SERVER, SERVICE_SIGNON, parse_html, parse_xrds
from secfunet.openid.form import IDENTIFIER_SELECT, NAMESPACE, decode_key_values
from secfunet.vm_auth_token import unverified_claims
from tests.gose.grid import Answer, Browser, TestGrid, restart

pytestmark = pytest.mark.asyncio(loop_scope="module")

XRDS = {"Accept": "application/xrds+xml"}
HTML = {"Accept": "text/html,application/xhtml+xml;q=0.9"}


@pytest_asyncio.fixture(loop_scope="module")
async def service(grid: TestGrid) -> AsyncIterator[GridService]:
    async with grid.running() as service:
        yield service


async def begin(grid: TestGrid, browser: Browser, hypervisor: str = "hv-a", vm: str = "vm-1") -> Answer:
    """The first request: 303 to the OpenID provider."""
    return await browser.request("POST", f"{grid.sp}/v1/sessions", json=grid.session_form(vm, hypervisor))


def query(url: str) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}


def with_field(url: str, name: str, value: str) -> str:
    parts = urlsplit(url)
    return parts._replace(query=urlencode({**query(url), name: value})).geturl()


async def test_a_whole_login(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        answer = await begin(grid, browser)
        assert answer.status == 303
        assert answer.headers["Cache-Control"] == "no-store"
        answer = await browser.follow("GET", answer.location)
        granted = answer.json()
        doors = [urlsplit(url)._replace(query="").geturl() for url in browser.visited]
    assert doors == [
        f"{grid.sp}/v1/sessions",
        f"{grid.op}/openid",
        f"{grid.login}/login",
        f"{grid.sp}/v1/openid/return",
    ]
    assert granted["vmid"] == grid.vms["vm-1"].thumbprint
    assert granted["hvid"] == grid.hypervisor("hv-a").hvid
    assert granted["operations"] == ["decrypt", "encrypt", "sign"]
    assert time.time() + 3500 < granted["expires_at"] <= time.time() + 3600
    assert der_of(load_certificate(granted["container_authority"].encode())) == der_of(
        grid.authority.container_certificate
    )


async def test_the_provider_learns_nothing_of_the_vm(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        await browser.follow("GET", (await begin(grid, browser)).location)
        at_provider = " ".join(url for url in browser.visited if not url.startswith(grid.sp))
    assert grid.vms["vm-1"].thumbprint not in at_provider
    assert "vm-1" not in at_provider


async def test_the_login_page_for_a_person(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        page = await browser.get((await begin(grid, browser)).location, headers=HTML)
        assert page.status == 200
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "script" not in page.body.decode()
        cookie = page.headers["Set-Cookie"]
        assert all(word in cookie for word in ("Secure", "HttpOnly", "SameSite=Lax", "Path=/", "Max-Age="))
        link = re.search(r'id="AutoLogin" href="([^"]+)"', page.body.decode())
        assert link is not None
        assert link[1].startswith(f"{grid.login}/login?sid=")
        answer = await browser.follow("GET", link[1])
        assert answer.status == 200
        assert answer.json()["vmid"] == grid.vms["vm-1"].thumbprint


async def test_a_person_may_cancel(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        page = await browser.get((await begin(grid, browser)).location, headers=HTML)
        link = re.search(r'id="Cancel" href="([^"]+)"', page.body.decode())
        assert link is not None
        answer = await browser.follow("GET", link[1])
        assert (answer.status, answer.reason) == (403, "LOGIN_REFUSED")
        assert (await browser.get(link[1])).reason == "LOGIN_UNKNOWN"


async def test_an_assertion_and_a_state_serve_once(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        first = await begin(grid, browser)
        back = await browser.follow("GET", first.location, until=grid.sp)
        assert (await browser.get(back.location)).status == 200
        again = await browser.get(back.location)
        assert (again.status, again.reason) == (400, "LOGIN_UNKNOWN")
        # The same assertion under a state that is fresh.
        second = await begin(grid, browser)
        state = query(query(second.location)["openid.return_to"])["state"]
        forged = await browser.get(with_field(back.location, "state", state))
        assert (forged.status, forged.reason) == (403, "LOGIN_REFUSED")


@pytest.mark.parametrize("field", ["openid.claimed_id", "openid.identity", "openid.sig", "openid.response_nonce"])
async def test_a_changed_assertion_is_refused(grid: TestGrid, service: GridService, field: str) -> None:
    grid.hypervisor("hv-b")
    async with grid.browser("hv-a") as browser:
        back = await browser.follow("GET", (await begin(grid, browser)).location, until=grid.sp)
        value = query(back.location)[field]
        if field in ("openid.claimed_id", "openid.identity"):
            changed = value.replace(grid.hypervisor("hv-a").hvid, grid.hypervisor("hv-b").hvid)
        else:
            changed = value[:-3] + ("AA=" if not value.endswith("AA=") else "BB=")
        assert changed != value
        answer = await browser.get(with_field(back.location, field, changed))
        assert (answer.status, answer.reason) == (403, "LOGIN_REFUSED")


async def test_a_login_ends_over_the_connection_of_who_began_it(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser, grid.browser("hv-b") as thief:
        back = await browser.follow("GET", (await begin(grid, browser)).location, until=grid.sp)
        stolen = await thief.get(back.location)
        assert (stolen.status, stolen.reason) == (403, "HYPERVISOR_MISMATCH")
        # It has not cost the owner his login.
        assert (await browser.get(back.location)).status == 200


async def test_another_hypervisors_login_does_not_count(
    grid: TestGrid, service: GridService, caplog: pytest.LogCaptureFixture
) -> None:
    """hv-a begins, hv-b logs in for it: the assertion is true, and names hv-b."""
    async with grid.browser("hv-a") as browser, grid.browser("hv-b") as other:
        back = await other.follow("GET", (await begin(grid, browser)).location, until=grid.sp)
        answer = await browser.get(back.location)
        assert (answer.status, answer.reason) == (403, "LOGIN_REFUSED")
    assert grid.hypervisor("hv-b").hvid in next(
        record.cause for record in caplog.records if getattr(record, "reason", "") == "LOGIN_REFUSED"
    )


async def test_the_login_needs_its_cookie_and_serves_once(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser, grid.browser("hv-a") as without_cookie:
        page = await browser.get((await begin(grid, browser)).location)
        assert page.location.startswith(grid.login)
        answer = await without_cookie.get(page.location)
        assert (answer.status, answer.reason) == (400, "LOGIN_UNKNOWN")
        without_cookie.cookies["sid"] = "another"
        assert (await without_cookie.get(page.location)).reason == "LOGIN_UNKNOWN"
        assert (await browser.get(page.location)).status == 303
        answer = await browser.get(page.location)
        assert (answer.status, answer.reason) == (400, "LOGIN_UNKNOWN")


async def test_single_sign_on_within_its_bound(grid: TestGrid) -> None:
    async with grid.running(sso_lifetime=1.5), grid.browser("hv-a") as browser:
        await browser.follow("GET", (await begin(grid, browser)).location)
        browser.visited.clear()
        answer = await browser.follow("GET", (await begin(grid, browser, vm="vm-2")).location)
        assert answer.json()["vmid"] == grid.vms["vm-2"].thumbprint
        assert not [url for url in browser.visited if url.startswith(grid.login)], "the login still counted"
        await asyncio.sleep(1.6)
        browser.visited.clear()
        answer = await browser.follow("GET", (await begin(grid, browser)).location)
        assert answer.status == 200
        assert [url for url in browser.visited if url.startswith(grid.login)], "the login counted too long"


async def test_a_login_connection_ends_when_it_counts_no_longer(grid: TestGrid) -> None:
    async with grid.running(sso_lifetime=0.5):
        reader, writer = await asyncio.open_connection(
            "localhost",
            grid.settings.openid_provider.login.port,
            ssl=grid.hypervisor("hv-a").context(grid.authority.ca_path),
        )
        writer.write(b"GET /login HTTP/1.1\r\nHost: localhost\r\n\r\n")
        began = time.monotonic()
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 400")
        assert 0.3 < time.monotonic() - began < 3
        writer.close()


async def test_immediate_requests_are_answered(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        location = (await begin(grid, browser)).location
        immediate = with_field(location, "openid.mode", "checkid_immediate")
        answer = await browser.get(immediate)
        assert (answer.status, query(answer.location)["openid.mode"]) == (303, "setup_needed")
        await browser.follow("GET", location)
        answer = await browser.get(immediate)
        assert query(answer.location)["openid.mode"] == "id_res"
        assert query(answer.location)["openid.claimed_id"] == f"{grid.op}/id/{grid.hypervisor('hv-a').hvid}"
        other = f"{grid.op}/id/{grid.hypervisor('hv-b').hvid}"
        about_another = with_field(with_field(immediate, "openid.claimed_id", other), "openid.identity", other)
        assert query((await browser.get(about_another)).location)["openid.mode"] == "setup_needed"


async def test_a_revoked_hypervisor_is_signed_on_no_longer(grid: TestGrid, service: GridService) -> None:
    grid.hypervisor("hv-gone")
    async with grid.browser("hv-gone") as browser:
        location = (await begin(grid, browser, "hv-gone")).location
        await browser.follow("GET", location)
        second = (await begin(grid, browser, "hv-gone")).location
        with grid.registry() as registry:
            registry.revoke_identity(Role.HYPERVISOR, "hv-gone")
        answer = await browser.follow("GET", second)
        assert (answer.status, answer.reason) == (403, "HYPERVISOR_REFUSED")
        assert browser.visited[-1].startswith(grid.login)
    assert (await fetch(grid, f"{grid.op}/id/{grid.hypervisor('hv-gone').hvid}")).status == 404


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("other hypervisor", "HYPERVISOR"),
        ("other vm", "VM"),
        ("revoked", "REVOKED"),
        ("garbage", "MALFORMED"),
        ("signature", "SIGNATURE"),
    ],
)
async def test_a_refused_token(
    grid: TestGrid, service: GridService, caplog: pytest.LogCaptureFixture, change: str, refusal: str
) -> None:
    form = grid.session_form("vm-1", "hv-a")
    match change:
        case "other hypervisor":
            form["vm_auth_token"] = grid.token("vm-1", grid.hypervisor("hv-b").name)
        case "other vm":
            form["vm_auth_token"] = grid.token("vm-2", "hv-a")
        case "revoked":
            with grid.registry() as registry:
                registry.revoke_token(unverified_claims(form["vm_auth_token"]).jti)
        case "garbage":
            form["vm_auth_token"] = "x.y.z"
        case "signature":
            header, claims, signature = form["vm_auth_token"].split(".")
            form["vm_auth_token"] = (
                f"{header}.{claims}.{signature[:10]}{'A' if signature[10] != 'A' else 'B'}{signature[11:]}"
            )
    caplog.set_level(logging.WARNING)
    async with grid.browser("hv-a") as browser:
        answer = await browser.request("POST", f"{grid.sp}/v1/sessions", json=form)
    assert (answer.status, answer.reason) == (403, "TOKEN_REFUSED")
    assert answer.json()["code"] == "PERMISSION_DENIED"
    assert answer.json()["message"] == "the VM-Auth-Token is refused", "outside all refusals look alike"
    assert refusal in {getattr(record, "cause", "") for record in caplog.records}
    assert form["vm_auth_token"] not in caplog.text


async def test_the_certificate_must_be_the_connections(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-b") as browser:
        answer = await browser.request("POST", f"{grid.sp}/v1/sessions", json=grid.session_form("vm-1", "hv-a"))
    assert (answer.status, answer.reason) == (403, "HYPERVISOR_MISMATCH")


async def test_a_vm_is_no_hypervisor(grid: TestGrid, service: GridService) -> None:
    """A certificate of the right CA and the wrong role opens TLS, and nothing else."""
    key = rsa.generate_private_key(65537, 2048)
    certificate = der_of(
        grid.authority.certificate_authority.issue(
            Holder(Role.VM, "vm-x"), key.public_key(), now=time.time(), valid=3600.0
        )
    )
    pem = grid.folder / "vm-x.pem"
    pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + pem_of(certificate))
    context = ssl.create_default_context(cafile=str(grid.authority.ca_path))
    context.load_cert_chain(pem)
    form = grid.session_form("vm-1", "hv-a") | {"hypervisor_certificate": pem_of(certificate).decode()}
    async with grid.browser("hv-a") as browser, Browser(context) as impostor:
        answer = await impostor.request("POST", f"{grid.sp}/v1/sessions", json=form)
        assert (answer.status, answer.reason) == (403, "HYPERVISOR_REFUSED")
        page = await impostor.get((await begin(grid, browser)).location)
        answer = await impostor.get(page.location)
        assert (answer.status, answer.reason) == (403, "LOGIN_REFUSED")


async def test_without_a_certificate_no_door_but_the_endpoint_opens(grid: TestGrid, service: GridService) -> None:
    async with grid.browser(None) as browser:
        assert (await browser.get(f"{grid.op}/")).status == 200
        for url in (f"{grid.sp}/v1/sessions", f"{grid.login}/login"):
            with pytest.raises((aiohttp.ClientError, OSError)):
                await browser.get(url)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"vm_certificate": 1}', b"[" * 20000, b"\xff"])
async def test_bodies_that_are_none(grid: TestGrid, service: GridService, body: bytes) -> None:
    async with grid.browser("hv-a") as browser:
        answer = await browser.request("POST", f"{grid.sp}/v1/sessions", data=body)
        assert (answer.status, answer.reason) == (400, "REQUEST_INVALID")


async def test_bounds_of_the_http_doors(grid: TestGrid) -> None:
    async with grid.running(http_body=4096, http_request_timeout=0.5, http_connections=3):
        async with grid.browser("hv-a") as browser:
            answer = await browser.request("POST", f"{grid.sp}/v1/sessions", data=b"x" * 5000)
            assert (answer.status, answer.reason) == (400, "REQUEST_INVALID")
            assert (await browser.get(f"{grid.op}/nothing")).status == 404
            assert (await browser.request("DELETE", f"{grid.op}/openid")).status == 405
        context = ssl.create_default_context(cafile=str(grid.authority.ca_path))
        port = grid.settings.openid_provider.endpoint.port
        began = time.monotonic()
        reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
        writer.write(b"GET / HTTP/1.1\r\nHost:")
        assert await asyncio.wait_for(reader.read(), 5) == b"", "half a head is not waited for"
        assert time.monotonic() - began < 2
        writer.close()
        async with contextlib.AsyncExitStack() as stack:
            for number in range(5):
                reader, writer = await asyncio.open_connection("localhost", port, ssl=context)
                stack.callback(writer.close)
                writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
                if number < 3:
                    assert await asyncio.wait_for(reader.readline(), 5) == b"HTTP/1.1 200 OK\r\n"
                else:
                    with contextlib.suppress(ConnectionError):
                        assert await asyncio.wait_for(reader.readline(), 5) == b""


async def test_logins_are_bounded_in_rate_and_number(grid: TestGrid) -> None:
    async with grid.running(logins_per_minute=3), grid.browser("hv-a") as browser, grid.browser("hv-b") as other:
        for _ in range(3):
            assert (await begin(grid, browser)).status == 303
        answer = await begin(grid, browser)
        assert (answer.status, answer.reason) == (429, "TOO_MANY_LOGINS")
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
        assert (await begin(grid, other, "hv-b")).status == 303, "another hypervisor's logins are its own"
    async with grid.running(logins_per_hypervisor=2), grid.browser("hv-a") as browser:
        first = await begin(grid, browser)
        await begin(grid, browser)
        assert (await begin(grid, browser)).reason == "TOO_MANY_LOGINS"
        assert (await browser.follow("GET", first.location)).status == 200
        assert (await begin(grid, browser)).status == 303, "a login that has ended leaves its place"


async def test_a_busy_pool_of_server_cards_queues_within_a_deadline(grid: TestGrid) -> None:
    async with grid.running(server_card_timeout=1.0) as service, contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(service.rack.servers.lease(timeout=1))
        async with grid.browser("hv-a") as browser:
            page = await browser.get((await begin(grid, browser)).location)
            began = time.monotonic()
            with pytest.raises((aiohttp.ClientError, OSError)):
                await browser.get(page.location)
            assert 0.8 < time.monotonic() - began < 3
            waiting = asyncio.create_task(browser.get(page.location))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await stack.aclose()
            assert (await waiting).status == 303


async def test_a_dead_server_card_is_replaced_by_the_other(grid: TestGrid, service: GridService) -> None:
    await grid.cards["server-0"].kill()
    try:
        for number in range(6):
            try:
                await grid.session("vm-1", "hv-a")
            except (aiohttp.ClientError, OSError):
                assert number < 2, "a card that is gone is asked once"
    finally:
        await restart(grid.cards["server-0"])


# --- the provider as others see it


async def fetch(grid: TestGrid, url: str, **arguments: object) -> Answer:
    async with grid.browser(None) as browser:
        return await browser.get(url, **arguments)


async def test_discovery_by_document_header_and_html(grid: TestGrid, service: GridService) -> None:
    claimed = f"{grid.op}/id/{grid.hypervisor('hv-a').hvid}"
    for url, kind in ((f"{grid.op}/", SERVICE_SERVER), (claimed, SERVICE_SIGNON)):
        document = await fetch(grid, url, headers=XRDS)
        assert document.headers["Content-Type"] == "application/xrds+xml"
        (service_found,) = parse_xrds(document.body)
        assert (service_found.types, service_found.uri) == ((kind,), f"{grid.op}/openid")
        page = await fetch(grid, url, headers=HTML)
        links = parse_html(page.body)
        assert links.provider == f"{grid.op}/openid"
        assert page.headers["X-XRDS-Location"] == links.xrds_location
        assert (await fetch(grid, links.xrds_location)).body == document.body
    assert (await fetch(grid, f"{grid.op}/id/{'A' * 43}")).status == 404
    assert (await fetch(grid, f"{grid.op}/id/x%2f..")).status == 404


async def direct(grid: TestGrid, **fields: str) -> tuple[int, dict[str, str]]:
    form = {"openid.ns": NAMESPACE, **{f"openid.{key}": value for key, value in fields.items()}}
    async with grid.browser(None) as browser:
        answer = await browser.request("POST", f"{grid.op}/openid", data=form)
        return answer.status, decode_key_values(answer.body)


async def test_associations(grid: TestGrid, service: GridService) -> None:
    status, answer = await direct(grid, mode="associate", assoc_type="HMAC-SHA256", session_type="no-encryption")
    assert status == 200
    assert len(answer["mac_key"]) == 44
    for kind in ("SHA1", "SHA256"):
        status, answer = await direct(
            grid,
            mode="associate",
            assoc_type=f"HMAC-{kind}",
            session_type=f"DH-{kind}",
            dh_consumer_public="Kw==",
        )
        assert status == 200
        assert "mac_key" not in answer
        assert answer["enc_mac_key"]
    status, answer = await direct(grid, mode="associate", assoc_type="HMAC-MD5", session_type="DH-SHA1")
    assert (status, answer["error_code"]) == (400, "unsupported-type")


async def test_check_authentication_says_yes_once(grid: TestGrid, service: GridService) -> None:
    async with grid.browser("hv-a") as browser:
        location = (await begin(grid, browser)).location
        # A relying party without an association.
        parts = urlsplit(location)
        fields = {key: value for key, value in query(location).items() if key != "openid.assoc_handle"}
        back = await browser.follow("GET", parts._replace(query=urlencode(fields)).geturl(), until=grid.sp)
    assertion = {
        key.removeprefix("openid."): value for key, value in query(back.location).items() if key.startswith("openid.")
    } | {"mode": "check_authentication"}
    assertion.pop("ns")
    forged = assertion | {"claimed_id": f"{grid.op}/id/{grid.hypervisor('hv-b').hvid}"}
    assert (await direct(grid, **forged))[1]["is_valid"] == "false"
    assert (await direct(grid, **assertion))[1]["is_valid"] == "true"
    assert (await direct(grid, **assertion))[1]["is_valid"] == "false"


async def test_realms_and_return_tos_are_checked(grid: TestGrid, service: GridService) -> None:
    def checkid(realm: str, return_to: str) -> str:
        fields = {
            "openid.ns": NAMESPACE,
            "openid.mode": "checkid_setup",
            "openid.claimed_id": IDENTIFIER_SELECT,
            "openid.identity": IDENTIFIER_SELECT,
            "openid.realm": realm,
            "openid.return_to": return_to,
        }
        return f"{grid.op}/openid?{urlencode(fields)}"

    assert (await fetch(grid, checkid(f"{grid.sp}/", f"{grid.sp}/v1/openid/return"))).status == 303
    # A realm is a URL: its host's letters, a final dot, and a path that is not there make no other.
    for spelling in (grid.sp, grid.sp.replace("localhost", "LOCALHOST"), grid.sp.replace("localhost", "localhost.")):
        assert (await fetch(grid, checkid(spelling, f"{grid.sp}/v1/openid/return"))).status == 303
    for realm, return_to in (
        ("https://elsewhere.example/", "https://elsewhere.example/return"),
        (f"{grid.sp}/", "https://elsewhere.example/return"),
        (f"{grid.sp}/", f"{grid.sp}.elsewhere.example/return"),
        ("https://*.example/", "https://elsewhere.example/return"),
    ):
        answer = await fetch(grid, checkid(realm, return_to))
        assert (answer.status, answer.reason) == (400, "REQUEST_INVALID")
        page = await fetch(grid, checkid(realm, return_to), headers=HTML)
        assert page.status == 400
        assert "cannot go on" in page.body.decode()


async def test_a_restart_in_the_middle_of_a_login(grid: TestGrid) -> None:
    """The pending login is lost, and that is said; the associations of both sides are not."""
    async with grid.browser("hv-a") as browser:
        async with grid.running():
            back = await browser.follow("GET", (await begin(grid, browser)).location, until=grid.sp)
        async with grid.running():
            answer = await browser.get(back.location)
            assert (answer.status, answer.reason) == (400, "LOGIN_UNKNOWN")
            assert (await browser.follow("GET", (await begin(grid, browser)).location)).status == 200
