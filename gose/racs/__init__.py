"""The grid's end of RACS: a node lends its cards to users on other hosts (``gose racs serve``), a grid takes such cards into its slots.

``settings`` is the node's file, ``rules`` which commands to a card are meant, ``access`` who may do what with which card. ``hosted`` is one
card and who has it, ``session`` one user's connection, ``server`` the door with its bounds. ``tls`` is what both sides ask of TLS.
"""
