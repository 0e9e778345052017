"""The process between a program and one pcscd (``python -m secfunet.pcsc.worker``): each card has a thread and a connection of its own.

Calls of PC/SC cannot be cancelled. So a thread may hang with a card that does not answer, and nothing but that reader hangs with it: the
program gives the connection up, a second one for the same reader is refused at once, and the thread gives the card back when it can. The
process ends, threads that hang or not, when the program has closed its end of the control socket (descriptor 0) or is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Final

from secfunet.errors import SecFuNetError
from secfunet.pcsc.frames import Frame, FrameDecoder, FrameError, Kind, encode_readers
from secfunet.pcsc.reader import BUSY_PATIENCE, ReaderBusyError, ReaderCard, ReaderGoneError, seen_readers
from secfunet.service.daemon import forbid_core_dumps

CONTROL: Final = 0
MAX_CONNECTIONS: Final = 256
SYSTEM_DAEMON: Final = "/run/pcscd/pcscd.comm"
_PIECE: Final = 1 << 17
_STACK: Final = 512 * 1024


class _ReadersInUse:
    """Which readers a thread of this process is at."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Raises ReaderBusyError if another thread does not leave the reader in a moment."""
        with self._changed:
            if not self._changed.wait_for(lambda: name not in self._names, BUSY_PATIENCE):
                raise ReaderBusyError(f"the card in {name} is in use here, or has not answered its last command yet")
            self._names.add(name)
        try:
            yield
        finally:
            with self._changed:
                self._names.discard(name)
                self._changed.notify_all()


class _Connection:
    """One card's conversation with the program."""

    def __init__(self, stream: socket.socket, readers: _ReadersInUse, where: str) -> None:
        self._stream = stream
        self._readers = readers
        self._where = where
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []
        self._answers: list[bytes] = []

    def serve(self) -> None:
        """Until the program closes it, or the card is gone."""
        with self._stream, contextlib.suppress(OSError, FrameError):
            try:
                self._serve()
            except ReaderBusyError as error:
                self._answer(Kind.BUSY, str(error).encode())
            except ReaderGoneError as error:
                self._answer(Kind.GONE, str(error).encode())
            self._flush()

    def _serve(self) -> None:
        request = self._next()
        if request is None:
            return
        if request.kind is Kind.LIST:
            self._answer(Kind.DONE, encode_readers(seen_readers(self._where)))
        elif request.kind is Kind.OPEN:
            with self._readers.one(request.text):
                card = ReaderCard(request.text, self._where)
                try:
                    self._answer(Kind.DONE, card.atr)
                    closing = self._serve_card(card)
                finally:
                    card.close()
            if closing:
                self._answer(Kind.DONE)

    def _serve_card(self, card: ReaderCard) -> bool:
        """Whether the program wants to be told that the card was given back."""
        while (request := self._next()) is not None:
            match request.kind:
                case Kind.TRANSMIT:
                    self._answer(Kind.DONE, card.transmit(request.body))
                case Kind.RESET_WARM | Kind.RESET_COLD:
                    self._answer(Kind.DONE, card.reset(cold=request.kind is Kind.RESET_COLD))
                case Kind.CLOSE:
                    return True
                case _:
                    return False
        return False

    def _next(self) -> Frame | None:
        """The next request; answers are sent before this waits for it. None: the program is gone."""
        while not self._frames:
            self._flush()
            untrusted = self._stream.recv(_PIECE)
            if not untrusted:
                return None
            self._frames = self._decoder.feed(untrusted)
        return self._frames.pop(0)

    def _answer(self, kind: Kind, body: bytes = b"") -> None:
        self._answers.append(Frame(kind, body).encode())

    def _flush(self) -> None:
        answers, self._answers = self._answers, []
        if answers:
            self._stream.sendall(b"".join(answers))


def serve(control: socket.socket, where: str) -> None:
    """Takes connections (a descriptor with each message) until ``control`` ends."""
    readers = _ReadersInUse()
    places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def run(stream: socket.socket) -> None:
        try:
            _Connection(stream, readers, where).serve()
        finally:
            places.release()

    threading.stack_size(_STACK)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        for descriptor in descriptors:
            stream = socket.socket(fileno=descriptor)
            if places.acquire(blocking=False):
                threading.Thread(target=run, args=(stream,), daemon=True).start()
            else:
                stream.close()


def main() -> None:
    """The process: SIGTERM and SIGINT are the program's affair, which closes the control socket when it has given its cards back."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    forbid_core_dumps()
    where = f"pcscd at {os.environ.get('PCSCLITE_CSOCK_NAME', SYSTEM_DAEMON)}"
    try:
        serve(socket.socket(fileno=CONTROL), where)
    except (OSError, SecFuNetError) as error:
        sys.stderr.write(f"PC/SC worker: {error}\n")
    os._exit(0)  # threads may hang in PC/SC: they are not waited for


if __name__ == "__main__":
    main()
