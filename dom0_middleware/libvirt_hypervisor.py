"""The hypervisor through libvirt-python: its calls in a thread, its events from libvirt's own loop in another, both into asyncio.

A lost connection heals: whatever fails because the connection is gone marks it lost, and a keeper opens it again until it answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import libvirt

from dom0_middleware import domain_xml
from dom0_middleware.domain_template import DomainTemplate, TemplateError
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
_DEFINED = libvirt.VIR_DOMAIN_VCPU_CONFIG
_PROBES = tuple(
    DomainSpec("5ecf0e70-0000-4000-8000-000000000001", "secfunet-template-check", "A" * 43, memory_mib, vcpus)
    for memory_mib, vcpus in ((256, 1), (1280, 3))
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
    """See ``hypervisor.Hypervisor``. ``heal_interval`` in seconds.

    ``connect`` raises TemplateError, too, if libvirt makes no domain from the ``template`` that has what was asked for.
    """

    def __init__(self, uri: str, *, template: DomainTemplate | None = None, heal_interval: float = 1.0) -> None:
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
        try:
            await self._in_thread(self._try_template)
        except BaseException:
            await self._in_thread(self._drop)
            raise
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
            # libvirt would replace a definition of the same name and UUID; this room never redefines.
            for find, wanted in ((connection.lookupByName, spec.name), (connection.lookupByUUIDString, spec.uuid)):
                with _unless_unknown():
                    found = find(wanted)
                    raise Refused(Reason.VM_EXISTS, f"the hypervisor already has a domain '{found.name()}'")
            return _info(self._define(connection, spec))

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

    async def undefine(self, uuid: str) -> tuple[str, ...]:
        return await self._call(lambda connection: _undefine(connection.lookupByUUIDString(uuid)))

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
            raise Refused(Reason.LIBVIRT_REFUSED, f"the hypervisor refuses: {error}") from error

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

    async def list(self, uuids: Collection[str]) -> tuple[DomainInfo, ...]:
        def act(connection: Any) -> tuple[DomainInfo, ...]:
            found = []
            for domain in connection.listAllDomains():
                # Its UUID came with it; what _info asks is a question to libvirt each, and nobody's but ours are of interest.
                if domain.UUIDString() in uuids:
                    with _unless_unknown():
                        found.append(_info(domain))
            return tuple(found)

        return await self._call(act)

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
        return Refused(Reason.LIBVIRT_REFUSED, f"the hypervisor refuses: {error}")

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

    def _define(self, connection: Any, spec: DomainSpec) -> Any:
        """Raises Refused (LIBVIRT_REFUSED) if libvirt took the XML, and made something else of it than what was asked for."""
        xml = domain_xml.domain_xml(spec, domain_type=self._domain_type, template=self._template)
        domain = connection.defineXML(xml)
        try:
            vcpus = [domain.vcpusFlags(_DEFINED), domain.vcpusFlags(_DEFINED | libvirt.VIR_DOMAIN_VCPU_MAXIMUM)]
            memory_mib = domain.maxMemory() / 1024
            if vcpus != [spec.vcpus, spec.vcpus] or memory_mib != spec.memory_mib:
                raise Refused(
                    Reason.LIBVIRT_REFUSED,
                    f"the hypervisor made a domain with {vcpus[0]} of {vcpus[1]} vCPUs and {memory_mib:g} MiB of memory,"
                    f" where {spec.vcpus} vCPUs and {spec.memory_mib} MiB were asked for",
                )
        except BaseException:
            _undefine(domain)
            raise
        return domain

    def _try_template(self) -> None:
        """Defines two domains of different sizes, one after the other, and removes them: whether it works is not to be learnt from the
        first VM. Both have a name and a UUID that only they have, so that what a crash left is replaced."""
        if self._template is None:
            return
        for spec in _PROBES:
            try:
                _undefine(self._define(self._connection, spec))
            except (libvirt.libvirtError, Refused) as error:
                if isinstance(error, libvirt.libvirtError) and error.get_error_code() in _LOST:
                    raise Unavailable(
                        Reason.HYPERVISOR_UNAVAILABLE, f"libvirt at {self._uri} cannot be reached: {error}"
                    ) from error
                raise TemplateError(
                    self._template.path,
                    f"libvirt makes no domain with {spec.vcpus} vCPUs and {spec.memory_mib} MiB from it: {error}",
                ) from error

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


@contextlib.contextmanager
def _unless_unknown() -> Iterator[None]:
    """Lets a look for a domain find none."""
    try:
        yield
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise


def _undefine(domain: Any) -> tuple[str, ...]:
    """With what libvirt keeps of it besides; says what that was. Only what is there is named: not every driver knows every flag."""
    flags, named = 0, []
    for flag, (name, is_there) in _BESIDES.items():
        # An error: a driver that has no such thing.
        with contextlib.suppress(libvirt.libvirtError):
            if is_there(domain):
                flags |= flag
                named.append(name)
    try:
        domain.undefineFlags(flags) if flags else domain.undefine()
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_INVALID_ARG or not flags & _NVRAM:
            raise
        # A driver of firmware that keeps its variables itself.
        domain.undefineFlags(flags & ~_NVRAM)
        named.remove(_BESIDES[_NVRAM][0])
    return tuple(named)


def _has_nvram(domain: Any) -> bool:
    # libvirt's own print of it; a file that libvirt made from a template at the first start, or one that the definition names.
    return domain_xml.has_nvram(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


_NVRAM = libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
_BESIDES: dict[int, tuple[str, Callable[[Any], bool]]] = {
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE: (
        "its saved memory (managed save)",
        lambda domain: bool(domain.hasManagedSaveImage()),
    ),
    libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA: (
        "what libvirt knew of its snapshots",
        lambda domain: bool(domain.snapshotNum()),
    ),
    libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA: (
        "what libvirt knew of its checkpoints",
        lambda domain: bool(domain.listAllCheckpoints()),
    ),
    _NVRAM: ("the variables of its firmware (NVRAM)", _has_nvram),
}


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
