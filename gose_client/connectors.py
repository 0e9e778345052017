"""How each place of a grid is reached: by TLS-Tandem with the hypervisor's card, or (the OpenID endpoint) by ordinary TLS."""

from __future__ import annotations

import asyncio
import ssl
from functools import partial
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gose_client.cards import CarefulCards
from gose_client.errors import GoseClientError, GridUnavailableError, GridUntrustedError, HypervisorCardError
from gose_client.http_connections import Connect, Streams
from gose_client.settings import GoseClientSettings
from secfunet.apdu import StatusError
from secfunet.card.errors import CardError
from secfunet.openid.realm import WebUrl, parse_url
from secfunet.rpc.reasons import Reason
from secfunet.service.tcp import watch_peer
from secfunet.tandem.aio import open_tandem_connection
from secfunet.tandem.errors import HandshakeRefusedError
from secfunet.tandem.parameters import DEFAULT_PATIENCE, TandemParameters
from secfunet.tls.errors import PeerAlertError, ServerNameError, UnsupportedSuiteError

# Alerts by which a server says that it does not want this client (RFC 8446, 6.2): bad, unsupported, revoked, expired and unknown
# certificate, unknown CA, access denied, certificate required. They come again however often one asks.
_UNWANTED: Final = frozenset({42, 43, 44, 45, 46, 48, 49, 116})
_READ_LIMIT = 2**18

Wanted = TypeVar("Wanted", bound=BaseException)


def explain(error: BaseException, place: str) -> GoseClientError:
    """What an error below means for a caller: try again (GridUnavailableError), or do not."""
    known = find_cause(error, GoseClientError)
    if known is not None:
        return known
    alert = find_cause(error, PeerAlertError)
    if alert is not None and alert.description in _UNWANTED:
        return GridUntrustedError(
            f"{place} does not accept the hypervisor's card: {alert}", reason=Reason.HYPERVISOR_REFUSED
        )
    if isinstance(error, (ServerNameError, HandshakeRefusedError, UnsupportedSuiteError, ssl.SSLCertVerificationError)):
        return GridUntrustedError(f"{place} is not the grid that is meant: {error}")
    if isinstance(error, StatusError):
        return HypervisorCardError(f"the hypervisor's card refused: {error}")
    if isinstance(error, CardError):
        return GridUnavailableError(
            f"the hypervisor's card cannot be used now: {error}", reason=Reason.HYPERVISOR_CARD_UNAVAILABLE
        )
    return GridUnavailableError(f"{place} cannot be reached: {error or type(error).__name__}")


def find_cause(error: BaseException | None, kind: type[Wanted]) -> Wanted | None:
    """The first of that kind in the chain of causes."""
    for _ in range(8):
        if error is None or isinstance(error, kind):
            return error
        error = error.__cause__
    return None


class Connectors:
    """Opens connections. Every method raises a GoseClientError."""

    def __init__(self, settings: GoseClientSettings, cards: CarefulCards, authority: x509.Certificate) -> None:
        self._settings = settings
        self._cards = cards
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._context.load_verify_locations(cadata=authority.public_bytes(Encoding.PEM).decode("ascii"))
        self._context.set_alpn_protocols(["http/1.1"])

    def http(self) -> dict[str, Connect]:
        """For HttpConnections: each configured origin with its own way."""
        settings = self._settings
        return {
            settings.openid_provider: partial(self._ordinary, parse_url(settings.openid_provider)),
            # The login waits for a card of the grid, which may take as long as we are ready to wait at all.
            settings.openid_login: partial(
                self._tandem, parse_url(settings.openid_login), ("http/1.1",), patience=settings.connect_timeout
            ),
            settings.service_provider: partial(self._tandem, parse_url(settings.service_provider), ("http/1.1",)),
        }

    async def operations(self) -> Streams:
        """A connection for gRPC (HTTP/2, ALPN h2)."""
        streams = await self._tandem(parse_url(f"https://{self._settings.operations}"), ("h2",))
        if streams[1].get_extra_info("alpn") != "h2":
            streams[1].transport.abort()
            raise GridUntrustedError(f"{self._settings.operations} does not speak HTTP/2")
        return streams

    async def _tandem(self, url: WebUrl, alpn: tuple[str, ...], *, patience: float = DEFAULT_PATIENCE) -> Streams:
        try:
            streams = await open_tandem_connection(
                self._cards,
                url.host,
                url.port,
                server_name=url.host,
                parameters=TandemParameters(alpn=alpn, patience=patience),
                timeout=self._settings.connect_timeout,
                limit=_READ_LIMIT,
            )
        except Exception as error:
            raise explain(error, url.origin) from error
        self._watch(streams)
        return streams

    async def _ordinary(self, url: WebUrl) -> Streams:
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                streams = await asyncio.open_connection(
                    url.host, url.port, ssl=self._context, server_hostname=url.host, limit=_READ_LIMIT
                )
        except (OSError, TimeoutError) as error:
            raise explain(error, url.origin) from error
        self._watch(streams)
        return streams

    def _watch(self, streams: Streams) -> None:
        """Lets the kernel find out that the other side is gone: without it a machine that lost its power is missed for minutes."""
        watch_peer(streams[1].get_extra_info("socket"), self._settings.dead_peer_timeout)
