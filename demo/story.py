"""The main job and four attacks, told as they happen."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from shlex import quote

from demo.attacks import (
    Refusal,
    copied_image,
    enrolment_of,
    foreign_hypervisor,
    neighbour,
    public_key_pem,
    replayed_container,
    sealed_signature,
    sign_operation,
)
from demo.evidence import last_login, last_operation
from demo.narrator import Narrator
from demo.processes import COMMANDS, run
from demo.stack import CardKind, Stack
from secfunet.errors import SecFuNetError

VM, NEIGHBOUR = "web", "db"
HOST, FOREIGN_HOST = "xen-1", "xen-2"
OPENSSL_PSS = ("-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest")


class StoryError(SecFuNetError):
    """The story did not go as it must."""


class Kept:
    """An installation that goes on running after its story until it is told to end."""

    def __init__(self) -> None:
        self.waits = False
        self._end = asyncio.Event()

    def end(self) -> None:
        """Everything is to be stopped."""
        self._end.set()

    async def until_ended(self) -> None:
        self.waits = True
        await self._end.wait()


async def tell(folder: Path, narrator: Narrator, *, keep: Kept | None = None, cards: CardKind = "socket") -> None:
    """Runs everything in ``folder``; with ``keep``, leaves it running until that is ended.

    Raises SecFuNetError (ProcessError, AttackSucceededError …) if anything is not as it must be.
    """
    narrator.chapter("Everything is started, a process each")
    stack = Stack(folder, vms=(VM, NEIGHBOUR), hypervisors=(HOST, FOREIGN_HOST), cards=cards, report=narrator.step)
    async with stack:
        _who_runs(stack, narrator)
        await _sign(stack, narrator)
        await _attack(stack, narrator)
        if keep is not None:
            await _keep(stack, narrator, keep)
        narrator.chapter("Everything is stopped")
    narrator.step("all processes ended cleanly; run it again: it starts with what it made")


def _who_runs(stack: Stack, narrator: Narrator) -> None:
    ports = stack.ports
    pids = {name: daemon.pid for name, daemon in stack.daemons.items() if daemon.running}
    cards = {name.removeprefix("card-"): pid for name, pid in pids.items() if name.startswith("card-")}
    narrator.fact("cards  " + ", ".join(f"{name} (pid {pid})" for name, pid in cards.items()))
    for pcscd in stack.pcscds:
        narrator.fact(
            f"PC/SC  {pcscd.name} (pid {pcscd.pid}): {len(pcscd.readers)} virtual readers; cards attach to loopback, programs use pyscard"
        )
    narrator.fact(
        f"grid   pid {pids['gose']}: service provider {ports.sp_https} (HTTPS) and {ports.sp_grpc} (gRPC), "
        f"OpenID provider {ports.op_endpoint} and {ports.op_login} (login page, TLS inside the cards)"
    )
    narrator.fact(f"host   pid {pids[f'middleware-{HOST}']}: libvirt test:///default, one channel a domain")
    narrator.fact("VMs    " + ", ".join(f"{vm}: agent pid {pids[f'agent-{vm}']}" for vm in stack.vms))


async def _sign(stack: Stack, narrator: Narrator) -> None:
    narrator.chapter(f"A program in the VM {VM} signs a file; the VM never holds the key")
    work = stack.layout.folder / "work"
    work.mkdir(exist_ok=True)
    document, signature, public = work / "contract.txt", work / "contract.sig", work / "web.pub.pem"
    document.write_text("The parties agree that nobody copies a virtual machine to become it.\n")
    certificate = stack.layout.certificate(VM)
    public.write_bytes(public_key_pem(certificate))

    first = await _timed(lambda: stack.agent(VM, "sign", str(document), "--out", str(signature)))
    narrator.step(
        f"vm-agent sign contract.txt: {signature.stat().st_size} bytes of signature after {first:.2f} s, command included"
    )
    login, done = last_login(stack, VM), last_operation(stack, VM)
    narrator.fact("program -> agent       gRPC over a Unix socket: a scheme and a digest of 32 bytes, not the file")
    narrator.fact(
        f"agent -> middleware    mutual TLS on the domain's own channel; audit record {done.audit_number}: "
        f"{done.operation} {done.scheme} {done.decision}, correlation {done.correlation}"
    )
    narrator.fact(
        f"middleware -> grid     {login.hypervisor} logged in with its card, card to card, in {1000 * login.to_login:.0f} ms"
        f"{'' if login.for_this_vm else ' (for another VM, just before)'}; "
        f"session {login.session} for {login.seid} granted {1000 * login.to_session:.0f} ms after it was asked for"
    )
    narrator.fact(
        f"grid -> card           {done.seid}'s own card signed under {done.correlation}; "
        f"{1000 * done.to_done:.1f} ms from the audit record to the container"
    )
    narrator.fact("and back               in the container; the agent verifies its trailer before it decrypts anything")

    enrolment = enrolment_of(stack, VM)
    operation = sign_operation(os.urandom(32))
    began = time.perf_counter()
    sealed = await sealed_signature(enrolment, enrolment, operation)
    elapsed = 1000 * (time.perf_counter() - began)
    size = len(sealed.container)
    narrator.step(f"the same again on the open session: {elapsed:.1f} ms, a new connection to the middleware included")
    narrator.fact(
        f"container: {size} bytes = header 256 (RSA) + body {size - 512} (IV, AES-256-CBC) + trailer 256 (signature)"
    )
    verified = await run(
        "openssl", "dgst", "-sha256", "-verify", public, *OPENSSL_PSS, "-signature", signature, document, check=False
    )
    narrator.good(f"openssl dgst -sha256 -verify web.pub.pem: {verified.output.decode().strip()}")
    if verified.exit_code != 0:
        raise StoryError("openssl does not accept the signature")
    document.write_text("The parties agree to something else.\n")
    forged = await run(
        "openssl", "dgst", "-sha256", "-verify", public, *OPENSSL_PSS, "-signature", signature, document, check=False
    )
    narrator.good(f"and for a changed file: {forged.output.decode().strip()}")
    if forged.exit_code == 0:
        raise StoryError("openssl accepts the signature of another file")


async def _attack(stack: Stack, narrator: Narrator) -> None:
    narrator.chapter("Four attacks")
    attacks: tuple[tuple[str, Callable[[], Awaitable[Refusal]]], ...] = (
        (f"the VM {NEIGHBOUR} asks for {VM}'s key, on {VM}'s channel", lambda: neighbour(stack, NEIGHBOUR, VM)),
        (f"{VM}'s token on another hypervisor, {FOREIGN_HOST}", lambda: foreign_hypervisor(stack, VM, FOREIGN_HOST)),
        ("a valid container, replayed as the answer to another request", lambda: replayed_container(stack, VM)),
        (f"a copy of {VM}'s image without its domain", lambda: copied_image(stack, VM)),
    )
    for title, perform in attacks:
        narrator.step(title)
        refusal = await perform()
        narrator.good(f"refused ({refusal.by}): {refusal.words}")
    verified = await stack.middleware("audit", "verify")
    narrator.step(f"secure-middleware audit verify: {verified.decode().strip()}")


async def _keep(stack: Stack, narrator: Narrator, kept: Kept) -> None:
    await stack.start_vm(VM)
    stack.forget()  # a reader who tries things may revoke what the next story needs
    narrator.chapter("It goes on running: commands to try in another terminal (Ctrl-C here ends it)")
    for line in commands_to_try(stack):
        narrator.say(f"  {line}")
    await kept.until_ended()


def commands_to_try(stack: Stack) -> tuple[str, ...]:
    """Lines for a shell in any folder, quoted where a path needs it; files that they make lie in the demonstration's own folder."""
    layout = stack.layout
    program = {name: quote(str(COMMANDS / name)) for name in ("vm-agent", "gose", "secure-middleware")}
    agent = f"--config {quote(str(layout.agent_config(VM)))}"
    middleware = f"--config {quote(str(layout.middleware_config(HOST)))}"
    grid = f"--config {quote(str(layout.gose_config))}"
    message, signature, public = (
        quote(str(layout.folder / "work" / name)) for name in ("message", "message.sig", "web.pub.pem")
    )
    return (
        f"{program['vm-agent']} identity {agent}",
        f"{program['vm-agent']} status {agent}",
        f"date > {message} && {program['vm-agent']} sign {message} --out {signature} {agent}",
        f"openssl dgst -sha256 -verify {public} {' '.join(OPENSSL_PSS)} -signature {signature} {message}",
        f"echo secret | {program['vm-agent']} encrypt - {agent} | {program['vm-agent']} decrypt - {agent}",
        f"{program['gose']} status {grid}",
        *(f"{program['gose']} readers --pcscd {quote(str(pcscd.socket))}" for pcscd in stack.pcscds),
        f"{program['gose']} revoke vm {NEIGHBOUR} {grid}",
        f"{program['secure-middleware']} vm list {middleware}",
        f"{program['secure-middleware']} vm stop {VM} --force {middleware}",
        f"{program['secure-middleware']} audit verify {middleware}",
    )


async def _timed(perform: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await perform()
    return time.perf_counter() - began
