"""TLS-Tandem: a TLS connection whose handshake runs in a card, and whose records the docking host protects itself.

The card holds the private key and speaks the handshake; the host holds the socket. The story of a connection, in either role:

1. :class:`~secfunet.tandem.connection.TandemConnection` (no IO) relays flights: it says what to send to the peer and what to ask the
   card, and is told what either answered;
2. :mod:`.card_link` carries the questions to a card, as EAP-TLS packets in Process-EAP commands;
3. when the card has authenticated the peer, it hands over the cipher suite and the keys, is released, and the connection goes on
   as a :class:`~secfunet.tls.stream.ProtectedStream`;
4. :mod:`.aio` makes an :class:`asyncio.Transport` of it: :func:`~secfunet.tandem.aio.create_tandem_connection`,
   :func:`~secfunet.tandem.aio.open_tandem_connection`, :func:`~secfunet.tandem.aio.start_tandem_server`;
5. :mod:`.relay` lends a connection to a library that insists on a socket of its own (gRPC).
"""
