"""The hypervisor through libvirt-python: its calls in a thread, its events from libvirt's own loop in another, both into asyncio.

A lost connection heals: whatever fails because the connection is gone marks it lost, and a keeper opens it again until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import libvirt

from dom0_middleware import domain_xml
from dom0_middleware.errors import MiddlewareError, Reason, Refused, Unavailable
from dom0_middleware.hypervisor import (
    ConnectionListener,
    DomainEvent,
    DomainEventKind,
    DomainInfo,
    DomainSpec,
    DomainState,
    EventListener,
)

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

# virDomainEventType -> what it means here; all else (defined, shutdown asked for) changes nothing for us.
_EVENTS = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: DomainEventKind.STARTED,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: DomainEventKind.SUSPENDED,
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: DomainEventKind.SUSPENDED,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: DomainEventKind.RESUMED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: DomainEventKind.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_CRASHED: DomainEventKind.STOPPED,
    libvirt.VIR_DOMAIN_EVENT_UNDEFINED: DomainEventKind.UNDEFINED,
}
_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.RUNNING,
    # Asked to shut down, but still there: it keeps its channel until it stops.
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.PAUSED,
}
_LOST = {
    libvirt.VIR_ERR_INVALID_CONN,
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_SYSTEM_ERROR,
}
_EXISTS = {libvirt.VIR_ERR_DOM_EXIST}
_MIGRATE = (
    libvirt.VIR_MIGRATE_LIVE
    | libvirt.VIR_MIGRATE_PEER2PEER
    | libvirt.VIR_MIGRATE_PERSIST_DEST
    | libvirt.VIR_MIGRATE_UNDEFINE_SOURCE
)
_KEEPALIVE_SECONDS = 5
_KEEPALIVE_COUNT = 3

_loop_lock = threading.Lock()
_loop_thread: threading.Thread | None = None


def _run_libvirt_events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:
            log.exception("libvirt's event loop failed once; it goes on")


def _start_libvirt_events() -> None:
    """One event loop a process, before the first connection is opened (libvirt's rule); it never ends."""
    global _loop_thread
    with _loop_lock:
        if _loop_thread is None:
            # Errors come as exceptions; without this libvirt also prints each one.
            libvirt.registerErrorHandler(lambda _context, _error: None, None)
            libvirt.virEventRegisterDefaultImpl()
            _loop_thread = threading.Thread(target=_run_libvirt_events, name="libvirt-events", daemon=True)
            _loop_thread.start()


class LibvirtHypervisor:
    """See ``hypervisor.Hypervisor``. ``template`` is the text of a domain XML; ``heal_interval`` in seconds."""

    def __init__(self, uri: str, *, template: str | None = None, heal_interval: float = 1.0) -> None:
        self._uri = uri
        self._template = template
        self._heal_interval = heal_interval
        # A few threads: a domain that takes long to boot does not hold up the others. Who needs an order of calls waits for their answers.
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="libvirt-call")
        self._connection: Any = None
        self._callback = -1
        self._domain_type = "xen"
        self._lost = asyncio.Event()
        self._connected = False
        self._keeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_event: EventListener = lambda event: None
        self._on_connection: ConnectionListener = lambda connected: None

    @property
    def connected(self) -> bool:
        return self._connected

    async def connect(self, on_event: EventListener, on_connection: ConnectionListener) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._on_connection = on_connection
        _start_libvirt_events()
        try:
            await self._in_thread(self._open)
        except libvirt.libvirtError as error:
            raise Unavailable(
                Reason.HYPERVISOR_UNAVAILABLE, f"libvirt at {self._uri} cannot be reached: {error}"
            ) from error
        self._connected = True
        self._keeper = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._connected = False
        await self._in_thread(self._drop)
        self._threads.shutdown(wait=False)

    async def define(self, spec: DomainSpec) -> DomainInfo:
        def act(connection: Any) -> DomainInfo:
            for found in connection.listAllDomains():
                # libvirt would replace a definition of the same name and UUID; this room never redefines.
                if found.name() == spec.name or found.UUIDString() == spec.uuid:
                    raise Refused(Reason.VM_EXISTS, f"the hypervisor already has a domain '{found.name()}'")
            xml = domain_xml.domain_xml(spec, domain_type=self._domain_type, template=self._template)
            return _info(connection.defineXML(xml))

        return await self._call(act)

    async def create(self, uuid: str, *, paused: bool = False) -> DomainInfo:
        def act(connection: Any) -> DomainInfo:
            domain = connection.lookupByUUIDString(uuid)
            if paused:
                domain.createWithFlags(libvirt.VIR_DOMAIN_START_PAUSED)
            else:
                domain.create()
            return _info(domain)

        return await self._call(act)

    async def suspend(self, uuid: str) -> None:
        await self._call(lambda connection: connection.lookupByUUIDString(uuid).suspend())

    async def resume(self, uuid: str) -> None:
        await self._call(lambda connection: connection.lookupByUUIDString(uuid).resume())

    async def shutdown(self, uuid: str) -> None:
        await self._call(lambda connection: connection.lookupByUUIDString(uuid).shutdown())

    async def destroy(self, uuid: str) -> None:
        await self._call(lambda connection: connection.lookupByUUIDString(uuid).destroy())

    async def undefine(self, uuid: str) -> None:
        await self._call(lambda connection: connection.lookupByUUIDString(uuid).undefine())

    async def migrate(self, uuid: str, uri: str) -> None:
        """Peer to peer: this host's libvirt speaks with that at ``uri`` by itself, and goes on if this daemon ends."""

        def act() -> None:
            # A connection of its own: the other one's keep-alive, and its loss, are not to be mistaken for the end of this.
            connection = libvirt.open(self._uri)
            try:
                connection.lookupByUUIDString(uuid).migrateToURI3(uri, {}, _MIGRATE)
            finally:
                connection.close()

        try:
            await _in_own_thread(act)
        except libvirt.libvirtError as error:
            raise Refused(Reason.HYPERVISOR_REFUSED, f"the hypervisor refuses: {error}") from error

    async def migrating(self, uuid: str) -> bool:
        def act(connection: Any) -> bool:
            domain = connection.lookupByUUIDString(uuid)
            try:
                return bool(domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE)
            except libvirt.libvirtError:
                return False  # stopped, or of a driver that knows no jobs

        return await self._call(act)

    async def info(self, uuid: str) -> DomainInfo | None:
        try:
            return await self._call(lambda connection: _info(connection.lookupByUUIDString(uuid)))
        except Refused as error:
            if error.reason is Reason.VM_UNKNOWN:
                return None
            raise

    async def list(self) -> tuple[DomainInfo, ...]:
        return await self._call(lambda connection: tuple(_info(domain) for domain in connection.listAllDomains()))

    async def _in_thread(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def _call(self, act: Callable[[Any], Answer]) -> Answer:
        if not self._connected:
            raise Unavailable(
                Reason.HYPERVISOR_UNAVAILABLE, "the hypervisor cannot be reached", retry_after=self._heal_interval
            )
        try:
            return await self._in_thread(lambda: act(self._present()))
        except libvirt.libvirtError as error:
            raise self._translated(error) from error

    def _translated(self, error: Any) -> MiddlewareError:
        code = error.get_error_code()
        if code in _LOST:
            self._mark_lost()
            return Unavailable(
                Reason.HYPERVISOR_UNAVAILABLE, "the hypervisor cannot be reached", retry_after=self._heal_interval
            )
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return Refused(Reason.VM_UNKNOWN, "the hypervisor has no such domain")
        if code in _EXISTS:
            return Refused(Reason.VM_EXISTS, f"the hypervisor refuses: {error}")
        return Refused(Reason.HYPERVISOR_REFUSED, f"the hypervisor refuses: {error}")

    def _mark_lost(self) -> None:
        if self._connected:
            self._connected = False
            log.warning("the connection to libvirt is lost", extra={"uri": self._uri})
            self._on_connection(False)
        self._lost.set()

    async def _keep_connected(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._lost.wait(), self._heal_interval)
            if self._connected and not await self._in_thread(self._alive):
                self._mark_lost()
            if self._connected:
                continue
            try:
                await self._in_thread(self._open)
            except libvirt.libvirtError as error:
                log.debug("libvirt still does not answer: %s", error)
                await asyncio.sleep(self._heal_interval)
                continue
            self._lost.clear()
            self._connected = True
            log.info("the connection to libvirt is back", extra={"uri": self._uri})
            self._on_connection(True)

    # Below: in the thread of libvirt's calls.

    def _open(self) -> None:
        self._drop()
        connection = libvirt.open(self._uri)
        with contextlib.suppress(libvirt.libvirtError):  # local drivers have no keep-alive, and need none
            connection.setKeepAlive(_KEEPALIVE_SECONDS, _KEEPALIVE_COUNT)
        with contextlib.suppress(libvirt.libvirtError):
            connection.registerCloseCallback(lambda *_: self._tell(self._mark_lost), None)
        self._callback = connection.domainEventRegisterAny(
            None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._lifecycle, None
        )
        self._domain_type = {"TEST": "test", "QEMU": "kvm"}.get(connection.getType(), "xen")
        self._connection = connection

    def _present(self) -> Any:
        connection = self._connection
        if connection is None:
            # Between the question whether we are connected and its turn in this thread.
            raise Unavailable(
                Reason.HYPERVISOR_UNAVAILABLE, "the hypervisor cannot be reached", retry_after=self._heal_interval
            )
        return connection

    def _drop(self) -> None:
        if self._connection is not None:
            # A callback that stays registered keeps the connection open.
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.domainEventDeregisterAny(self._callback)
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.unregisterCloseCallback()
            with contextlib.suppress(libvirt.libvirtError):
                self._connection.close()
            self._connection = None

    def _alive(self) -> bool:
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False

    # Below: in the thread of libvirt's events.

    def _lifecycle(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: object) -> None:
        kind = _EVENTS.get(event)
        if event == libvirt.VIR_DOMAIN_EVENT_STOPPED and detail == libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED:
            kind = DomainEventKind.MIGRATED
        if kind is not None:
            happened = DomainEvent(domain.UUIDString(), domain.name(), kind)
            self._tell(lambda: self._on_event(happened))

    def _tell(self, what: Callable[[], None]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop closed in between
                self._loop.call_soon_threadsafe(what)


async def _in_own_thread(work: Callable[[], None]) -> None:
    """For what takes minutes. The thread does not keep this process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell(error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except Exception as raised:  # noqa: BLE001 - raised where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop closed in between
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=run, name="libvirt-migration", daemon=True).start()
    await done


def _info(domain: Any) -> DomainInfo:
    state, reason = domain.state()
    if (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION):
        # What the libxl driver says for good of a domain that it could not send, though it goes on; and of one that stands still at the end
        # of its way, which asks for nothing meanwhile.
        state = libvirt.VIR_DOMAIN_RUNNING
    # An active domain in a state that we do not know is not running for us.
    known = _STATES.get(state, DomainState.PAUSED) if domain.isActive() else DomainState.STOPPED
    number = domain.ID()
    return DomainInfo(
        uuid=domain.UUIDString(),
        name=domain.name(),
        state=known,
        domain_id=number if known is not DomainState.STOPPED and number >= 0 else None,
        vmid=_vmid(domain),
    )


def _vmid(domain: Any) -> str | None:
    try:
        metadata = domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, domain_xml.NAMESPACE, 0)
    except libvirt.libvirtError:
        return None
    return domain_xml.vmid_in(metadata)
