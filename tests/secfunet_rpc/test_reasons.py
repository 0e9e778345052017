"""The registry of reasons: each name has one meaning, each program uses its own rows, and what leaves a program names who spoke."""

import ast
from pathlib import Path

import grpc
import pytest

from dom0_middleware.api.errors import facts_of
from dom0_middleware.errors import GridFailed, Refused
from gose_client.errors import GridRefusedError
from secfunet.card.errors import CardGoneError
from secfunet.errors import SecFuNetError
from secfunet.rpc.facts import Facts, from_failure
from secfunet.rpc.reasons import HTTP_STATUSES, Domain, Healing, Reason, find_reason, healing_of

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "gose": {Domain.GRID},
    "dom0_middleware": {Domain.MIDDLEWARE},
    "gose_client": {Domain.MIDDLEWARE},
    "vm_agent": set(Domain),  # it acts on what the others say
}


def test_every_row_is_whole() -> None:
    for reason in Reason:
        assert reason.name == reason.value
        assert reason.domains
        assert reason.code is not grpc.StatusCode.OK
        assert reason.sentence
        assert "\n" not in reason.sentence
        assert len(reason.sentence) < 100
        assert (reason.http_status is None) == (Domain.GRID not in reason.domains)
    assert {reason.code for reason in Reason if Domain.GRID in reason.domains} <= HTTP_STATUSES.keys()


def test_no_two_rows_mean_the_same() -> None:
    sentences = [reason.sentence for reason in Reason]
    assert len(sentences) == len(set(sentences))


@pytest.mark.parametrize(("package", "domains"), PACKAGES.items())
def test_a_program_uses_rows_of_its_own_domain_only(package: str, domains: set[Domain]) -> None:
    used = {
        node.attr
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Reason"
    }
    assert used
    if package == "dom0_middleware":
        used.discard("TOKEN_REFUSED")  # it looks for the cause of what the grid says
    assert {name for name in used if not domains & set(Reason[name].domains)} == set()


def test_no_reason_is_written_as_text_in_a_program() -> None:
    statuses = {code.name for code in grpc.StatusCode}  # two of them are reasons, too
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and find_reason(node.value) is not None
        and node.value not in statuses
    ]
    assert found == []


def test_every_row_is_used() -> None:
    text = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert [reason.name for reason in Reason if f"Reason.{reason.name}" not in text] == []


def test_two_causes_are_never_told_alike() -> None:
    """An operator or a program that reads one reason does not act on the wrong card or the wrong host."""
    errors: list[SecFuNetError] = [
        GridFailed(Facts.of(Domain.GRID, Reason.CARD_UNAVAILABLE, "the VM's card is out of service")),
        CardGoneError("the hypervisor's card is gone"),
        GridRefusedError("HYPERVISOR_REFUSED", "not admitted", code=grpc.StatusCode.PERMISSION_DENIED),
        Refused(Reason.LIBVIRT_REFUSED, "the hypervisor refuses: libvirt ..."),
    ]
    assert len({facts_of(error).reason for error in errors}) == len(errors)
    told = [from_failure(facts_of(error).failure(b"i" * 16), Domain.AGENT) for error in errors]
    assert [one.domain for one in told] == [Domain.GRID, Domain.MIDDLEWARE, Domain.GRID, Domain.MIDDLEWARE]


def test_an_unknown_reason_is_judged_by_its_code() -> None:
    assert healing_of("NEW_IN_ANOTHER_VERSION", grpc.StatusCode.UNAVAILABLE) is Healing.TIME
    assert healing_of("NEW_IN_ANOTHER_VERSION", grpc.StatusCode.RESOURCE_EXHAUSTED) is Healing.ROOM
    assert healing_of("NEW_IN_ANOTHER_VERSION", grpc.StatusCode.INTERNAL) is Healing.NONE
    # A known one by its row: that this one is UNAVAILABLE does not make it worth a repetition by itself.
    assert healing_of("NOT_ENROLLED", grpc.StatusCode.UNAVAILABLE) is Healing.NONE
