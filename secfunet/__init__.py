"""The protocols of a Grid of Secure Elements, sans-IO, and the thin asyncio shells that carry them.

A protocol here is a class that takes bytes and gives back bytes and events. It opens no socket, reads no clock and starts no task: both
are passed in. What moves bytes (sockets, cards, HTTP) lives in modules named for that, at the edge.
"""

import os

__version__ = "0.1.0"

# gRPC's C core writes lines of its own about every connection that a stranger breaks, as many as he likes; it reads this when it is loaded.
# Every program here imports this package before it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
