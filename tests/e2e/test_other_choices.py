"""The choices that the other tests do not make: containers of the PKCS#1 v1.5 profile, VM keys on elliptic curves."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from demo.attacks import public_key_pem
from demo.processes import run
from demo.stack import Stack

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="sf-"))
    yield path / "i"
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("key", "profile", "digest"),
    [("p-256", "pkcs1-v1_5", "-sha256"), ("p-384", "oaep-pss-sha256", "-sha384"), ("rsa-3072", "pkcs1-v1_5", None)],
)
async def test_a_signature_verifies(folder: Path, key: str, profile: str, digest: str | None) -> None:
    async with Stack(folder, vms=("web",), server_cards=1, key=key, profile=profile) as stack:
        document, signature, public = (folder / name for name in ("document", "signature", "public.pem"))
        document.write_bytes(b"what is signed")
        public.write_bytes(public_key_pem(stack.layout.certificate("web")))
        scheme = () if digest else ("--scheme", "rsassa-pkcs1-v1_5-sha256")
        await stack.agent("web", "sign", str(document), "--out", str(signature), *scheme)
        command = ("openssl", "dgst", digest or "-sha256", "-verify", public, "-signature", signature, document)
        assert (await run(*command)).output == b"Verified OK\n"
