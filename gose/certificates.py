"""The certificates that a running grid shows: what ``gose renew-servers`` wrote counts, after SIGHUP, for the next connection."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from gose.authority import SERVICE_PROVIDER, AuthorityFolder
from gose.authority.errors import AuthorityDamagedError
from secfunet.identity import load_certificate
from secfunet.service.files import naming


class ServerCertificates:
    """Of the service provider and the OpenID provider, from the authority's folder."""

    def __init__(self, keys: AuthorityFolder) -> None:
        self._keys = keys
        self._contexts: dict[str, list[ssl.SSLContext]] = {}
        self._shown: dict[str, tuple[bytes, bytes]] = {}
        self._new: dict[str, tuple[bytes, bytes]] = {}
        self._for_grpc: grpc.ServerCertificateConfiguration | None = None

    def context(self, server: str, *, client_authority: Path | None = None) -> ssl.SSLContext:
        """For a door of this server; see ``server_context``. Raises AuthorityDamagedError, OSError."""
        context = server_context(self._keys.server_file(server), client_authority=client_authority)
        self._contexts.setdefault(server, []).append(context)
        self._shown[server] = self._keys.read_server(server)
        return context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """Of the service provider's gRPC door: every client must have a certificate of the grid's CA. Raises AuthorityDamagedError."""
        self._shown[SERVICE_PROVIDER] = self._keys.read_server(SERVICE_PROVIDER)
        return grpc.dynamic_ssl_server_credentials(
            self._grpc_configuration(),
            self._next_configuration,  # type: ignore[arg-type] # its types do not know of None, which its text does
            require_client_authentication=True,
        )

    def read(self) -> None:
        """Looks at what the files hold now. Raises AuthorityDamagedError, OSError."""
        pairs = {server: self._keys.read_server(server) for server in self._shown}
        self._new = {server: pair for server, pair in pairs.items() if pair != self._shown[server]}
        for server in self._new:
            server_context(self._keys.server_file(server))

    def show(self) -> list[str]:
        """From the next connection on, what ``read`` found; says for which servers that is new."""
        new, self._new = self._new, {}
        said = []
        for server, pair in new.items():
            for context in self._contexts.get(server, ()):
                context.load_cert_chain(self._keys.server_file(server))
            self._shown[server] = pair
            ends = load_certificate(pair[1]).not_valid_after_utc
            said.append(f"certificate of the {server}, until {ends:%Y-%m-%d}")
        if SERVICE_PROVIDER in new:
            self._for_grpc = self._grpc_configuration()
        return said

    def _grpc_configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [self._shown[SERVICE_PROVIDER]], root_certificates=self._keys.ca_path.read_bytes()
        )

    def _next_configuration(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks before each handshake, in a thread of its own; None: go on with what you have."""
        new, self._for_grpc = self._for_grpc, None
        return new


def server_context(key_and_certificate: Path, *, client_authority: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 and 1.3, forward secrecy; with ``client_authority`` (PEM file) every client must have a certificate of that CA.

    Raises AuthorityDamagedError, OSError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    with naming(key_and_certificate):
        try:
            context.load_cert_chain(key_and_certificate)
        except ssl.SSLError:
            raise AuthorityDamagedError(
                key_and_certificate, "does not hold a key and its certificate (gose renew-servers makes a new one)"
            ) from None
    if client_authority is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        with naming(client_authority):
            context.load_verify_locations(client_authority)
    return context


def client_context(authority: Path) -> ssl.SSLContext:
    """Trusts the grid's CA (PEM file) and no other; checks the server's name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with naming(authority):
        context.load_verify_locations(authority)
    return context
