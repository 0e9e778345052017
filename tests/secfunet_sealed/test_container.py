"""Containers: only the whole, untouched container opens; one content key serves within its bounds; openssl alone can open one."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

import secfunet.container
from secfunet.container import (
    ContainerError,
    ContainerProfile,
    ContainerSealer,
    VerifiedContainer,
    header_of,
    unwrap_content_key,
    verify_container,
)

RECIPIENT = rsa.generate_private_key(65537, 2048)
AUTHORITY = rsa.generate_private_key(65537, 2048)
PROFILES = list(ContainerProfile)
SEALERS = {profile: ContainerSealer(RECIPIENT.public_key(), AUTHORITY, profile) for profile in PROFILES}


def opened(container: bytes, profile: ContainerProfile = ContainerProfile.OAEP_PSS_SHA256) -> bytes:
    verified = verify_container(container, AUTHORITY.public_key(), 256, profile)
    return verified.open(unwrap_content_key(RECIPIENT, verified.header, profile))


@pytest.mark.parametrize("profile", PROFILES)
@given(plaintext=st.binary(max_size=300))
def test_round_trip_and_layout(profile: ContainerProfile, plaintext: bytes) -> None:
    container = SEALERS[profile].seal(plaintext)
    assert opened(container, profile) == plaintext
    assert len(container) == 256 + 16 + (len(plaintext) // 16 + 1) * 16 + 256


@pytest.mark.parametrize("profile", PROFILES)
def test_every_single_bit_flip_is_refused(profile: ContainerProfile) -> None:
    container = SEALERS[profile].seal(b"a signature, perhaps")
    authority = AUTHORITY.public_key()
    assert verify_container(container, authority, 256, profile)
    for bit in range(8 * len(container)):
        changed = bytearray(container)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ContainerError):
            verify_container(bytes(changed), authority, 256, profile)


def test_every_truncation_and_extension_is_refused() -> None:
    container = SEALERS[ContainerProfile.OAEP_PSS_SHA256].seal(b"x" * 40)
    for size in range(len(container)):
        with pytest.raises(ContainerError):
            verify_container(container[:size], AUTHORITY.public_key(), 256)
    for more in (1, 16, 256):
        with pytest.raises(ContainerError):
            verify_container(container + bytes(more), AUTHORITY.public_key(), 256)


@given(st.binary(max_size=1200))
def test_any_bytes_are_refused(untrusted: bytes) -> None:
    with pytest.raises(ContainerError):
        verify_container(untrusted, AUTHORITY.public_key(), 256)


@given(body=st.binary(min_size=2, max_size=8).map(lambda seed: (seed * 40)[:80]), key=st.binary(max_size=40))
def test_a_wrong_key_gives_bytes_or_the_error(body: bytes, key: bytes) -> None:
    """CBC has no proof of its own; the trailer is the proof. Opening is total all the same."""
    with contextlib.suppress(ContainerError):
        assert len(VerifiedContainer(b"", body).open(key)) < 64


def test_another_authority_and_the_other_profile_are_refused() -> None:
    stranger = rsa.generate_private_key(65537, 2048)
    container = ContainerSealer(RECIPIENT.public_key(), stranger).seal(b"x")
    with pytest.raises(ContainerError):
        verify_container(container, AUTHORITY.public_key(), 256)
    for profile, other in (PROFILES, PROFILES[::-1]):
        with pytest.raises(ContainerError):
            verify_container(SEALERS[profile].seal(b"x"), AUTHORITY.public_key(), 256, other)


def test_another_hypervisor_cannot_unwrap() -> None:
    """Oaep only: v1.5 answers a wrong key with made-up bytes, and those do not open the body."""
    header = header_of(SEALERS[ContainerProfile.OAEP_PSS_SHA256].seal(b"x"), 256)
    with pytest.raises(ContainerError):
        unwrap_content_key(rsa.generate_private_key(65537, 2048), header)


def test_all_errors_have_one_text() -> None:
    container = SEALERS[ContainerProfile.OAEP_PSS_SHA256].seal(b"x")
    texts = set()
    for attempt in (
        lambda: verify_container(b"", AUTHORITY.public_key(), 256),
        lambda: verify_container(container[:-1] + b"\0", AUTHORITY.public_key(), 256),
        lambda: verify_container(container, AUTHORITY.public_key(), 256).open(b"short"),
        lambda: VerifiedContainer(b"", b"\0" * 48).open(b"\0" * 32),
        lambda: unwrap_content_key(RECIPIENT, b"\1" * 256),
        lambda: header_of(b"", 256),
    ):
        with pytest.raises(ContainerError) as caught:
            attempt()
        assert caught.value.__cause__ is None
        texts.add(str(caught.value))
    assert len(texts) == 1


def test_content_key_serves_within_its_count() -> None:
    sealer = ContainerSealer(RECIPIENT.public_key(), AUTHORITY, max_containers=3)
    containers = [sealer.seal(b"x") for _ in range(7)]
    assert sorted(Counter(header_of(container, 256) for container in containers).values()) == [1, 3, 3]
    assert len({container[256:272] for container in containers}) == 7  # a fresh IV each


def test_content_key_serves_within_its_time() -> None:
    now = [1000.0]
    sealer = ContainerSealer(RECIPIENT.public_key(), AUTHORITY, max_age=300, clock=lambda: now[0])
    headers = []
    for moment in (1000, 1299.9, 1300, 1600, 1500):  # the last one: a clock that goes back is not believed
        now[0] = moment
        headers.append(header_of(sealer.seal(b"x"), 256))
    assert headers[0] == headers[1]
    assert len({headers[0], headers[2], headers[3], headers[4]}) == 4


def test_forgotten_key_is_not_used_again() -> None:
    sealer = ContainerSealer(RECIPIENT.public_key(), AUTHORITY)
    first = header_of(sealer.seal(b"x"), 256)
    sealer.forget()
    assert header_of(sealer.seal(b"x"), 256) != first


def test_threads_keep_the_bound() -> None:
    sealer = ContainerSealer(RECIPIENT.public_key(), AUTHORITY, max_containers=5)
    made: list[bytes] = []
    threads = [threading.Thread(target=lambda: made.extend(sealer.seal(b"x") for _ in range(10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Counter(header_of(container, 256) for container in made).values()) == {5}
    assert {opened(container) for container in made} == {b"x"}


def test_secrets_are_not_in_a_repr() -> None:
    key = b"\xaa" * 32
    sealer = ContainerSealer(RECIPIENT.public_key(), AUTHORITY, randbytes=lambda size: b"\xaa" * size)
    sealer.seal(b"x")
    assert repr(key)[2:-1] not in repr(sealer._current)


def test_a_signing_function_serves_in_place_of_a_key() -> None:
    seen: list[bytes] = []

    def sign(message: bytes) -> bytes:
        seen.append(message)
        return b"\0" * 256

    container = ContainerSealer(RECIPIENT.public_key(), sign).seal(b"x")
    assert container == seen[0] + b"\0" * 256


def test_too_long_a_plaintext_is_a_fault_of_the_caller() -> None:
    with pytest.raises(ValueError, match="at most"):
        SEALERS[ContainerProfile.OAEP_PSS_SHA256].seal(bytes(2**20 + 1))


@pytest.mark.interop
def test_openssl_alone_opens_one_by_the_documented_commands(tmp_path: Path) -> None:
    """Runs the commands of the module's docstring, as they stand there."""
    documented = secfunet.container.__doc__
    assert documented is not None
    start = documented.index("    size=$(stat")
    script = documented[start : documented.index("\n\n", start)]
    assert script.count("openssl") == 3
    (tmp_path / "c").write_bytes(
        SEALERS[ContainerProfile.OAEP_PSS_SHA256].seal(b"who opens this needs no code of ours")
    )
    (tmp_path / "r.pem").write_bytes(
        RECIPIENT.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "a.pem").write_bytes(
        AUTHORITY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == b"Verified OK\nwho opens this needs no code of ours"


@pytest.mark.interop
def test_openssl_alone_opens_one_of_the_other_profile(tmp_path: Path) -> None:
    documented = secfunet.container.__doc__
    assert documented is not None
    start = documented.index("    size=$(stat")
    script = documented[start : documented.index("\n\n", start)]
    script = script.replace("-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32", "")
    script = script.replace("-pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256", "")
    (tmp_path / "c").write_bytes(SEALERS[ContainerProfile.PKCS1_V1_5].seal(b"legacy"))
    (tmp_path / "r.pem").write_bytes(
        RECIPIENT.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "a.pem").write_bytes(
        AUTHORITY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    done = subprocess.run(["sh", "-ec", script], cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == b"Verified OK\nlegacy"
