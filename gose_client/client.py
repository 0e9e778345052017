"""The client of one grid: see GoseClient."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from gose_client.cards import CarefulCards
from gose_client.channel import OperationsChannel
from gose_client.connectors import Connectors, explain
from gose_client.content_keys import ContentKeys
from gose_client.deadline import Deadline
from gose_client.errors import GoseClientError, GridRefusedError, GridUnavailableError
from gose_client.http_connections import HttpConnections
from gose_client.login import Grant, Logins
from gose_client.session import VmSession
from gose_client.settings import GoseClientSettings
from gose_client.trial import Link, Trial
from secfunet.apdu import ApduError
from secfunet.card.errors import CardError
from secfunet.card.pool import CardPool
from secfunet.container import ContainerProfile
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.rpc.correlation import clean_correlation
from secfunet.rpc.reasons import Healing
from secfunet.vm_auth_token import unverified_claims

_log = logging.getLogger(__name__)

_MAX_BEGINNINGS = 4
_MAX_LOGINS = 8  # at the same time
_MAX_AUTHORITIES = 1024  # the grid's, and a bound VM's own certificate each


class GoseClient:
    """Logs a hypervisor in, opens sessions for its VMs, and has its card unwrap the keys of their containers.

    An asynchronous context manager. Entering it asks nobody: the grid may be away then. Connections, the login at the OpenID
    provider and content keys are shared by all sessions.
    """

    def __init__(
        self, settings: GoseClientSettings, cards: CardPool, *, clock: Callable[[], float] = time.time
    ) -> None:
        """Reads the CA's certificate. Raises OSError or IdentityError."""
        self._settings = settings
        self._clock = clock
        self._cards = CarefulCards(cards)
        authority: x509.Certificate = load_certificate(settings.authority.read_bytes())
        connectors = Connectors(settings, self._cards, authority)
        self._http = HttpConnections(
            connectors.http(),
            limit=settings.connections,
            idle_timeout=settings.idle_timeout,
            answer_timeout=settings.answer_timeout,
        )
        self._trial = Trial(settings, self._http, self._cards, connectors)
        self._trying: asyncio.Task[tuple[Link, ...]] | None = None
        self._logins = Logins(settings, self._http, self._cards, authority, clock)
        self._channel = OperationsChannel(settings, connectors)
        self._keys = ContentKeys(
            self._cards,
            ContainerProfile.named(settings.container_profile),
            limit=settings.content_keys,
            card_timeout=settings.card_timeout,
        )
        # Newest last. A session's containers may be opened while another one, of a renewed authority, is already open.
        self._authorities: dict[bytes, rsa.RSAPublicKey] = {}
        self._login_places = asyncio.Semaphore(_MAX_LOGINS)
        self._sessions: set[VmSession] = set()

    async def __aenter__(self) -> Self:
        await self._channel.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions), return_exceptions=True)
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)
        await self._channel.close()
        await self._http.close()
        await self._keys.close()

    async def open_session(
        self, vm_certificate: bytes, vm_auth_token: str, *, timeout: float, correlation: str = ""
    ) -> VmSession:
        """A session for the VM of ``vm_certificate`` (DER) on this hypervisor. ``correlation`` (letters, digits, "-") follows the login
        through the grid's log.

        Raises GridRefusedError with the grid's reason, DeadlineError after ``timeout`` seconds, GridUntrustedError, HypervisorCardError,
        ProtocolViolationError.
        """
        correlation = clean_correlation(correlation)
        deadline = Deadline(timeout)

        async def log_in(until: Deadline) -> Grant:
            return await self._log_in(vm_certificate, vm_auth_token, correlation, until)

        async with deadline.enforced():
            grant = await log_in(deadline)
        session = VmSession(grant, log_in, self._channel, self._settings, clock=self._clock, correlation=correlation)
        self._sessions = {one for one in self._sessions if not one.is_closed} | {session}
        return session

    async def content_key(self, container: bytes, *, timeout: float) -> bytes:
        """The 32-byte key of a container's body. The trailer is verified first; the card is asked once a key.

        Raises ContainerRefusedError (uniform, whatever is wrong with the container), DeadlineError, GridUnavailableError with reason
        HYPERVISOR_CARD_UNAVAILABLE, HypervisorCardError.
        """
        return await self._keys.key_of(container, [*reversed(self._authorities.values())], timeout=timeout)

    async def card_lives(self, *, timeout: float) -> None:
        """A sign of life of the hypervisor's card. Raises GridUnavailableError (HYPERVISOR_CARD_UNAVAILABLE), HypervisorCardError."""
        try:
            async with self._cards.lease(timeout=timeout) as card:
                await card.state()
        except (CardError, ApduError) as error:
            raise explain(error, "the hypervisor's card") from error

    async def look(self, *, timeout: float) -> tuple[Link, ...]:
        """Would a login work now? Callers at the same time share one look (``trial``); ``timeout``: seconds for each of its three steps."""
        if self._trying is None or self._trying.done():
            self._trying = asyncio.ensure_future(self._trial.look(timeout=timeout))
        return await asyncio.shield(self._trying)

    async def _log_in(self, vm_certificate: bytes, vm_auth_token: str, correlation: str, deadline: Deadline) -> Grant:
        """Logs in until it succeeds, is refused, or the caller's time is over (the caller enforces it)."""
        beginnings = 0
        while True:
            try:
                async with self._login_places:
                    grant = await self._logins.attempt(vm_certificate, vm_auth_token, correlation)
            except GridRefusedError as error:
                if error.healing is Healing.LOGIN and beginnings < _MAX_BEGINNINGS:
                    # The login was lost on its way (a restarted grid has forgotten it): from the beginning.
                    beginnings += 1
                    self._logins.forget()
                elif error.healing not in (Healing.TIME, Healing.ROOM):
                    raise
                await deadline.pause_or_refuse(error)
            except GridUnavailableError as error:
                await deadline.pause(error)
            except (CardError, ApduError) as error:
                translated: GoseClientError = explain(error, "the hypervisor's card")
                if not isinstance(translated, GridUnavailableError):
                    raise translated from error
                await deadline.pause(translated)
            else:
                if unverified_claims(vm_auth_token).from_card:
                    # The token came from whoever started the VM, not through the grid: what the service provider says of the authority of
                    # a bound VM's containers is not believed.
                    grant = dataclasses.replace(grant, container_authority=vm_certificate)
                self._remember_authority(grant.container_authority)
                _log.info(
                    "session opened",
                    extra={"vmid": grant.vmid, "hvid": grant.hvid, "correlation": correlation},
                )
                return grant

    def _remember_authority(self, certificate: bytes) -> None:
        key = self._authorities.pop(certificate, None) or rsa_key_of(load_certificate(certificate))
        self._authorities[certificate] = key
        while len(self._authorities) > _MAX_AUTHORITIES:
            del self._authorities[next(iter(self._authorities))]
