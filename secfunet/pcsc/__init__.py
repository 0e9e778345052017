"""The side of a card that talks to pcscd: a small process for each pcscd, since libpcsclite serves one pcscd a process.

``frames`` is what a program and the process say to each other, ``reader`` has one card through PC/SC (pyscard), ``worker`` is the process.
The port to a card that a program uses is in ``secfunet.card.pcsc``. The process imports nothing but this package: it starts in no time.
"""
