"""The tables of reasons in docs/protocols.md say what the registry says."""

import re
from pathlib import Path

import pytest

from secfunet.rpc.reasons import Domain, Reason

PROTOCOLS = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text()


def table(domain: Domain) -> dict[str, tuple[str, ...]]:
    """The rows of the domain's table: reason, and its cells up to the meaning."""
    section = PROTOCOLS.split("\n## Reasons\n")[1].split("\n## ")[0]
    part = re.split(r"^Domain `", section, flags=re.MULTILINE)
    (own,) = (one for one in part if one.startswith(f"{domain}`"))
    rows: dict[str, tuple[str, ...]] = {}
    for line in own.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not re.match(r"\| [A-Z_]{4,}", line):
            continue
        for name in cells[0].split(", "):
            assert name not in rows, f"{name} stands twice"
            rows[name] = tuple(cells[1:])
    return rows


@pytest.mark.parametrize("domain", Domain)
def test_the_documents_table_is_the_registry(domain: Domain) -> None:
    told = table(domain)
    assert set(told) == {reason.name for reason in Reason if domain in reason.domains}
    for name, cells in told.items():
        reason = Reason[name]
        assert cells[0] == reason.code.name, name
        if domain is Domain.GRID:
            assert cells[1] == str(reason.http_status), name


def test_every_reason_that_the_documents_name_exists() -> None:
    """In backticks or alone in a table's cell; abbreviations of other protocols are shorter or have no underscore."""
    folder = Path(__file__).parents[2] / "docs"
    known = {reason.name for reason in Reason}
    ends = (
        "_REFUSED",
        "_UNAVAILABLE",
        "_MISSING",
        "_REQUIRED",
        "_AUTHORISED",
        "_EXPIRED",
        "_UNKNOWN",
        "_MISMATCH",
        "_DENIED",
    )
    grpc_codes = {reason.code.name for reason in Reason}
    for path in (folder / "protocols.md", folder / "operations.md", folder / "threat-model.md"):
        named = {name for name in re.findall(r"\b[A-Z]+(?:_[A-Z]+)+\b", path.read_text()) if name.endswith(ends)}
        assert named - known - grpc_codes == set(), path.name
