"""One installation in one folder: cards, grid, middleware, agents: their settings files, secrets and the commands that make them.

Nothing here talks to a daemon in another way than its users do: by settings files and commands.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from demo.readers import VirtualReader
from secfunet.card.place import CardPlace, PcscPlace
from secfunet.service.files import private_folder, write_atomically

# The longest path of an installation's folder, bytes: the sockets of a domain's channel are the deepest
# (HOST/state/guests/UUID/agent.sock), and a Unix socket's path has at most 107.
LONGEST_FOLDER = 107 - len("/xen-1/state/guests/00000000-0000-0000-0000-000000000000/agent.sock")


FIRST_PORT, LAST_PORT = 20_000, 32_000


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports of the grid, free when the installation was made."""

    sp_https: int
    sp_grpc: int
    op_endpoint: int
    op_login: int

    @classmethod
    def free(cls) -> Ports:
        """Ports that nobody listens on, outside the range from which outgoing connections take theirs: they stay free between runs."""
        chosen: list[int] = []
        while len(chosen) < 4:
            port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT)
            with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
                if port not in chosen:
                    chosen.append(port)
        return cls(*chosen)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of an installation is. Socket paths are kept short: a Unix socket's path has at most 107 bytes."""

    folder: Path

    def card(self, name: str) -> Path:
        return self.folder / "cards" / name

    def card_socket(self, name: str) -> Path:
        return self.card(name) / "card.sock"

    @property
    def grid(self) -> Path:
        return self.folder / "grid"

    @property
    def grid_authority(self) -> Path:
        """The grid's CA, PEM: what a host must be given of the grid."""
        return self.grid / "state" / "authority" / "ca.pem"

    @property
    def gose_config(self) -> Path:
        return self.grid / "gose.toml"

    def host(self, hypervisor: str) -> Path:
        return self.folder / hypervisor

    def middleware_config(self, hypervisor: str) -> Path:
        return self.host(hypervisor) / "secure-middleware.toml"

    def guest(self, vm: str) -> Path:
        return self.folder / "vms" / vm

    def agent_config(self, vm: str) -> Path:
        return self.guest(vm) / "vm-agent.toml"

    def agent_socket(self, vm: str) -> Path:
        return self.guest(vm) / "agent.sock"

    def certificate(self, name: str) -> Path:
        return self.folder / "certificates" / f"{name}.pem"

    def token(self, vm: str, hypervisor: str) -> Path:
        return self.folder / "certificates" / f"{vm}@{hypervisor}.jwt"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def make(self) -> None:
        for folder in ("cards", "grid", "vms", "certificates", "logs", "readers"):
            private_folder(self.folder / folder)


def toml(value: object) -> str:
    """A TOML value (strings, numbers, booleans, lists of them): JSON has the same notation for these."""
    return json.dumps(str(value) if isinstance(value, Path) else value)


def place_line(place: CardPlace) -> str:
    """The line of a settings file that says where a card is."""
    if isinstance(place, PcscPlace):
        return f"pcsc = {{ reader = {toml(place.reader)}, daemon = {toml(place.daemon)} }}"
    return f"socket = {toml(place)}"


def write_card(layout: Layout, name: str, *, reader: VirtualReader | None = None, user_pin: str | None = None) -> Path:
    """Settings and secrets of one software card, which listens at a Unix socket or is in ``reader``; returns the settings file."""
    folder = private_folder(layout.card(name))
    write_atomically(folder / "store.key", secrets.token_bytes(32).hex().encode())
    write_atomically(folder / "user.pin", (user_pin or f"{secrets.randbelow(10**8):08d}").encode())
    config = folder / "secure-element.toml"
    where = ['socket = "card.sock"']
    if reader is not None:
        where = [f"attach = {toml(reader.address)}", place_line(reader.place)]
    lines = [*where, 'store = "card.store"', "", "[store_key]", 'file = "store.key"', ""]
    write_atomically(config, "\n".join(lines).encode())
    return config


def write_grid(layout: Layout, ports: Ports, cards: Sequence[tuple[str, str, CardPlace]], profile: str) -> Path:
    """Settings of the grid with its ``cards``: SEID, role and place of each."""
    lines = [
        'state = "state"',
        'names = ["localhost", "127.0.0.1"]',
        f"container_profile = {toml(profile)}",
        "",
        "[service_provider]",
        f'https = "127.0.0.1:{ports.sp_https}"',
        f'grpc = "127.0.0.1:{ports.sp_grpc}"',
        "",
        "[openid_provider]",
        f'endpoint = "127.0.0.1:{ports.op_endpoint}"',
        f'login = "127.0.0.1:{ports.op_login}"',
    ]
    for seid, role, place in cards:
        lines += [
            "",
            "[[secure_elements]]",
            f"seid = {toml(seid)}",
            f"role = {toml(role)}",
            place_line(place),
            f"user_pin_file = {toml(layout.card(seid) / 'user.pin')}",
            f"administrator_keys_file = {toml(layout.card(seid) / 'card.keys')}",
        ]
    write_atomically(layout.gose_config, "\n".join([*lines, ""]).encode())
    return layout.gose_config


def write_agent(layout: Layout, vm: str, join: Path, profile: str) -> Path:
    """Settings of the agent in one VM."""
    private_folder(layout.guest(vm))
    text = f'join = {toml(join)}\nstate = "state"\nsocket = "agent.sock"\ncontainer_profile = {toml(profile)}\n'
    write_atomically(layout.agent_config(vm), text.encode())
    return layout.agent_config(vm)


def save_reader_ports(layout: Layout, ports: Sequence[int]) -> None:
    write_atomically(layout.folder / "readers.json", json.dumps(list(ports)).encode())


def load_reader_ports(layout: Layout) -> list[int]:
    return [int(port) for port in json.loads((layout.folder / "readers.json").read_text())]


def save_ports(layout: Layout, ports: Ports) -> None:
    write_atomically(layout.folder / "ports.json", json.dumps(asdict(ports)).encode())


def load_ports(layout: Layout) -> Ports | None:
    """None: this folder has no complete installation."""
    path = layout.folder / "ports.json"
    return Ports(**json.loads(path.read_text())) if path.exists() else None


POLICY = """\
# Which VM may do what on this host; what no rule allows is denied.
[[rule]]
names = ["*"]
operations = ["sign", "decrypt", "encrypt"]
schemes = ["rsassa-*", "ecdsa-*", "rsaes-oaep-*"]
"""


def write_middleware(layout: Layout, hypervisor: str, place: CardPlace, ports: Ports, profile: str) -> Path:
    """Settings and policy of the Secure Middleware of one host, whose card is at ``place``."""
    folder = private_folder(layout.host(hypervisor))
    text = f"""\
state = "state"
policy = "policy.toml"

[card]
{place_line(place)}
user_pin_file = {toml(layout.card(hypervisor) / "user.pin")}

[grid]
service_provider = "https://localhost:{ports.sp_https}"
operations = "localhost:{ports.sp_grpc}"
openid_provider = "https://localhost:{ports.op_endpoint}"
openid_login = "https://localhost:{ports.op_login}"
authority = {toml(layout.grid_authority)}
container_profile = {toml(profile)}
"""
    write_atomically(layout.middleware_config(hypervisor), text.encode())
    write_atomically(folder / "policy.toml", POLICY.encode())
    return layout.middleware_config(hypervisor)
