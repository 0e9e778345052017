"""RADIUS as far as EAP needs it (RFC 2865, 3579, 2548): ``wire`` is the form of packets, ``access`` what a client asks and is answered,
``udp`` carries that and repeats itself, ``peer`` has a card authenticated. A server is in ``gose.radius``.

pyrad carries attributes and authenticators (extras ``card`` and ``gose``); form and bounds are checked before it sees a packet.
"""
