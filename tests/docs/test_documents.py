"""The documents are true where a program can tell: links lead somewhere, targets exist, and a mitigated attack has its test."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import typer.main
from pydantic import BaseModel

from dom0_middleware.settings import MiddlewareSettings
from gose.racs.settings import NodeSettings
from gose.settings import GoseSettings
from secure_element.settings import CardSettings
from vm_agent.settings import AgentSettings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
STATUSES = {"mitigated", "operational", "unmitigated"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_exist(document: Path) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", document.read_text()))
    assert named <= known


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\((\d{4}-[a-z0-9-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("0*.md")}


def keys_of(model: type[BaseModel]) -> set[str]:
    """Every key of a settings model and of the tables in it."""
    found = set()
    for name, field in model.model_fields.items():
        found.add(name)
        for nested in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(nested, type) and issubclass(nested, BaseModel):
                found |= keys_of(nested)
    return found


@pytest.mark.parametrize("model", [CardSettings, GoseSettings, NodeSettings, MiddlewareSettings, AgentSettings])
def test_every_setting_is_told(model: type[BaseModel]) -> None:
    told = set(re.findall(r"`(?:[a-z_]+\.)*([a-z_]+)`", (ROOT / "docs" / "operations.md").read_text()))
    tables = {name for name in keys_of(model) if f"[{name}]" in (ROOT / "docs" / "operations.md").read_text()}
    headings = {
        "service_provider",
        "openid_provider",
        "store_key",
        "card",
        "grid",
        "libvirt",
        "orchestrators",
        "audit",
        "limits",
        "channel",
        "tcp",
    }
    assert keys_of(model) - told - tables - headings == set()


def commands(command: object, path: tuple[str, ...]) -> list[str]:
    """Of a program: each as a user types it."""
    inner: dict[str, object] | None = getattr(command, "commands", None)
    if inner is None:
        return [" ".join(path)]
    return [name for word, one in inner.items() for name in commands(one, (*path, word))]


@pytest.mark.parametrize(
    ("program", "module"),
    [
        ("gose", "gose.cli"),
        ("secure-element", "secure_element.cli"),
        ("secure-middleware", "dom0_middleware.cli"),
        ("vm-agent", "vm_agent.cli"),
    ],
)
def test_every_command_is_told(program: str, module: str) -> None:
    told = "".join(path.read_text() for path in DOCUMENTS)
    known = commands(typer.main.get_command(importlib.import_module(module).app), (program,))
    assert len(known) > 5
    assert [name for name in known if name not in told] == []


def attacks() -> list[tuple[str, str, str]]:
    """The rows of the threat model's tables: number, status, last column."""
    rows = []
    for line in (ROOT / "docs" / "threat-model.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if re.fullmatch(r"[STRIDE]\d+", cells[0]):
            rows.append((cells[0], cells[-2], cells[-1]))
    return rows


def test_the_threat_model_has_attacks_of_every_kind() -> None:
    rows = attacks()
    assert {number[0] for number, _, _ in rows} == set("STRIDE")
    assert {status for _, status, _ in rows} <= STATUSES
    numbers = [number for number, _, _ in rows]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize(("number", "evidence"), [(n, e) for n, status, e in attacks() if status == "mitigated"])
def test_a_mitigated_attack_is_performed_by_a_test(number: str, evidence: str) -> None:
    named = re.findall(r"`(tests/[a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`", evidence)
    assert named, f"{number} names no test"
    for file, function in named:
        tree = ast.parse((ROOT / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert function in functions, f"{number}: {file} has no {function}"
