"""TLS below RACS, both sides: 1.2 or 1.3, forward secrecy, a certificate of the one authority on either side."""

from __future__ import annotations

import ssl
from pathlib import Path

from secfunet.errors import SecFuNetError
from secfunet.service.files import naming, read_secret


class TlsFilesError(SecFuNetError):
    """Key, certificate or authority cannot be used."""


def server_side(key: Path, certificate: Path, authority: Path) -> ssl.SSLContext:
    """Every client must have a certificate of ``authority`` (all are PEM files). Raises TlsFilesError, UnsafeFileError, OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session would not be checked anew: a certificate that has ended could live on in tickets.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return _filled(context, key, certificate, authority)


def client_side(key: Path, certificate: Path, authority: Path) -> ssl.SSLContext:
    """The server's name is checked against its certificate of ``authority``. Raises TlsFilesError, UnsafeFileError, OSError."""
    return _filled(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), key, certificate, authority)


def _filled(context: ssl.SSLContext, key: Path, certificate: Path, authority: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    read_secret(key)
    try:
        with naming(certificate):
            context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise TlsFilesError(f"{certificate} and {key} are no certificate and its key ({error.reason})") from None
    try:
        with naming(authority):
            context.load_verify_locations(authority)
    except ssl.SSLError as error:
        raise TlsFilesError(f"{authority} is no certificate of an authority ({error.reason})") from None
    return context
