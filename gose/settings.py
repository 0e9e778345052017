"""What an administrator decides about a grid: one TOML file, every limit with a default that holds.

Relative paths are relative to the folder of the file.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, model_validator

from secfunet.card.settings import CardUserSettings
from secfunet.container import ProfileName
from secfunet.errors import SecFuNetError
from secfunet.host_names import canonical_host, canonical_url
from secfunet.identity import NAME_PATTERN, NAME_WORDS
from secfunet.openid.realm import check_realm, parse_url
from secfunet.racs.errors import RacsValueError
from secfunet.racs.syntax import check_seid
from secfunet.service.addresses import canonical_network
from secfunet.service.doorkeeper import KEPT_DESCRIPTORS, METRICS_BOUNDS, DoorBounds
from secfunet.service.settings import FilePath, Settings, form


class Address(NamedTuple):
    """Where to listen: a host (name or IP address) and a port (0: any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(untrusted: object) -> object:
    """``host:port`` or ``[IPv6]:port`` into an Address; anything else is a ValueError."""
    if isinstance(untrusted, Address):
        return untrusted
    if not isinstance(untrusted, str):
        raise ValueError("an address is written 'host:port'")
    host, separator, port = untrusted.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif ":" in host:
        raise ValueError("an IPv6 address is written '[address]:port'")
    if not separator or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("an address is written 'host:port'")
    return Address(canonical_host(host), int(port))


def _origin(untrusted: str) -> str:
    url = parse_url(canonical_url(untrusted))
    if url.scheme != "https" or (url.path, url.query, url.fragment) != ("/", "", ""):
        raise ValueError("an origin is written 'https://host[:port]'")
    return url.origin


def _realm(untrusted: str) -> str:
    return str(check_realm(canonical_url(untrusted)))


def _valued(check: Callable[[str], str]) -> AfterValidator:
    def checked(untrusted: str) -> str:
        try:
            return check(untrusted)
        except SecFuNetError as error:
            raise ValueError(str(error)) from None

    return AfterValidator(checked)


HostName = Annotated[str, _valued(canonical_host)]
ListenAddress = Annotated[Address, BeforeValidator(parse_address)]
Seconds = Annotated[float, Field(gt=0, le=366 * 86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Name = Annotated[str, form(f"^{NAME_PATTERN}$", NAME_WORDS)]


class ServiceProviderSettings(Settings):
    """The service provider's two doors: HTTPS for sessions, gRPC for operations."""

    https: ListenAddress = Address("127.0.0.1", 8443)
    grpc: ListenAddress = Address("127.0.0.1", 8444)
    # The name under which others reach the two doors; None: the first of ``names``.
    public_host: HostName | None = None
    # The OpenID provider that hypervisors log in at; None: the one of this grid.
    openid_provider: Annotated[str, _valued(_origin)] | None = None


class OpenIdProviderSettings(Settings):
    """The OpenID provider's two doors: ordinary HTTPS, and the login page over TLS-Tandem."""

    endpoint: ListenAddress = Address("127.0.0.1", 9443)
    login: ListenAddress = Address("127.0.0.1", 9444)
    public_host: HostName | None = None
    # Relying parties that are answered beside this grid's service provider, by their realms.
    realms: tuple[Annotated[str, _valued(_realm)], ...] = ()


def _seid(untrusted: str) -> str:
    try:
        return check_seid(untrusted)
    except RacsValueError as error:
        raise ValueError(str(error)) from None


RacsSeid = Annotated[str, AfterValidator(_seid)]


class RemoteCardSettings(Settings):
    """A card that another host lends by RACS. ``seid``: its name there; None: the same as here."""

    address: ListenAddress
    seid: RacsSeid | None = None


class RacsSettings(Settings):
    """What this grid shows to the nodes that lend it cards. ``authority`` None: their certificates are of this grid's own CA."""

    key: FilePath
    certificate: FilePath
    authority: FilePath | None = None
    dead_peer_timeout: Seconds = 10.0


class SecureElementSettings(CardUserSettings):
    """One card of the grid and the way to it: a Unix socket or a PC/SC reader of this host, or RACS.

    ``role``: "vm" holds VMs' keys, "server" opens TLS for the login page.
    """

    seid: Name
    racs: RemoteCardSettings | None = None
    role: Literal["vm", "server"]
    # Only needed to personalise the card.
    administrator_keys_file: FilePath | None = None
    # The friendly name of the TLS-Id that is used; None: the same as ``role``.
    identity: Name | None = None

    @property
    def label(self) -> str:
        """The friendly name of the TLS-Id that this card is used with."""
        return self.identity or self.role

    @property
    def place(self) -> str:
        """Where the card is, for a person: its socket or reader, or host, port and name of a card elsewhere. No two cards have the same."""
        if self.racs is None:
            return str(self.local_place)
        return f"racs://{self.racs.address}/{self.racs.seid or self.seid}"

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if sum(place is not None for place in (self.socket, self.pcsc, self.racs)) != 1:
            raise ValueError(f"the secure element '{self.seid}' has either a 'socket' or 'pcsc' or 'racs'")
        return self


def _network(untrusted: str) -> str:
    return str(canonical_network(untrusted))


class RadiusClientSettings(Settings):
    """Who may ask: an address or a network (access points, switches), and the file of the secret that it shares with the grid."""

    address: Annotated[str, AfterValidator(_network)]
    secret_file: FilePath


class RadiusSettings(Settings):
    """The grid as a RADIUS server: whom it authenticates with EAP-TLS, and who may ask."""

    listen: ListenAddress = Address("127.0.0.1", 1812)
    clients: Annotated[tuple[RadiusClientSettings, ...], Field(min_length=1)]
    roles: Annotated[tuple[Literal["hypervisor", "vm"], ...], Field(min_length=1)] = ("hypervisor",)


class Limits(Settings):
    """Bounds on what one grid takes upon itself. Times are seconds, sizes are bytes."""

    # --- slots
    slot_queue: Count = 128  # batches that wait for one card
    operation_timeout: Seconds = 20.0  # one APDU exchange with its chaining; then the card counts as dead
    card_connect_timeout: Seconds = 5.0
    card_backoff: Seconds = 0.1  # first pause before a dead card is tried again; doubles
    card_backoff_max: Seconds = 5.0
    watchdog_interval: Seconds = 5.0  # an idle card is asked for a sign of life this often
    watchdog_timeout: Seconds = 2.0
    # --- operations
    batch_operations: Annotated[int, Field(ge=1, le=64)] = 64
    batch_timeout: Seconds = 30.0  # one batch of a stream; unary calls bring their own deadline
    longest_deadline: Seconds = 300.0  # a unary call that asks for more is held to this
    stream_batches: Count = 16  # batches of one stream in work at the same time
    streams_per_hypervisor: Count = 256
    calls_per_hypervisor: Count = 1024  # streams and unary calls at the same time
    message_size: Annotated[int, Field(ge=65536, le=16 * 2**20)] = 2**20
    answers_kept: Seconds = 300.0  # how long a retry gets the first answer
    answers_size: Annotated[int, Field(ge=2**20)] = 256 * 2**20
    # --- containers
    containers_per_key: Count = 1000
    container_key_age: Seconds = 300.0
    # --- sessions
    session_lifetime: Seconds = 8 * 3600.0  # at most; a session ends with its token
    sessions_per_vm: Count = 4
    sessions_per_hypervisor: Count = 1024
    # --- logins
    login_lifetime: Seconds = 60.0  # from the first request to the granted session
    logins_pending: Count = 4096
    logins_per_hypervisor: Count = 64  # pending at the same time
    logins_per_minute: Count = 600  # a hypervisor (certificate) may begin
    sso_lifetime: Seconds = 300.0  # one login may serve later sessions this long
    association_lifetime: Seconds = 3600.0
    associations_per_minute: Count = 120  # that one address may ask for
    # --- server cards
    server_card_timeout: Seconds = 10.0  # a handshake waits this long for a free card
    handshake_timeout: Seconds = 15.0
    handshakes: Count = 256  # at the same time, waiting for a card included
    peer_patience: Seconds = 5.0  # a handshake that has a card waits this long for its client, in all
    longest_lease: Seconds = 30.0  # whoever holds a card longer loses it
    # --- HTTP
    http_body: Annotated[int, Field(ge=1024, le=2**24)] = 65536
    http_connections: Count = 512  # a door, after their handshakes
    http_idle: Seconds = 75.0
    http_request_timeout: Seconds = 20.0  # head and body of one request
    shutdown_timeout: Seconds = 5.0
    grpc_connections: Count = 1024  # of hypervisors that have made a call
    # --- strangers, at all doors together
    silent_connections: Count = 1024  # that have not begun their handshake
    talking_connections: Count = 256  # in their handshakes

    def door_bounds(self) -> DoorBounds:
        """For the doorkeeper."""
        return DoorBounds(
            silent=self.silent_connections,
            talking=self.talking_connections,
            silence=min(DoorBounds.silence, self.handshake_timeout),
            # The doors' own bound comes first: it tells the peer why.
            handshake=self.handshake_timeout + 1.0,
        )


class GoseSettings(Settings):
    """The whole file ``gose.toml``."""

    state: FilePath = Field(default=Path("state"), validate_default=True)
    names: Annotated[tuple[HostName, ...], Field(min_length=1, max_length=64)] = ("localhost", "127.0.0.1")
    service_provider: ServiceProviderSettings = ServiceProviderSettings()
    openid_provider: OpenIdProviderSettings = OpenIdProviderSettings()
    secure_elements: tuple[SecureElementSettings, ...] = ()
    # Needed if a secure element is on another host.
    racs: RacsSettings | None = None
    # None: the grid is no RADIUS server.
    radius: RadiusSettings | None = None
    # How containers are made; the middleware and the agents must expect the same.
    container_profile: ProfileName = "oaep-pss-sha256"
    limits: Limits = Limits()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None

    @property
    def descriptors(self) -> int:
        """What the grid may need when every bound is reached: strangers, three doors of HTTP, gRPC (a connection has its own descriptor and
        two for the way inside), cards, files.
        """
        limits = self.limits
        strangers = limits.silent_connections + 3 * limits.talking_connections
        inside = 3 * limits.http_connections + 3 * limits.grpc_connections
        return strangers + inside + METRICS_BOUNDS.descriptors + 4 * len(self.secure_elements) + KEPT_DESCRIPTORS + 256

    @property
    def authority(self) -> Path:
        """The folder of the keys of the CA, the token authority, the container authority and the servers."""
        return self.state / "authority"

    @property
    def database(self) -> Path:
        """The SQLite file of the grid."""
        return self.state / "grid.sqlite"

    @property
    def service_provider_host(self) -> str:
        """The name in URLs of the service provider, and in its server certificate."""
        return self.service_provider.public_host or self.names[0]

    @property
    def openid_provider_host(self) -> str:
        """The name in URLs of the OpenID provider, and in its server certificates."""
        return self.openid_provider.public_host or self.names[0]

    @property
    def audience(self) -> str:
        """What ``aud`` of a VM-Auth-Token for this grid says: the service provider's URL."""
        return origin(self.service_provider_host, self.service_provider.https.port)

    def secure_element(self, seid: str) -> SecureElementSettings | None:
        """The card of that name, or None."""
        return next((element for element in self.secure_elements if element.seid == seid), None)

    @model_validator(mode="after")
    def _cards_are_distinct(self, info: ValidationInfo) -> Self:
        for what, values in (
            ("seid", [element.seid for element in self.secure_elements]),
            ("place", [element.place for element in self.secure_elements]),
        ):
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise ValueError(f"two secure elements have the same {what}: {', '.join(sorted(twice))}")
        if self.racs is None and any(element.racs is not None for element in self.secure_elements):
            raise ValueError("secure elements with 'racs' need the table 'racs': this grid's key and certificate")
        return self


def origin(host: str, port: int) -> str:
    """The origin ``https://host[:port]`` (RFC 6454, 6.2): the port is left out when it is 443."""
    name = f"[{host}]" if ":" in host else host
    return f"https://{name}" if port == 443 else f"https://{name}:{port}"
