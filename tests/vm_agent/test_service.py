"""The agent as a whole against the middleware's double: enrolment, operations, renewal, loss and return of dom0."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import grp
import hashlib
import json
import os
import socket
import stat
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import grpc
import grpc.aio
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, utils
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secfunet.agent.v1 import local_pb2, local_pb2_grpc
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import thumbprint
from secfunet.middleware.v1 import agent_pb2
from secfunet.rpc.facts import from_error
from secfunet.rpc.reasons import Domain
from secfunet.service.files import write_atomically
from secfunet.service.inner import Half
from tests.vm_agent.conftest import eventually
from tests.vm_agent.double import Grid, MiddlewareDouble
from vm_agent import middleware_client
from vm_agent.enrolment import EnrolmentStore
from vm_agent.errors import NotEnrolledError
from vm_agent.local_socket import DoorError
from vm_agent.options import AgentOptions
from vm_agent.server import AgentService

PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
OAEP = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256
DIGEST = hashlib.sha256(b"what is signed").digest()
SIGN = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=PSS, digest=DIGEST))


@asynccontextmanager
async def running(options: AgentOptions) -> AsyncIterator[tuple[AgentService, local_pb2_grpc.LocalServiceStub]]:
    async with (
        AgentService(options) as service,
        grpc.aio.insecure_channel(f"unix:{options.socket}", [("grpc.use_local_subchannel_pool", 1)]) as channel,
    ):
        yield service, local_pb2_grpc.LocalServiceStub(channel)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    facts = from_error(error, *Domain)
    return facts.reason if facts is not None else ""


async def test_enrols_signs_and_erases_the_join_secret(
    middleware: MiddlewareDouble, options: AgentOptions, grid: Grid
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        answer = await stub.Sign(SIGN, timeout=5)
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        grid.vm.public_key().verify(answer.signature, DIGEST, pss, utils.Prehashed(hashes.SHA256()))
        identity = await stub.GetIdentity(local_pb2.GetIdentityRequest(), timeout=5)
        status = await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=5)
    assert identity.vmid == thumbprint(grid.vm_certificate)
    assert status.enrolled
    assert status.connected
    assert status.problem == ""
    assert not middleware.join_json.exists()
    kept = options.state / "enrolment.json"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(options.state.stat().st_mode) == 0o700


async def test_encrypt_then_decrypt(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options) as (_, stub):
        operation = operation_pb2.EncryptOperation(scheme=OAEP, plaintext=b"short")
        sealed = await stub.Encrypt(local_pb2.EncryptRequest(encrypt=operation), timeout=5, wait_for_ready=True)
        back = operation_pb2.DecryptOperation(scheme=OAEP, ciphertext=sealed.ciphertext)
        opened = await stub.Decrypt(local_pb2.DecryptRequest(decrypt=back), timeout=5)
    assert opened.plaintext == b"short"


async def refused(stub: local_pb2_grpc.LocalServiceStub, timeout: float = 5) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await stub.Sign(SIGN, timeout=timeout)
    return error.value


async def test_without_join_information_there_is_a_sentence(folder: Path, options: AgentOptions) -> None:
    async with running(options) as (_, stub):
        error = await refused(stub)
        status = await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=5)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "NOT_ENROLLED"
    assert not status.enrolled
    assert str(options.join) in status.problem


async def test_a_domain_that_is_paused_enrols_later_with_the_same_secret(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    """dom0 looks at the domain before it looks at the secret: the refusal says nothing of it."""
    middleware.paused = 2
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature
    assert (middleware.paused, middleware.enrolments) == (0, 1)


async def test_an_answer_that_is_lost_is_asked_for_again_with_the_same_key(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    """dom0 has taken the secret, for that key alone, and erased what it handed over."""
    middleware.lost = 2
    async with running(options) as (service, stub):
        await eventually(lambda: middleware.lost == 1)
        middleware.join_json.unlink()
        await eventually(lambda: service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature
    assert middleware.enrolments == 3
    assert sorted(path.name for path in options.state.glob("*.json")) == ["enrolment.json"]


async def stopped_before_the_answer(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    """dom0 has taken the secret, and erased what it handed over; the agent is gone."""
    middleware.lost = 1000
    async with running(options):
        await eventually(lambda: middleware.enrolments > 0)
    middleware.join_json.unlink()


async def test_an_agent_that_is_stopped_before_the_answer_asks_again(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    await stopped_before_the_answer(middleware, options)
    begun = options.state / "enrolling.json"
    assert stat.S_IMODE(begun.stat().st_mode) == 0o600
    middleware.lost = 0
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
    assert not begun.exists()


async def test_an_attempt_that_was_refused_is_not_made_again(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    await stopped_before_the_answer(middleware, options)
    middleware.join_secret = bytes(32)  # the run is over
    async with running(options) as (_, stub):
        assert reason_of(await refused(stub)) == "ENROLMENT_REFUSED"
    assert not (options.state / "enrolling.json").exists()
    middleware.lost = 0
    async with running(options) as (service, stub):
        assert reason_of(await refused(stub)) == "NOT_ENROLLED"
        middleware.invite()
        await eventually(lambda: service.status().connected)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"join": {}, "key": 1}', b"[" * 100_000, b"\0" * 40_000])
async def test_an_attempt_that_cannot_be_read_is_forgotten(
    middleware: MiddlewareDouble, options: AgentOptions, content: bytes
) -> None:
    options.state.mkdir(mode=0o700, exist_ok=True)
    write_atomically(options.state / "enrolling.json", content)
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)


async def test_an_attempt_that_cannot_be_read_now_is_not_forgotten(
    middleware: MiddlewareDouble, options: AgentOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor is left, for one: the key in it cannot be made again, and dom0 answers no other."""
    await stopped_before_the_answer(middleware, options)
    middleware.lost = 0
    with monkeypatch.context() as patch:
        patch.setattr("vm_agent.enrolment.read_secret", Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
        async with running(options) as (_, stub):
            assert "Too many open files" in ((await refused(stub)).details() or "")
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)


async def test_a_full_disk_costs_no_secret(
    middleware: MiddlewareDouble, options: AgentOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is kept before the secret is presented; where it cannot be, the agent says so and waits."""
    with monkeypatch.context() as patch:
        patch.setattr("vm_agent.enrolment.write_atomically", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
        async with running(options) as (_, stub):
            error = await refused(stub)
            assert reason_of(error) == "NOT_ENROLLED"
            assert "No space left" in (error.details() or "")
    assert middleware.enrolments == 0
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)


async def test_a_disk_that_fills_afterwards_stops_nobody(
    middleware: MiddlewareDouble, options: AgentOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    middleware.life, middleware.age = 4.0, 0.0
    full = NotEnrolledError("enrolment.json cannot be written: No space left")
    monkeypatch.setattr(EnrolmentStore, "save", Mock(side_effect=full))
    async with running(options) as (service, stub):
        await eventually(lambda: middleware.renewals >= 1)
        await eventually(lambda: service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature


async def test_a_new_invitation_disturbs_nothing_until_it_is_accepted(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        client = service._client
        middleware.paused = 2
        middleware.invite()
        while middleware.paused:
            assert service._client is client
            assert (await stub.Sign(SIGN, timeout=5)).signature
            await asyncio.sleep(0.02)
        await eventually(lambda: middleware.enrolments == 2 and service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature


async def test_a_wrong_join_secret_is_presented_once(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    middleware.join_secret = bytes(32)  # not what join.json says
    async with running(options) as (service, stub):
        error = await refused(stub)
        assert reason_of(error) == "ENROLMENT_REFUSED"
        middleware.invite()  # the domain is started again
        await eventually(lambda: service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature
    assert middleware.enrolments == 1


async def test_the_certificate_is_kept_across_a_restart(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
    async with running(options) as (_, stub):
        assert (await stub.Sign(SIGN, timeout=5)).signature
    assert middleware.enrolments == 1


async def test_join_information_that_cannot_be_erased_is_not_presented_twice(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    invitation = middleware.join_json.read_bytes()
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
    middleware.join_json.touch(mode=0o600)
    middleware.join_json.write_bytes(invitation)
    async with running(options) as (_, stub):
        assert (await stub.Sign(SIGN, timeout=5)).signature
    assert middleware.enrolments == 1


async def test_a_readable_join_secret_is_not_used(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    middleware.join_json.chmod(0o644)
    async with running(options) as (_, stub):
        error = await refused(stub)
    assert reason_of(error) == "JOIN_INVALID"
    assert middleware.enrolments == 0


async def test_another_middleware_is_not_believed(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    """Somebody else at the domain's channel has no certificate of the guest authority: the join secret never reaches him."""
    other = MiddlewareDouble(middleware.folder, middleware.grid)
    await middleware.stop()
    other.join_secret = middleware.join_secret
    async with other, running(options) as (service, stub):
        error = await refused(stub)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert not service.status().enrolled
    assert other.enrolments == 0


async def test_renewal_under_load_loses_nothing(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    """Certificates that live two seconds, and die the moment the next one is made."""
    middleware.life, middleware.age, middleware.only_newest_serial = 2.0, 0.0, True
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        end = asyncio.get_running_loop().time() + 4.0

        async def sign_on() -> int:
            done = 0
            while asyncio.get_running_loop().time() < end:
                assert (await stub.Sign(SIGN, timeout=5)).signature
                done += 1
            return done

        done = await asyncio.gather(*(sign_on() for _ in range(4)))
    assert sum(done) > 20
    assert middleware.renewals >= 2
    assert middleware.enrolments == 1


async def test_an_expired_certificate_waits_for_a_new_invitation(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    middleware.life, middleware.age = 4.0, 10.0  # long enough to connect on a machine that is busy
    middleware.renews_ended = False
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        await middleware.stop()
        await eventually(lambda: not service.status().enrolled)
        await middleware.start()
        await eventually(lambda: "join secret" in service.status().problem)
        assert reason_of(await refused(stub)) == "NOT_ENROLLED"
        middleware.life = 3600.0
        middleware.invite()
        await eventually(lambda: service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature


async def test_a_certificate_that_ended_while_dom0_was_away_is_renewed(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    """A program that asked meanwhile gets its signature."""
    middleware.life, middleware.age = 4.0, 10.0
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        await middleware.stop()
        await eventually(lambda: not service.status().enrolled)
        asked = asyncio.ensure_future(stub.Sign(SIGN, timeout=30))
        middleware.life = 3600.0
        await middleware.start()
        assert (await asked).signature
        assert service.status().enrolled
    assert (middleware.enrolments, middleware.late_renewals) == (1, 1)


async def test_a_certificate_that_ended_while_the_agent_was_away_is_renewed(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    middleware.life, middleware.age = 3.0, 10.0
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected)
        await middleware.stop()
        end = service.status().certificate_expires_at
    await asyncio.sleep(max(end - time.time(), 0) + 1.1)
    await middleware.start()
    middleware.life = 3600.0
    async with running(options) as (service, stub):
        assert (await stub.Sign(SIGN, timeout=10)).signature
    assert (middleware.enrolments, middleware.late_renewals) == (1, 1)


async def test_a_certificate_that_is_dated_back_is_not_renewed_in_a_loop(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    middleware.life, middleware.age = 20.0, 300.0
    async with running(options) as (service, _):
        await eventually(lambda: service.status().connected and middleware.renewals == 1)
        await asyncio.sleep(1.0)
    assert middleware.renewals == 1


async def test_a_clock_that_is_ahead_costs_nothing(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    """The agent believes that its certificate has ended; when its clock is set right it serves again."""
    ahead = 0.0
    async with AgentService(options, clock=lambda: time.time() + ahead) as service:
        await eventually(lambda: service.status().connected)
        ahead = 7 * 86400.0
        assert service._client is not None
        service._client._doubtful.set()  # in place of half a minute's sleep
        await eventually(lambda: middleware.late_renewals >= 1)
        assert not service.status().enrolled
        ahead = 0.0
        await eventually(lambda: service.status().enrolled and service.status().connected)
    assert middleware.enrolments == 1


async def test_a_certificate_that_dom0_takes_for_ended_is_renewed(
    middleware: MiddlewareDouble, options: AgentOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the VM is behind: nothing here says that the certificate has ended, and TLS does not tell why it is refused."""
    monkeypatch.setattr(middleware_client, "DOUBT_TIME", 0.5)
    middleware.life, middleware.age = 4.0, 10.0
    async with AgentService(options, clock=lambda: time.time() - 3600) as service:
        await eventually(lambda: service.status().connected)
        end = service.status().certificate_expires_at
        await asyncio.sleep(max(end - time.time(), 0) + 1.1)
        middleware.life = 3600.0
        await middleware.stop()
        await middleware.start()
        await eventually(lambda: middleware.late_renewals >= 1 and service.status().connected, timeout=20)


@pytest.mark.parametrize("old", ["silent", "refuses", "away"])
async def test_what_waits_survives_a_new_enrolment(
    middleware: MiddlewareDouble, options: AgentOptions, folder: Path, old: str
) -> None:
    """Twenty operations wait for a dom0 that does not answer; the domain is handed a new join secret by another one, which does."""
    there_folder = folder / "t"
    there_folder.mkdir()
    async with running(options) as (service, stub), MiddlewareDouble(there_folder, middleware.grid) as there:
        await eventually(lambda: service.status().connected)
        assert (await stub.Sign(SIGN, timeout=5)).signature

        async def silence(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
            await asyncio.Event().wait()
            return []

        async def refusal(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
            failures = [
                operation_pb2.OperationFailure(
                    request_id=one.request_id, code=16, reason="CERTIFICATE_NOT_CURRENT", message="of another run"
                )
                for one in request.operations
            ]
            return [agent_pb2.OperateResponse(batch_id=request.batch_id, failures=failures)]

        middleware.answer = refusal if old == "refuses" else silence
        middleware.batches.clear()
        waiting = [asyncio.ensure_future(stub.Sign(SIGN, timeout=60)) for _ in range(20)]
        await eventually(lambda: len(middleware.batches) >= 1 and service._batcher.waiting == 20)  # type: ignore[union-attr]
        if old == "away":
            await middleware.stop()
            waiting += [asyncio.ensure_future(stub.Sign(SIGN, timeout=60)) for _ in range(5)]
        there.invite()
        there.join_json.rename(middleware.join_json)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert [answer for answer in answers if isinstance(answer, BaseException)] == []
        first = {one.request_id for batch in middleware.batches for one in batch.operations}
        second = [one.request_id for batch in there.batches for one in batch.operations]
        assert first <= set(second), "the same request ids"
        assert len(second) == len(set(second)) == len(waiting)


async def test_the_agent_goes_with_its_domain_to_another_host(
    middleware: MiddlewareDouble, options: AgentOptions, folder: Path
) -> None:
    """Its certificate has an hour to live, but nobody answers to it: another dom0, with another authority, hands over new information."""
    there_folder = folder / "t"
    there_folder.mkdir()
    async with running(options) as (service, stub), MiddlewareDouble(there_folder, Grid()) as there:
        await eventually(lambda: service.status().connected)
        first = service.identity
        await middleware.stop()
        assert (await refused(stub)).code() is grpc.StatusCode.UNAVAILABLE
        assert service.status().enrolled, "it does not give up its place by itself"
        there.invite()
        there.join_json.rename(middleware.join_json)
        await eventually(lambda: service.status().connected)
        assert service.identity.hvid != first.hvid
        assert (await stub.Sign(SIGN, timeout=5)).signature
    assert (middleware.enrolments, there.enrolments) == (1, 1)


async def test_a_middleware_that_dies_and_returns_within_the_deadline(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        middleware.latency = 0.3
        caller = stub.Sign(SIGN, timeout=10)
        await eventually(lambda: len(middleware.batches) == 1)
        await middleware.stop()
        await eventually(lambda: not service.status().connected)
        await middleware.start()
        assert (await caller).signature
        await eventually(lambda: service.status().connected)
    ids = [batch.operations[0].request_id for batch in middleware.batches]
    assert len(ids) >= 2
    assert len(set(ids)) == 1  # the retry is the same request


async def test_a_dead_middleware_is_named_when_the_time_is_over(
    middleware: MiddlewareDouble, options: AgentOptions, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        await middleware.stop()
        error = await refused(stub, timeout=0.8)
        await eventually(lambda: not service.status().connected)
        problem = service.status().problem
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert reason_of(error) == "MIDDLEWARE_UNAVAILABLE"
    for sentence in (problem, error.details() or ""):
        # What is wrong and what to do, once; what gRPC says of sockets is in the log only.
        assert sentence.count("the Secure Middleware cannot be reached: see that it runs in dom0") == 1
        assert "unix:" not in sentence
        assert len(sentence) < 200
    away = next(record for record in caplog.records if record.message.startswith("the Secure Middleware is away"))
    assert "UNAVAILABLE" in str(vars(away)["detail"])


async def test_a_refusal_reaches_the_program_with_its_reason(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    async def deny(request: agent_pb2.OperateRequest) -> list[agent_pb2.OperateResponse]:
        failures = [
            operation_pb2.OperationFailure(
                request_id=operation.request_id, code=7, reason="POLICY_DENIED", message="not this scheme"
            )
            for operation in request.operations
        ]
        return [agent_pb2.OperateResponse(batch_id=request.batch_id, failures=failures)]

    middleware.answer = deny
    async with running(options) as (_, stub):
        error = await refused(stub)
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert reason_of(error) == "POLICY_DENIED"
    assert str(error.details()).startswith("not this scheme (id ")


async def test_a_refused_certificate_is_no_endless_retry(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    middleware.refuse = grpc.StatusCode.UNAUTHENTICATED
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        error = await refused(stub)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_wrong_requests_never_leave_the_vm(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    short = local_pb2.SignRequest(sign=operation_pb2.SignOperation(scheme=PSS, digest=b"short"))
    foreign = local_pb2.SignRequest(
        sign=operation_pb2.SignOperation(scheme=operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, digest=DIGEST)
    )
    long = local_pb2.EncryptRequest(encrypt=operation_pb2.EncryptOperation(scheme=OAEP, plaintext=bytes(191)))
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        for call in (stub.Sign(short), stub.Sign(foreign), stub.Encrypt(long), stub.Sign(local_pb2.SignRequest())):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert reason_of(error.value) == "OPERATION_INVALID"
        assert middleware.batches == []


async def test_a_local_stream_of_many(middleware: MiddlewareDouble, options: AgentOptions, grid: Grid) -> None:
    async with running(options) as (_, stub):
        call = stub.Operate()

        async def write() -> None:
            for number in range(200):
                request = local_pb2.OperateRequest(id=number, sign=SIGN.sign)
                if number == 100:
                    request.sign.digest = b"wrong"
                await call.write(request)
            await call.done_writing()

        writer = asyncio.create_task(write())
        answers = {answer.id: answer async for answer in call}
        await writer
    assert sorted(answers) == list(range(200))
    assert answers[100].failure.reason == "OPERATION_INVALID"
    assert all(answer.output for number, answer in answers.items() if number != 100)
    assert len(middleware.batches) < 150  # they travelled together
    assert max(len(batch.operations) for batch in middleware.batches) <= 64


async def test_health_follows_the_connection(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with (
        running(options) as (service, _),
        grpc.aio.insecure_channel(f"unix:{options.socket}") as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        await eventually(lambda: service.status().connected)
        await asyncio.sleep(0.05)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        await middleware.stop()
        await eventually(lambda: not service.status().connected)
        await asyncio.sleep(0.05)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_changed_identity_is_used(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options) as (service, stub):
        await eventually(lambda: service.status().connected)
        other = Grid(vm=ec.generate_private_key(ec.SECP384R1()))
        middleware.grid, middleware.identity = other, other.identity()
        middleware.identity_changed.set()
        await eventually(lambda: service.identity.vmid == thumbprint(other.vm_certificate))
        operation = operation_pb2.SignOperation(
            scheme=operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA384, digest=hashlib.sha384(b"x").digest()
        )
        assert (await stub.Sign(local_pb2.SignRequest(sign=operation), timeout=5)).signature


async def test_a_vm_without_an_identity_is_told_so(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    middleware.identity = agent_pb2.Identity()
    async with running(options) as (service, stub):
        await eventually(lambda: "certificate for this VM" in service.status().problem)
        error = await refused(stub)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(error) == "IDENTITY_INVALID"


async def test_why_there_is_no_identity_is_what_a_program_is_told(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    middleware.identity, whole = agent_pb2.Identity(), middleware.identity
    middleware.refuse_identity = grpc.StatusCode.PERMISSION_DENIED
    async with running(options) as (service, stub):
        await eventually(lambda: "VM-Auth-Token is refused" in service.status().problem)
        error = await refused(stub)
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert str(error.details()).startswith("the VM-Auth-Token is refused (id ")
        middleware.identity = whole
        middleware.identity_changed.set()
        await eventually(lambda: not service.status().problem)


async def test_two_agents_do_not_share_a_state_folder(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options):
        with pytest.raises(DoorError, match="another agent"):
            async with AgentService(replace(options, socket=options.socket.with_name("b.sock"))):
                pass


async def test_two_agents_do_not_share_a_socket(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    async with running(options):
        with pytest.raises(DoorError, match="another agent"):
            async with AgentService(replace(options, state=options.state.with_name("other"))):
                pass


async def test_the_socket_is_closed_to_others_and_open_to_the_group(folder: Path, options: AgentOptions) -> None:
    async with running(options):
        assert stat.S_IMODE(options.socket.stat().st_mode) == 0o600
    assert not options.socket.exists()
    group = grp.getgrgid(os.getgid()).gr_name
    async with running(replace(options, group=group)):
        assert stat.S_IMODE(options.socket.stat().st_mode) == 0o660
        assert options.socket.stat().st_gid == os.getgid()
    with pytest.raises(DoorError, match="no group"):
        async with running(replace(options, group="no-such-group")):
            pass
    assert not options.socket.exists()


async def test_a_socket_that_a_dead_agent_left_is_replaced_and_a_file_is_not(
    folder: Path, options: AgentOptions
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(options.socket))
    async with running(options) as (_, stub):
        assert (await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=5)).version
    options.socket.write_text("precious")
    with pytest.raises(DoorError, match="is no socket"):
        async with running(options):
            pass
    assert options.socket.read_text() == "precious"


async def test_connections_are_limited_and_callers_named(
    folder: Path, options: AgentOptions, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "vm_agent.local_socket")
    limited = replace(options, limits=replace(options.limits, connections=2))
    async with running(limited):
        opened = [await asyncio.open_unix_connection(str(options.socket)) for _ in range(2)]
        await asyncio.sleep(0.05)
        reader, _ = await asyncio.open_unix_connection(str(options.socket))
        with contextlib.suppress(ConnectionError):  # reset or end: both are a way of being turned away
            assert await asyncio.wait_for(reader.read(), 5) == b""
        for _, writer in opened:
            writer.close()
        await asyncio.sleep(0.1)
        async with grpc.aio.insecure_channel(f"unix:{options.socket}") as channel:
            stub = local_pb2_grpc.LocalServiceStub(channel)
            assert (await stub.GetStatus(local_pb2.GetStatusRequest(), timeout=5)).version
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.Sign(local_pb2.SignRequest(), timeout=5)
    named = [record for record in caplog.records if record.getMessage() == "a local program connected"]
    assert {record.__dict__["uid"] for record in named} == {os.getuid()}
    assert {record.__dict__["pid"] for record in named} == {os.getpid()}


async def test_a_call_under_way_is_answered_before_the_agent_stops(
    middleware: MiddlewareDouble, options: AgentOptions
) -> None:
    middleware.latency = 0.5
    async with AgentService(options) as service:
        await eventually(lambda: service.status().connected)
        channel = grpc.aio.insecure_channel(f"unix:{options.socket}")
        caller = local_pb2_grpc.LocalServiceStub(channel).Sign(SIGN, timeout=5)
        await eventually(lambda: len(middleware.batches) == 1)
    assert (await caller).signature
    await channel.close()


async def test_metrics_tell_what_was_done(middleware: MiddlewareDouble, options: AgentOptions) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with running(replace(options, metrics_port=port)) as (_, stub):
        await stub.Sign(SIGN, timeout=5)
        url = f"http://127.0.0.1:{port}/metrics"
        text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read().decode())
    assert "vm_agent_operations_total 1.0" in text
    assert "vm_agent_connected 1.0" in text


async def test_a_handshake_that_takes_seconds_comes_to_its_end(
    middleware: MiddlewareDouble, options: AgentOptions, folder: Path
) -> None:
    """A host that is very busy, or emulated: each piece on the way takes seconds. dom0 has used up the secret before its answer is here."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(3)
                writer.write(data)
                await writer.drain()
            writer.close()

    async def relay(path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    join = json.loads((folder / "join.json").read_text())
    async with contextlib.AsyncExitStack() as stack:
        for door in ("enrol", "agent"):
            path = str(folder / join[door].removeprefix("unix:"))
            server = await asyncio.start_unix_server(functools.partial(relay, path), folder / f"slow-{door}")
            stack.callback(server.close)
            join[door] = f"unix:slow-{door}"
        write_atomically(folder / "join.json", json.dumps(join).encode())
        service, _ = await stack.enter_async_context(running(options))
        await eventually(lambda: service.status().connected, timeout=100)


async def test_what_comes_before_a_caller_is_connected_inside_is_not_lost() -> None:
    """asyncio up to 3.11.3 reads from a connection whose reading was paused as it was made."""
    left, right = socket.socketpair()
    near, far = Half(), Half()
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: far, sock=left)
    for piece in (b"first ", b"and second"):
        near.get_buffer(-1)[: len(piece)] = piece
        near.buffer_updated(len(piece))
    near.connect(far)
    near.get_buffer(-1)[:4] = b", on"
    near.buffer_updated(4)
    assert await asyncio.to_thread(right.recv, 100) == b"first and second, on"
    assert far.transport is not None
    far.transport.close()
    right.close()
