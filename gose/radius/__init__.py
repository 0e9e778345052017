"""The grid as an authentication server: RADIUS outside (RFC 2865, 3579), and EAP-TLS inside the server cards.

``packets`` is the codec (attributes by pyrad), ``dialogue`` binds each authentication to the card that it runs in, ``admission`` says who
is let in, ``server`` is the UDP door.
"""
