"""The secure element in software: a smartcard operating system with one EAP-TLS applet, in a process of its own."""

import secfunet  # noqa: F401 - before gRPC: see there
