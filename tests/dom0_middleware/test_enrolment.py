"""Enrolment: one domain, one secret, one certificate."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from dataclasses import replace
from unittest.mock import Mock

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dom0_middleware.enrolment import MAX_REPEATS
from dom0_middleware.errors import Reason, Refused, Unavailable
from dom0_middleware.guest import Phase
from dom0_middleware.guest_authority import parse_request
from dom0_middleware.state import StateStore
from gose_client.errors import GridUnavailableError
from secfunet.identity import pem_of
from secfunet.middleware.v1 import agent_pb2, agent_pb2_grpc, orchestrator_pb2
from tests.dom0_middleware.costly_requests import request_with_exponent
from tests.dom0_middleware.world import TIMEOUT, Guest, World, certificate, eventually, facts, request_for, rsa_key

DENIED = grpc.StatusCode.PERMISSION_DENIED


async def refused(guest: Guest, secret: bytes | None = None, request: bytes | None = None) -> tuple[object, str]:
    async with guest.enrol_channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent_pb2_grpc.EnrolmentServiceStub(channel).Enrol(
                agent_pb2.EnrolRequest(
                    join_secret=guest.secret if secret is None else secret,
                    certificate_signing_request=request_for(guest.key) if request is None else request,
                ),
                timeout=TIMEOUT,
            )
    return facts(error.value)[:2]


async def test_the_certificate_names_the_domain_and_not_what_the_request_says(world: World) -> None:
    guest = await world.enrolled()
    issued = x509.load_der_x509_certificate(guest.certificate)
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:uuid:{guest.uuid}"]
    assert "somebody else" not in issued.subject.rfc4514_string()
    lifetime = issued.not_valid_after_utc - issued.not_valid_before_utc
    assert 3600 <= lifetime.total_seconds() <= 3600 + 301
    usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate(guest.authority))


async def test_what_the_domain_is_handed(world: World) -> None:
    guest = await world.boot(await world.create())
    join = guest.folder / "join.json"
    assert join.stat().st_mode & 0o777 == 0o600
    assert guest.folder.stat().st_mode & 0o777 == 0o700
    assert set(guest.join) == {"uuid", "join_secret", "guest_authority", "enrol", "agent", "server_name"}
    assert guest.join["uuid"] == guest.uuid
    assert guest.join["server_name"] == "secure-middleware"
    assert len(guest.secret) == 32
    stored = (world.state / "state.sqlite").read_bytes() + (world.state / "state.sqlite-wal").read_bytes()
    assert guest.secret not in stored
    await guest.enrol()
    assert not join.exists()


async def test_a_second_enrolment_is_refused_until_the_next_start(world: World) -> None:
    guest = await world.enrolled()
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")
    async with world.orchestrator() as stub:
        await stub.StopVm(orchestrator_pb2.StopVmRequest(uuid=guest.uuid, force=True), timeout=TIMEOUT)
    again = await world.boot(guest.uuid)
    assert again.secret != guest.secret
    assert await refused(again, secret=guest.secret) == (DENIED, "JOIN_SECRET_REFUSED")
    await again.enrol()


async def test_an_answer_that_is_lost_can_be_asked_for_again_with_the_same_key(world: World) -> None:
    """The agent was killed, the channel broke, the answer came too late: the secret belongs to that key and to no other."""
    world.hold_hypervisor()
    guest = await world.boot(await world.create())
    first = (await guest.enrol()).certificate
    thief = replace(guest, key=ec.generate_private_key(ec.SECP256R1()))
    assert await refused(thief) == (DENIED, "JOIN_SECRET_REFUSED")
    await world.stop()
    await world.start()
    assert await refused(thief) == (DENIED, "JOIN_SECRET_REFUSED")
    assert (await guest.enrol()).certificate != first
    # Either may be the one that arrived; with the first call that shows one the secret is worth nothing to anybody.
    await replace(guest, certificate=first).show_certificate()
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")
    await guest.show_certificate()
    await world.stop()
    await world.start()
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")
    async with world.orchestrator() as stub:
        assert (await stub.GetVm(orchestrator_pb2.GetVmRequest(uuid=guest.uuid), timeout=TIMEOUT)).vm.enrolled


async def test_an_answer_is_not_asked_for_again_without_end(world: World) -> None:
    """Each is a certificate and a record in the audit log; a guest that never shows one gets no more of them."""
    guest = await world.boot(await world.create())
    for _ in range(1 + MAX_REPEATS):
        await guest.enrol()
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")
    await guest.show_certificate()


async def test_a_domain_that_is_paused_while_it_enrols_asks_again(world: World) -> None:
    """dom0 waits for the grid after it took the secret; the answer to a domain that does not run is a refusal."""
    guest = await world.boot(await world.create())
    world.grid.login_gate.clear()
    asked = asyncio.create_task(refused(guest))
    await eventually(lambda: world.grid.logins)
    domain = world.hold_hypervisor().lookupByUUIDString(guest.uuid)
    domain.suspend()
    await eventually(lambda: world.service.vms.guests()[0].phase is Phase.PAUSED)
    world.grid.login_gate.set()
    assert (await asked)[1] == "DOMAIN_NOT_RUNNING"
    domain.resume()
    await eventually(lambda: world.service.vms.guests()[0].phase is Phase.RUNNING)
    await guest.enrol()
    await guest.show_certificate()


async def test_a_disk_that_is_full_when_the_certificate_is_shown_refuses_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = await world.boot(await world.create())
    await guest.enrol()
    full = Unavailable(Reason.STATE_UNAVAILABLE, "the middleware cannot write its state", retry_after=5.0)
    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "forget_secret", Mock(side_effect=full))
        await guest.show_certificate()
    await guest.enrol()  # not forgotten yet
    await guest.show_certificate()
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")


async def test_five_wrong_attempts_kill_the_secret(world: World) -> None:
    guest = await world.boot(await world.create())
    for attempt in range(5):
        assert await refused(guest, secret=secrets.token_bytes(32)) == (DENIED, "JOIN_SECRET_REFUSED"), attempt
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")
    causes = [record["detail"] for record in world.audit() if record["action"] == "enrol"]
    assert causes == ["the secret is wrong"] * 5 + ["the secret is dead"]


async def test_four_wrong_attempts_do_not(world: World) -> None:
    guest = await world.boot(await world.create())
    for _ in range(4):
        await refused(guest, secret=b"")
    await guest.enrol()


async def test_a_bad_request_costs_an_attempt(world: World) -> None:
    guest = await world.boot(await world.create())
    for _ in range(4):
        assert await refused(guest, request=b"no CSR") == (grpc.StatusCode.INVALID_ARGUMENT, "CSR_INVALID")
    await guest.enrol()


async def test_attempts_are_counted_over_a_restart(world: World) -> None:
    world.hold_hypervisor()
    guest = await world.boot(await world.create())
    for _ in range(3):
        await refused(guest, secret=b"wrong")
    await world.stop()
    await world.start()
    for _ in range(2):
        await refused(guest, secret=b"wrong")
    assert await refused(guest) == (DENIED, "JOIN_SECRET_REFUSED")


async def test_of_several_keys_at_once_exactly_one_gets_a_certificate(world: World) -> None:
    guest = await world.boot(await world.create())
    world.grid.login_gate.clear()
    others = [replace(guest, key=ec.generate_private_key(ec.SECP256R1())) for _ in range(4)]
    tasks = [asyncio.create_task(one.enrol()) for one in (guest, *others)]
    await asyncio.sleep(0.1)
    world.grid.login_gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(isinstance(outcome, agent_pb2.EnrolResponse) for outcome in outcomes) == 1
    issued = [r for r in world.audit() if r["action"] == "enrol" and r["decision"] == "permitted"]
    assert len(issued) == 1


async def test_another_domains_secret_is_worth_nothing(world: World) -> None:
    web = await world.boot(await world.create("web"))
    db = await world.boot(await world.create("db"))
    assert await refused(db, secret=web.secret) == (DENIED, "JOIN_SECRET_REFUSED")
    await web.enrol()
    await db.enrol()


async def test_a_paused_domain_does_not_enrol(world: World) -> None:
    guest = await world.boot(await world.create())
    domain = world.hold_hypervisor().lookupByUUIDString(guest.uuid)
    domain.suspend()
    await eventually(lambda: world.service.vms.guests()[0].phase is Phase.PAUSED)
    assert (await refused(guest))[1] == "DOMAIN_NOT_RUNNING"
    domain.resume()
    await eventually(lambda: world.service.vms.guests()[0].phase is Phase.RUNNING)
    await guest.enrol()


async def test_a_grid_that_is_down_does_not_cost_the_secret(world: World) -> None:
    world.grid.down = GridUnavailableError("the grid is down")
    guest = await world.boot(await world.create())
    response = await guest.enrol()
    assert response.identity.container_authority == b""
    assert response.identity.vm_certificate != b""


async def test_the_server_certificate_is_checked(world: World) -> None:
    """The enrolment door shows a certificate of the guest authority, with the name in join.json."""
    guest = await world.boot(await world.create())
    # An authority that never signed anything here.
    guest.join["guest_authority"] = pem_of(certificate("web")).decode()
    async with guest.enrol_channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await agent_pb2_grpc.EnrolmentServiceStub(channel).Enrol(agent_pb2.EnrolRequest(), timeout=2)
    assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def csr_with(key: object, tamper: bool = False) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, algorithm)  # type: ignore[arg-type]
    der = request.public_bytes(serialization.Encoding.DER)
    return der[:-1] + bytes([der[-1] ^ 1]) if tamper else der


@pytest.mark.parametrize(
    "request_der",
    [
        csr_with(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - to be refused
        csr_with(ed25519.Ed25519PrivateKey.generate()),
        csr_with(ec.generate_private_key(ec.SECP256K1())),
        csr_with(rsa_key("web"), tamper=True),
        csr_with(ec.generate_private_key(ec.SECP256R1())) + b"\0" * 8192,
        b"",
    ],
    ids=["rsa-1024", "ed25519", "secp256k1", "signature", "too long", "empty"],
)
def test_requests_that_are_refused(request_der: bytes) -> None:
    with pytest.raises(Refused) as error:
        parse_request(request_der)
    assert error.value.reason is Reason.CSR_INVALID


@pytest.mark.parametrize(("bits", "exponent_bits"), [(2048, 2047), (3072, 3071), (3072, 1500), (4096, 65)])
def test_a_key_that_would_be_slow_is_refused_before_anything_is_computed_with_it(bits: int, exponent_bits: int) -> None:
    costly, ordinary = request_with_exponent(bits, exponent_bits), request_with_exponent(4096, 17)
    parse_request_time(ordinary)
    assert min(parse_request_time(costly) for _ in range(5)) < 3 * min(parse_request_time(ordinary) for _ in range(5))


def parse_request_time(request_der: bytes) -> float:
    begin = time.perf_counter()
    with pytest.raises(Refused) as error:
        parse_request(request_der)
    assert error.value.reason is Reason.CSR_INVALID
    return time.perf_counter() - begin


@pytest.mark.parametrize("key", [rsa_key("web"), ec.generate_private_key(ec.SECP384R1())], ids=["rsa-2048", "p-384"])
def test_requests_that_are_taken(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
    assert parse_request(csr_with(key)) == key.public_key()


GOOD = csr_with(ec.generate_private_key(ec.SECP256R1()))


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
@settings(max_examples=150)
@example(7, 1)  # another version of PKCS#10
def test_a_changed_request_is_refused(index: int, flip: int) -> None:
    changed = GOOD[:index] + bytes([GOOD[index] ^ flip]) + GOOD[index + 1 :]
    # The last bit of a signature may count as padding: that is the same signature, of the same request.
    with contextlib.suppress(Refused):
        assert parse_request(changed) == parse_request(GOOD)
        signed = x509.load_der_x509_csr(changed).tbs_certrequest_bytes
        assert signed == x509.load_der_x509_csr(GOOD).tbs_certrequest_bytes


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(untrusted: bytes) -> None:
    with pytest.raises(Refused):
        parse_request(untrusted)
