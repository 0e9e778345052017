"""The settings of one dom0: a TOML file. Relative paths are relative to its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, IPvAnyAddress, field_validator, model_validator

from gose_client.settings import GoseClientSettings
from secfunet.card.place import CardPlace
from secfunet.card.settings import CardUserSettings
from secfunet.identity import NAME_PATTERN, NAME_WORDS
from secfunet.service.settings import FilePath, Settings, form

Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
OrchestratorName = Annotated[str, form(f"^{NAME_PATTERN}$", NAME_WORDS)]
DestinationName = Annotated[str, form(f"^{NAME_PATTERN}$", NAME_WORDS)]
LibvirtUri = Annotated[str, form(r"^[a-z][a-z0-9+.-]*://[!-~]{1,255}$", "a URI of libvirt (xen+tls://host/system)")]
LoopbackAddress = Annotated[
    str, form(r"^(127\.0\.0\.1|\[::1\]|localhost):[0-9]{1,5}$", "a port of this host's loopback (127.0.0.1:7001)")
]


class LibvirtSettings(Settings):
    """``template``: a domain XML with what every domain here has (operating system, devices)."""

    uri: str = "test:///default"
    template: FilePath | None = None
    heal_interval: Seconds = 1.0


class CardSettings(CardUserSettings):
    """The hypervisor's secure element."""

    identity: str = Field(default="hypervisor", min_length=1, max_length=64)
    timeout: Seconds = 10.0

    @property
    def place(self) -> CardPlace:
        """Where it is."""
        if self.local_place is None:
            raise AssertionError("the settings give the card one place")
        return self.local_place

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if (self.socket is None) == (self.pcsc is None):
            raise ValueError("the hypervisor's card has either a 'socket' or 'pcsc'")
        return self


class OrchestratorSettings(Settings):
    """``address``: TCP on loopback, beside the Unix socket; None: off."""

    allowed: tuple[OrchestratorName, ...] = ("admin",)
    socket: FilePath | None = None
    address: LoopbackAddress | None = None


class AuditSettings(Settings):
    """``file`` None: audit.jsonl in the state folder. ``sync_interval``: seconds of records that a power cut may cost."""

    file: FilePath | None = None
    sync_interval: Seconds = 1.0


class LimitSettings(Settings):
    """Of each domain."""

    operations_in_flight: Count = 1024
    concurrent_calls: Count = 256
    agent_certificate_lifetime: Annotated[float, Field(ge=1, le=86400)] = 3600.0


class TcpChannelSettings(Settings):
    """``address``: dom0's own on ``bridge``. ``ports``: two a running domain, ``first-last``."""

    address: IPvAnyAddress
    bridge: Annotated[
        str, form(r"^[A-Za-z0-9_.-]{1,15}$", "a bridge's name, of 1 to 15 letters, digits, '_', '.' and '-'")
    ] = "xenbr0"
    ports: Annotated[str, form(r"^[0-9]{1,5}-[0-9]{1,5}$", "a range of ports, first and last (7000-7999)")] = (
        "7000-7999"
    )

    @property
    def port_range(self) -> range:
        first, _, last = self.ports.partition("-")
        return range(int(first), int(last) + 1)

    @field_validator("ports")
    @classmethod
    def _in_order(cls, ports: str) -> str:
        first, _, last = (int(word) if word.isdigit() else 0 for word in ports.partition("-"))
        if not 0 < first < last < 65536:
            raise ValueError("a range of ports is first-last, within 1 to 65535")
        return ports


class ChannelSettings(Settings):
    """How domains reach this daemon: a folder that is handed to them, a vchan of Xen's, or TCP on the bridge."""

    kind: Literal["folder", "vchan", "tcp"] = "folder"
    tcp: TcpChannelSettings | None = None

    @model_validator(mode="after")
    def _complete(self) -> ChannelSettings:
        if self.kind == "tcp" and self.tcp is None:
            raise ValueError(
                "channel.kind is tcp: the table [channel.tcp] with dom0's address on the bridge is missing"
            )
        return self


class MiddlewareSettings(Settings):
    state: FilePath
    policy: FilePath
    card: CardSettings
    grid: GoseClientSettings
    libvirt: LibvirtSettings = LibvirtSettings()
    channel: ChannelSettings = ChannelSettings()
    # Hosts that VMs may be migrated to: name -> the URI at which this host's libvirt reaches theirs.
    destinations: dict[DestinationName, LibvirtUri] = Field(default={}, max_length=256)
    orchestrators: OrchestratorSettings = OrchestratorSettings()
    audit: AuditSettings = AuditSettings()
    limits: LimitSettings = LimitSettings()
    reflection: bool = False
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def orchestrator_socket(self) -> Path:
        return self.orchestrators.socket or self.state / "orchestrator.sock"

    @property
    def audit_file(self) -> Path:
        return self.audit.file or self.state / "audit.jsonl"
