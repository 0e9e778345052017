"""What the toolstack knows of a domain's interfaces, told to the bridge and to dom0: then no frame of a neighbour changes it.

For a domain with a channel of kind tcp, while it runs:

- its address is at its MAC address for good (a permanent entry of dom0's neighbour table): gratuitous ARP changes nothing;
- its MAC address is at its own interface for good (a static, sticky entry of the bridge's table): frames with that source change nothing;
- nothing is learned at its interface (``learning off``): it fills no table;
- it is told nothing about dom0's own address but by dom0 (a filter of ARP towards its interface, IPv4 only).

Each is asked of the kernel by its name, with iproute2. What a kernel cannot do is left out, and said.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from dom0_middleware.channels.iproute import FactsUnavailable, output

log = logging.getLogger(__name__)

_NETWORK = Path("/sys/class/net")
_FILTER = ("egress", "protocol", "arp", "pref", "1")
_SHOT, _UNSPECIFIED = 2, 0xFFFFFFFF  # TC_ACT_SHOT, TC_ACT_UNSPEC of linux/pkt_cls.h

Basis = tuple[str, tuple[str, ...]]
"""The bridge's own MAC address, and the interfaces that it is told about."""


def arp_filter(address: IPv4Address, mac: str) -> str:
    """Classic BPF, as tc-bpf(8) takes it: drops ARP that says that ``address`` is anywhere but at ``mac``."""
    where = bytes.fromhex(mac.replace(":", ""))
    # Offsets in the frame: 12 its type, 22 the sender's MAC address, 28 its IP address. 0x20, 0x28: load a word, half a one; 0x15: jump.
    program = [
        (0x28, 0, 0, 12),
        (0x15, 0, 6, 0x0806),
        (0x20, 0, 0, 28),
        (0x15, 0, 4, int(address)),
        (0x20, 0, 0, 22),
        (0x15, 0, 3, int.from_bytes(where[:4], "big")),
        (0x28, 0, 0, 26),
        (0x15, 0, 1, int.from_bytes(where[4:], "big")),
        (0x06, 0, 0, _UNSPECIFIED),
        (0x06, 0, 0, _SHOT),
    ]
    return ",".join([str(len(program)), *(" ".join(str(part) for part in one) for one in program)])


class Pinning:
    """On one ``bridge``; ``address``: dom0's own there. Problems are logged, once for each kind."""

    def __init__(self, bridge: str, address: str) -> None:
        self._bridge = bridge
        self._address = ip_address(address)
        self._said: set[str] = set()

    def basis(self, interfaces: Iterable[str]) -> Basis:
        """What ``pin`` would build on now: once that is another, it is to be called again.

        Not an interface whose emulated twin is still there: a guest that boots uses that one, with the same MAC address.
        """
        ready = [name for name in sorted(interfaces) if self._is_port(name) and not self._is_port(f"{name}-emu")]
        return self._bridge_mac(), tuple(ready)

    async def pin(self, address: str, interfaces: Mapping[str, str]) -> None:
        """For the domain whose IP address is ``address``; ``interfaces``: its back ends and their MAC addresses."""
        ours = {name: mac for name, mac in sorted(interfaces.items()) if self._is_port(name)}
        if not ours:
            self._say("interface", "a domain has no interface at the bridge %s", self._bridge)
            return
        _, ready = self.basis(interfaces)
        for name in ready:
            mac = interfaces[name]
            is_kept = await self._do("bridge", "fdb", "replace", mac, "dev", name, "master", "static", "sticky")
            if is_kept:
                await self._do("bridge", "link", "set", "dev", name, "learning", "off")
            await self._filter_arp(name)
        # A domain with several interfaces there: its address is the first one's.
        mac = next(iter(ours.values()))
        await self._do(
            *("ip", "neigh", "replace", str(ip_address(address)), "lladdr", mac),
            *("dev", self._bridge, "nud", "permanent"),
        )

    async def unpin(self, address: str, interfaces: Mapping[str, str]) -> None:
        """Undoes it, where there is still something to undo: what was told of an interface is gone with it."""
        await self._do("ip", "neigh", "del", str(ip_address(address)), "dev", self._bridge, quiet=True)
        for name, mac in interfaces.items():
            if self._is_port(name):
                await self._do("bridge", "link", "set", "dev", name, "learning", "on", quiet=True)
                await self._do("bridge", "fdb", "del", mac, "dev", name, "master", quiet=True)
                await self._do("tc", "filter", "del", "dev", name, *_FILTER, quiet=True)

    def _bridge_mac(self) -> str:
        """ "" if it is not known. It changes when the bridge gets another port, unless somebody has set it."""
        try:
            return (_NETWORK / self._bridge / "address").read_text(encoding="ascii").strip()
        except OSError:
            return ""

    async def _filter_arp(self, name: str) -> None:
        mac = self._bridge_mac()
        if not mac or not isinstance(self._address, IPv4Address):
            return
        if await self._do("tc", "qdisc", "replace", "dev", name, "clsact"):
            await self._do("tc", "filter", "del", "dev", name, *_FILTER, quiet=True)
            program = arp_filter(self._address, mac)
            await self._do(*("tc", "filter", "add", "dev", name, *_FILTER, "bpf", "direct-action", "bytecode", program))

    def _is_port(self, name: str) -> bool:
        return (_NETWORK / name / "master").resolve().name == self._bridge

    async def _do(self, *command: str, quiet: bool = False) -> bool:
        try:
            await output(*command)
        except FactsUnavailable as error:
            if not quiet:
                what = " ".join(command[:3])
                self._say(what, "a neighbour may cut a domain's channel off, as the bridge cannot be told: %s", error)
            return False
        return True

    def _say(self, kind: str, message: str, *facts: object) -> None:
        if kind not in self._said:
            self._said.add(kind)
            log.warning(message, *facts)
