"""``gose racs`` as an operator types it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gose.grid import free_ports

pytestmark = pytest.mark.e2e

ENVIRONMENT = {**os.environ, "GOSE_CONFIG": "gose.toml", "GOSE_RACS_CONFIG": "racs.toml"}


def gose(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "gose.cli", *arguments),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
    )


def make_request(folder: Path, name: str) -> None:
    subprocess.run(
        (
            *("openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", f"{name}.key", "-subj", f"/CN={name}", "-out", f"{name}.csr"),
        ),
        cwd=folder,
        check=True,
        capture_output=True,
    )
    (folder / f"{name}.key").chmod(0o600)


def test_from_a_request_to_a_list_of_cards(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (tmp_path / "gose.toml").write_text('names = ["localhost"]\n')
    assert gose(tmp_path, "init").returncode == 0
    for name in ("site-b", "grid-a"):
        make_request(tmp_path, name)
        signed = gose(
            tmp_path, "racs", "sign", name, "--request", f"{name}.csr", "--host", "localhost", "--out", f"{name}.pem"
        )
        assert signed.returncode == 0, signed.stderr
        assert signed.stdout.startswith(f"node {name} is certified: ")
    other = gose(
        tmp_path, "racs", "sign", "other", "--request", "grid-a.csr", "--host", "localhost", "--out", "other.pem"
    )
    assert (other.returncode, other.stderr) == (65, "error: the certificate signing request is not for 'other'\n")
    (tmp_path / "racs.toml").write_text(
        f'listen = "127.0.0.1:{port}"\nkey = "site-b.key"\ncertificate = "site-b.pem"\n'
        'authority = "state/authority/ca.pem"\n'
        'secure_elements = [{ seid = "b-1", socket = "b-1.sock" }, { seid = "b-2", socket = "b-2.sock" }]\n'
        '[[users]]\nname = "grid-a"\n[[users.grants]]\nsecure_elements = ["b-2"]\nallow = ["operate"]\n'
    )

    def look(name: str, at: int = port) -> subprocess.CompletedProcess[str]:
        authority = ("--authority", "state/authority/ca.pem")
        return gose(
            tmp_path,
            "racs",
            "list",
            f"localhost:{at}",
            "--key-file",
            f"{name}.key",
            "--certificate",
            f"{name}.pem",
            *authority,
        )

    assert look("grid-a").returncode == 69
    log = tmp_path / "log"
    with log.open("wb") as file:
        node = subprocess.Popen(
            (sys.executable, "-m", "gose.cli", "racs", "serve"), cwd=tmp_path, stderr=file, env=ENVIRONMENT
        )
    try:
        deadline = time.monotonic() + 30
        while "the node is ready" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        found = look("grid-a")
        assert (found.returncode, found.stdout) == (0, "RACS 0.2\nb-2\n")
        assert look("site-b").returncode == 1
        (tmp_path / "grid-a.key").chmod(0o644)
        assert look("grid-a").returncode == 78
    finally:
        node.terminate()
        assert node.wait(timeout=20) == 0
    assert "PRIVATE" not in log.read_text()
    (tmp_path / "racs.toml").write_text('listen = "nowhere"\n')
    assert gose(tmp_path, "racs", "serve").returncode == 78
