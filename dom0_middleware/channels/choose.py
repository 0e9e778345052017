"""The channel that the settings name."""

from __future__ import annotations

from pathlib import Path

from dom0_middleware.channels.folder import FolderChannel
from dom0_middleware.channels.port import Flooded, GuestChannel
from dom0_middleware.channels.tcp import Refused, TcpChannel
from dom0_middleware.channels.vchan import VchanChannel
from dom0_middleware.settings import ChannelSettings


def choose_channel(settings: ChannelSettings, folder: Path, *, refused: Refused, flooded: Flooded) -> GuestChannel:
    """``folder``: private, for the servers' sockets. ``refused``, ``flooded``: told of what comes to a channel and must not."""
    if settings.kind == "vchan":
        return VchanChannel(folder, flooded=flooded)
    if settings.kind == "tcp" and settings.tcp is not None:
        tcp = settings.tcp
        return TcpChannel(
            folder, address=str(tcp.address), bridge=tcp.bridge, ports=tcp.port_range, refused=refused, flooded=flooded
        )
    return FolderChannel(folder, flooded=flooded)
