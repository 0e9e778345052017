"""The collection's module ``tree``, run by Ansible on this machine: what it makes, what it would make, and that it makes it once."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COLLECTION = Path(__file__).parents[2] / "ansible"


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """Arguments that make two instances' folders and files, and a link."""
    mine = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}
    return {
        "instances": ["web", "db"],
        "folders": [
            {"path": f"{tmp_path}/cards", "mode": "0755", **mine},
            {"path": f"{tmp_path}/cards/%i", "mode": "0700", **mine},
        ],
        "files": [{"path": f"{tmp_path}/cards/%i/card.toml", "mode": "0640", "content": "name = %i\n", **mine}],
        "links": [{"path": f"{tmp_path}/current", "target": "cards/web"}],
        "absent": [f"{tmp_path}/old"],
    }


def run(arguments: dict[str, Any], folder: Path, *options: str) -> dict[str, Any]:
    command = [str(Path(sys.executable).with_name("ansible")), "localhost", "-m", "tree", "-a", json.dumps(arguments)]
    environment = {
        **os.environ,
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
        "ANSIBLE_STDOUT_CALLBACK": "minimal",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        "ANSIBLE_NOCOLOR": "1",
    }
    options = ("-c", "local", "-e", f"ansible_python_interpreter={sys.executable}", *options)
    done = subprocess.run(
        [*command, *options], cwd=COLLECTION, env=environment, capture_output=True, text=True, check=False, timeout=110
    )
    _, _, text = done.stdout.partition("localhost | ")
    assert text, done.stderr
    found: dict[str, Any] = json.loads(text.partition("=> ")[2])
    return found


def test_what_check_mode_tells_is_what_is_made_and_only_once(
    tree: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    (tmp_path / "old").write_text("old")
    would = run(tree, home, "--check")
    assert would["changed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    made = run(tree, home)
    assert made["paths"] == would["paths"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cards", "current"]
    for name in ("web", "db"):
        file = tmp_path / "cards" / name / "card.toml"
        assert file.read_text() == f"name = {name}\n"
        assert file.stat().st_mode & 0o777 == 0o640
        assert file.parent.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "current").readlink() == Path("cards/web")
    assert not run(tree, home)["changed"]


def test_a_mode_that_somebody_changed_is_put_right_and_nothing_else_is_touched(
    tree: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.mktemp("home")
    run(tree, home)
    file = tmp_path / "cards/db/card.toml"
    file.chmod(0o644)
    assert run(tree, home)["paths"] == [str(file)]
    assert file.stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_made_is_said_in_a_sentence(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["files"][0]["owner"] = "nobody-of-that-name"
    failed = run(tree, tmp_path)
    assert failed["msg"] == "there is no user or group nobody-of-that-name"


@pytest.mark.skipif(os.getuid() != 0, reason="gives folders away")
def test_links_of_a_services_user_lead_root_nowhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The user that owns a folder put links at the names that root will use in it."""
    home = tmp_path_factory.mktemp("home")
    outside, state = tmp_path / "etc", tmp_path / "state"
    outside.mkdir(mode=0o755)
    (outside / "settings").write_text("root's")
    state.mkdir(mode=0o700)
    os.chown(state, 65534, 65534)
    service = {"owner": "nobody", "group": "nogroup"}
    (state / "certificates").symlink_to(outside)
    (state / "file").symlink_to(outside / "settings")
    (state / "way").symlink_to(outside)

    refused = [
        run({"folders": [{"path": f"{state}/certificates", "mode": "0700", **service}]}, home),
        run({"folders": [{"path": f"{state}/way/new", "mode": "0700", **service}]}, home),
        run({"files": [{"path": f"{state}/way/new", "mode": "0600", "content": "x", **service}]}, home),
        run({"links": [{"path": f"{state}/way/new", "target": "x"}]}, home),
        run({"absent": [f"{state}/way/settings"]}, home),
    ]
    for one in refused:
        assert str(state) in one["msg"]
        assert "link" in one["msg"]
    # A file is put into the link's place, as it is into that of a file.
    assert run({"files": [{"path": f"{state}/file", "mode": "0600", "content": "x", **service}]}, home)["changed"]
    assert not (state / "file").is_symlink()

    assert outside.stat().st_uid == 0
    assert outside.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in outside.iterdir()] == ["settings"]
    assert (outside / "settings").read_text() == "root's"
    assert (outside / "settings").stat().st_uid == 0


@pytest.mark.skipif(os.getuid() != 0, reason="root's links are followed")
def test_links_that_only_root_can_have_made_are_followed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "var").symlink_to("real")
    made = run({"folders": [{"path": f"{tmp_path}/var/lib", "mode": "0700"}]}, tmp_path_factory.mktemp("home"))
    assert made["changed"]
    assert (tmp_path / "real" / "lib").stat().st_mode & 0o777 == 0o700
