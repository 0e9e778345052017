"""The Grid of Secure Elements: cards in slots, the service provider before them, the OpenID provider beside it, and the authority."""

import secfunet  # noqa: F401 - before gRPC: see there
