"""``gose check``, and what ``gose serve`` refuses to start with: each is said at once, by the key or the file that is wrong."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gose.authority import create_authority
from gose.checks import look_before_start, provider_problem
from gose.settings import GoseSettings
from secfunet.service.findings import Weight
from tests.gose.grid import free_ports
from tests.support.cards import running_card

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def ports() -> list[int]:
    return free_ports(5)


@pytest.fixture
def write(tmp_path: Path, ports: list[int]) -> Callable[..., Path]:
    def settings(more: str = "", *, names: str = '["localhost", "127.0.0.1"]', grpc: str = "") -> Path:
        config = tmp_path / "gose.toml"
        config.write_text(
            f"names = {names}\n{more}\n"
            f'[service_provider]\nhttps = "127.0.0.1:{ports[0]}"\ngrpc = "{grpc or f"127.0.0.1:{ports[1]}"}"\n'
            f'[openid_provider]\nendpoint = "127.0.0.1:{ports[2]}"\nlogin = "127.0.0.1:{ports[3]}"\n'
        )
        return config

    return settings


@pytest.fixture
def gose(tmp_path: Path, write: Callable[..., Path]) -> Run:
    write()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gose.cli", *arguments, "--config", str(tmp_path / "gose.toml")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert run("init").returncode == 0
    return run


def found(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    return {one["what"]: (one["state"], one["message"]) for one in json.loads(done.stdout)}


def test_what_would_work_is_said_to(gose: Run, tmp_path: Path) -> None:
    done = gose("check", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    states = {what: state for what, (state, _) in found(done).items()}
    assert states.pop("secure_elements") == "warning"
    assert set(states.values()) == {"ok"}
    assert {"grid", "service_provider.https", "openid_provider.login"} <= set(states)
    assert str(tmp_path / "state" / "authority" / "service-provider.pem") in states
    assert "ok       service_provider.grpc: 127.0.0.1:" in gose("check").stdout


@pytest.fixture
def listener(ports: list[int]) -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", ports[3]))
        one.listen()
        yield ports[3]


def test_an_address_that_is_taken_is_named_by_its_key(gose: Run, listener: int) -> None:
    done = gose("check")
    assert done.returncode == 78
    assert f"wrong    openid_provider.login: 127.0.0.1:{listener}: another program listens there" in done.stdout
    served = gose("serve")
    assert served.returncode == 78
    assert f"openid_provider.login: 127.0.0.1:{listener}: another program listens there" in served.stderr


def test_everything_that_is_wrong_is_said_at_once(gose: Run, write: Callable[..., Path], ports: list[int]) -> None:
    write(names='["grid.example.org"]', grpc=f"127.0.0.1:{ports[0]}")
    served = gose("serve")
    assert served.returncode == 78
    assert "service-provider.pem: is not for 'grid.example.org'" in served.stderr
    assert "openid-provider.pem: is not for 'grid.example.org'" in served.stderr
    assert "run 'gose renew-servers'" in served.stderr
    assert (
        f"service_provider.grpc: 127.0.0.1:{ports[0]} is the address of 'service_provider.https' already"
        in served.stderr
    )
    assert gose("renew-servers").returncode == 0
    write(names='["grid.example.org"]')
    assert gose("check").returncode == 0


@pytest.mark.parametrize(
    ("grpc", "why"),
    [("192.0.2.1:8444", "this host has no such address"), ("nowhere.invalid:8444", "cannot be resolved on this host")],
)
def test_an_address_of_no_use(gose: Run, write: Callable[..., Path], grpc: str, why: str) -> None:
    write(grpc=grpc)
    done = gose("check", "--json")
    assert done.returncode == 78
    state, message = found(done)["service_provider.grpc"]
    assert (state, why in message) == ("wrong", True)


def test_a_certificate_of_another_grid(gose: Run, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other" / "authority", ["localhost"], now=time.time())
    (tmp_path / "state" / "authority" / "service-provider.pem").write_bytes(
        other.server_file("service-provider").read_bytes()
    )
    served = gose("serve")
    assert (served.returncode, "was not issued by this grid's CA" in served.stderr) == (78, True)


def test_a_registry_that_cannot_be_read_is_a_sentence(gose: Run, tmp_path: Path) -> None:
    for path in (tmp_path / "state").glob("grid.sqlite*"):
        path.write_bytes(b"no database" * 1000)
    for command in ("check", "serve"):
        done = gose(command)
        assert done.returncode == 78
        assert "grid.sqlite" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_ends_are_seen_before_they_come(tmp_path: Path) -> None:
    now = time.time()
    settings = GoseSettings.model_validate({"state": tmp_path / "state", "service_provider": {"https": "127.0.0.1:0"}})
    create_authority(settings.authority, ["localhost"], now=now)

    def of(server: str, at: float) -> tuple[Weight, str]:
        (one,) = [one for one in look_before_start(settings, now=at) if one.what.endswith(f"{server}.pem")]
        return one.weight, one.message

    day = 86400.0
    assert of("service-provider", now)[0] is Weight.OK
    assert of("service-provider", now + 800 * day)[0] is Weight.WARNING
    weight, message = of("openid-provider", now + 830 * day)
    assert (weight, "renew-servers" in message) == (Weight.WRONG, True)
    # A clock that is behind comes right by itself.
    assert of("ca", now - 30 * day) == (Weight.WARNING, "is not valid yet: is this host's clock right?")


@pytest.mark.e2e
async def test_cards_are_tried_with_their_pins(gose: Run, write: Callable[..., Path], tmp_path: Path) -> None:
    async with running_card(tmp_path, name="good") as good, running_card(tmp_path, name="bad") as bad:
        wrong: Any = tmp_path / "wrong.pin"
        wrong.write_bytes(b"99999999\n")
        wrong.chmod(0o600)
        cards = "".join(
            f'[[secure_elements]]\nseid = "{seid}"\nsocket = "{where}"\nrole = "vm"\nuser_pin_file = "{pin}"\n'
            for seid, where, pin in (
                ("good", good.socket, good.user_pin_file),
                ("bad", bad.socket, wrong),
                ("gone", tmp_path / "gone.sock", wrong),
            )
        )
        config = write()
        config.write_text(config.read_text() + cards)
        done = gose("check", "--json")
        assert done.returncode == 78
        said = found(done)
        assert said["card good"][0] == "away"  # blank: it is not enrolled
        assert "enrol" in said["card good"][1], said
        assert said["card gone"][0] == "away"
        assert said["card bad"][0] == "wrong"
        assert "the card refuses the PIN" in said["card bad"][1]


@pytest.mark.parametrize("url", ["https://[::1]", "https://localhost", "https://127.0.0.1:1"])
async def test_the_openid_provider_is_asked_at_its_address_and_port(tmp_path: Path, url: str) -> None:
    create_authority(tmp_path / "state" / "authority", ["localhost"], now=time.time())
    settings = GoseSettings.model_validate(
        {"state": tmp_path / "state", "names": ["localhost"], "service_provider": {"openid_provider": url}}
    )
    place = url.partition("://")[2]
    problem = await provider_problem(settings)
    assert problem is not None
    assert (place if url.endswith(":1") else f"{place}:443") in problem
