"""The main road: a hypervisor logs in with its card, opens a session for a VM, and runs operations."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from gose_client import GridRefusedError, RequestInvalidError, SessionClosedError
from secfunet.identity import load_certificate, rsa_key_of, thumbprint
from secfunet.operation import check_result, parse_result_set, request_digest  # noqa: F401
from tests.gose.grid import sign_operation
from tests.gose_client.conftest import Host

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.e2e]


async def test_a_signature_by_the_vms_key_comes_out_of_a_container_of_the_grid(host: Host) -> None:
    async with host.grid.running(), host.client() as client:
        session = await host.session(client)
        assert session.vmid == host.grid.vms["vm-1"].thumbprint
        assert session.hvid == host.hvid == thumbprint(host.certificate)
        assert session.operations == {"sign", "decrypt", "encrypt"}
        operation = sign_operation()
        answer = await session.execute([operation], timeout=10)
        assert not answer.failures
        (container,) = answer.containers
        results = await host.open(client, session, container)
        (result,) = results.results
        assert result.request_id == operation.request_id
        assert result.request_digest == request_digest(operation)
        rsa_key_of(load_certificate(host.grid.vms["vm-1"].certificate)).verify(
            result.output,
            operation.sign.digest,
            padding.PSS(padding.MGF1(hashes.SHA256()), 32),
            Prehashed(hashes.SHA256()),
        )
        await session.close()
        with pytest.raises(SessionClosedError):
            await session.execute([sign_operation()], timeout=5)
