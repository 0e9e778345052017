"""In folders that a service's user may write, a playbook's root works as that user: a planted link leads it nowhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

COLLECTION = Path(__file__).parents[2] / "ansible"
# What the services' users own, and the variables that name it.
THEIRS = re.compile(
    r"/var/lib/secfunet-(gose|card)\b|\$store\b|\{\{ *(gose_state|dom0_middleware_grid_folder|gose__made|common__stores)"
)
# Ways to name such a path that neither follow a link to change something nor show what it leads to.
HARMLESS = (
    re.compile(r"^\s*\[ !? ?-e \S+ \]"),
    re.compile(r"^\s*store=/var/lib/secfunet-card/\$card$"),
    re.compile(r"^\s*for \w+ in "),
    re.compile(r"^\s*test ! -e "),
    re.compile(r"^\s*rm -rf /etc/secfunet /var/lib/secfunet-card "),  # removes links, never follows them
    re.compile(r"^\s*\$\(ls -d var/lib/"),  # tar keeps links as links
)
ROOTS_OWN = re.compile(r"^\s*(\[ .+ \] \|\| )?(runuser -u secfunet-\w+ -- |\{\{ gose_command \}\} )")


def tasks() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(COLLECTION.rglob("*.yml")):
        if "tasks" not in path.parts and path.parent.name != "playbooks":
            continue
        for entry in yaml.safe_load(path.read_text()) or []:
            yield from ((path, task) for task in _in(entry))


def _in(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    inner = [
        key for key in ("tasks", "pre_tasks", "post_tasks", "handlers", "block", "rescue", "always") if key in entry
    ]
    if not inner:
        yield entry
    for key in inner:
        for task in entry[key] or []:
            yield from _in(task)


def commands() -> Iterator[tuple[Path, str, str]]:
    """Every command line that the collection has a host's root run: file, task, line (continued lines as one)."""
    for path, task in tasks():
        for module in ("shell", "command", "raw"):
            what = task.get(f"ansible.builtin.{module}")
            text = what.get("cmd", "") if isinstance(what, dict) else what or ""
            for line in re.sub(r"\\\n\s*", " ", text).splitlines():
                for part in line.split(";"):
                    yield path.relative_to(COLLECTION), task.get("name", ""), part


def test_every_command_in_a_services_folder_is_that_users() -> None:
    found = [one for one in commands() if THEIRS.search(one[2])]
    assert len(found) > 8
    wrong = [
        one
        for one in found
        if not ROOTS_OWN.search(one[2]) and not any(harmless.search(one[2]) for harmless in HARMLESS)
    ]
    assert wrong == []


def test_the_documentation_of_the_modules_is_yaml() -> None:
    for path in sorted((COLLECTION / "plugins/modules").glob("*.py")):
        text = path.read_text()
        for name in ("DOCUMENTATION", "EXAMPLES", "RETURN"):
            yaml.safe_load(text.split(f'{name} = r"""', 1)[1].split('"""', 1)[0])


def test_nothing_is_put_where_everybody_may_write() -> None:
    for path in sorted(COLLECTION.rglob("*.yml")):
        assert not re.search(r"(?<![\w/])/(var/)?tmp/", path.read_text()), path


def literal(name: str, **values: object) -> str:
    """The command of a task, as it stands in the collection, with its variables filled in."""
    task = next(task for _, task in tasks() if task.get("name") == name)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # noqa: S701 - for a shell
    environment.filters["regex_replace"] = lambda text, pattern, by: re.sub(pattern, by.replace(r"\1", r"\g<1>"), text)
    what = next(task[f"ansible.builtin.{module}"] for module in ("shell", "raw") if f"ansible.builtin.{module}" in task)
    return environment.from_string(what["cmd"] if isinstance(what, dict) else what).render(values)


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder that every user may enter."""
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def perform(command: str, base: Path, data: str = "") -> subprocess.CompletedProcess[str]:
    """As root, with user nobody in the services' place, in ``base``; our own programs are stood in for by one that succeeds."""
    for user in ("gose", "card"):
        command = command.replace(f"/var/lib/secfunet-{user}", f"{base}/{user}").replace(f"secfunet-{user}", "nobody")
    command = command.replace("/etc/secfunet", f"{base}/settings").replace("-g nobody", "-g nogroup")
    words = ["bash", "-c", command]
    return subprocess.run(words, input=data, capture_output=True, text=True, check=False, cwd=base)


@pytest.mark.skipif(os.getuid() != 0, reason="root and another user")
def test_planted_links_lead_root_nowhere(base: Path) -> None:
    settings, state, home = base / "settings", base / "gose", base / "home"
    certificates, store = state / "certificates", base / "card" / "web"
    secret = base / "root-owned"
    secret.write_text("root's")
    secret.chmod(0o600)
    outside = base / "outside"
    outside.mkdir()
    (outside / "xen1.pem").write_text("root's")
    for folder in (certificates, store):
        folder.mkdir(parents=True)
    (home / "current/bin").mkdir(parents=True)
    making = "cd secret; touch card.store; echo secret >user.pin; echo secret >card.keys"
    for program, does in (("gose", "exit 0"), ("secure-element", making)):
        (home / "current/bin" / program).write_text(f"#!/bin/sh\n{does}\n")
        (home / "current/bin" / program).chmod(0o755)
    cards = settings / "cards" / "web"
    (cards / "secret").mkdir(parents=True)
    pins = settings / "gose" / "pins"
    pins.mkdir(parents=True)
    # The service's user, taken over.
    for name in ("xen1.csr", "xen1.pem"):
        (certificates / name).symlink_to(secret)
    (store / "card.store").symlink_to(base / "nowhere")
    (store / "card.store.new").symlink_to(secret)
    (pins / "web.user.pin").symlink_to(outside)
    (pins / "web.card.keys").symlink_to(secret)
    for path in (*state.rglob("*"), *(base / "card").rglob("*"), state, base / "card"):
        os.chown(path, 65534, 65534, follow_symlinks=False)

    values = {
        "common_home": str(home),
        "common_cards": ["web"],
        "dom0_middleware_name": "xen1",
        "dom0_middleware_renew": False,
        "dom0_middleware_grid_folder": "/var/lib/secfunet-gose/certificates",
        "gose_cards": ["web"],
        "gose_state": "/var/lib/secfunet-gose",
        "gose_command": f"runuser -u secfunet-gose -- {home}/current/bin/gose",
        "gose_key": "rsa-2048",
        "gose_replace": [],
        "decommission_name": "xen1",
    }
    signing = perform(literal("Sign it at the grid", **values), base, "a request")
    assert signing.returncode != 0  # the user itself may not write there
    reading = perform(literal("Read the certificates", **values), base)
    assert "root's" not in reading.stdout
    made = perform(literal("Make the stores of the cards, their keys and their PINs", **values), base)
    assert made.returncode != 0
    giving = "Make the authority, give the grid PIN and keys of each of its cards, and enrol them"
    given = perform(literal(giving, **values), base)
    assert given.returncode == 0, given.stderr
    assert (pins / "web.user.pin").is_file()
    assert not (pins / "web.card.keys").is_symlink()
    shutil.rmtree(certificates)
    certificates.symlink_to(outside)
    perform(literal("Revoke it", **values), base)

    assert secret.read_text() == "root's"
    assert (secret.stat().st_uid, secret.stat().st_mode & 0o777) == (0, 0o600)
    assert [path.name for path in outside.iterdir()] == ["xen1.pem"]
    assert (outside / "xen1.pem").stat().st_uid == 0


@pytest.mark.skipif(os.getuid() != 0, reason="root and another user")
def test_a_store_is_handed_over_whole_and_belongs_to_the_service(base: Path) -> None:
    home, cards, store = base / "home", base / "settings/cards/web", base / "card/web"
    (cards / "secret").mkdir(parents=True)
    store.mkdir(parents=True)
    for path in (base / "card", store):
        os.chown(path, 65534, 65534)
    (home / "current/bin").mkdir(parents=True)
    program = home / "current/bin/secure-element"
    program.write_text("#!/bin/sh\nprintf store >secret/card.store; touch secret/card.store.lock secret/user.pin\n")
    program.chmod(0o755)
    name = "Make the stores of the cards, their keys and their PINs"
    done = perform(literal(name, common_home=str(home), common_cards=["web"]), base)
    assert done.returncode == 0, done.stderr
    made = store / "card.store"
    assert made.read_text() == "store"
    assert (made.stat().st_uid, made.stat().st_mode & 0o777) == (65534, 0o600)
    assert sorted(path.name for path in (cards / "secret").iterdir()) == ["user.pin"]
