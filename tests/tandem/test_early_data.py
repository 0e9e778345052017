"""A client that holds another server's ticket and sends early data: the card skips it, and the handshake goes on in full (RFC 8446,
4.2.10). The client is ``openssl s_client``; what it sends before the server has answered may become garbage on the way.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from secfunet.tandem.aio import start_tandem_server
from secfunet.tls.cipher_suites import TLS_1_3
from secfunet.tls.records import ContentType, encode_record, split_records
from tests.tandem.conftest import Pools
from tests.tandem.peers import Files, free_port, listening, program, read_until
from tests.tandem.test_attacks import until
from tests.tandem.test_both_ends import Echo, only, port_of


async def ticket_from_elsewhere(files: Files, folder: Path) -> Path:
    """A session of another server at the same name, which takes early data."""
    certificate, key = files.leaf()
    port, session = free_port(), folder / "elsewhere.pem"
    serve = (
        "-accept",
        f"127.0.0.1:{port}",
        "-cert",
        certificate,
        "-key",
        key,
        "-tls1_3",
        "-early_data",
        "-quiet",
        "-max_early_data",
        "1000000",
    )
    async with program("openssl", "s_server", *serve):
        await listening(port)
        target = ("-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-tls1_3", "-sess_out", session)
        async with program("openssl", "s_client", *target):
            await until(session.exists)
            await until(lambda: b"END SSL SESSION" in session.read_bytes())
    return session


class Garbling:
    """A hop that makes noise of the records of data that the client sends before anything was answered."""

    def __init__(self, target: int, *, garble: bool) -> None:
        self._target = target
        self._garble = garble
        self.early = 0
        """Records of data that came so early."""

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.sleep(0.1)  # all of it is there
        first = await reader.read(1 << 18)
        for record in split_records(first):
            is_data = record.kind == ContentType.APPLICATION_DATA
            self.early += is_data
            noise = encode_record(record.kind, os.urandom(record.length))
            far_writer.write(noise if is_data and self._garble else record.raw)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            try:
                while data := await source.read(65536):
                    sink.write(data)
            except OSError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))


@pytest.mark.parametrize("garble", [False, True], ids=["early data", "garbage"])
@pytest.mark.parametrize("groups", [(), (0x0018,)], ids=["at once", "retry"])
async def test_early_data_is_skipped(
    pools: Pools, files: Files, tmp_path: Path, groups: tuple[int, ...], garble: bool
) -> None:
    session = await ticket_from_elsewhere(files, tmp_path)
    certificate, key = files.leaf()
    early = tmp_path / "early"
    parameters = only(TLS_1_3, groups=groups)
    async with await start_tandem_server(Echo, pools.server(), host="127.0.0.1", parameters=parameters) as listener:
        for size, succeeds in ((5, True), (12_000, True), (60_000, False)):
            early.write_bytes(b"e" * size)
            hop = Garbling(port_of(listener), garble=garble)
            server = await asyncio.start_server(hop.carry, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            target = ("-connect", f"127.0.0.1:{port}", "-servername", "localhost", "-CAfile", files.ca, "-tls1_3")
            own = (
                "-cert",
                certificate,
                "-key",
                key,
                "-sess_in",
                session,
                "-early_data",
                early,
                "-groups",
                "X25519:P-384",
            )
            async with program("openssl", "s_client", *target, *own) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                if succeeds:
                    process.stdin.write(b"behind the Finished\n")
                    output = await read_until(process.stdout, b"BEHIND THE FINISHED")
                    assert b"Early data was rejected" in output
                    assert b"EEEEE" not in output
                else:
                    # More than the card skips; it says so.
                    assert b"alert" in await asyncio.wait_for(process.stdout.read(), 10)
            server.close()
            assert hop.early, "it was early"
        await until(lambda: (listener.handshakes_done, listener.handshakes_failed) == (2, 1))
