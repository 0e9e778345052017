"""What PC/SC costs: the same software card at a Unix socket, and in a virtual reader of a real pcscd."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from bench.plan import Plan, times
from bench.rows import Row
from demo.readers import Pcscd, free_ports
from secfunet.card import CardClient, KeyAlgorithm
from secfunet.card.client import KeyRequest
from secfunet.card.instructions import KeyOperation
from secfunet.gose.v1 import operation_pb2
from tests.support.cards import personalise, running_card
from tests.support.pki import CertificateAuthority

AT_ONCE = 8
REQUEST: KeyRequest = (KeyOperation.SIGN, operation_pb2.SIGNATURE_SCHEME_ECDSA_SHA256, bytes(32))


async def measure(plan: Plan) -> None:
    """Three rows for each way, those through PC/SC beside the others."""
    folder = Path(tempfile.mkdtemp(prefix="sf-"))
    pcscd = Pcscd(folder, "pcscd-1", free_ports(1), folder / "pcscd-1.log")
    authority = CertificateAuthority()
    try:
        await pcscd.start()
        async with (
            running_card(folder, name="socket") as at_socket,
            running_card(folder, name="reader", reader=pcscd.readers[0]) as in_reader,
        ):
            clients = []
            for card in (at_socket, in_reader):
                await personalise(card, authority, "vm", algorithm=KeyAlgorithm.P_256)
                clients.append(await card.connect("vm"))
            beside = await _rows(plan, clients[0], "at a Unix socket")
            for row, other in zip(await _rows(plan, clients[1], "through PC/SC"), beside, strict=True):
                plan.add(row.against(other))
            for client in clients:
                await client.close()
    finally:
        await pcscd.stop()
        shutil.rmtree(folder)


async def _rows(plan: Plan, client: CardClient, way: str) -> list[Row]:
    rows = [
        Row.of(f"a command that does nothing, {way}", "ms", await times(plan, client.pin_attempts)),
        Row.of(f"P-256 signature, {way}", "ms", await times(plan, lambda: client.operate([REQUEST]))),
        Row.of(
            f"{AT_ONCE} P-256 signatures at once, {way}",
            "ms",
            await times(plan, lambda: client.operate([REQUEST] * AT_ONCE)),
        ),
    ]
    return [plan.add(row) for row in rows]
