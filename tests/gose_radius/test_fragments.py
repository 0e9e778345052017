"""The grid's RADIUS server, eapol_test and our own card with certificates of 8 KB at both ends, in fragments of 64 bytes and more.

eapol_test gives up after 100 packets, so 8 KB go to it and come from it in fragments of some 200 bytes at least; in smaller ones it has
shorter certificates. Our own card has no such bound: 8 KB both ways in pieces of 64 are 270 packets.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gose.settings import Address, RadiusClientSettings, RadiusSettings
from secfunet.card import KeyAlgorithm
from secfunet.card.parameters import TLS_1_2, TLS_1_3, TlsParameters
from secfunet.identity import Holder, Role, der_of, pem_of, role_uri, thumbprint
from secfunet.radius.access import AccessClient
from secfunet.radius.peer import authenticate
from secfunet.radius.udp import radius_port
from tests.gose.grid import Hypervisor, TestGrid, free_ports, new_grid
from tests.gose_radius.peer import SECRET, eapol_test
from tests.support.cards import running_card
from tests.support.pki import key_pem

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.interop]

LONG, SHORT = 8192, 2000
GRIDS = [(64, SHORT), (64, LONG), (253, LONG), (2900, LONG)]
"""How many TLS bytes the server card puts into a packet, and the size of its certificate."""


def names(size: int) -> list[str]:
    return [f"{os.urandom(30).hex()}.{os.urandom(30).hex()}.example" for _ in range(size // 132)]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="rad-") as folder:
        yield Path(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=GRIDS, ids=lambda pair: f"{pair[1]}-by-{pair[0]}")
async def grid(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[TestGrid]:
    """One server card with a certificate of that size, which sends fragments of so many bytes."""
    fragment, size = request.param
    home = Path(mkdtemp(prefix=f"{fragment}-{size}-", dir=folder))
    settings = f"eap_fragment = {fragment}"
    async with new_grid(home, vms=(), servers=1, server_names=names(size - 700), card_settings=settings) as grid:
        secret = home / "radius.secret"
        secret.touch(0o600)
        secret.write_bytes(SECRET + b"\n")
        radius = RadiusSettings(
            listen=Address("127.0.0.1", free_ports(1)[0]),
            clients=(RadiusClientSettings(address="127.0.0.1", secret_file=secret),),
        )
        grid.settings = grid.settings.model_copy(update={"radius": radius})
        for name, size in (("long", LONG), ("short", SHORT)):
            key = ec.generate_private_key(ec.SECP256R1())
            der = certify(grid, name, size, key.public_key())
            pem = grid.folder / f"{name}.pem"
            pem.write_bytes(key_pem(key) + pem_of(der))
            grid.hypervisors[name] = Hypervisor(name, thumbprint(der), der, key, pem)  # type: ignore[arg-type]  # not RSA
        yield grid


def certify(grid: TestGrid, name: str, size: int, key: ec.EllipticCurvePublicKey) -> bytes:
    """Enrols a hypervisor under a certificate of that size, which is returned."""
    authority = grid.authority.certificate_authority
    now = datetime.now(UTC).replace(microsecond=0)
    uri = x509.UniformResourceIdentifier(role_uri(Holder(Role.HYPERVISOR, name)))
    alternatives = [uri, *(x509.DNSName(one) for one in names(size - 500))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(authority._key, SHA384())
    )
    der = der_of(certificate)
    assert len(der) == pytest.approx(size, rel=0.1)
    with grid.registry() as registry:
        registry.begin_enrolment(Role.HYPERVISOR, name, thumbprint(der), der, None, time.time() + 3600)
        registry.finish_enrolment(thumbprint(der))
    return der


@pytest.mark.parametrize("tls13", [False, True])
@pytest.mark.parametrize(
    ("grid", "fragment", "peer"),
    [
        ((64, SHORT), 64, "short"),
        ((64, SHORT), 1398, "long"),
        ((253, LONG), 253, "long"),
        ((253, LONG), 1000, "long"),
        ((2900, LONG), 64, "short"),
        ((2900, LONG), 100, "long"),
        ((2900, LONG), 1398, "long"),
    ],
    indirect=["grid"],
    scope="module",
)
async def test_eapol_test_with_long_certificates_in_fragments(
    grid: TestGrid, fragment: int, peer: str, tls13: bool
) -> None:
    assert grid.settings.radius is not None
    async with grid.running():
        port = grid.settings.radius.listen.port
        outcome = await eapol_test(grid, port, grid.hypervisors[peer], tls13=tls13, fragment=fragment, timeout=60)
    assert outcome.is_success, outcome.text[-2500:]
    assert outcome.keys == (1, 0)


@pytest.mark.parametrize("version", [TLS_1_2, TLS_1_3])
@pytest.mark.parametrize("grid", [(64, LONG), (2900, LONG)], indirect=True, scope="module")
async def test_card_to_card_in_the_smallest_fragments(grid: TestGrid, tmp_path: Path, version: int) -> None:
    """A client card on one side, a server card on the other, the grid's RADIUS server between them."""
    assert grid.settings.radius is not None
    async with running_card(tmp_path, settings="eap_fragment = 64") as card:
        administrator = await card.administer()
        await administrator.generate_key("peer", KeyAlgorithm.P_256)
        request = x509.load_der_x509_csr(await administrator.certificate_signing_request("peer", "peer"))
        public = request.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        name = f"card-{version:x}"
        der = certify(grid, name, 8000, public)
        await administrator.load_identity("peer", name.encode(), der, [der_of(grid.authority.ca_certificate)])
        await administrator.close()
        client = await card.connect("peer")
        await client.set_tls_parameters(TlsParameters(min_version=version, max_version=version))
        # Hundreds of packets: as long as a busy machine takes for them.
        patient = grid.running(handshake_timeout=100.0, longest_lease=110.0, peer_patience=30.0)
        async with patient, radius_port("127.0.0.1", grid.settings.radius.listen.port, patience=30) as port:
            access = AccessClient(SECRET, nas="here", mtu=2900)
            done = await authenticate(client, access, port.exchange, unix_time=int(time.time()))
        await client.close()
    assert (done.identity, done.tls.version) == (name, version)
    assert done.rounds > (256 if grid.folder.name.startswith("64-") else 125)
