"""Where the grid is, whom to believe, and how long to wait. A table of a daemon's TOML file."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from secfunet.container import ProfileName
from secfunet.host_names import HostNameError, canonical_url
from secfunet.openid.errors import OpenIdFormatError
from secfunet.openid.realm import parse_url
from secfunet.service.settings import FilePath, Settings


def _origin(untrusted: str) -> str:
    try:
        url = parse_url(canonical_url(untrusted))
    except (OpenIdFormatError, HostNameError) as error:
        raise ValueError(str(error)) from None
    if url.scheme != "https" or (url.path, url.query, url.fragment) != ("/", "", ""):
        raise ValueError("an origin is written 'https://host[:port]'")
    return url.origin


def _endpoint(untrusted: str) -> str:
    _origin(f"https://{untrusted}")
    if untrusted.rpartition("]")[2].count(":") != 1:
        raise ValueError("it is written 'host:port'")
    # With its port even where that is the one of https.
    return canonical_url(f"https://{untrusted}").partition("://")[2]


Origin = Annotated[str, AfterValidator(_origin)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class GoseClientSettings(Settings):
    """One grid as its client knows it. No place that is not named here is ever asked, whatever the grid answers. Times are seconds."""

    service_provider: Origin  # HTTPS: sessions
    operations: Annotated[str, AfterValidator(_endpoint)]  # host:port, gRPC
    openid_provider: Origin  # HTTPS: the endpoint, reached by ordinary TLS
    openid_login: Origin  # HTTPS: the login page, reached by TLS-Tandem
    authority: FilePath  # the grid's CA, PEM
    container_profile: ProfileName = "oaep-pss-sha256"
    # A private folder (0700) for the socket between gRPC and TLS-Tandem; None: a temporary one.
    relay_folder: FilePath | None = None
    connect_timeout: Seconds = 10.0  # one attempt to connect, handshake and wait for the card included
    card_timeout: Seconds = 10.0  # unwrapping one content key, wait for the card included
    close_timeout: Seconds = 2.0  # telling the grid that a session ends
    stall_timeout: Seconds = 45.0  # a stream with batches in work and without any answer for so long counts as lost
    answer_timeout: Seconds = 30.0  # one HTTP exchange of a login on an open connection
    idle_timeout: Seconds = 60.0  # an HTTP connection is kept for the next login
    dead_peer_timeout: Seconds = (
        10.0  # bytes that the other side has not acknowledged for so long: the connection is lost
    )
    connections: Annotated[int, Field(ge=1, le=64)] = 4  # HTTP connections to one origin at the same time
    batches_in_flight: Annotated[int, Field(ge=1, le=256)] = 16  # of one session's stream
    content_keys: Annotated[int, Field(ge=1, le=100_000)] = 1024  # that are remembered
