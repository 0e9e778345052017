"""SCP03: the secure channel between a card and whoever administers it (GlobalPlatform Card Specification, Amendment D 1.1.2).

Both ends share a static key set (``keys``). A handshake of two commands (``handshake``) proves it both ways and makes session keys; then
each command carries a MAC that chains it to those before it, and commands and answers may be encrypted (``channel``). A new key set
travels encrypted under the one that is in use (``put_key``). Nothing here does IO: challenges and random bytes are passed in.
"""

from secfunet.scp03.channel import CardChannel, HostChannel, SecurityLevel
from secfunet.scp03.errors import Scp03Error, Scp03FormatError, Scp03SecurityError
from secfunet.scp03.handshake import CardHandshake, HostHandshake, InitializeUpdateAnswer
from secfunet.scp03.keys import KeySet, ScpMode
from secfunet.scp03.put_key import PutKey, key_check_value

__all__ = [
    "CardChannel",
    "CardHandshake",
    "HostChannel",
    "HostHandshake",
    "InitializeUpdateAnswer",
    "KeySet",
    "PutKey",
    "Scp03Error",
    "Scp03FormatError",
    "Scp03SecurityError",
    "ScpMode",
    "SecurityLevel",
    "key_check_value",
]
