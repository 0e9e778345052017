"""An authority of tokens for tests, and a card that trusts it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secfunet.card import CardClient, KeyAlgorithm
from secfunet.card.tokens import CardTokens
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.user_token import UserToken, key_digest, public_key_der
from secure_element.card_os import CardOs
from secure_element.store import StoreContents
from tests.support.local_card import administrator_client, new_store, open_store, personalised, ready_client
from tests.support.pki import CertificateAuthority, key_pem

OAEP, V15 = ContainerProfile.OAEP_PSS_SHA256, ContainerProfile.PKCS1_V1_5


class TokenMaker:
    """An authority's key, and what it signs: containers as they should be, and others."""

    def __init__(self, bits: int = 2048) -> None:
        self.key = rsa.generate_private_key(65537, bits)

    @property
    def public(self) -> bytes:
        return public_key_der(self.key.public_key())

    def seal(self, plaintext: bytes, recipient: rsa.RSAPublicKey, profile: ContainerProfile = OAEP) -> bytes:
        return ContainerSealer(recipient, self.key, profile).seal(plaintext)

    def token(
        self,
        recipient: rsa.RSAPublicKey,
        counter: int,
        *,
        name: str = "badge",
        value: bytes = b"the token",
        profile: ContainerProfile = OAEP,
    ) -> bytes:
        token = UserToken(counter, key_digest(public_key_der(recipient)), name, value)
        return self.seal(token.encode(), recipient, profile)


class TokenCard:
    """A card with an RSA identity, "alice", another one, "bob", and one on a curve, "ec"; it trusts ``maker``."""

    def __init__(self, card: CardOs, folder: Path, ca: CertificateAuthority) -> None:
        self.card = card
        self.folder = folder
        self.ca = ca

    @classmethod
    async def make(cls, folder: Path, maker: TokenMaker) -> TokenCard:
        names = (("alice", KeyAlgorithm.RSA_2048), ("bob", KeyAlgorithm.RSA_2048), ("ec", KeyAlgorithm.P_256))
        ca = CertificateAuthority()
        made = cls(await personalised(new_store(folder), ca, *names), folder, ca)
        await (await made.administrator()).trust(maker.public)
        return made

    def copy(self, folder: Path) -> TokenCard:
        """Another card with the same store, in another folder."""
        shutil.copy(self.folder / "card.store", folder / "card.store")
        return TokenCard(CardOs(open_store(folder)), folder, self.ca)

    async def administrator(self) -> CardTokens:
        return CardTokens(await administrator_client(self.card))

    async def user(self, identity: str = "alice", **how: object) -> CardTokens:
        return CardTokens(await ready_client(self.card, identity, **how))  # type: ignore[arg-type]

    async def client(self, identity: str = "alice") -> CardClient:
        return await ready_client(self.card, identity)

    async def key(self, identity: str = "alice") -> rsa.RSAPublicKey:
        return rsa_key_of(load_certificate(await (await self.client(identity)).certificate()))

    @property
    def contents(self) -> StoreContents:
        """All that the card keeps."""
        return self.card._channel._store.contents


OPENSSL = """
set -e
openssl rand -out key 32
openssl pkeyutl -encrypt -pubin -inkey r.pem -pkeyopt rsa_padding_mode:oaep -pkeyopt rsa_oaep_md:sha256 -in key > header
openssl rand -out iv 16
openssl enc -aes-256-cbc -K "$(od -An -v -tx1 key | tr -d ' \\n')" -iv "$(od -An -v -tx1 iv | tr -d ' \\n')" -in token > body
cat header iv body > signed
openssl dgst -sha256 -sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32 -sign a.key signed > trailer
cat signed trailer > container
"""


async def run_openssl(folder: Path, maker: TokenMaker, recipient: rsa.RSAPublicKey, plaintext: bytes) -> bytes:
    """A container that openssl's command line makes."""
    (folder / "r.pem").write_bytes(recipient.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    (folder / "a.key").write_bytes(key_pem(maker.key))
    (folder / "token").write_bytes(plaintext)
    process = await asyncio.create_subprocess_exec("sh", "-c", OPENSSL, cwd=folder)
    assert await process.wait() == 0
    return (folder / "container").read_bytes()
