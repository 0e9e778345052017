"""A VM of these tests: its card and token at the grid, its domain on a host, its agent's socket brought here."""

from __future__ import annotations

import hashlib
import json
import secrets
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secfunet.gose.v1 import operation_pb2
from testbed import Host
from testbed.guests import Guest
from tests.xen.orchestrator import Orchestrator, forward
from vm_agent.client import LocalClient
from vm_agent.errors import AgentError

CERTIFICATES = "/var/lib/secfunet-gose/certificates"
GOSE = "runuser -u secfunet-gose -- /opt/secfunet/current/bin/gose"
CONFIG = "--config /etc/secfunet/gose/gose.toml"
AGENT_STATE = "/run/secfunet/state"  # of guests on the shared disk: in memory
AGENT_SOCKET = "/run/secfunet/agent.sock"
PSS = operation_pb2.SIGNATURE_SCHEME_RSASSA_PSS_SHA256
OAEP = operation_pb2.ENCRYPTION_SCHEME_RSAES_OAEP_SHA256


def issue_token(grid: Host, vm: str, hypervisor: str, *options: str) -> str:
    """A VM-Auth-Token, as an administrator of the grid gets it."""
    target = f"{CERTIFICATES}/{vm}-{hypervisor}-{secrets.token_hex(4)}.jwt"
    grid.run(f"{GOSE} issue-token --vm {vm} --hypervisor {hypervisor} {CONFIG} --out {target} {' '.join(options)}")
    return grid.get(target).decode().strip()


def certificate(grid: Host, name: str) -> x509.Certificate:
    """What the grid's authority certified."""
    return x509.load_pem_x509_certificate(grid.get(f"{CERTIFICATES}/{name}.pem"))


@dataclass
class Vm:
    """``make`` one; then ``boot`` it."""

    name: str
    uuid: str
    certificate: x509.Certificate
    guest: Guest
    orchestrator: Orchestrator
    folder: Path
    token: str = field(repr=False)

    @classmethod
    def make(
        cls,
        name: str,
        number: int,
        *,
        grid: Host,
        host: Host,
        orchestrator: Orchestrator,
        folder: Path,
        memory_mib: int = 224,
    ) -> Vm:
        """Creates the domain through the orchestrator API, stopped. ``number``: the last part of its address."""
        address = f"192.168.77.{number}"
        vmid = certificate(grid, name)
        token = issue_token(grid, name, host.name)
        made = orchestrator.create(name, vmid.public_bytes(Encoding.DER), address=address, memory_mib=memory_mib)
        return cls(name, made.uuid, vmid, Guest(host, name, address), orchestrator, folder, token)

    def boot(self) -> None:
        """Starts it; returns when its agent has enrolled."""
        self.guest.hang_up()
        self.orchestrator.start(self.uuid, self.token)
        self.guest.wait_until_ready()
        self.orchestrator.wait_until_enrolled(self.uuid)

    @property
    def public_key(self) -> rsa.RSAPublicKey:
        key = self.certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        return key

    def agent(self, *, timeout: float = 60) -> LocalClient:
        """A program in the guest: a connection to its agent's socket. AgentError if there is none."""
        socket = self.folder / f"{self.name}-{secrets.token_hex(3)}.sock"
        forward(self.guest.ssh(), socket, AGENT_SOCKET)
        return LocalClient(socket, timeout=timeout)

    def sign(self, document: bytes, *, timeout: float = 60) -> bytes:
        """A signature by the VM's key, asked for as a program in the guest. Raises AgentError."""
        with self.agent(timeout=timeout) as agent:
            return agent.sign(PSS, hashlib.sha256(document).digest())

    def must_work(self, *, timeout: float = 300) -> None:
        """Signs and decrypts; tries again until the deadline, as programs do while something is restarted. AssertionError after it."""
        deadline = time.monotonic() + timeout
        secret = secrets.token_bytes(32)
        oaep = padding.OAEP(padding.MGF1(SHA256()), SHA256(), None)
        while True:
            try:
                document = secrets.token_bytes(64)
                with self.agent() as agent:
                    signature = agent.sign(PSS, hashlib.sha256(document).digest())
                    plaintext = agent.decrypt(OAEP, self.public_key.encrypt(secret, oaep))
                break
            except (AgentError, subprocess.CalledProcessError) as error:
                if time.monotonic() > deadline:
                    raise AssertionError(f"{self.name} cannot use its key after {timeout:g} s: {error}") from error
                time.sleep(0.5)
        assert plaintext == secret
        openssl_verifies(self.certificate, document, signature, self.folder)

    def must_not_work(self) -> AgentError:
        """No key for this VM; what its agent says."""
        try:
            self.sign(b"this must be refused", timeout=20)
        except AgentError as error:
            return error
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"the guest cannot be asked: {error.stderr!r}") from None
        raise AssertionError(f"{self.name} used a key that it must not use")

    def status(self) -> dict[str, object]:
        """What ``vm-agent status`` says in the guest."""
        answer: dict[str, object] = json.loads(self.guest.run("vm-agent status --json").stdout)
        return answer


def openssl_verifies(certificate: x509.Certificate, document: bytes, signature: bytes, folder: Path) -> None:
    """With the openssl command alone: the signature is good, and not good for another document."""
    public = folder / f"{secrets.token_hex(4)}.pem"
    public.write_bytes(certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    signed = public.with_suffix(".sig")
    signed.write_bytes(signature)
    command = [
        "openssl",
        "dgst",
        "-sha256",
        "-sigopt",
        "rsa_padding_mode:pss",
        "-verify",
        str(public),
        "-signature",
        str(signed),
    ]
    for content, expected in ((document, 0), (document + b"!", 1)):
        done = subprocess.run(command, input=content, capture_output=True, check=False)
        assert done.returncode == expected, done
    public.unlink()
    signed.unlink()
