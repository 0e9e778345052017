"""Would a grid with these settings work? Looked at by ``gose check``, and by ``gose serve`` before it knocks at any card.

Each finding names the key of the settings, or the file, that it is about, and says what to do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from gose.authority import OPENID_PROVIDER, SERVICE_PROVIDER, AuthorityFolder
from gose.authority.ledger import FILE as AUDIT_FILE
from gose.cards import CardWays
from gose.certificates import client_context, server_context
from gose.racs.tls import client_side
from gose.registry import Identity, Registry, open_registry
from gose.running import RunningGrid, ask_running_grid
from gose.settings import Address, GoseSettings, SecureElementSettings
from gose.slots.connect import CardConnector, PinRefusedError
from gose.slots.errors import CardNotAdmittedError
from gose.slots.slot import SlotState
from gose.standing import RegistryStanding
from secfunet.errors import SecFuNetError
from secfunet.identity import Role, load_certificate
from secfunet.openid.realm import parse_url
from secfunet.service.audit import AuditJournal
from secfunet.service.findings import Finding, Weight

NEAR_END: Final = 30 * 86400.0  # seconds
PROVIDER_TIMEOUT: Final = 3.0
CARDS_AT_ONCE: Final = 16


def look_before_start(settings: GoseSettings, *, now: float) -> Iterator[Finding]:
    """All that ``gose serve`` needs and that is no card. Raises nothing."""
    yield from _files(settings, now)
    yield from _addresses(settings)


async def look(settings: GoseSettings, *, now: float) -> list[Finding]:
    """Everything. A card that a running grid has is not touched; one that is free is tried as ``gose serve`` would, with its PIN."""
    running = None
    try:
        running = await ask_running_grid(settings.state)
        found = [Finding("grid", message="not running" if running is None else f"running (process {running.pid})")]
    except (SecFuNetError, OSError) as error:
        found = [Finding("grid", Weight.WARNING, str(error))]
    found += _files(settings, now)
    if running is None:
        found += _addresses(settings)
    else:
        found.append(await _provider(settings))
    try:
        return found + await _cards(settings, running)
    except (SecFuNetError, OSError) as error:  # the registry, of which there is a finding already
        return [*found, Finding("secure_elements", Weight.AWAY, f"not tried: {error}")]


async def provider_problem(settings: GoseSettings) -> str | None:
    """Why the service provider would not reach the OpenID provider, by its name and over TLS; None: it does."""
    finding = await _provider(settings)
    return None if finding.weight is Weight.OK else str(finding)


# --- files


def _files(settings: GoseSettings, now: float) -> Iterator[Finding]:
    try:
        keys = AuthorityFolder(settings.authority)
        ca = keys.ca_certificate
        _ = keys.token_keys, keys.container_key
        yield _ends(str(keys.ca_path), ca, now, "a new grid needs a new 'state' folder")
        yield _ends(str(keys.path / "containers.pem"), keys.container_certificate, now, "see 'gose init'")
    except (SecFuNetError, OSError) as error:
        yield Finding("authority", Weight.WRONG, str(error))
        return
    for server, host, key in (
        (SERVICE_PROVIDER, settings.service_provider_host, "service_provider"),
        (OPENID_PROVIDER, settings.openid_provider_host, "openid_provider"),
    ):
        yield _server(keys, ca, server, host, key, now)
    yield from _state(settings, now)
    if settings.racs is not None:
        try:
            client_side(settings.racs.key, settings.racs.certificate, settings.racs.authority or keys.ca_path)
            yield _ends(
                "racs.certificate", load_certificate(settings.racs.certificate.read_bytes()), now, "'gose racs sign'"
            )
        except (SecFuNetError, OSError) as error:
            yield Finding("racs", Weight.WRONG, str(error))
    if settings.radius is not None:
        from gose.radius.server import RadiusServer

        try:
            RadiusServer.read_clients(settings.radius)
            yield Finding("radius.clients")
        except (SecFuNetError, OSError) as error:
            yield Finding("radius.clients", Weight.WRONG, str(error))


def _server(keys: AuthorityFolder, ca: x509.Certificate, server: str, host: str, key: str, now: float) -> Finding:
    path = keys.server_file(server)
    advice = "run 'gose renew-servers'"
    try:
        server_context(path)
        certificate = load_certificate(keys.read_server(server)[1])
        certificate.verify_directly_issued_by(ca)
    except (SecFuNetError, OSError) as error:
        return Finding(str(path), Weight.WRONG, str(error))
    except (ValueError, TypeError, InvalidSignature):
        return Finding(str(path), Weight.WRONG, f"was not issued by this grid's CA: {advice}")
    names = _names_in(certificate)
    if host not in names:
        known = ", ".join(sorted(names)) or "none"
        return Finding(
            str(path), Weight.WRONG, f"is not for '{host}', by which clients call the {server} ('names' or '{key}.public_host'); "
            f"it has {known}: {advice}"
        )  # fmt: skip
    return _ends(str(path), certificate, now, advice)


def _names_in(certificate: x509.Certificate) -> set[str]:
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return {*alternatives.get_values_for_type(x509.DNSName), *map(str, addresses)}


def _ends(what: str, certificate: x509.Certificate, now: float, advice: str) -> Finding:
    begin, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    day = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    if now < begin:
        # A clock that is behind when a host starts comes right by itself: no reason to stay away for good.
        return Finding(what, Weight.WARNING, "is not valid yet: is this host's clock right?")
    if now >= end:
        return Finding(what, Weight.WRONG, f"ended on {day}: {advice}")
    if end - now < NEAR_END:
        return Finding(what, Weight.WARNING, f"ends on {day}: {advice}")
    return Finding(what, message=f"until {day}")


def _state(settings: GoseSettings, now: float) -> Iterator[Finding]:
    if not os.access(settings.state, os.W_OK | os.X_OK):
        yield Finding("state", Weight.WRONG, f"{settings.state} cannot be written by the user of this process")
        return
    try:
        AuditJournal(settings.state / AUDIT_FILE).probe()
        yield Finding(str(settings.state / AUDIT_FILE))
    except (SecFuNetError, OSError) as error:
        # The grid itself writes nothing there: commands are refused, guests are not.
        yield Finding(str(settings.state / AUDIT_FILE), Weight.WARNING, str(error))
    try:
        with open_registry(settings.database) as registry:
            for role in (Role.VM, Role.HYPERVISOR, Role.SERVER):
                for identity in registry.identities(role):
                    if not identity.is_revoked and identity.expires_at - now < NEAR_END:
                        yield _identity_ends(identity, now)
            yield from _server_cards(settings, registry)
        yield Finding(str(settings.database))
    except (SecFuNetError, OSError) as error:
        yield Finding(str(settings.database), Weight.WRONG, str(error))


def _identity_ends(identity: Identity, now: float) -> Finding:
    day = time.strftime("%Y-%m-%d", time.gmtime(identity.expires_at))
    has_ended = "ended" if identity.expires_at <= now else "ends"
    return Finding(
        f"{identity.role} {identity.name}", Weight.WARNING, f"its certificate {has_ended} on {day}: enrol it again"
    )


def _server_cards(settings: GoseSettings, registry: Registry) -> Iterator[Finding]:
    for element in settings.secure_elements:
        holder = registry.in_secure_element(element.seid) if element.role == "server" else None
        if holder is None or settings.openid_provider_host in _names_in(load_certificate(holder.certificate)):
            continue
        yield Finding(
            f"card {element.seid}",
            Weight.WARNING,
            f"its certificate is not for '{settings.openid_provider_host}', so nobody believes the login page: "
            f"'gose enrol-server {holder.name} --seid {element.seid} --replace'",
        )


# --- addresses


def doors(settings: GoseSettings) -> dict[str, Address]:
    """What the grid listens at, over TCP, by the keys of the settings."""
    found = {
        "service_provider.https": settings.service_provider.https,
        "service_provider.grpc": settings.service_provider.grpc,
        "openid_provider.endpoint": settings.openid_provider.endpoint,
        "openid_provider.login": settings.openid_provider.login,
    }
    if settings.metrics_port is not None:
        found["metrics_port"] = Address("127.0.0.1", settings.metrics_port)
    return found


def _addresses(settings: GoseSettings) -> Iterator[Finding]:
    taken: dict[Address, str] = {}
    for key, address in doors(settings).items():
        if address.port and (other := taken.setdefault(address, key)) != key:
            yield Finding(key, Weight.WRONG, f"{address} is the address of '{other}' already")
        else:
            yield _can_listen(key, address, socket.SOCK_STREAM)
    if settings.radius is not None:
        yield _can_listen("radius.listen", settings.radius.listen, socket.SOCK_DGRAM)


def _can_listen(key: str, address: Address, kind: socket.SocketKind) -> Finding:
    try:
        places = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        return Finding(key, Weight.WRONG, f"{address}: the name cannot be resolved on this host ({error.strerror})")
    for family, _, protocol, _, place in places:
        with socket.socket(family, kind, protocol) as probe:
            try:
                if kind is socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(place)
            except OSError as error:
                return Finding(key, Weight.WRONG, f"{address}: {_why_not(error)}")
    return Finding(key, message=str(address))


def _why_not(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "another program listens there"
        case errno.EADDRNOTAVAIL:
            return "this host has no such address"
        case errno.EACCES:
            return "a port below 1024 needs the capability CAP_NET_BIND_SERVICE"
        case _:
            return f"cannot be listened at: {error.strerror}"


async def _provider(settings: GoseSettings) -> Finding:
    if settings.service_provider.openid_provider is not None:
        what = "service_provider.openid_provider"
        url = parse_url(settings.service_provider.openid_provider)
        host, number = url.host, url.port
    else:
        what, host, number = "names", settings.openid_provider_host, settings.openid_provider.endpoint.port
    place = Address(host, number)
    try:
        context = client_context(settings.authority / "ca.pem")
        async with asyncio.timeout(PROVIDER_TIMEOUT):
            _, writer = await asyncio.open_connection(host, number, ssl=context, server_hostname=host)
        writer.transport.abort()
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or error.reason
        return Finding(what, Weight.WRONG, f"the OpenID provider at {place} is not the one that is meant: {reason}")
    except socket.gaierror:
        return Finding(
            what,
            Weight.WRONG,
            f"this host does not know '{host}', by which the service provider asks the OpenID provider",
        )
    except (OSError, TimeoutError) as error:
        why = getattr(error, "strerror", None) or f"no answer within {PROVIDER_TIMEOUT:g} s"
        return Finding(what, Weight.AWAY, f"the OpenID provider at {place} cannot be reached: {why}")
    return Finding("openid_provider", message=f"reached at {place}")


# --- cards


async def _cards(settings: GoseSettings, running: RunningGrid | None) -> list[Finding]:
    if not settings.secure_elements:
        return [Finding("secure_elements", Weight.WARNING, "there is none: nobody can log in, and no VM has a key")]
    limit = asyncio.Semaphore(CARDS_AT_ONCE)
    known = {} if running is None else {card.seid: card for card in running.cards}
    with open_registry(settings.database) as registry:
        standing = RegistryStanding(registry, settings.database)
        try:

            async def ask(element: SecureElementSettings) -> Finding:
                card = known.get(element.seid)
                if card is not None:
                    is_fine = card.state == SlotState.IN_SERVICE.value
                    return Finding(
                        f"card {element.seid}", Weight.OK if is_fine else Weight.AWAY, card.cause or card.state
                    )
                async with limit:
                    found = await _try(element, settings, standing)
                if running is None or found.weight is not Weight.OK:
                    return found
                return Finding(found.what, Weight.WARNING, "the running grid does not have it yet: send it SIGHUP")

            return list(await asyncio.gather(*map(ask, settings.secure_elements)))
        finally:
            standing.close()


async def _try(element: SecureElementSettings, settings: GoseSettings, standing: RegistryStanding) -> Finding:
    what = f"card {element.seid}"
    try:
        card = await CardConnector(element, settings.limits, CardWays.of(settings))()
    except PinRefusedError as error:
        return Finding(what, Weight.WRONG, str(error))
    except (SecFuNetError, OSError) as error:  # TimeoutError is an OSError
        return Finding(what, Weight.AWAY, str(error) or f"{element.place} did not answer in time")
    try:
        standing.card(element.seid, await card.client.certificate())
    except CardNotAdmittedError as error:
        return Finding(what, Weight.AWAY, f"it answers and takes its PIN, and is not used: {error}")
    except (SecFuNetError, OSError) as error:
        return Finding(what, Weight.AWAY, str(error) or "it did not answer in time")
    finally:
        await card.client.close()
    return Finding(what, message=f"answers at {element.place}")
