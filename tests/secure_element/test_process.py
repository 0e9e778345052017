"""The real process: personalised over its socket, used, stopped, started again."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256

from secfunet.card import CardBusyError, KeyAlgorithm, Segmentation, connect_unix
from tests.support.cards import personalise, running_card
from tests.support.pki import CertificateAuthority

DIGEST = bytes(range(32))


@pytest.mark.e2e
@pytest.mark.parametrize("segmentation", list(Segmentation))
async def test_personalise_and_use(tmp_path: Path, segmentation: Segmentation) -> None:
    authority = CertificateAuthority()
    async with running_card(tmp_path) as card:
        rsa_certificate = await personalise(card, authority, "rsa", algorithm=KeyAlgorithm.RSA_2048)
        ec_certificate = await personalise(card, authority, "ec", algorithm=KeyAlgorithm.P_384)
        client = await card.connect("rsa", segmentation=segmentation)
        assert await client.identities() == ("rsa", "ec")
        assert await client.certificate() == rsa_certificate
        public_key = x509.load_der_x509_certificate(rsa_certificate).public_key()
        assert isinstance(public_key, rsa.RSAPublicKey)
        signature = await client.sign(4, DIGEST)
        public_key.verify(signature, DIGEST, padding.PSS(padding.MGF1(SHA256()), 32), Prehashed(SHA256()))
        assert await client.decrypt(1, await client.encrypt(1, b"a short message")) == b"a short message"
        assert await client.unwrap_key(1, await client.encrypt(1, DIGEST)) == DIGEST
        await client.set_identity("ec")
        ec_key = x509.load_der_x509_certificate(ec_certificate).public_key()
        assert isinstance(ec_key, ec.EllipticCurvePublicKey)
        ec_key.verify(await client.sign(7, DIGEST), DIGEST, ec.ECDSA(Prehashed(SHA256())))
        with pytest.raises(CardBusyError):
            await connect_unix(card.socket, timeout=5)
        await client.close()
        assert await card.stop() == 0
        await card.start()
        client = await card.connect("ec")
        assert await client.certificate() == ec_certificate
        await client.close()
