"""A service provider that lies: ``gose`` as it is, with the grid's own keys and cards, but for what it answers.

``python tests/support/hostile_grid.py FILE serve --config …``: FILE holds the name of the lie to tell from now on, and is read for each
batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gose.cli import main
from gose.service_provider.execution import BatchAnswer, Executor
from gose.sessions import Session
from secfunet.container import ContainerSealer
from secfunet.gose.v1 import operation_pb2
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.operation import request_digest

FORGED = b"\x5a" * 256  # the "signature" of a forged result

_honest = Executor.execute
_last: list[bytes] = []  # containers of the batch before


def tampered(executor: Any, session: Session, operations: Sequence[operation_pb2.Operation], good: list[bytes]) -> None:
    """One bit of the body."""
    container = bytearray(good[0])
    container[len(container) // 2] ^= 1
    good[0] = bytes(container)


def swapped(executor: Any, session: Session, operations: Sequence[operation_pb2.Operation], good: list[bytes]) -> None:
    """A good answer, to what was asked before."""
    good[:] = _last


def forged(executor: Any, session: Session, operations: Sequence[operation_pb2.Operation], good: list[bytes]) -> None:
    """A result of its own making, under the key that it seals the results of unbound VMs with."""
    results = [
        operation_pb2.Result(request_id=one.request_id, request_digest=request_digest(one), output=FORGED)
        for one in operations
    ]
    answer = operation_pb2.ResultSet(vmid=session.vmid, hvid=session.hvid, time=int(executor._clock()), results=results)
    recipient = rsa_key_of(load_certificate(executor._standing.hypervisor(session.hvid).certificate))
    sealer = ContainerSealer(recipient, executor._container_key, executor._profile)
    good[:] = [sealer.seal(answer.SerializeToString())]


LIES: dict[str, Callable[..., None]] = {lie.__name__: lie for lie in (tampered, swapped, forged)}


def _chosen() -> str:
    return _file.read_text()


async def execute(
    executor: Executor, session: Session, operations: Sequence[operation_pb2.Operation], **more: Any
) -> BatchAnswer:
    answer: BatchAnswer = await _honest(executor, session, operations, **more)
    good = list(answer.containers)
    if lie := LIES.get(_chosen()):
        lie(executor, session, operations, answer.containers)
    _last[:] = good
    return answer


if __name__ == "__main__":
    _file = Path(sys.argv.pop(1))
    Executor.execute = execute  # type: ignore[method-assign]  # that is the point
    main()
