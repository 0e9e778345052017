"""Enrolment: a secret that only one domain was handed, good for one key of its agent.

Rules, in the order in which they are applied (``api/enrolment.py`` has already seen that the domain runs):
the request is a sound PKCS#10; an attempt is used up, on disk, before anything is compared; the secret is compared in constant time;
it belongs, on disk, to the key of that request before the certificate is made. From then on it is worth nothing to another key, and to
this one until its first certificate was shown: an agent that the answer did not reach (the domain was paused, the agent killed) asks
again. After five wrong attempts it is dead until the next StartVm makes another.
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
        return base64.urlsafe_b64encode(secret).rstrip(b"=").decode("ascii")

    def redeem(self, uuid: str, untrusted_secret: bytes, key: PublicKey) -> None:
        """Returns if the secret is right and belongs to ``key``, as it does from now on.

        Raises Refused (JOIN_SECRET_REFUSED), with the cause in ``detail``.
        """
        expected = self._store.take_attempt(uuid)
        if expected is None:
            run = self._store.run(uuid)
            raise _refused("used already" if run is not None and run.secret_used else "dead")
        if not hmac.compare_digest(hashlib.sha256(untrusted_secret[:1024]).digest(), expected):
            raise _refused("wrong")
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if not self._store.use_secret(uuid, hashlib.sha256(spki).digest(), attempts=MAX_REPEATS):
            raise _refused("used already")


def _refused(cause: str) -> Refused:
    return Refused(
        Reason.JOIN_SECRET_REFUSED, "this join secret is not valid for this domain", detail=f"the secret is {cause}"
    )
