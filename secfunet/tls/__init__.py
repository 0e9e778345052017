"""TLS as the docking host sees it: everything but the handshake, and no input or output.

A card runs the handshake; the host relays its flights and then protects the records itself. So this room has no key
exchange, no certificate chain and no transcript. It has what is left:

1. :mod:`.records` cuts the byte stream into records, and :mod:`.flights` says when enough of them have come for the card;
2. :mod:`.key_schedule` turns what the card hands over (key block or traffic secrets) into keys, for the
   :mod:`.cipher_suites` of the registry;
3. :mod:`.protection` protects and opens single records, and :mod:`.stream` is the life of a connection after the
   handshake: application data, alerts (:mod:`.alerts`), key updates, tickets, bounds and the orderly end;
4. :mod:`.server_names` checks that a certificate names the server that was meant (RFC 9525).

Errors derive from :class:`~secfunet.tls.errors.TlsError`; those that the peer must be told carry their alert.
"""
