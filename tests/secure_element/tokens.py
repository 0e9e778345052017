"""An authority of tokens for tests, and a card that trusts it."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import rsa

from secfunet.card import CardClient, KeyAlgorithm
from secfunet.card.tokens import CardTokens
from secfunet.container import ContainerProfile, ContainerSealer
from secfunet.identity import load_certificate, rsa_key_of
from secfunet.user_token import UserToken, key_digest, public_key_der
from secure_element.card_os import CardOs
from tests.support.local_card import administrator_client, new_store, personalised, ready_client
from tests.support.pki import CertificateAuthority

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

    def __init__(self, card: CardOs, folder: Path, maker: TokenMaker) -> None:
        self.card = card
        self.folder = folder
        self.maker = maker

    @classmethod
    async def make(cls, folder: Path, maker: TokenMaker) -> TokenCard:
        names = (("alice", KeyAlgorithm.RSA_2048), ("bob", KeyAlgorithm.RSA_2048), ("ec", KeyAlgorithm.P_256))
        made = cls(await personalised(new_store(folder), CertificateAuthority(), *names), folder, maker)
        await (await made.administrator()).trust(maker.public)
        return made

    async def administrator(self) -> CardTokens:
        return CardTokens(await administrator_client(self.card))

    async def user(self, identity: str = "alice", **how: object) -> CardTokens:
        return CardTokens(await ready_client(self.card, identity, **how))  # type: ignore[arg-type]

    async def client(self, identity: str = "alice") -> CardClient:
        return await ready_client(self.card, identity)

    async def key(self, identity: str = "alice") -> rsa.RSAPublicKey:
        return rsa_key_of(load_certificate(await (await self.client(identity)).certificate()))

    @property
    def contents(self) -> object:
        """All that the card keeps."""
        return self.card._channel._store.contents
