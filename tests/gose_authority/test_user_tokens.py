"""The authority of users' tokens: for whom it makes containers, with which counters, and under which key."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from hypothesis import given
from hypothesis import strategies as st

from gose.authority import AuthorityFolder, CertificateAuthority, create_authority
from gose.authority.errors import IssuanceError, TokenNotIssuedError
from gose.registry import Registry
from secfunet.container import ContainerProfile, unwrap_content_key, verify_container
from secfunet.identity import Holder, Role, der_of, thumbprint
from secfunet.user_token import MAX_VALUE, UserToken, UserTokenError, key_digest, public_key_der

KEY = rsa.generate_private_key(65537, 2048)
NOW = 1_800_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> AuthorityFolder:
    return create_authority(tmp_path / "authority", ["localhost"], now=NOW)


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    with Registry(tmp_path / "grid.sqlite") as registry:
        yield registry


def certify(authority: CertificateAuthority, role: Role = Role.USER, **how: Any) -> x509.Certificate:
    return authority.issue(
        Holder(role, "alice"), how.pop("key", KEY.public_key()), now=NOW, valid=how.pop("valid", 3600)
    )


def issue(folder: AuthorityFolder, registry: Registry, certificate: x509.Certificate, **how: Any) -> bytes:
    wanted = {"name": "badge", "value": b"value", "profile": ContainerProfile.OAEP_PSS_SHA256, "now": NOW} | how
    return folder.user_token_authority.issue(registry, certificate=certificate, **wanted)


def opened(folder: AuthorityFolder, container: bytes) -> UserToken:
    key = load_pem_public_key(folder.user_tokens_path.read_bytes())
    assert isinstance(key, rsa.RSAPublicKey)
    verified = verify_container(container, key, 256)
    return UserToken.decode(verified.open(unwrap_content_key(KEY, verified.header)))


def test_what_it_makes(folder: AuthorityFolder, registry: Registry) -> None:
    certificate = certify(folder.certificate_authority)
    containers = [issue(folder, registry, certificate, value=b"value") for _ in range(3)]
    tokens = [opened(folder, container) for container in containers]
    assert tokens[0] == UserToken(int(NOW * 1000), key_digest(public_key_der(KEY.public_key())), "badge", b"value")
    assert [token.counter for token in tokens] == [int(NOW * 1000) + more for more in range(3)]
    assert len({container[:256] for container in containers}) == 3  # a content key each
    assert opened(folder, issue(folder, registry, certificate, now=NOW - 1)).counter == int(NOW * 1000) + 3
    (folder.path.parent / "grid.sqlite").rename(folder.path.parent / "lost")
    with Registry(folder.path.parent / "grid.sqlite") as restored:
        assert opened(folder, issue(folder, restored, certificate, now=NOW + 1)).counter == int(NOW * 1000) + 1000


def test_for_whom_it_makes_none(folder: AuthorityFolder, registry: Registry) -> None:
    ours = folder.certificate_authority
    foreign = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP384R1()), now=NOW)
    hypervisor = certify(ours, Role.HYPERVISOR)
    der = der_of(hypervisor)
    registry.begin_enrolment(Role.HYPERVISOR, "alice", thumbprint(der), der, None, NOW + 3600)
    registry.finish_enrolment(thumbprint(der))
    registry.revoke_identity(Role.HYPERVISOR, "alice")
    sound = certify(ours)
    curve = certify(ours, Role.VM, key=ec.generate_private_key(ec.SECP256R1()).public_key())
    for certificate, how in (
        (certify(foreign), {}),
        (sound, {"now": NOW + 3601}),
        (sound, {"now": NOW - 301}),
        (hypervisor, {}),
        (curve, {}),
        (ours.certificate, {}),
        (folder.container_certificate, {}),
        (sound, {"value": bytes(MAX_VALUE + 1)}),
        (sound, {"name": ""}),
        (sound, {"name": "two words"}),
        (sound, {"name": "n" * 33}),
        (sound, {"name": "é"}),
    ):
        with pytest.raises(TokenNotIssuedError):
            issue(folder, registry, certificate, **how)
    assert registry.record_user_token("", "", 1.0) == 1000  # nothing was recorded
    with pytest.raises(IssuanceError, match="RSA"):
        certify(ours, key=ec.generate_private_key(ec.SECP256R1()).public_key())


def test_its_key_is_made_once_and_is_its_own(folder: AuthorityFolder) -> None:
    assert not (folder.path / "user-tokens.key").exists()
    program = (
        "import sys, pathlib; from gose.authority import AuthorityFolder; "
        "print(AuthorityFolder(pathlib.Path(sys.argv[1])).user_token_authority.public_key_der.hex())"
    )
    racing = [
        subprocess.Popen([sys.executable, "-c", program, str(folder.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    keys = {process.communicate(timeout=60)[0].strip() for process in racing}
    assert keys == {folder.user_token_authority.public_key_der.hex()}
    assert stat.S_IMODE((folder.path / "user-tokens.key").stat().st_mode) == 0o600
    assert folder.user_token_authority.public_key_der != public_key_der(folder.container_key.public_key())
    folder.user_tokens_path.unlink()
    assert AuthorityFolder(folder.path).user_token_authority.public_key_der.hex() in keys
    assert folder.user_tokens_path.exists()


@given(
    st.integers(1, 2**63 - 1),
    st.binary(min_size=32, max_size=32),
    st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=32),
    st.binary(max_size=300),
)
def test_tokens_round_trip(counter: int, recipient: bytes, name: str, value: bytes) -> None:
    token = UserToken(counter, recipient, name, value)
    assert UserToken.decode(token.encode()) == token


@given(st.binary(max_size=200))
def test_any_bytes_are_a_token_or_none(untrusted: bytes) -> None:
    try:
        token = UserToken.decode(untrusted)
    except UserTokenError:
        return
    assert token.encode() == untrusted
