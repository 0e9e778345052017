"""What a guest is told of a failure: a reason, a sentence of fixed words and an id; dom0's records tell the rest under that id."""

import re
import secrets
import ssl
import time

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dom0_middleware.api.errors import told_to_guest
from dom0_middleware.errors import GridFailed, Reason, Refused, Unavailable
from gose_client.connectors import explain
from gose_client.errors import (
    DeadlineError,
    GoseClientError,
    GridRefusedError,
    GridUnavailableError,
    GridUntrustedError,
    HypervisorCardError,
    ProtocolViolationError,
)
from secfunet.apdu import StatusError
from secfunet.card.errors import CardGoneError
from secfunet.middleware.v1 import agent_pb2, orchestrator_pb2
from secfunet.operation import OperationProblem
from secfunet.rpc.facts import Facts
from secfunet.rpc.reasons import Domain
from secfunet.tls.errors import PeerAlertError
from tests.dom0_middleware.test_operations import batch, operate
from tests.dom0_middleware.world import TIMEOUT, World, facts, sign_operation, token

INSIDE = [
    "https://localhost:8444 cannot be reached: [Errno 111] Connect call failed ('127.0.0.1', 8444)",
    "https://localhost:9443 is not the grid that is meant: [SSL: CERTIFICATE_VERIFY_FAILED] (_ssl.c:1006)",
    "the hypervisor's card does not take the PIN: attempts left: 2",
    "the login leads to https://localhost:9443, which is not configured",
    "/etc/secfunet/user.pin: [Errno 13] Permission denied",
]
SENTENCES = {reason.sentence for reason in Reason} | {"the grid refused"} | {one.value for one in OperationProblem}
SENTENCES.add("two operations of the batch have the same request id")


def of_all_kinds(text: str, reason: Reason, name: str) -> list[Exception]:
    return [
        Refused(reason, text, detail=text),
        Unavailable(reason, text, retry_after=1.0),
        GridFailed(Facts(grpc.StatusCode.UNAVAILABLE, Domain.GRID, name, text, 1.0)),
        GridRefusedError(name, text, code=grpc.StatusCode.PERMISSION_DENIED),
        GoseClientError(name, text, code=grpc.StatusCode.INTERNAL),
        GridUnavailableError(text),
        GridUntrustedError(text),
        HypervisorCardError(text),
        ProtocolViolationError(text),
        DeadlineError(RuntimeError(text)),
        CardGoneError(text),
        StatusError(0x63C2, 0x20),
        OSError(111, text),
        RuntimeError(text),
        explain(ConnectionRefusedError(111, text), "https://localhost:8444"),
    ]


@given(
    st.one_of(st.sampled_from(INSIDE), st.text()),
    st.sampled_from(list(Reason)),
    st.one_of(st.sampled_from([reason.value for reason in Reason]), st.just("NEW_IN_ANOTHER_VERSION")),
)
def test_every_failure_is_told_in_fixed_words(text: str, reason: Reason, name: str) -> None:
    correlation = secrets.token_hex(8)
    for error in of_all_kinds(text, reason, name):
        told = told_to_guest(error, correlation)
        sentence, _, rest = told.message.rpartition(" (id ")
        assert sentence in SENTENCES, error
        assert rest == f"{correlation})"


def test_no_sentence_tells_of_the_inside() -> None:
    """No address, port, errno, count of attempts, file or library: no digits and no paths, but in words about the guest's own request."""
    own = {one.value for one in OperationProblem}
    for sentence in SENTENCES - own:
        assert not re.search(r"[0-9/\\\[\]:_]", sentence), sentence
        assert "PIN" not in sentence


@pytest.mark.parametrize("text", INSIDE)
async def test_the_cause_is_in_dom0_under_the_id_that_the_guest_is_told(world: World, text: str) -> None:
    world.grid.down = GridUnavailableError(text)
    guest = await world.enrolled()
    answers = await operate(guest, batch(1, [sign_operation(), sign_operation()]))
    messages = [failure.message for failure in answers[1].failures]
    async with guest.agent() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)
        messages.append(str(error.value.details()))
        operation = sign_operation()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.Sign(
                agent_pb2.SignRequest(request_id=operation.request_id, sign=operation.sign), timeout=TIMEOUT
            )
        messages.append(str(error.value.details()))
    assert facts(error.value)[1] == "GRID_UNAVAILABLE"
    found = [re.fullmatch(r"the grid cannot be reached now \(id ([0-9a-f-]+)\)", message) for message in messages]
    ids = [one[1] for one in found if one is not None]
    assert len(set(ids)) == 4, messages
    causes = {record.get("correlation"): record for record in world.audit()}
    for one in ids:
        assert causes[one]["detail"] == text
        assert (causes[one]["reason"], causes[one]["domain"]) == ("GRID_UNAVAILABLE", "middleware.secfunet")


async def test_a_wrong_setting_leaves_no_traceback(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.grid.down = ProtocolViolationError(INSIDE[3])
    guest = await world.enrolled()
    async with guest.agent() as stub:
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.GetIdentity(agent_pb2.GetIdentityRequest(), timeout=TIMEOUT)
    assert facts(error.value)[1] == "GRID_PROTOCOL_VIOLATED"
    told = [record for record in caplog.records if "refused or failed" in record.message]
    assert 1 <= len(told) < 20
    assert {getattr(record, "cause", "") for record in told} == {INSIDE[3]}
    assert all(record.exc_info is None for record in caplog.records)


async def test_the_domain_of_a_reason_is_on_record(world: World) -> None:
    guest = await world.enrolled()
    bad = sign_operation()
    world.grid.fail_ids.add(bad.request_id)
    answers = await operate(guest, batch(1, [bad]))
    assert answers[1].failures[0].domain == "gose.secfunet"
    record = next(record for record in world.audit() if record.get("reason") == "SLOT_BUSY")
    assert record["domain"] == "gose.secfunet"


async def test_which_program_asked_is_recorded_as_the_guests_word(world: World) -> None:
    guest = await world.enrolled()
    operations = [sign_operation() for _ in range(3)]
    for operation in operations:
        operation.correlation_id = "of-the-guests-choice"
    request = batch(1, operations)
    request.origins.extend(
        [
            agent_pb2.Origin(correlation_id="a1", uid=1000, pid=4711, executable="/usr/bin/curl"),
            agent_pb2.Origin(correlation_id="bad id!", uid=2**32 - 1, executable="/opt/\n" + "x" * 5000),
            agent_pb2.Origin(),
        ]
    )
    await operate(guest, request)
    records = [record for record in world.audit() if record["action"] == "operation"]
    assert [record.get("guest_correlation", "") for record in records] == ["a1", "", ""]
    assert records[0]["program"] == {"uid": 1000, "pid": 4711, "executable": "/usr/bin/curl"}
    executable = str(records[1]["program"]["executable"])  # type: ignore[index] # it is one
    assert executable.startswith("/opt/\\n")
    assert len(executable) < 150
    assert "of-the-guests-choice" not in {record["correlation"] for record in records}
    assert len({record["correlation"] for record in records}) == 3
    # Not one for each: nothing is guessed.
    request = batch(2, [sign_operation(), sign_operation()])
    request.origins.append(agent_pb2.Origin(uid=1000, pid=1))
    await operate(guest, request)
    assert all("program" not in record for record in world.audit() if record.get("batch") == 2)


async def test_each_operation_reaches_the_grid_under_its_own_id(world: World) -> None:
    guest = await world.enrolled()
    await operate(guest, batch(1, [sign_operation() for _ in range(4)]))
    recorded = {record["request"]: record["correlation"] for record in world.audit() if record["action"] == "operation"}
    assert world.grid.called == recorded
    assert len(set(recorded.values())) == 4


async def test_a_token_of_a_clock_that_is_ahead_is_the_orchestrators_to_hear(world: World) -> None:
    uuid = await world.create(vm_auth_token="")
    ahead = token("web", issued_ago=-3600, valid=7200)
    async with world.orchestrator() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.StartVm(orchestrator_pb2.StartVmRequest(uuid=uuid, vm_auth_token=ahead), timeout=TIMEOUT)
    assert facts(error.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "TOKEN_NOT_YET_VALID")
    assert "compare the clocks" in str(error.value.details())


async def test_what_this_hosts_clock_has_against_a_refused_token_is_in_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.grid.down = GridRefusedError("TOKEN_REFUSED", "refused", code=grpc.StatusCode.PERMISSION_DENIED)
    world.service.sessions._clock = lambda: time.time() - 86400.0
    guest = await world.enrolled()
    answers = await operate(guest, batch(1, [sign_operation()]))
    assert answers[1].failures[0].reason == "TOKEN_REFUSED"
    assert answers[1].failures[0].message.startswith("the VM-Auth-Token is refused (id ")
    causes = [str(getattr(record, "cause", "")) for record in caplog.records if "refused a VM-Auth" in record.message]
    assert len(causes) == 1
    assert "is valid from" in causes[0]


@pytest.mark.parametrize(("alert", "reason"), [(46, "HYPERVISOR_REFUSED"), (80, "GRID_UNAVAILABLE")])
def test_that_the_grid_does_not_want_this_card_is_not_called_a_wrong_grid(alert: int, reason: str) -> None:
    assert explain(PeerAlertError(alert), "https://localhost:8444").reason == reason
    assert explain(ssl.SSLCertVerificationError(1, "x"), "https://localhost:8444").reason == "GRID_UNTRUSTED"


async def test_an_orchestrator_is_told_the_id_of_its_call(world: World) -> None:
    async with world.orchestrator() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.GetVm(
                orchestrator_pb2.GetVmRequest(uuid="6f1d3a52-96a1-4b0c-9d7e-5f1f0c0a7b11"),
                timeout=TIMEOUT,
                metadata=(("secfunet-correlation-id", "deploy-42"),),
            )
    assert facts(error.value)[1] == "VM_UNKNOWN"
    assert str(error.value.details()).endswith(" (id deploy-42)")
