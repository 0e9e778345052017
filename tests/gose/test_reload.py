"""SIGHUP to a running grid: cards come and go without a restart, the others are not disturbed, and a bad file changes nothing."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from secfunet.identity import Role, load_certificate, pem_of, thumbprint
from tests.gose.grid import new_grid
from tests.gose.test_running import Served
from tests.support.cards import CardProcess, running_card

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


class Reloaded(Served):
    """``gose serve`` whose settings are written again and again."""

    def write(self, *cards: tuple[str, str, CardProcess], more: str = "") -> None:
        """Settings with the grid's own cards and these."""
        settings = self.grid.settings
        lines = [
            'state = "state"',
            f'service_provider = {{ https = "{settings.service_provider.https}", grpc = "{settings.service_provider.grpc}" }}',
            f'openid_provider = {{ endpoint = "{settings.openid_provider.endpoint}", login = "{settings.openid_provider.login}" }}',
            more,
        ]
        own = [(element.seid, element.role, self.grid.cards[element.seid]) for element in settings.secure_elements]
        for seid, role, card in (*own, *cards):
            lines += [
                "[[secure_elements]]",
                *(f'seid = "{seid}"', f'socket = "{card.socket}"', f'role = "{role}"'),
                *(f'user_pin_file = "{card.user_pin_file}"', f'administrator_keys_file = "{card.keys_file}"'),
            ]
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = self.config.with_suffix(".log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]  # gRPC's own are no JSON

    async def hang_up(self) -> dict[str, Any]:
        """SIGHUP; the line of the log that says what came of it."""
        before = len(self.log)
        assert self.process is not None
        self.process.send_signal(signal.SIGHUP)

        def said() -> list[dict[str, Any]]:
            return [
                line
                for line in self.log[before:]
                if "settings were read" in line["message"] or "cannot be used" in line["message"]
            ]

        await until(lambda: bool(said()))
        return said()[0]

    async def cards(self) -> dict[str, str]:
        return {card["seid"]: card["state"] for card in (await self.status())["secure_elements"]}


async def until(is_so: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(short_folder: Path) -> AsyncIterator[Reloaded]:
    async with new_grid(short_folder, servers=1) as grid, running_card(short_folder, name="blank") as blank:
        grid.hypervisor("hv-a")
        served = Reloaded(grid, blank, short_folder / "gose.toml", 0)
        served.write()
        await served.start()
        yield served
        await served.kill()


async def test_a_vms_card_is_enrolled_and_added_while_the_others_work(served: Reloaded, tmp_path: Path) -> None:
    served.write(("se-new", "vm", served.blank))
    out = tmp_path / "new.pem"
    # The settings have the card, the running grid has not: that is said before a guest finds out.
    code, _, errors = await served.gose("enrol-vm", "new", "--seid", "se-new", "--key", "rsa-2048", "--out", str(out))
    assert code == 0, errors
    assert "the running grid does not have the secure element 'se-new' yet: send it SIGHUP" in errors
    code, _, errors = await served.gose(
        "issue-token", "--vm", "new", "--hypervisor", "hv-a", "--out", str(tmp_path / "t")
    )
    assert (code, "'se-new' yet" in errors) == (0, True)
    with served.grid.registry() as registry:
        served.grid.vms["new"] = registry.named(Role.VM, "new")

    others = asyncio.create_task(_sign_on(served))
    said = await served.hang_up()
    assert (said["changed"], said["needs_restart"]) == (["card se-new added"], [])
    assert (await served.cards())["se-new"] == "in service"
    await served.sign("new")
    others.cancel()
    with pytest.raises(asyncio.CancelledError):
        await others  # what it met would be raised here
    code, _, errors = await served.gose(
        "issue-token", "--vm", "new", "--hypervisor", "hv-a", "--out", str(tmp_path / "t")
    )
    assert (code, errors) == (0, "")


async def _sign_on(served: Reloaded) -> None:
    while True:
        await served.sign("vm-1")


@pytest.mark.parametrize(
    "content", ["no = toml = at all", 'stat = "state"', 'names = ["localhost"]\nmetrics_port = 0\n']
)
async def test_a_file_that_cannot_be_used_changes_nothing(served: Reloaded, content: str) -> None:
    good, before = served.config.read_text(), await served.cards()
    served.config.write_text(content)
    said = await served.hang_up()
    assert said["level"] == "error"
    assert "everything stays as it was" in said["message"]
    served.config.write_text(good)
    assert await served.cards() == before
    await served.sign("new")
    assert (await served.hang_up())["changed"] == []


async def test_what_counts_only_after_a_restart_is_said(served: Reloaded) -> None:
    good = served.config.read_text()
    served.config.write_text(
        f'log_level = "debug"\nnames = ["localhost", "other.example"]\n{good}\n[limits]\nslot_queue = 7\n'
    )
    said = await served.hang_up()
    assert said["level"] == "warning"
    assert (said["changed"], said["needs_restart"]) == (["log_level"], ["names", "limits.slot_queue"])
    served.config.write_text(good)
    assert (await served.hang_up())["changed"] == ["log_level"]


async def test_new_certificates_are_shown_without_a_restart(served: Reloaded) -> None:
    def shown() -> set[str]:
        doors = (
            served.grid.settings.service_provider.https,
            served.grid.settings.service_provider.grpc,
            served.grid.settings.openid_provider.endpoint,
        )
        found = set()
        for door in doors:
            pem = ssl.get_server_certificate((door.host, door.port))
            found.add(thumbprint(ssl.PEM_cert_to_DER_cert(pem)))
        return found

    before = await asyncio.to_thread(shown)
    assert (await served.gose("renew-servers"))[0] == 0
    said = await served.hang_up()
    assert sorted(line.split(",")[0] for line in said["changed"]) == [
        "certificate of the openid-provider",
        "certificate of the service-provider",
    ]
    after = await asyncio.to_thread(shown)
    assert before.isdisjoint(after)
    assert len(after) == 2
    await served.sign("vm-1")


async def test_a_damaged_certificate_keeps_the_one_of_before(served: Reloaded) -> None:
    path = served.grid.settings.authority / "service-provider.pem"
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    served.write()  # nor is the card taken away, though the file says so
    said = await served.hang_up()
    assert "everything stays as it was" in said["message"]
    assert "service-provider.pem" in said["message"]
    await served.sign("new")
    path.write_bytes(good)


async def test_a_card_that_is_taken_out_is_free_and_its_vm_is_told(served: Reloaded) -> None:
    assert load_certificate(pem_of(served.grid.vms["new"].certificate))
    served.write()
    said = await served.hang_up()
    assert said["changed"] == ["card se-new removed"]
    assert "se-new" not in await served.cards()
    with pytest.raises((AssertionError, grpc.aio.AioRpcError, KeyError)):
        await served.sign("new")
    await served.sign("vm-1")
    # Nobody has it: it can be given a new key.
    client = await served.blank.connect("vm")
    await client.close()


async def test_a_servers_card_comes_and_goes(served: Reloaded) -> None:
    served.write(("server-9", "server", served.blank))
    assert (await served.gose("enrol-server", "server-9", "--seid", "server-9", "--replace", "--key", "p-256"))[0] == 0
    assert (await served.hang_up())["changed"] == ["card server-9 added"]
    assert (await served.cards())["server-9"] == "in service"
    await asyncio.gather(*(served.sign("vm-1") for _ in range(4)))
    served.write()
    assert (await served.hang_up())["changed"] == ["card server-9 removed"]
    await served.sign("vm-1")


async def test_hangups_in_a_row_end_nothing(served: Reloaded) -> None:
    assert served.process is not None
    for _ in range(20):
        served.process.send_signal(signal.SIGHUP)
    await served.hang_up()
    await served.sign("vm-1")
    assert served.process.returncode is None
