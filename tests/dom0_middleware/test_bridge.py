"""Channel kind tcp at a real bridge: what a neighbour guest sends there decides nothing about another guest."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dom0_middleware.channels import pinning
from tests.dom0_middleware.bridge import ADDRESSES, ATTACKS, BRIDGE, DOM0, INTERFACES, MACS, Bridge, bridge

GUEST = str(Path(__file__).with_name("bridge_guest.py"))
TIMES = 20


@pytest.fixture(scope="module")
def made() -> Iterator[Bridge]:
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    with bridge(folder) as one:
        yield one
    shutil.rmtree(folder)


def guest(made: Bridge) -> subprocess.Popen[str]:
    """Guest a at its port, with its first connection open."""
    process = made.start("a", GUEST, DOM0, str(made.port), str(TIMES))
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def attack(made: Bridge, program: str, *arguments: str) -> subprocess.Popen[str]:
    """Guest b does this."""
    return made.start("b", str(ATTACKS / f"{program}.py"), *arguments)


def result(process: subprocess.Popen[str]) -> dict[str, object]:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    answer: dict[str, object] = json.loads(said)
    return answer


SERVED = {"served": TIMES, "kept": True}


def test_what_a_neighbour_says_of_addresses_changes_nothing(made: Bridge) -> None:
    """Where the guest is, which interface its MAC address is at, and, to the guest, where dom0 is."""
    victim = guest(made)
    spoof = attack(
        *(made, "spoof_bridge", "eth0", "4", "20"),
        *(f"arp={ADDRESSES['a']}", f"mac={MACS['a']}", f"arp={DOM0}"),
    )
    assert result(victim) == SERVED
    assert int(str(result(spoof)["sent"])) > 60


def test_a_flood_of_mac_addresses_changes_nothing(made: Bridge) -> None:
    before = made.ask("facts")
    victim = guest(made)
    assert result(attack(made, "spoof_bridge", "eth0", "0", "1", "macs=50000"))["sent"] == 50000
    assert len(made.tables("bridge", "fdb", "show", "br", BRIDGE).splitlines()) > 10_000
    assert made.ask("facts") < 3 * before + 0.02
    assert result(victim) == SERVED


def test_connections_of_a_neighbour_cost_the_guest_nothing(made: Bridge) -> None:
    victim = guest(made)
    knocks = attack(made, "knock", DOM0, str(made.port), "3.5", "400")
    assert made.ask("refused")["state"] == "open"
    assert result(victim) == SERVED
    assert int(str(result(knocks)["made"])) >= 400
    told = made.ask("refused")
    assert 0 < told["refused"] < 400  # then the kernel drops them
    assert len([line for line in told["lines"] if "refused" in line]) <= 6


def test_the_guests_own_connections_are_bounded_too(made: Bridge) -> None:
    """In number, in time, and in the log."""
    before = made.ask("refused")
    knocks = made.start("a", str(ATTACKS / "knock.py"), DOM0, str(made.port), "2", "300")
    assert int(str(result(knocks)["made"])) >= 300
    told = made.ask("refused")
    assert told["refused"] - before["refused"] < 200
    assert len(told["lines"]) - len(before["lines"]) <= 4


def test_a_bridge_that_gets_another_address_is_told_anew(made: Bridge) -> None:
    """It takes the lowest one of its ports. What guests may hear of dom0's address is then another thing."""

    def told() -> str:
        return made.tables("tc", "filter", "show", "dev", INTERFACES["a"], "egress")

    before, victim = told(), guest(made)
    made.tables("ip", "link", "set", BRIDGE, "address", "02:00:00:00:00:01")
    deadline = time.monotonic() + 20
    while told() in ("", before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert told() not in ("", before)
    # As the guest finds out by itself, in time.
    subprocess.run(("ip", "-n", f"{made.name}-a", "neigh", "flush", "all"), check=True)
    result(victim)
    assert result(guest(made)) == SERVED


def test_an_interface_whose_emulated_twin_is_there_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest with emulated hardware boots from that one, with the same MAC address."""
    monkeypatch.setattr(pinning, "_NETWORK", tmp_path)
    (tmp_path / BRIDGE).mkdir()
    (tmp_path / BRIDGE / "address").write_text("02:00:00:00:00:01\n")
    for name in ("vif1.0", "vif1.1", "vif1.1-emu", "vif1.2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "master").symlink_to(tmp_path / ("other" if name == "vif1.2" else BRIDGE))
    told = pinning.Pinning(BRIDGE, DOM0)
    assert told.basis(["vif1.2", "vif1.1", "vif1.0"]) == ("02:00:00:00:00:01", ("vif1.0",))
    (tmp_path / "vif1.1-emu" / "master").unlink()
    assert told.basis(["vif1.2", "vif1.1", "vif1.0"]) == ("02:00:00:00:00:01", ("vif1.0", "vif1.1"))


def test_what_the_bridge_was_told_goes_with_the_run(made: Bridge) -> None:
    interface, address = INTERFACES["a"], ADDRESSES["a"]

    def told() -> tuple[bool, bool, bool, bool]:
        return (
            "PERMANENT" in made.tables("ip", "neigh", "show", "to", address),
            "sticky" in made.tables("bridge", "fdb", "show", "dev", interface),
            "learning off" in made.tables("bridge", "-d", "link", "show", "dev", interface),
            "bpf" in made.tables("tc", "filter", "show", "dev", interface, "egress"),
        )

    assert told() == (True, True, True, True)
    made.ask("close")
    assert told() == (False, False, False, False)
