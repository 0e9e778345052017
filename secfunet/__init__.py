"""The protocols of a Grid of Secure Elements, sans-IO, and the thin asyncio shells that carry them.

A protocol here is a class that takes bytes and gives back bytes and events. It opens no socket, reads no clock and starts no task: both
are passed in. What moves bytes (sockets, cards, HTTP) lives in modules named for that, at the edge.
"""

__version__ = "0.1.0"
