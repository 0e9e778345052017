"""Each daemon is restarted, and killed, in the middle of operations; dom0 is booted anew; a soak of a thousand operations."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from testbed import Testbed
from testbed.bed import BOOT_TIMEOUT
from tests.xen.audit import Audit
from tests.xen.deployment import GRID, HOST
from tests.xen.orchestrator import Orchestrator
from tests.xen.vm import PSS, Vm, openssl_verifies
from vm_agent.client import LocalClient
from vm_agent.errors import AgentError

SOAK = 1000
SOAK_CALLERS = 40


@pytest.fixture(scope="module")
def web(make_vm: Callable[..., Vm]) -> Vm:
    vm = make_vm("web", 21)
    vm.boot()
    vm.must_work()
    return vm


@contextlib.contextmanager
def signing(vm: Vm) -> Iterator[list[str]]:
    """A program in the guest that signs without a pause; each signature is checked. Yields what went wrong, which may be refusals only."""
    problems: list[str] = []
    ended = threading.Event()
    done = 0
    public = vm.public_key

    def run() -> None:
        nonlocal done
        with vm.agent(timeout=30) as agent:
            while not ended.is_set():
                document = secrets.token_bytes(32)
                try:
                    signature = agent.sign(PSS, hashlib.sha256(document).digest())
                except AgentError as error:
                    problems.append(str(error))
                    time.sleep(0.2)
                    continue
                verify(public, signature, document)
                done += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        deadline = time.monotonic() + 120
        while done < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert done >= 3, problems
        yield problems
        before = done
        deadline = time.monotonic() + 300
        while done < before + 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert done >= before + 3, f"the program could not go on: {problems[-3:]}"
    finally:
        ended.set()
        thread.join(60)
        assert not thread.is_alive()


def verify(public: object, signature: bytes, document: bytes) -> None:
    from cryptography.hazmat.primitives.asymmetric import padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA256

    assert isinstance(public, rsa.RSAPublicKey)
    public.verify(signature, document, padding.PSS(padding.MGF1(SHA256()), padding.PSS.AUTO), SHA256())


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (HOST, "systemctl restart secure-middleware.service"),
        (HOST, "systemctl kill --signal=KILL secure-middleware.service"),
        (HOST, f"systemctl kill --signal=KILL secure-element@{HOST}.service"),
        (HOST, "systemctl restart libvirtd.service"),
        (HOST, "systemctl kill --signal=KILL libvirtd.service"),
        (GRID, "systemctl restart gose.service"),
        (GRID, "systemctl kill --signal=KILL gose.service"),
        (GRID, "systemctl kill --signal=KILL secure-element@web.service"),
        ("guest", "systemctl restart secfunet-vm-agent.service"),
        ("guest", "systemctl kill --signal=KILL secfunet-vm-agent.service"),
    ],
    ids=lambda value: value.replace("systemctl ", "").replace("--signal=KILL", "-9").replace(".service", ""),
)
def test_a_daemon_goes_in_the_middle_of_operations(bed: Testbed, web: Vm, where: str, what: str) -> None:
    if where == "guest":
        web.guest.run(what)
        web.must_work()
        return
    with signing(web):
        bed[where].run(what)
    web.must_work()
    assert Audit(bed[HOST]).is_sound()


def test_a_soak_of_a_thousand_operations(bed: Testbed, web: Vm) -> None:
    """Every signature is good; neither daemon nor agent grows, and no descriptor is left."""

    def facts() -> dict[str, tuple[int, int]]:
        count = 'p=$(systemctl show -p MainPID --value {unit}); ls /proc/$p/fd | wc -l; sed -n "s/VmRSS:[^0-9]*//p" /proc/$p/status'
        found = {}
        for run, unit in (
            (bed[HOST].run, "secure-middleware.service"),
            (bed[GRID].run, "gose.service"),
            (web.guest.run, "secfunet-vm-agent.service"),
        ):
            descriptors, memory, _ = run(count.replace("{unit}", unit)).text.split()
            found[unit] = int(descriptors), int(memory)
        return found

    wrong: list[str] = []
    good = 0
    lock = threading.Lock()
    public = web.public_key

    def soak(agent: LocalClient, count: int) -> None:
        nonlocal good
        for _ in range(count):
            document = secrets.token_bytes(32)
            try:
                verify(public, agent.sign(PSS, hashlib.sha256(document).digest()), document)
            except AgentError as error:
                wrong.append(str(error))
            else:
                with lock:
                    good += 1

    def round_of(count: int) -> None:
        with web.agent(timeout=120) as agent:
            callers = [threading.Thread(target=soak, args=(agent, count // SOAK_CALLERS)) for _ in range(SOAK_CALLERS)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()

    round_of(SOAK_CALLERS * 2)
    before, good = facts(), 0
    round_of(SOAK)
    after = facts()
    assert (good, wrong) == (SOAK, [])
    for unit, (descriptors, memory) in after.items():
        assert descriptors <= before[unit][0] + 8, f"{unit}: {before[unit]} -> {after[unit]}"
        assert memory <= before[unit][1] * 1.15 + 4096, f"{unit}: {before[unit]} -> {after[unit]} KiB"


def test_events_of_a_time_without_the_middleware_are_noticed(bed: Testbed, web: Vm) -> None:
    host = bed[HOST]
    host.run("systemctl stop secure-middleware.service")
    web.guest.hang_up()
    host.run("virsh -c xen:///system destroy web && virsh -c xen:///system start web")
    host.run("systemctl start secure-middleware.service")
    found = web.orchestrator.wait_until_enrolled(web.uuid, enrolled=False)
    assert found.state == 2  # another run of the same domain: it runs, and has nothing
    web.guest.wait_until_ready()
    web.must_not_work()


def test_dom0_boots_anew(bed: Testbed, web: Vm, orchestrator: Orchestrator) -> None:
    """Guests are gone with it; what was deployed is there again by itself, and the VM, whose last run had nothing, can be started."""
    host = bed[HOST]
    web.guest.hang_up()
    orchestrator.disconnect()
    host.reboot(timeout=BOOT_TIMEOUT)
    host.wait_for("systemctl is-active secure-middleware.service", timeout=BOOT_TIMEOUT)
    orchestrator.connect()
    found = orchestrator.get(web.uuid)
    assert (found.state, found.enrolled) == (1, False)
    assert host.run("ls /var/lib/secfunet-middleware/guests").text == ""
    web.boot()
    web.must_work()
    document = b"after the boot"
    openssl_verifies(web.certificate, document, web.sign(document), web.folder)
    assert Audit(host).is_sound()
