"""Certificates of a grid: who is named, and when not to believe it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from gose.authority.certificate_authority import CertificateAuthority
from secfunet.identity import (
    Holder,
    IdentityError,
    IdentityProblem,
    Role,
    check_name,
    check_thumbprint,
    der_of,
    has_server_names,
    load_certificate,
    pem_of,
    role_of,
    role_uri,
    rsa_key_of,
    thumbprint,
    verify_certificate,
    verify_container_authority,
)
from tests.support.pki import CertificateAuthority as ForeignAuthority

NOW = 1_800_000_000
CA = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP384R1()), now=NOW)
KEY = rsa.generate_private_key(65537, 2048).public_key()
VM = CA.issue(Holder(Role.VM, "web-1"), KEY, now=NOW, valid=3600)


def problem_of(certificate: x509.Certificate, *, role: Role = Role.VM, now: float = NOW) -> IdentityProblem:
    with pytest.raises(IdentityError) as caught:
        verify_certificate(certificate, CA.certificate, role=role, now=now)
    return caught.value.problem


def test_thumbprint_is_that_of_rfc_7515(tmp_path: Path) -> None:
    der = der_of(VM)
    assert thumbprint(der) == base64.urlsafe_b64encode(hashlib.sha256(der).digest()).decode().rstrip("=")
    path = tmp_path / "c.der"
    path.write_bytes(der)
    shown = subprocess.run(
        ["openssl", "x509", "-inform", "DER", "-in", path, "-noout", "-fingerprint", "-sha256"],
        capture_output=True,
        check=True,
    )
    fingerprint = bytes.fromhex(shown.stdout.decode().strip().split("=")[1].replace(":", ""))
    assert base64.urlsafe_b64decode(thumbprint(der) + "=") == fingerprint


@given(st.binary(max_size=64))
def test_thumbprints_are_thumbprints(raw: bytes) -> None:
    assert check_thumbprint(thumbprint(raw)) == thumbprint(raw)


@pytest.mark.parametrize(
    "untrusted", ["", "A" * 42, "A" * 44, "A" * 42 + "B", "A" * 42 + "=", "A" * 41 + "/A", "A" * 42 + "A\n"]
)
def test_other_texts_are_none(untrusted: str) -> None:
    with pytest.raises(IdentityError):
        check_thumbprint(untrusted)


@pytest.mark.parametrize("untrusted", ["", ".a", "a b", "a/b", "é", "a" * 65, "a\n", "a:b"])
def test_names_that_are_none(untrusted: str) -> None:
    with pytest.raises(IdentityError):
        check_name(untrusted)


def test_roles_and_encodings() -> None:
    for role in Role:
        holder = Holder(role, "name-1.x_y")
        names = ["localhost"] if has_server_names(role) else []
        certificate = CA.issue(holder, KEY, now=NOW, valid=3600, server_names=names)
        assert role_of(certificate) == holder
        assert verify_certificate(certificate, CA.certificate, role=role, now=NOW) == holder
    assert load_certificate(der_of(VM)) == load_certificate(pem_of(der_of(VM))) == VM
    assert load_certificate(b"some text\n" + pem_of(der_of(VM))) == VM
    assert rsa_key_of(VM) == KEY


def test_validity_includes_both_ends() -> None:
    for now in (NOW - 300, NOW, NOW + 3600, NOW + 3600.9):
        verify_certificate(VM, CA.certificate, role=Role.VM, now=now)
    assert problem_of(VM, now=NOW - 301) is IdentityProblem.NOT_YET_VALID
    assert problem_of(VM, now=NOW + 3601) is IdentityProblem.EXPIRED
    assert problem_of(VM, now=1e30) is IdentityProblem.EXPIRED


def test_another_role_is_refused() -> None:
    assert problem_of(VM, role=Role.HYPERVISOR) is IdentityProblem.ROLE


def test_another_grid_is_refused() -> None:
    other = CertificateAuthority.create("A grid", ec.generate_private_key(ec.SECP384R1()), now=NOW)
    assert problem_of(other.issue(Holder(Role.VM, "web-1"), KEY, now=NOW, valid=60)) is IdentityProblem.ISSUER


def test_a_ca_and_the_container_authority_are_nobody() -> None:
    assert problem_of(CA.certificate) is IdentityProblem.PURPOSE
    containers = CA.issue_container_authority(KEY, now=NOW, valid=3600)
    assert verify_container_authority(containers, CA.certificate, now=NOW) == KEY
    for role in Role:
        assert problem_of(containers, role=role) is IdentityProblem.ROLE
    with pytest.raises(IdentityError):
        verify_container_authority(VM, CA.certificate, now=NOW)
    with pytest.raises(IdentityError):
        verify_container_authority(containers, CA.certificate, now=NOW + 3601)


FOREIGN = ForeignAuthority()
URI = x509.UniformResourceIdentifier(role_uri(Holder(Role.VM, "web-1")))


@pytest.mark.parametrize(
    ("common_name", "names", "server"),
    [
        ("web-1", [], False),
        ("web-1", [x509.DNSName("web-1")], False),
        ("web-2", [URI], False),
        ("web-1", [URI], True),
        ("web-1", [URI, x509.UniformResourceIdentifier("urn:secfunet:hypervisor:web-1")], False),
        ("web-1", [x509.UniformResourceIdentifier("urn:secfunet:king:web-1")], False),
        ("web-1", [x509.UniformResourceIdentifier("urn:secfunet:vm:")], False),
        ("web-1", [x509.UniformResourceIdentifier("urn:secfunet:vm")], False),
    ],
    ids=["no names", "no uri", "other name", "other purpose", "two roles", "no role", "no name", "no colon"],
)
def test_certificates_without_a_role(common_name: str, names: list[x509.GeneralName], server: bool) -> None:
    with pytest.raises(IdentityError):
        role_of(FOREIGN.issue(KEY, common_name, names=names, server=server))


def test_the_foreign_authority_can_name_a_vm() -> None:
    assert role_of(FOREIGN.issue(KEY, "web-1", names=[URI], server=False)) == Holder(Role.VM, "web-1")


@given(st.binary(max_size=600))
def test_any_bytes_are_refused(untrusted: bytes) -> None:
    with pytest.raises(IdentityError):
        load_certificate(untrusted)


@given(st.integers(0, len(der_of(VM)) - 1), st.integers(0, 255), st.booleans())
def test_any_changed_byte_gives_a_certificate_or_an_error(place: int, value: int, pem: bool) -> None:
    changed = bytearray(der_of(VM))
    changed[place] = value
    untrusted = pem_of(bytes(changed)) if pem else bytes(changed)
    with contextlib.suppress(IdentityError):
        certificate = load_certificate(untrusted)
        with contextlib.suppress(IdentityError):
            role_of(certificate)
        with contextlib.suppress(IdentityError):
            rsa_key_of(certificate)
        with contextlib.suppress(IdentityError):
            verify_certificate(certificate, CA.certificate, role=Role.VM, now=NOW)


@pytest.mark.parametrize("tag", range(256))
def test_a_name_of_any_type_is_no_other_error(tag: int) -> None:
    """A value of type BIT STRING (3) makes the library raise TypeError when the name is read."""
    der = der_of(VM).replace(b"\x0c\x05web-1", bytes([tag, 5]) + b"\0eb-1")
    assert der != der_of(VM)
    with contextlib.suppress(IdentityError):
        load_certificate(der)
    if tag == 3:
        with pytest.raises(IdentityError) as caught:
            load_certificate(der)
        assert caught.value.problem is IdentityProblem.MALFORMED


@given(st.integers(0, 8 * len(der_of(VM)) - 1))
def test_any_changed_bit_is_refused(bit: int) -> None:
    changed = bytearray(der_of(VM))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IdentityError):
        verify_certificate(load_certificate(bytes(changed)), CA.certificate, role=Role.VM, now=NOW)


def test_bounds_of_loading() -> None:
    with pytest.raises(IdentityError) as caught:
        load_certificate(bytes(30000))
    assert caught.value.problem is IdentityProblem.TOO_LARGE
    with pytest.raises(IdentityError):
        load_certificate(pem_of(der_of(VM)) * 2)


def test_keys_that_no_container_is_made_for() -> None:
    elliptic = CA.issue(Holder(Role.VM, "e"), ec.generate_private_key(ec.SECP256R1()).public_key(), now=NOW, valid=60)
    with pytest.raises(IdentityError):
        rsa_key_of(elliptic)
    weak = FOREIGN.issue(rsa.generate_private_key(65537, 1024).public_key(), "w")  # noqa: S505 - weak on purpose: it must be refused
    with pytest.raises(IdentityError):
        rsa_key_of(weak)
    edwards = FOREIGN.issue(ed25519.Ed25519PrivateKey.generate().public_key(), "d")  # type: ignore[arg-type]
    with pytest.raises(IdentityError):
        rsa_key_of(edwards)
