"""``knock.py ADDRESS PORT SECONDS AT_ONCE``: so many connections to a port of dom0 at any time, each held until it is closed there."""

from __future__ import annotations

import errno
import json
import select
import socket
import sys
import time


def main(address: str, port: int, seconds: float, at_once: int) -> dict[str, int]:
    made = closed = 0
    connections: dict[int, socket.socket] = {}
    poll = select.poll()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        while len(connections) < at_once:
            one = socket.socket()
            one.setblocking(False)
            if one.connect_ex((address, port)) not in (0, errno.EINPROGRESS):
                one.close()
                break
            made += 1
            connections[one.fileno()] = one
            poll.register(one, select.POLLIN | select.POLLHUP | select.POLLERR)
        for number, _ in poll.poll(50):
            try:
                data = connections[number].recv(100)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                poll.unregister(number)
                connections.pop(number).close()
                closed += 1
    return {"made": made, "closed": closed}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))))
