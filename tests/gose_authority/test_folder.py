"""The authority's folder: whole or not there, private, never overwritten."""

from __future__ import annotations

import datetime
import ssl
import stat
import traceback
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

import gose.authority.folder
from gose.authority import OPENID_PROVIDER, SERVICE_PROVIDER, AuthorityFolder, create_authority
from gose.authority.errors import (
    AuthorityDamagedError,
    AuthorityExistsError,
    AuthorityMissingError,
    IssuanceError,
    TokenNotIssuedError,
)
from gose.registry import NotEnrolledError, Registry
from secfunet.container import unwrap_content_key, verify_container
from secfunet.identity import Role, load_certificate, role_of, thumbprint, verify_container_authority
from secfunet.service.files import UnsafeFileError
from secfunet.vm_auth_token import TokenError, TokenRefusal, TokenVerifier
from tests.secfunet_sealed.test_container import RECIPIENT

NOW = datetime.datetime.now(datetime.UTC).timestamp()
NAMES = ("localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> AuthorityFolder:
    return create_authority(tmp_path_factory.mktemp("grid") / "state" / "authority", NAMES, now=NOW)


def test_keys_are_private(made: AuthorityFolder) -> None:
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.path.iterdir()}
    assert modes == {
        "ca.key": 0o600,
        "ca.pem": 0o644,
        "token.key": 0o600,
        "containers.key": 0o600,
        "containers.pem": 0o644,
        "service-provider.pem": 0o600,
        "openid-provider.pem": 0o600,
    }
    for name, mode in modes.items():
        assert (b"PRIVATE" in (made.path / name).read_bytes()) is (mode == 0o600)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "a", NAMES, now=NOW)
    (tmp_path / "a" / "ca.key").chmod(0o640)
    with pytest.raises(UnsafeFileError):
        _ = authority.certificate_authority


def test_an_authority_is_never_overwritten(made: AuthorityFolder) -> None:
    before = {path: path.read_bytes() for path in made.path.iterdir()}
    with pytest.raises(AuthorityExistsError, match="renew-servers"):
        create_authority(made.path, NAMES, now=NOW)
    assert {path: path.read_bytes() for path in made.path.iterdir()} == before


def test_a_run_that_fails_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state" / "authority"
    with pytest.raises(IssuanceError):
        create_authority(path, ["not a name"], now=NOW)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(AuthorityMissingError):
        AuthorityFolder(path)
    # A run that was killed cannot clean up.
    with monkeypatch.context() as killed:
        killed.setattr(gose.authority.folder.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(IssuanceError):
            create_authority(path, ["not a name"], now=NOW)
    assert list(path.parent.iterdir()) != []
    assert create_authority(path, NAMES, now=NOW).certificate_authority
    assert [entry.name for entry in path.parent.iterdir() if entry.is_dir()] == ["authority"]


def test_the_servers_files_serve_tls(made: AuthorityFolder) -> None:
    for server in (SERVICE_PROVIDER, OPENID_PROVIDER):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(made.server_file(server))
        key, certificate = made.read_server(server)
        parsed = load_certificate(certificate)
        assert role_of(parsed) == (Role.SERVER, server)
        assert b"CERTIFICATE" not in key
        assert b"PRIVATE" not in certificate
        private = serialization.load_pem_private_key(key, None)
        assert private.public_key() == parsed.public_key()


def test_servers_can_be_renewed_under_new_names(tmp_path: Path) -> None:
    authority = create_authority(tmp_path / "a", NAMES, now=NOW)
    before = authority.read_server(SERVICE_PROVIDER)
    authority.renew_servers(["grid.example"], now=NOW)
    key, certificate = authority.read_server(SERVICE_PROVIDER)
    assert (key, certificate) != before
    names = load_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["grid.example"]
    assert (tmp_path / "a" / "service-provider.pem").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("name", ["ca.key", "ca.pem", "token.key", "containers.key", "service-provider.pem"])
def test_damage_is_named_and_never_quoted(tmp_path: Path, name: str) -> None:
    authority = create_authority(tmp_path / "a", NAMES, now=NOW, tokens="p-256")
    (tmp_path / "a" / name).write_text("c2VjcmV0 and no PEM")
    uses = {
        "ca.key": lambda: authority.certificate_authority,
        "ca.pem": lambda: authority.ca_certificate,
        "token.key": lambda: authority.token_keys,
        "containers.key": lambda: authority.container_key,
        "service-provider.pem": lambda: authority.read_server(SERVICE_PROVIDER),
    }
    with pytest.raises(AuthorityDamagedError, match=name) as caught:
        uses[name]()
    assert "c2VjcmV0" not in "".join(traceback.format_exception(caught.value))


def test_containers_of_the_authority_are_believed(made: AuthorityFolder) -> None:
    key = verify_container_authority(made.container_certificate, made.ca_certificate, now=NOW)
    container = made.container_sealer(RECIPIENT.public_key()).seal(b"result")
    verified = verify_container(container, key, 256)
    assert verified.open(unwrap_content_key(RECIPIENT, verified.header)) == b"result"


VM, HYPERVISOR = thumbprint(b"vm"), thumbprint(b"hypervisor")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "grid.sqlite")
    for role, name, short, end in ((Role.VM, "web", VM, 7200), (Role.HYPERVISOR, "host", HYPERVISOR, 3600)):
        registry.begin_enrolment(role, name, short, b"", None, int(NOW) + end)
        registry.finish_enrolment(short)
    return registry


@pytest.mark.parametrize("tokens", ["rsa-2048", "p-256"])
def test_tokens_are_recorded_and_die_by_revocation(tmp_path: Path, registry: Registry, tokens: str) -> None:
    authority = create_authority(tmp_path / "a", NAMES, now=NOW, tokens=tokens)
    token = authority.token_authority.issue(
        registry, vm="web", hypervisor="host", audience="https://sp", operations=["sign"], now=NOW, valid=60
    )
    verifier = TokenVerifier(authority.token_issuer, "https://sp", authority.token_keys)
    said = verifier.verify(token, vmid=VM, hvid=HYPERVISOR, now=NOW, is_revoked=registry.is_token_revoked)
    assert said.operations == {"sign"}
    (recorded,) = registry.tokens()
    assert (recorded.jti, recorded.vmid, recorded.hvid, recorded.operations) == (said.jti, VM, HYPERVISOR, {"sign"})
    assert recorded.expires_at == said.expires_at == int(NOW + 60)
    registry.revoke_token(said.jti)
    with pytest.raises(TokenError) as caught:
        verifier.verify(token, vmid=VM, hvid=HYPERVISOR, now=NOW, is_revoked=registry.is_token_revoked)
    assert caught.value.refusal is TokenRefusal.REVOKED


def test_tokens_that_are_not_issued(made: AuthorityFolder, registry: Registry) -> None:
    def issue(vm: str = "web", hypervisor: str = "host", now: float = NOW, valid: float = 60, **more: list[str]) -> str:
        return made.token_authority.issue(
            registry, vm=vm, hypervisor=hypervisor, audience="https://sp", now=now, valid=valid, **more
        )

    with pytest.raises(NotEnrolledError):
        issue(vm="host")
    with pytest.raises(NotEnrolledError):
        issue(hypervisor="web")
    for wrong in ({"operations": []}, {"operations": ["export"]}):
        with pytest.raises(TokenNotIssuedError):
            issue(**wrong)
    for valid in (0.5, 1e9, float("nan"), float("inf")):
        with pytest.raises(TokenNotIssuedError):
            issue(valid=valid)
    with pytest.raises(TokenNotIssuedError, match="expired"):
        issue(now=NOW + 3601)
    assert registry.tokens() == ()
    issue(valid=86400)
    assert registry.tokens()[0].expires_at == int(NOW) + 3600  # the end of the hypervisor's certificate
    registry.revoke_identity(Role.VM, "web")
    with pytest.raises(TokenNotIssuedError, match="revoked"):
        issue()
