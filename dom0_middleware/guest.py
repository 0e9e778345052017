"""One run of one domain, from the moment its channel is made until it stops: the caller that everything from that channel is."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import time
from collections.abc import Callable, Iterator
from enum import Enum

from dom0_middleware.errors import Reason, Refused, Unavailable
from dom0_middleware.guest_authority import AgentCertificate
from dom0_middleware.hypervisor import DomainState
from dom0_middleware.policy import Subject
from dom0_middleware.presence import Presence
from dom0_middleware.refusals import (
    CALLS_BURST,
    CALLS_PER_SECOND,
    OPERATIONS_BURST,
    OPERATIONS_PER_SECOND,
    WASTED_BURST,
    WASTED_PER_SECOND,
    RefusalMeter,
    RefusalPace,
)
from dom0_middleware.state import RunRecord, StateStore, VmRecord
from secfunet.service.rate import TokenBucket

# An agent renews once in two thirds of a certificate's life; this leaves room for one that restarts again and again.
# A certificate that has ended is renewed for the key that had it, in the same run, so long after its end (seconds).
MAX_LATENESS = 86_400.0
RENEWALS = 20.0
RENEWALS_PER_SECOND = 0.1
MAX_KEY = 1024  # bytes of a SubjectPublicKeyInfo: RSA-4096 has 550
# An agent needs two, and two more while it renews. Each may hold answers that nobody reads.
MAX_STREAMS = 32


class Phase(Enum):
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    ENDED = "ended"


class GuestDomain:
    """The domain that a pair of servers is made for. ``hypervisor_answers`` says whether what we know of its state still holds."""

    def __init__(
        self,
        record: VmRecord,
        store: StateStore,
        *,
        clock: Callable[[], float],
        hypervisor_answers: Callable[[], bool],
        run: RunRecord | None = None,
    ) -> None:
        self.record = record
        self.phase = Phase.STARTING
        self.domain_id: int | None = None
        self._store = store
        self._clock = clock
        self._hypervisor_answers = hypervisor_answers
        self._serials = dict(run.serials) if run is not None else {}
        self._agent_key = run.agent_key if run is not None else b""
        self._has_shown = run is not None and run.secret_forgotten
        self._changed = asyncio.Event()
        self._version = 0
        self.operations_in_flight = 0
        self.key_check = asyncio.Lock()  # see ``key_checks``
        self._streams = 0
        self.presence = Presence(clock)
        self.refusals = RefusalMeter(time.monotonic)
        self.refused_calls = RefusalPace(time.monotonic, burst=CALLS_BURST, per_second=CALLS_PER_SECOND)
        self.refused_operations = RefusalPace(time.monotonic, burst=OPERATIONS_BURST, per_second=OPERATIONS_PER_SECOND)
        self.wasted_calls = TokenBucket(WASTED_PER_SECOND, WASTED_BURST)
        self.renewals = RefusalMeter(time.monotonic, burst=RENEWALS, per_second=RENEWALS_PER_SECOND)

    @property
    def uuid(self) -> str:
        return self.record.uuid

    @property
    def subject(self) -> Subject:
        return Subject(self.record.uuid, self.record.name, self.record.vmid)

    @property
    def enrolled(self) -> bool:
        """An agent of this run has shown a certificate, and has one that has not ended."""
        now = self._clock()
        return self._has_shown and any(end > now for end in self._serials.values())

    def set_state(self, state: DomainState) -> None:
        if self.phase is not Phase.ENDED:
            self.phase = {
                DomainState.RUNNING: Phase.RUNNING,
                DomainState.PAUSED: Phase.PAUSED,
                DomainState.STOPPED: Phase.ENDED,
            }[state]

    def end(self) -> None:
        """The domain stopped: from now on nothing is permitted, and no certificate is current. There is no way back."""
        self.phase = Phase.ENDED
        self._serials.clear()
        self._agent_key = b""
        self.identity_changed()

    def invited(self) -> None:
        """It was given a new join secret: the certificates of before are not current any more, and their key is not known any more."""
        self._serials.clear()
        self._agent_key = b""
        self._has_shown = False
        self.identity_changed()

    def require_not_ended(self) -> None:
        """Raises Refused (DOMAIN_NOT_RUNNING) once the run is over; not while the domain is only paused."""
        if self.phase is Phase.ENDED:
            raise Refused(Reason.DOMAIN_NOT_RUNNING, "the domain of this channel stopped")

    def require_running(self) -> None:
        """Raises Refused (DOMAIN_NOT_RUNNING), or Unavailable (HYPERVISOR_UNAVAILABLE) while nobody can say whether it runs."""
        if self.phase is not Phase.RUNNING:
            raise Refused(Reason.DOMAIN_NOT_RUNNING, "the domain of this channel does not run")
        if not self._hypervisor_answers():
            raise Unavailable(
                Reason.HYPERVISOR_UNAVAILABLE,
                "the hypervisor cannot be asked whether this domain runs",
                retry_after=1.0,
            )

    def require_current(self, certificate: AgentCertificate) -> None:
        """Raises Refused: CERTIFICATE_FOREIGN, CERTIFICATE_EXPIRED, CERTIFICATE_NOT_CURRENT."""
        if certificate.uuid != self.uuid:
            raise Refused(
                Reason.CERTIFICATE_FOREIGN,
                "this certificate belongs to another domain",
                detail=f"the certificate of {certificate.uuid}",
            )
        if certificate.not_after <= self._clock():
            raise Refused(Reason.CERTIFICATE_EXPIRED, "this certificate has ended; renew it before, or enrol again")
        if certificate.serial not in self._serials:
            raise Refused(Reason.CERTIFICATE_NOT_CURRENT, "this certificate is not of this run of the domain")

    def require_renewable(self, untrusted_key: bytes) -> None:
        """Whether the holder of this key (SubjectPublicKeyInfo) may have its certificate renewed although that has ended.

        Compares hashes only: nothing is computed with a key that is not the run's. Raises Refused: CERTIFICATE_NOT_CURRENT (not the
        key that a certificate of this run is for), CERTIFICATE_EXPIRED (it ended more than MAX_LATENESS ago).
        """
        presented = hashlib.sha256(untrusted_key[:MAX_KEY]).digest()
        if not self._agent_key or not self._serials or not hmac.compare_digest(presented, self._agent_key):
            raise Refused(Reason.CERTIFICATE_NOT_CURRENT, "no certificate of this run of the domain is for that key")
        if max(self._serials.values()) + MAX_LATENESS <= self._clock():
            raise Refused(
                Reason.CERTIFICATE_EXPIRED,
                f"this certificate ended more than {MAX_LATENESS / 3600:g} hours ago: dom0 must invite this domain again",
            )

    def require_authorised(self) -> None:
        """Raises Refused (VM_REVOKED, TOKEN_MISSING)."""
        if self.record.revoked:
            raise Refused(Reason.VM_REVOKED, "this VM's right to its key was revoked")
        if not self.record.vm_auth_token:
            raise Refused(Reason.TOKEN_MISSING, "there is no VM-Auth-Token for this VM")

    def shows_certificate(self) -> bool:
        """Its agent called with a current certificate: it has what the join secret was for, which is forgotten with that.

        True the first time in this run.
        """
        if self._has_shown:
            return False
        try:
            self._store.forget_secret(self.uuid)
        except Unavailable:
            return False  # the next call tries again: who has that key has its certificate already
        self._has_shown = True
        return True

    def make_first(self, certificate: AgentCertificate, key: bytes) -> None:
        """``certificate`` is current beside those before it, which are for the same key: nobody knows yet which of them arrived.

        ``key``: the hash of its key (``enrolment.key_hash``).
        """
        self._take({**self._serials, certificate.serial: certificate.not_after}, key)

    def make_current(self, certificate: AgentCertificate, key: bytes, *, renewed: int | None = None) -> None:
        """``certificate`` is current from now on; of those before it only ``renewed``, the serial that asked for it."""
        kept = {serial: end for serial, end in self._serials.items() if serial == renewed}
        self._take({**kept, certificate.serial: certificate.not_after}, key)

    def _take(self, serials: dict[int, float], key: bytes) -> None:
        self._store.set_serials(self.uuid, serials, key)
        self._serials, self._agent_key = serials, key

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """One stream of this domain, while the context lasts. Raises Refused (TOO_MANY_STREAMS)."""
        if self._streams >= MAX_STREAMS:
            raise Refused(Reason.TOO_MANY_STREAMS, f"this VM has {MAX_STREAMS} streams open already", retry_after=1.0)
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    @property
    def identity_version(self) -> int:
        """Counts the changes of the identity."""
        return self._version

    def identity_changed(self) -> None:
        """Wakes whoever waits for a change of the identity."""
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, since: int, *, timeout: float) -> None:
        """Returns once the identity's version is not ``since`` any more, or after ``timeout`` seconds."""
        if self._version == since:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._changed.wait()
