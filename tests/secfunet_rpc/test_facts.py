"""What leaves a program of an error reads the same at the other end, in both forms."""

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from gose.errors import Reason, Refusal
from gose_client.errors import GridUnavailableError
from secfunet.gose.v1 import operation_pb2
from secfunet.rpc.facts import Facts, code_of, from_error, from_failure, from_status, whole_seconds
from secfunet.rpc.reasons import Domain, Healing
from vm_agent.errors import UnavailableError

SECONDS = st.one_of(st.none(), st.floats(0, 3600))


@pytest.mark.parametrize(
    ("seconds", "milliseconds"),
    [(0.0004, 1), (0.0015, 2), (0.0333, 34), (0.5, 500), (0.0, 1), (None, 0), (1e9, 3_600_000)],
)
def test_one_rounding_in_both_forms_and_in_every_program(seconds: float | None, milliseconds: int) -> None:
    agent = UnavailableError("m")
    agent.retry_after = seconds
    for facts in (
        Refusal(Reason.SLOT_BUSY, "m", retry_after=seconds).facts,
        GridUnavailableError("m", retry_after=seconds).facts,
        agent.facts,
    ):
        assert facts.failure().retry_after_ms == milliseconds
        told = from_status(facts.status().SerializeToString())
        assert told is not None
        assert told.retry_after == (milliseconds / 1000 if milliseconds else None)


@given(st.sampled_from(list(Reason)), st.sampled_from(list(Domain)), st.text(max_size=600), SECONDS)
def test_both_forms_say_the_same(reason: Reason, domain: Domain, message: str, seconds: float | None) -> None:
    facts = Facts.of(domain, reason, message, seconds)
    by_status = from_status(facts.status().SerializeToString())
    by_failure = from_failure(facts.failure(b"i" * 16), Domain.GRID)
    assert by_status == by_failure
    assert (by_failure.code, by_failure.domain, by_failure.reason) == (reason.code, domain, reason)
    assert (by_failure.retry_after is None) == (seconds is None)
    assert by_failure.message.isprintable()
    assert seconds is None or seconds <= (by_failure.retry_after or 0) <= seconds + 0.00101


@given(st.binary(max_size=300))
def test_any_status_is_read_or_none(untrusted: bytes) -> None:
    facts = from_status(untrusted)
    assert facts is None or len(facts.reason) <= 64


@given(
    st.integers(-(2**31), 2**31 - 1),
    st.text(max_size=80),
    st.text(max_size=80),
    st.text(),
    st.integers(-(2**63), 2**63 - 1),
)
def test_any_failure_is_read(code: int, reason: str, domain: str, message: str, retry: int) -> None:
    untrusted = operation_pb2.OperationFailure(
        code=code, reason=reason, domain=domain, message=message, retry_after_ms=retry
    )
    facts = from_failure(untrusted, Domain.GRID)
    assert facts.reason.isascii()
    assert 0 < len(facts.reason) <= 64
    assert facts.domain
    assert facts.code is not grpc.StatusCode.OK
    assert facts.retry_after is None or 0 < facts.retry_after <= 3600


def test_an_ok_is_no_failure() -> None:
    assert code_of(0) is code_of(4711) is grpc.StatusCode.UNKNOWN


def test_a_status_without_a_reason_or_with_a_huge_body_says_nothing() -> None:
    status = status_pb2.Status(code=14, message="m")
    assert from_status(status.SerializeToString()) is None
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="SLOT_BUSY", domain="gose.secfunet"))
    assert from_status(status.SerializeToString()) is not None
    status.message = "m" * 20000
    assert from_status(status.SerializeToString()) is None


def test_only_who_may_speak_is_heard() -> None:
    details = Facts.of(Domain.GRID, Reason.SLOT_BUSY).trailing_metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(*details))
    assert from_error(error, Domain.MIDDLEWARE) is None
    told = from_error(error, Domain.MIDDLEWARE, Domain.GRID)
    assert told is not None
    assert told.healing is Healing.ROOM


@given(st.floats(0, 3600))
def test_http_waits_are_rounded_up_too(seconds: float) -> None:
    assert max(1.0, seconds) <= whole_seconds(seconds) + 1e-6
    assert whole_seconds(0.2) == 1
    assert whole_seconds(1.2) == 2
