"""RACS, Remote APDU Call Secure (draft-urien-core-racs-15): the cards of a grid, reached from afar in lines of text inside TLS.

A request is ``BEGIN``, commands, ``END``; an answer is ``BEGIN``, status lines, ``END``. ``syntax`` cuts lines and tokens, ``commands``
and ``status`` are what they mean, ``seids`` writes and reads lists of cards, ``apdu_run`` is the loop behind one APDU command. ``server``
and ``client`` are the two ends, sans-IO; ``card`` is the asyncio shell that makes a remote card a ``secfunet.card`` port.

Any input gives events, or raises RacsProtocolError: then the connection is to be closed.
"""

from secfunet.racs.errors import RacsError, RacsProtocolError, RacsRefusedError

__all__ = ["RacsError", "RacsProtocolError", "RacsRefusedError"]
