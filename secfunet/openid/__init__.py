"""OpenID Authentication 2.0, provider and relying party, without input or output.

``form`` has the two encodings of messages, ``diffie_hellman`` and ``association`` the shared secrets, ``realm`` who may be answered and
where, ``discovery`` how an identifier leads to its provider (Yadis: XRDS document, header, HTML), ``nonce`` the numbers used once.
On them stand ``provider.OpenIdProvider`` and ``relying_party.RelyingParty``. Nothing here opens a connection: the provider takes the
parameters of a request and gives back a body or a URL; the relying party's methods are generators that yield ``effects.HttpRequest``
and are sent ``effects.HttpResponse`` (``effects.drive`` and ``effects.drive_blocking`` run them over any HTTP client).

Only version 2.0 is spoken. Source: https://openid.net/specs/openid-authentication-2_0.html; "§" in this package means its sections.
"""
