"""What the hypervisor and its bridge say of a domain's network interfaces: whom does a connection on the bridge come from?

Three facts have to agree, none of which a guest can set for another: the domain's interfaces as the toolstack made them (their back ends in
xenstore, dom0's own), the neighbour table (which MAC address answered for the source address), and the bridge's forwarding table (at which
interface that MAC address was last seen). Whatever is missing or ambiguous speaks against the caller. The bridge is asked for the domain's
own MAC addresses only: what it learned from others is theirs to make as long as they like.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from dom0_middleware.channels.iproute import FactsUnavailable
from dom0_middleware.channels.iproute import output as _output
from secfunet.xen.errors import XenError
from secfunet.xen.xenstore import Xenstore

MAX_TABLE = 1 << 16  # bytes of a table's text
MAX_INTERFACES = 16  # of one domain
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True)
class BridgeFacts:
    """``interfaces``: name of each back end of the domain -> its MAC address. ``neighbours``: the MAC addresses that answer for the
    source address. ``forwarding``: at which interfaces of the bridge each MAC address was seen."""

    interfaces: Mapping[str, str]
    neighbours: frozenset[str]
    forwarding: Mapping[str, frozenset[str]]


def objection(source: str, address: str, facts: BridgeFacts) -> str:
    """Why a connection from ``source`` is not the domain's with ``address``, for the audit log; "" if it is. Rules, in this order."""
    try:
        if ip_address(source) != ip_address(address):
            return f"it comes from {source}, the domain's address is {address}"
    except ValueError:
        return "there is no address to compare with"
    if not facts.interfaces:
        return "the domain has no interface"
    if len(facts.neighbours) != 1:
        return f"{len(facts.neighbours)} neighbours answer for {source}"
    (mac,) = facts.neighbours
    own = {name for name, theirs in facts.interfaces.items() if theirs == mac}
    if not own:
        return f"{source} is at {mac}, which is none of the domain's interfaces"
    seen = facts.forwarding.get(mac, frozenset())
    if not seen or not seen <= own:
        return f"{mac} was seen at {', '.join(sorted(seen)) or 'no interface'}, not only at the domain's own"
    return ""


def parse_neighbours(untrusted: bytes) -> frozenset[str]:
    """MAC addresses in the output of ``ip -json neigh show to ADDRESS``. Raises FactsUnavailable for what is none."""
    entries = _table(untrusted)
    usable = [entry for entry in entries if not {"FAILED", "INCOMPLETE"} & set(_strings(entry.get("state")))]
    return frozenset(mac for entry in usable if (mac := _mac(entry.get("lladdr"))))


def parse_forwarding(untrusted: bytes) -> Mapping[str, frozenset[str]]:
    """What ``bridge -json fdb get`` says of a MAC address: MAC address -> interfaces. Raises FactsUnavailable for what is no table."""
    seen: dict[str, set[str]] = {}
    for entry in _table(untrusted):
        mac, interface = _mac(entry.get("mac")), entry.get("ifname")
        # Permanent entries are the interfaces' own addresses, not what came in through them.
        if mac and isinstance(interface, str) and entry.get("state") != "permanent":
            seen.setdefault(mac, set()).add(interface)
    return {mac: frozenset(names) for mac, names in seen.items()}


async def read_facts(domain_id: int, source: str, bridge: str) -> BridgeFacts:
    """The facts of now. Raises FactsUnavailable."""
    interfaces, neighbours = await asyncio.gather(
        back_ends(domain_id), _output("ip", "-json", "neigh", "show", "to", source, "dev", bridge)
    )
    forwarding: dict[str, frozenset[str]] = {}
    for found in await asyncio.gather(*(_forwarding(mac, bridge) for mac in set(interfaces.values()))):
        forwarding.update(found)
    return BridgeFacts(interfaces, parse_neighbours(neighbours), forwarding)


async def back_ends(domain_id: int) -> Mapping[str, str]:
    """The back ends of a domain's interfaces in dom0, and their MAC addresses. Raises FactsUnavailable."""
    return await asyncio.to_thread(_back_ends, domain_id)


async def _forwarding(mac: str, bridge: str) -> Mapping[str, frozenset[str]]:
    try:
        return parse_forwarding(await _output("bridge", "-json", "fdb", "get", mac, "br", bridge))
    except FactsUnavailable:
        return {}  # it says so, too, of an address that it never saw


def _back_ends(domain_id: int) -> Mapping[str, str]:
    folder = f"/local/domain/0/backend/vif/{domain_id}"
    found = {}
    try:
        with Xenstore() as xenstore:
            for number in xenstore.list(folder)[:MAX_INTERFACES]:
                mac = _mac((xenstore.read(f"{folder}/{number}/mac") or b"").decode("ascii", "replace"))
                if mac:
                    found[f"vif{domain_id}.{number}"] = mac
    except XenError as error:
        raise FactsUnavailable(f"the domain's interfaces are not known: {error}") from error
    return found


def _table(untrusted: bytes) -> list[dict[str, Any]]:
    if len(untrusted) > MAX_TABLE:
        raise FactsUnavailable("a table of the bridge is too large")
    try:
        table = json.loads(untrusted or b"[]")
    except (ValueError, RecursionError):
        raise FactsUnavailable("a table of the bridge is no JSON") from None
    if not isinstance(table, list) or not all(isinstance(entry, dict) for entry in table):
        raise FactsUnavailable("a table of the bridge is no list of entries")
    return table


def _mac(value: object) -> str:
    return value.lower() if isinstance(value, str) and _MAC.fullmatch(value.lower()) else ""


def _strings(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
