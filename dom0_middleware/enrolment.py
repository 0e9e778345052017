"""Enrolment: a secret that only one domain was handed, good for one key of its agent.

Rules, in the order in which they are applied (``api/enrolment.py`` has already seen that the domain runs):
an attempt is used up, on disk, before anything is compared; the secret is compared in constant time; the request is a sound PKCS#10; the
secret belongs, on disk, to the key of that request before the certificate is made. From then on it is worth nothing to another key, and to
this one until its first certificate was shown: an agent that the answer did not reach (the domain was paused, the agent killed) asks
again. After five attempts that were wrong, or whose request was not sound, it is dead until StartVm or InviteVm makes another. So nothing
is computed with a key of somebody who does not have the secret, and little with one of somebody who has.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dom0_middleware.authority import PublicKey
from dom0_middleware.errors import Reason, Refused
from dom0_middleware.state import StateStore

SECRET_SIZE = 32  # bytes
MAX_ATTEMPTS = 5
# Of the key that it belongs to: each makes a certificate and a record.
MAX_REPEATS = 20


class JoinSecrets:
    """Makes and redeems join secrets. Only their hashes are kept: with 256 random bits, SHA-256 without a salt is enough."""

    def __init__(self, store: StateStore, *, randbytes: Callable[[int], bytes]) -> None:
        self._store = store
        self._randbytes = randbytes

    def begin_run(self, uuid: str) -> str:
        """A new secret (base64url) for a new run of the domain; every earlier secret and certificate of it is dead."""
        secret = self._randbytes(SECRET_SIZE)
        self._store.begin_run(uuid, secret_hash=hashlib.sha256(secret).digest(), attempts=MAX_ATTEMPTS)
        return _text(secret)

    def invite(self, uuid: str) -> str:
        """A new secret (base64url) in the present run of the domain; every earlier secret and certificate of it is dead."""
        secret = self._randbytes(SECRET_SIZE)
        self._store.invite(uuid, secret_hash=hashlib.sha256(secret).digest(), attempts=MAX_ATTEMPTS)
        return _text(secret)

    def compare(self, uuid: str, untrusted_secret: bytes) -> bytes:
        """Uses up an attempt; what ``give_to`` takes if the secret is right. Raises Refused (JOIN_SECRET_REFUSED)."""
        expected = self._store.take_attempt(uuid)
        if expected is None:
            run = self._store.run(uuid)
            raise _refused("used already" if run is not None and run.secret_used else "dead")
        if not hmac.compare_digest(hashlib.sha256(untrusted_secret[:1024]).digest(), expected):
            raise _refused("wrong")
        return expected

    def give_to(self, uuid: str, secret_hash: bytes, key: PublicKey) -> None:
        """The secret that was compared belongs to ``key`` from now on.

        Raises Refused (JOIN_SECRET_REFUSED) if it is another key's, or another secret has taken its place since then.
        """
        if not self._store.use_secret(uuid, secret_hash, key_hash(key), attempts=MAX_REPEATS):
            raise _refused("used already")


def key_hash(key: PublicKey) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()


def _text(secret: bytes) -> str:
    return base64.urlsafe_b64encode(secret).rstrip(b"=").decode("ascii")


def _refused(cause: str) -> Refused:
    return Refused(
        Reason.JOIN_SECRET_REFUSED, "this join secret is not valid for this domain", detail=f"the secret is {cause}"
    )
