"""One card in its place, as its settings say, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from secfunet.service.files import private_folder
from secfunet.service.reload import Reloaded, Rereading, changed_keys
from secure_element.attachment import CardAttachment
from secure_element.card_os import CardOs
from secure_element.latency import NOTICE, LatencyModel
from secure_element.metrics import CardMetrics
from secure_element.server import CardServer
from secure_element.session import CardHost
from secure_element.settings import CardSettings
from secure_element.store import CardStore, StoreSecret

log = logging.getLogger(__name__)


class ServedCard:
    """A card that is served by ``host``."""

    def __init__(self, host: CardHost, file: Rereading[CardSettings]) -> None:
        self.host = host
        self._file = file

    async def reload(self) -> None:
        """Reads the settings again (SIGHUP): the log level counts at once, all else of a card is decided at its start."""
        new = self._file.again()
        if new is None:
            return
        result = Reloaded(changed=[key for key in changed_keys(self._file.settings, new) if key == "log_level"])
        logging.getLogger().setLevel(new.log_level.upper())
        result.needs_restart = self._file.adopt(new, ("log_level",))
        result.say()


@contextlib.asynccontextmanager
async def serving(
    settings: CardSettings, secret: StoreSecret, *, read_again: Callable[[], CardSettings] | None = None
) -> AsyncIterator[ServedCard]:
    """Opens the store with its ``secret`` and serves the card: at its Unix socket, or in the virtual reader that it attaches itself to.

    Raises StoreError, SocketPathError, SocketInUse, OSError.
    """
    latency = None
    if settings.benchmark_latency is not None:
        log.warning(NOTICE, extra={"store": str(settings.store)})
        latency = LatencyModel(settings.benchmark_latency)
    with (
        contextlib.closing(CardStore.open(settings.store, secret)) as store,
        contextlib.closing(CardMetrics(settings.metrics_port)) as metrics,
    ):
        card = CardOs(store, settings.options)
        host: CardAttachment | CardServer
        if settings.reader_address is not None:
            host = CardAttachment(card, settings.reader_address, observe=metrics.observe, latency=latency)
        elif settings.socket is not None:
            private_folder(settings.socket.parent)
            mode = int(settings.socket_mode, 8)
            host = CardServer(card, settings.socket, socket_mode=mode, observe=metrics.observe, latency=latency)
        else:
            raise AssertionError("the settings give every card one place")
        async with host:
            yield ServedCard(host, Rereading(settings, read_again))
