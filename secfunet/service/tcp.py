"""TCP connections whose other side may vanish without a word."""

from __future__ import annotations

import socket
from typing import Any


def watch_peer(connection: Any, seconds: float) -> None:
    """Lets the kernel end a connection (a socket, or asyncio's view of one) when its peer is gone: nothing that was sent is acknowledged
    for ``seconds``, or an idle one does not answer for about as long. Without it a machine that lost its power is missed for minutes.

    Small messages go at once. Does nothing for a socket that is not TCP.
    """
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(seconds / 2)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(seconds / 4)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))
