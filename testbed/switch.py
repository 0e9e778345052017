"""The cable between hosts: a process that passes each Ethernet frame (one UDP datagram of the loopback) on to all other hosts.

``python -m testbed.switch PORT HOST-PORT...`` runs until SIGTERM. Frames of ports that are not its hosts' are dropped.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Sequence

LARGEST_FRAME = 65536


def serve(port: int, hosts: Sequence[int]) -> None:
    """Never returns."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as cable:
        cable.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        cable.bind(("127.0.0.1", port))
        addresses = [("127.0.0.1", host) for host in hosts]
        while True:
            try:
                frame, origin = cable.recvfrom(LARGEST_FRAME)
            except ConnectionError:
                continue  # a host that is not there (yet)
            if origin not in addresses:
                continue
            for address in addresses:
                if address != origin:
                    with contextlib.suppress(OSError):
                        cable.sendto(frame, address)


if __name__ == "__main__":
    serve(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
