"""A card is authenticated by FreeRADIUS: with TLS 1.2 and 1.3, with the same keys at both ends; what is refused, and that the card is free again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from secfunet.card.parameters import TLS_1_2, TLS_1_3
from secfunet.radius.access import AccessClient
from secfunet.radius.peer import authenticate
from secfunet.radius.udp import radius_port
from tests.interop_radius.freeradius import SECRET, running_freeradius
from tests.support.cards import personalise, running_card
from tests.support.pki import CertificateAuthority, key_pem


@pytest.mark.interop
@pytest.mark.parametrize("version", ["1.2", "1.3"])
async def test_thin(tmp_path: Path, version: str) -> None:
    ca = CertificateAuthority()
    key = ec.generate_private_key(ec.SECP256R1())
    server = ca.issue(key.public_key(), "radius.example").public_bytes(Encoding.PEM)
    async with running_card(tmp_path) as card:
        await personalise(card, ca, "user")
        async with running_freeradius(
            tmp_path, key=key_pem(key), chain=[server], authorities=[ca.pem], version=version
        ) as radius:
            client = await card.connect("user")
            async with radius_port("127.0.0.1", radius.port, patience=10) as port:
                try:
                    done = await authenticate(
                        client, AccessClient(SECRET, nas="here", mtu=1400), port.exchange, unix_time=int(time.time())
                    )
                except Exception:
                    print(radius.text[-6000:])
                    raise
            print(done)
            assert done.tls.version == {"1.2": TLS_1_2, "1.3": TLS_1_3}[version]
