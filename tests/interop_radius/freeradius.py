"""FreeRADIUS as a private process: its own folder, loopback, a free port; never the service of the system."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gose.grid import free_ports

SECRET = b"a secret of thirty-two bytes, ok"
START_TIMEOUT = 30.0

SETTINGS = """
prefix = /usr
libdir = /usr/lib/freeradius
confdir = {folder}
logdir = {folder}
run_dir = {folder}
pidfile = {folder}/radiusd.pid
max_request_time = 30
cleanup_delay = 2
max_requests = 1024
hostname_lookups = no
proxy_requests = no
log {{
  destination = stdout
  auth = yes
}}
security {{
  reject_delay = 0
  allow_vulnerable_openssl = yes
}}
thread pool {{
  start_servers = 1
  max_servers = 4
  min_spare_servers = 1
  max_spare_servers = 2
}}
modules {{
  eap {{
    default_eap_type = tls
    timer_expire = 60
    max_sessions = 64
    tls-config common {{
      private_key_file = {folder}/server.key
      certificate_file = {folder}/server.pem
      ca_file = {folder}/ca.pem
      auto_chain = no
      cipher_list = "DEFAULT"
      ecdh_curve = ""
      tls_min_version = "{version}"
      tls_max_version = "{version}"
      fragment_size = {fragment}
      check_crl = {check_crl}
      cache {{
        enable = no
      }}
    }}
    tls {{
      tls = common
    }}
  }}
}}
client here {{
  ipaddr = 127.0.0.1
  secret = "{secret}"
  require_message_authenticator = yes
}}
server default {{
  listen {{
    type = auth
    ipaddr = 127.0.0.1
    port = {port}
  }}
  authorize {{
    eap
  }}
  authenticate {{
    eap
  }}
}}
"""


@dataclass
class FreeRadius:
    """A server that runs."""

    folder: Path
    port: int
    log: Path

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.log.read_text(errors="replace")


@contextlib.asynccontextmanager
async def running_freeradius(
    folder: Path,
    *,
    key: bytes,
    chain: Sequence[bytes],
    authorities: Sequence[bytes],
    version: str = "1.3",
    fragment: int = 1024,
    crl: bytes = b"",
) -> AsyncIterator[FreeRadius]:
    """``key``, ``chain`` (leaf first), ``authorities`` (of the peers) and ``crl`` are PEM."""
    settings = SETTINGS.replace("{version}", version).replace("{fragment}", str(fragment))
    settings = settings.replace("{check_crl}", "yes" if crl else "no").replace("{secret}", SECRET.decode())
    files = {
        "server.key": key,
        "server.pem": b"".join(chain),
        "ca.pem": b"".join(authorities) + crl,
    }
    async with running_radiusd(folder, settings, files) as server:
        yield server


@contextlib.asynccontextmanager
async def running_radiusd(folder: Path, settings: str, files: Mapping[str, bytes]) -> AsyncIterator[FreeRadius]:
    """A process with these settings, in which {folder} is its own folder with ``files``, and {port} a free port."""
    home = folder / f"radius-{secrets.token_hex(4)}"
    home.mkdir(mode=0o700)
    (port,) = free_ports(1)
    files = {"radiusd.conf": settings.format(folder=home, port=port).encode(), **files}
    for name, content in files.items():
        (home / name).touch(0o600)
        (home / name).write_bytes(content)
    server = FreeRadius(home, port, home / "log")
    with server.log.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(
                "freeradius",
                "-f",
                "-x",
                "-x",
                "-l",
                "stdout",
                "-n",
                "radiusd",
                "-d",
                str(home),
                "-D",
                "/usr/share/freeradius",
            ),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        while "Ready to process requests" not in server.text:
            if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                raise RuntimeError(f"FreeRADIUS did not start: {server.text[-4000:]}")
            await asyncio.sleep(0.05)
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
