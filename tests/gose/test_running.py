"""``gose serve`` as a process: what ``gose status`` learns of it, and cards that are enrolled while it runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from gose.overview.table import duration
from gose.running import SOCKET, RunningError, ask_running_grid
from secfunet.identity import Role, load_certificate, pem_of
from tests.gose.grid import TestGrid, free_ports, new_grid, sign_operation
from tests.support.cards import CardProcess, running_card

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


class Served:
    """A grid whose settings lie in a file, ``gose serve`` on it, and a blank card in its settings."""

    def __init__(self, grid: TestGrid, blank: CardProcess, config: Path, metrics_port: int) -> None:
        self.metrics_port = metrics_port
        self.grid = grid
        self.blank = blank
        self.config = config
        self.process: asyncio.subprocess.Process | None = None

    async def gose(self, *arguments: str) -> tuple[int, str, str]:
        """One command: exit code, standard output, standard error."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gose.cli", *arguments, "--config", str(self.config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = await process.communicate()
        assert process.returncode is not None
        return process.returncode, output.decode(), errors.decode()

    async def status(self) -> Any:
        code, output, errors = await self.gose("status", "--json")
        assert code == 0, errors
        return json.loads(output)

    async def start(self) -> None:
        log_path = self.config.with_suffix(".log")
        with log_path.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gose.cli", "serve", "--config", str(self.config), stderr=log
            )
        deadline = time.monotonic() + 30
        while "the grid is ready" not in log_path.read_text():
            assert self.process.returncode is None, log_path.read_text()
            assert time.monotonic() < deadline, log_path.read_text()
            await asyncio.sleep(0.05)

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def sign(self, vm: str) -> None:
        """A login and a signature by the VM's key."""
        granted = await self.grid.session(vm, "hv-a")
        async with self.grid.channel("hv-a") as channel:
            from secfunet.gose.v1 import service_provider_pb2 as pb

            operation = sign_operation()
            answer = await self.grid.stub(channel).Execute(
                pb.ExecuteRequest(operations=[operation]),
                metadata=(("secfunet-session", granted["session"]),),
                timeout=20,
            )
        (container,) = answer.containers
        (result,) = self.grid.open("hv-a", container).results
        assert result.request_id == operation.request_id


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(short_folder: Path) -> AsyncIterator[Served]:
    async with new_grid(short_folder, servers=1) as grid, running_card(short_folder, name="blank") as blank:
        grid.hypervisor("hv-a")
        settings = grid.settings
        (metrics_port,) = free_ports(1)
        lines = [
            'state = "state"',
            f"metrics_port = {metrics_port}",
            'names = ["localhost", "127.0.0.1"]',
            f'service_provider = {{ https = "{settings.service_provider.https}", grpc = "{settings.service_provider.grpc}" }}',
            f'openid_provider = {{ endpoint = "{settings.openid_provider.endpoint}", login = "{settings.openid_provider.login}" }}',
        ]
        for seid, role, card in (
            *((element.seid, element.role, grid.cards[element.seid]) for element in settings.secure_elements),
            ("se-blank", "vm", blank),
        ):
            lines += [
                "[[secure_elements]]",
                *(f'seid = "{seid}"', f'socket = "{card.socket}"', f'role = "{role}"'),
                *(f'user_pin_file = "{card.user_pin_file}"', f'administrator_keys_file = "{card.keys_file}"'),
            ]
        config = short_folder / "gose.toml"
        config.write_text("\n".join(lines) + "\n")
        served = Served(grid, blank, config, metrics_port)
        await served.start()
        yield served
        await served.kill()


async def test_status_of_a_running_grid(served: Served) -> None:
    await served.sign("vm-1")
    report = await served.status()
    running = report["running"]
    assert served.process is not None
    assert running["pid"] == served.process.pid
    assert time.time() - 300 < running["started_at"] <= time.time()
    assert running["queues"] == {"se-vm-1": 0, "se-blank": 0, "server cards": 0}
    (session,) = running["sessions"]
    assert session["vmid"] == served.grid.vms["vm-1"].thumbprint
    assert session["hvid"] == served.grid.hypervisor("hv-a").hvid
    assert session["operations"] == ["decrypt", "encrypt", "sign"]
    cards = {card["seid"]: card for card in report["secure_elements"]}
    assert (cards["se-vm-1"]["state"], cards["se-vm-1"]["waiting"], cards["se-vm-1"]["jobs_done"]) == (
        "in service",
        0,
        1,
    )
    assert cards["server-0"]["state"] == "in service"
    assert cards["se-blank"]["state"] == "out of service"
    assert "enrol it again" in cards["se-blank"]["cause"]
    assert "6985" not in cards["se-blank"]["cause"]
    code, text, _ = await served.gose("status")
    assert code == 0
    assert "grid: running since" in text
    assert "1 sessions" in text
    assert session["name"] in text
    mode = (served.grid.settings.state / SOCKET).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_the_same_figures_for_a_person_a_program_and_prometheus(served: Served) -> None:
    await served.sign("vm-1")
    card = {card["seid"]: card for card in (await served.status())["secure_elements"]}["se-vm-1"]
    assert card["operations"] == card["jobs_done"] > 0
    assert card["errors"] == {}
    assert 0 < card["worked"]["p50"] <= card["worked"]["p99"] <= card["busy_seconds"]
    assert 0 <= card["waited"]["p50"] <= card["waited"]["p99"]
    _, text, _ = await served.gose("status")
    (row,) = [line for line in text.splitlines() if line.startswith("  se-vm-1 ")]
    assert f" {card['operations']} " in row
    assert f"{duration(card['worked']['p50'])} / {duration(card['worked']['p99'])}" in row
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{served.metrics_port}/metrics") as answer:
        samples = {
            (sample.name, sample.labels.get("quantile") or sample.labels.get("state", "")): sample.value
            for family in text_string_to_metric_families(await answer.text())
            for sample in family.samples
            if sample.labels.get("seid") == "se-vm-1"
        }
    assert samples["gose_card_operations_total", ""] == card["operations"]
    assert samples["gose_card_busy_seconds_total", ""] == card["busy_seconds"]
    assert samples["gose_card_work_seconds", "0.99"] == card["worked"]["p99"]
    assert samples["gose_card_wait_seconds", "0.5"] == card["waited"]["p50"]
    assert (samples["gose_card_state", "in_service"], samples["gose_card_state", "out_of_service"]) == (1, 0)


def hear_sigint() -> None:
    """Tests that a shell runs in its background are started with SIGINT ignored, and so would be what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


async def test_watching(served: Served) -> None:
    """An object a line, with what happened since the one before; Ctrl-C is a good end. For a person: what needs a look comes first."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gose.cli", "status", "--watch", "--json", "--interval", "0.2"),
        *("--config", str(served.config)),
        stdout=asyncio.subprocess.PIPE,
        limit=2**20,
        preexec_fn=hear_sigint,
    )
    assert process.stdout is not None
    first = json.loads(await process.stdout.readline())
    assert first["pulse"] is None
    await served.sign("vm-1")
    done = 0.0
    for _ in range(100):
        pulse = json.loads(await process.stdout.readline())["pulse"]
        done += pulse["cards"]["se-vm-1"]["per_second"]
        assert 0 <= pulse["cards"]["se-vm-1"]["busy"] <= 1
        if done:
            break
    assert done > 0
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 0
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gose.cli", "status", "--watch", "--interval", "0.1", "--config", str(served.config)),
        stdout=asyncio.subprocess.PIPE,
        preexec_fn=hear_sigint,
    )
    assert process.stdout is not None
    picture = (await process.stdout.readuntil(b"\n\n")).decode()
    process.send_signal(signal.SIGINT)
    await process.wait()
    cards = [line.split()[0] for line in picture.splitlines() if line.startswith("  se")]
    assert cards[0] == "se-blank", "which is out of service"
    assert "2 of 3 cards in service, 0 jobs wait" in picture


async def test_a_report_has_no_secret(served: Served) -> None:
    granted = await served.grid.session("vm-1", "hv-a")
    _, output, _ = await served.gose("status", "--json")
    assert granted["session"] not in output


async def test_a_card_that_is_in_use_is_not_taken_away(served: Served, tmp_path: Path) -> None:
    """--replace says what to do, and nothing has happened to the card."""
    code, _, errors = await served.gose(
        "enrol-vm", "vm-1", "--seid", "se-vm-1", "--replace", "--out", str(tmp_path / "vm.pem")
    )
    assert code == 69, errors
    # What can be undone comes first.
    assert 0 < errors.index("stop 'gose serve'") < errors.index("'gose revoke'")
    assert not (tmp_path / "vm.pem").exists()
    await served.sign("vm-1")


async def test_a_new_card_is_enrolled_and_used_while_the_grid_runs(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "vm.pem"
    code, _, errors = await served.gose("enrol-vm", "vm-new", "--seid", "se-blank", "--out", str(out))
    assert code == 0, errors
    with served.grid.registry() as registry:
        identity = registry.in_secure_element("se-blank")
    assert identity is not None
    assert pem_of(identity.certificate) == out.read_bytes()
    assert load_certificate(out.read_bytes())
    served.grid.vms["vm-new"] = identity
    deadline = time.monotonic() + 8  # a slot looks after its card every 5 seconds at least
    while {card["seid"]: card["state"] for card in (await served.status())["secure_elements"]}[
        "se-blank"
    ] != "in service":
        assert time.monotonic() < deadline
    await served.sign("vm-new")


async def test_a_new_hypervisor_logs_in_at_a_running_grid(served: Served) -> None:
    served.grid.hypervisor("hv-new")
    granted = await served.grid.session("vm-1", "hv-new")
    assert granted["hvid"] == served.grid.hypervisor("hv-new").hvid


async def test_a_revoked_server_card_serves_no_longer(served: Served) -> None:
    """And an enrolled one in its place does again, without a restart of the grid."""
    code, _, errors = await served.gose("revoke", "server", "server-0")
    assert code == 0, errors
    with pytest.raises(Exception, match=r"Cannot connect|ssl|SSL|reset"):
        async with served.grid.browser("hv-a") as browser:
            await browser.get(f"{served.grid.login}/login")
    card = next(card for card in (await served.status())["secure_elements"] if card["seid"] == "server-0")
    assert (card["state"], card["cause"]) == ("out of service", "the server 'server-0' was revoked")
    code, _, errors = await served.gose("enrol-server", "server-0", "--seid", "server-0", "--replace", "--key", "p-256")
    assert code == 0, errors
    deadline = time.monotonic() + 8
    while {one["seid"]: one["state"] for one in (await served.status())["secure_elements"]}["server-0"] != "in service":
        assert time.monotonic() < deadline
    await served.sign("vm-1")


async def test_a_revoked_vm_gets_a_new_key_while_the_grid_runs(served: Served, tmp_path: Path) -> None:
    old = served.grid.vms["vm-1"]
    code, _, errors = await served.gose("revoke", "vm", "vm-1")
    assert code == 0, errors
    code, _, errors = await served.gose(
        "enrol-vm", "vm-1", "--seid", "se-vm-1", "--replace", "--out", str(tmp_path / "vm.pem")
    )
    assert code == 0, errors
    with served.grid.registry() as registry:
        served.grid.vms["vm-1"] = registry.named(Role.VM, "vm-1")
    assert served.grid.vms["vm-1"].thumbprint != old.thumbprint
    deadline = time.monotonic() + 8
    while {one["seid"]: one["state"] for one in (await served.status())["secure_elements"]}["se-vm-1"] != "in service":
        assert time.monotonic() < deadline
    await served.sign("vm-1")


async def test_a_token_of_before_and_its_sessions_are_not_shown_as_good(served: Served) -> None:
    """What the guard refuses is refused in the picture, too: by whose certificate it was, not by the token alone."""
    report = await served.status()
    ended = {revocation["value"] for revocation in report["revocations"] if revocation["kind"] == "vm"}
    tokens = [token for token in report["tokens"] if token["vmid"] in ended]
    assert tokens, "the test before has revoked a VM that had tokens"
    assert {token["standing"] for token in tokens} == {"refused: the VM was revoked"}
    good = [token for token in report["tokens"] if token["standing"] == "good"]
    assert good
    assert ended.isdisjoint(token["vmid"] for token in good)
    assert ended.isdisjoint(session["vmid"] for session in report["running"]["sessions"])
    assert {session["standing"] for session in report["running"]["sessions"]} == {"good"}
    _, text, _ = await served.gose("status")
    assert not [line for line in text.splitlines() if any(vmid in line for vmid in ended)], "a VM is shown by its name"
    assert text.count("refused: the VM was revoked") == len(tokens)


async def test_a_second_grid_on_the_same_state_does_not_start(served: Served, tmp_path: Path) -> None:
    """Nor does it blind 'gose status' for the first."""
    ports = free_ports(4)
    other = tmp_path / "gose.toml"
    other.write_text(
        f'state = "{served.grid.settings.state}"\n'
        f'[service_provider]\nhttps = "127.0.0.1:{ports[0]}"\ngrpc = "127.0.0.1:{ports[1]}"\n'
        f'[openid_provider]\nendpoint = "127.0.0.1:{ports[2]}"\nlogin = "127.0.0.1:{ports[3]}"\n'
    )
    pid = (await served.status())["running"]["pid"]
    second = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gose.cli", "serve", "--config", str(other)), stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(second.communicate(), 30)
    assert second.returncode == 78
    assert f"already (process {pid})" in errors.decode()
    assert (await served.status())["running"]["pid"] == pid
    await served.sign("vm-1")


async def test_a_killed_grid_leaves_a_socket_and_no_report(served: Served) -> None:
    await served.kill()
    assert (served.grid.settings.state / SOCKET).exists()
    report = await served.status()
    assert report["running"] is None
    states = {card["seid"]: card["state"] for card in report["secure_elements"]}
    assert states == {"se-vm-1": "answers", "server-0": "answers", "se-blank": "answers"}
    assert "grid: not running" in (await served.gose("status"))[1]
    await served.start()
    assert (await served.status())["running"] is not None


async def test_a_second_grid_does_not_take_the_socket(served: Served) -> None:
    code, _, errors = await served.gose("serve")
    assert code != 0, errors
    running = (await served.status())["running"]
    assert served.process is not None
    assert running["pid"] == served.process.pid


@pytest.mark.parametrize("answer", [b"", b"{}", b"x" * 70_000, b'{"pid": "no number"}'])
async def test_what_is_no_report(tmp_path: Path, answer: bytes) -> None:
    deep = tmp_path / ("a-folder-whose-name-is-long-" * 5)
    deep.mkdir()
    assert await ask_running_grid(deep) is None

    async def lie(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.close()

    folder = os.open(deep, os.O_RDONLY)
    try:
        async with await asyncio.start_unix_server(lie, f"/proc/self/fd/{folder}/{SOCKET}"):
            with pytest.raises(RunningError):
                await ask_running_grid(deep)
    finally:
        os.close(folder)
