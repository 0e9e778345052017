"""Certificates as RFC 5280 wants them, and requests that are not signed."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from gose.authority.certificate_authority import CertificateAuthority, check_request, new_authority_key
from gose.authority.errors import IssuanceError
from secfunet.identity import Holder, IdentityError, Role, der_of, pem_of

NOW = datetime.now(UTC).timestamp()
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
CA = CertificateAuthority.create("A grid", new_authority_key("p-384"), now=NOW)


def request(name: str = "web", key: object = RSA_KEY) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["p-384", "rsa-3072"])
@pytest.mark.interop
def test_openssl_accepts_the_chain_and_only_for_its_purpose(tmp_path: Path, algorithm: str) -> None:
    authority = CertificateAuthority.create("A grid", new_authority_key(algorithm), now=NOW)
    (tmp_path / "ca.pem").write_bytes(pem_of(der_of(authority.certificate)))
    certificates = {
        "hypervisor": authority.issue(Holder(Role.HYPERVISOR, "h"), RSA_KEY.public_key(), now=NOW, valid=86400),
        "vm": authority.issue(Holder(Role.VM, "v"), EC_KEY.public_key(), now=NOW, valid=86400),
        "server": authority.issue(
            Holder(Role.SERVER, "s"),
            EC_KEY.public_key(),
            now=NOW,
            valid=86400,
            server_names=["grid.example", "127.0.0.1", "::1"],
        ),
        "containers": authority.issue_container_authority(RSA_KEY.public_key(), now=NOW, valid=86400),
    }
    accepted = set()
    for name, certificate in certificates.items():
        (tmp_path / name).write_bytes(pem_of(der_of(certificate)))
        for purpose in ("sslclient", "sslserver"):
            command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", name]
            if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0:
                accepted.add((name, purpose))
    assert accepted == {("hypervisor", "sslclient"), ("vm", "sslclient"), ("server", "sslserver")}
    for option, name, is_good in (
        ("-verify_hostname", "grid.example", True),
        ("-verify_hostname", "other.example", False),
        ("-verify_ip", "::1", True),
        ("-verify_ip", "127.0.0.2", False),
    ):
        command = ["openssl", "verify", "-x509_strict", option, name, "-CAfile", "ca.pem", "server"]
        assert (subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0) is is_good


def test_what_a_certificate_says() -> None:
    certificate = CA.issue(Holder(Role.HYPERVISOR, "host-1"), RSA_KEY.public_key(), now=NOW, valid=3600)
    other = CA.issue(Holder(Role.HYPERVISOR, "host-1"), RSA_KEY.public_key(), now=NOW, valid=3600)
    assert certificate.serial_number != other.serial_number
    assert certificate.serial_number.bit_length() > 100
    assert certificate.not_valid_before_utc.timestamp() == int(NOW) - 300
    assert certificate.not_valid_after_utc.timestamp() == int(NOW) + 3600
    extensions = certificate.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert not basic.value.ca
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert usage.value.key_encipherment
    assert not usage.value.key_cert_sign
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("urn:secfunet:hypervisor:host-1")]
    issuer_key = CA.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    authority_key = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert authority_key.key_identifier == issuer_key.key_identifier
    assert extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.key_identifier
    ca_basic = CA.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert ca_basic.critical
    assert (ca_basic.value.ca, ca_basic.value.path_length) == (True, 0)


def test_no_certificate_outlives_the_ca() -> None:
    end = CA.certificate.not_valid_after_utc
    late = end.timestamp() - 100
    assert CA.issue(Holder(Role.VM, "v"), EC_KEY.public_key(), now=late, valid=86400).not_valid_after_utc == end
    for now, valid in ((end.timestamp() + 1, 60), (NOW, 0), (NOW, -1), (NOW, 1e9), (NOW - 86400, 60)):
        with pytest.raises(IssuanceError):
            CA.issue(Holder(Role.VM, "v"), EC_KEY.public_key(), now=now, valid=valid)


def test_keys_and_names_that_are_not_certified() -> None:
    for role, key in (
        (Role.HYPERVISOR, EC_KEY),
        (Role.VM, rsa.generate_private_key(65537, 1024)),  # noqa: S505 - weak on purpose: it must be refused
        (Role.VM, rsa.generate_private_key(3, 2048)),
        (Role.VM, ec.generate_private_key(ec.SECP521R1())),
    ):
        with pytest.raises(IssuanceError):
            CA.issue(Holder(role, "x"), key.public_key(), now=NOW, valid=60)
    for role, names in ((Role.SERVER, []), (Role.VM, ["localhost"]), (Role.SERVER, ["a b"]), (Role.SERVER, ["x:8443"])):
        with pytest.raises(IssuanceError):
            CA.issue(Holder(role, "x"), RSA_KEY.public_key(), now=NOW, valid=60, server_names=names)
    with pytest.raises(IdentityError):
        CA.issue(Holder(Role.VM, "a/b"), RSA_KEY.public_key(), now=NOW, valid=60)


def test_a_good_request() -> None:
    assert check_request(request(), Holder(Role.VM, "web")) == RSA_KEY.public_key()
    assert check_request(request(key=EC_KEY), Holder(Role.VM, "web")) == EC_KEY.public_key()


@pytest.mark.parametrize(
    ("untrusted", "role", "name"),
    [
        (request("other"), Role.VM, "web"),
        (request(key=EC_KEY), Role.HYPERVISOR, "web"),
        (request(key=ed25519.Ed25519PrivateKey.generate()), Role.VM, "web"),
        (b"", Role.VM, "web"),
        (bytes(20000), Role.VM, "web"),
    ],
    ids=["name", "role", "algorithm", "empty", "large"],
)
def test_requests_that_are_refused(untrusted: bytes, role: Role, name: str) -> None:
    with pytest.raises(IssuanceError):
        check_request(untrusted, Holder(role, name))


@given(st.data())
def test_a_request_with_any_changed_bit_is_refused(data: st.DataObject) -> None:
    """Also the public key of somebody else in a request that he did not sign."""
    good = request()
    changed = bytearray(good)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IssuanceError):
        check_request(bytes(changed), Holder(Role.VM, "web"))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(untrusted: bytes) -> None:
    with pytest.raises(IssuanceError):
        check_request(untrusted, Holder(Role.VM, "web"))
