"""A card is authenticated by FreeRADIUS, with TLS 1.2 and 1.3: both ends have the same keys; who refuses what; the card is free again."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from secfunet.card import KeyAlgorithm
from secfunet.identity import der_of
from secfunet.radius.errors import PeerRefusedError, RadiusRejectedError, RadiusSilenceError
from tests.interop_radius.freeradius import FreeRadius, running_freeradius
from tests.interop_radius.world import VERSIONS, ServerIdentity, crl_of, intermediate, load, long_names, run
from tests.support.cards import CardProcess, running_card
from tests.support.pki import CertificateAuthority, key_pem

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.interop]

BOTH = pytest.mark.parametrize("version", list(VERSIONS))
CA = CertificateAuthority("Ours")
FOREIGN = CertificateAuthority("Theirs")
SERVER = ServerIdentity(CA)
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def card(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[CardProcess]:
    """One card with everybody's identities: who waits for a card that was not given back waits for good."""
    async with running_card(tmp_path_factory.mktemp("card")) as card:
        await load(card, "ec", lambda key: CA.issue(key, "ec"), [CA], key=KeyAlgorithm.P_256)
        await load(card, "rsa", lambda key: CA.issue(key, "rsa"), [CA], key=KeyAlgorithm.RSA_2048)
        await load(card, "foreign", lambda key: FOREIGN.issue(key, "foreign"), [CA], key=KeyAlgorithm.P_256)
        await load(
            card,
            "expired",
            lambda key: CA.issue(key, "expired", not_before=timedelta(hours=-2), not_after=timedelta(hours=-1)),
            [CA],
            key=KeyAlgorithm.P_256,
        )
        await load(card, "server", lambda key: CA.issue(key, "server", client=False), [CA], key=KeyAlgorithm.P_256)
        yield card


async def still_good(card: CardProcess, radius: FreeRadius, version: str) -> None:
    """The card is free, and its next authentication succeeds."""
    done, _ = await run(card, "ec", radius, version)
    assert done.identity == "ec"


@BOTH
@pytest.mark.parametrize("identity", ["ec", "rsa"])
async def test_both_ends_have_the_same_keys(card: CardProcess, tmp_path: Path, version: str, identity: str) -> None:
    async with running_freeradius(tmp_path, **SERVER.files, authorities=[CA.pem], version=version) as radius:
        done, msk = await run(card, identity, radius, version)
        assert (done.identity, done.tls.version) == (identity, VERSIONS[version])
        # The server's own words, beside what came encrypted in the accept.
        (receive,) = re.findall(r"MS-MPPE-Recv-Key = 0x([0-9a-f]{64})", radius.text)
        (send,) = re.findall(r"MS-MPPE-Send-Key = 0x([0-9a-f]{64})", radius.text)
        assert msk.hex() == receive + send
        again, other = await run(card, identity, radius, version)
        assert again.rounds == done.rounds
        assert other != msk


@BOTH
@pytest.mark.parametrize("wrong", ["authority", "expired"])
async def test_the_card_refuses_the_server(card: CardProcess, tmp_path: Path, version: str, wrong: str) -> None:
    server = ServerIdentity(FOREIGN) if wrong == "authority" else ServerIdentity(CA, expired=True)
    async with running_freeradius(tmp_path, **server.files, authorities=[CA.pem], version=version) as radius:
        with pytest.raises(PeerRefusedError, match="refuses the server"):
            await run(card, "ec", radius, version)
        assert "Access-Accept" not in radius.text
    async with running_freeradius(tmp_path, **SERVER.files, authorities=[CA.pem], version=version) as radius:
        await still_good(card, radius, version)


@BOTH
async def test_the_server_refuses_the_card(card: CardProcess, tmp_path: Path, version: str) -> None:
    """Another authority's, an expired, a revoked certificate, and one that is for servers only."""
    revoked = await load(card, f"revoked-{version}", lambda key: CA.issue(key, "revoked"), [CA], key=KeyAlgorithm.P_256)
    how: dict[str, Any] = {"authorities": [CA.pem], "version": version, "crl": crl_of(CA, revoked)}
    async with running_freeradius(tmp_path, **SERVER.files, **how) as radius:
        for identity, reason in (
            ("foreign", "unable to get local issuer|unknown ca"),
            ("expired", "certificate has expired"),
            (f"revoked-{version}", "certificate revoked"),
            ("server", "unsupported certificate purpose|unsuitable certificate purpose"),
        ):
            before = len(radius.text)
            with pytest.raises(RadiusRejectedError, match="the server refuses the card"):
                await run(card, identity, radius, version)
            assert re.search(reason, radius.text[before:], re.IGNORECASE), radius.text[before:][-3000:]
            assert "Access-Accept" not in radius.text[before:]
            await still_good(card, radius, version)


async def test_another_secret_is_silence(card: CardProcess, tmp_path: Path) -> None:
    async with running_freeradius(tmp_path, **SERVER.files, authorities=[CA.pem]) as radius:
        with pytest.raises(RadiusSilenceError, match="another secret"):
            await run(card, "ec", radius, "1.3", secret=b"not the secret of this server..", patience=2.5)
        assert "Message-Authenticator" in radius.text
        await still_good(card, radius, "1.3")
    with pytest.raises(RadiusSilenceError, match="does not answer"):  # nobody is there any more
        await run(card, "ec", radius, "1.3", patience=1.5)
    assert await _is_free(card)


async def _is_free(card: CardProcess) -> bool:
    client = await card.connect("ec")
    await client.close()
    return True


# FreeRADIUS gives a dialogue up after 50 packets, and never sends fragments below 100 bytes, whatever its settings say. So the smaller the
# fragments, the shorter the chain can be; one of 8 KB needs fragments of some 200 bytes. Smaller ones: tests/gose_radius/test_fragments.py.
SIZES = pytest.mark.parametrize(
    ("fragment", "chain"), [(64, 1700), (100, 3200), (253, 8192), (1024, 8192), (2000, 8192)]
)


def chain_of(size: int) -> tuple[CertificateAuthority, list[x509.GeneralName]]:
    """An intermediate CA, and names for a leaf, which together have about ``size`` bytes, half of them each."""
    return intermediate(CA, size // 2 - 400), long_names(size // 2 - 400)


@BOTH
@SIZES
async def test_a_long_chain_of_the_server(
    card: CardProcess, tmp_path: Path, version: str, fragment: int, chain: int
) -> None:
    below, names = chain_of(chain)
    server = ServerIdentity(below, names=names)
    assert len(der_of(server.certificate) + below.der) == pytest.approx(chain, rel=0.1)
    how: dict[str, Any] = {"key": key_pem(server.key), "chain": [server.pem, below.pem], "authorities": [CA.pem]}
    async with running_freeradius(tmp_path, **how, version=version, fragment=fragment) as radius:
        done, _ = await run(card, "ec", radius, version, mtu=2900)
        assert done.rounds > chain // max(fragment, 100)
        assert der_of(server.certificate) == done.server_certificate


@BOTH
@SIZES
async def test_a_long_chain_of_the_card(tmp_path: Path, version: str, fragment: int, chain: int) -> None:
    below, names = chain_of(chain)
    async with running_card(tmp_path, settings=f"eap_fragment = {fragment}") as card:
        long = await load(
            card, "long", lambda key: below.issue(key, "long", names=names), [CA, below], key=KeyAlgorithm.P_256
        )
        assert len(der_of(long) + below.der) == pytest.approx(chain, rel=0.1)
        async with running_freeradius(tmp_path, **SERVER.files, authorities=[CA.pem], version=version) as radius:
            done, _ = await run(card, "long", radius, version)
            assert done.rounds > chain // fragment


@BOTH
async def test_more_packets_than_the_server_has_patience_for(card: CardProcess, tmp_path: Path, version: str) -> None:
    """8 KB in pieces of 64: FreeRADIUS gives up. That is a refusal, and the card is free."""
    below, names = chain_of(8192)
    server = ServerIdentity(below, names=names)
    how: dict[str, Any] = {"key": key_pem(server.key), "chain": [server.pem, below.pem], "authorities": [CA.pem]}
    async with running_freeradius(tmp_path, **how, version=version, fragment=64) as radius:
        with pytest.raises(RadiusRejectedError):
            await run(card, "ec", radius, version)
        assert "More than 50 roundtrips" in radius.text
    async with running_freeradius(tmp_path, **SERVER.files, authorities=[CA.pem], version=version) as radius:
        await still_good(card, radius, version)
