"""A guest: keeps one connection open, and makes new ones, one after the other; prints what became of them.

``bridge_guest.py ADDRESS PORT TIMES``. Lines of standard output: "ready" when the first connection is open, then the result.
"""

from __future__ import annotations

import json
import socket
import sys
import time


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def answers(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b"x"
    except OSError:
        return False


def main(address: str, port: int, times: int) -> dict[str, object]:
    kept = socket.create_connection((address, port), timeout=3)
    kept.settimeout(3)
    is_kept = answers(kept)
    say("ready")
    served = 0
    for _ in range(times):
        try:
            with socket.create_connection((address, port), timeout=3) as fresh:
                fresh.settimeout(3)
                served += answers(fresh)
        except OSError:
            pass
        is_kept = is_kept and answers(kept)
        time.sleep(0.15)
    return {"served": served, "kept": is_kept}


if __name__ == "__main__":
    say(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
