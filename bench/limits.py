"""What this machine's cores can do at most: private-key operations in process, one core, nothing around them."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

from bench.plan import Plan, rates
from bench.rows import Row

RSA = "RSA-2048 signature in process, one core"
EC = "P-256 signature in process, one core"
DIGEST = bytes(32)


async def measure(plan: Plan) -> None:
    """Two rows."""
    rsa_key = rsa.generate_private_key(65537, 2048)
    pss, algorithm = padding.PSS(padding.MGF1(hashes.SHA256()), 32), utils.Prehashed(hashes.SHA256())
    plan.add(Row.of(RSA, "1/s", rates(plan, lambda: rsa_key.sign(DIGEST, pss, algorithm))))
    ec_key, ecdsa = ec.generate_private_key(ec.SECP256R1()), ec.ECDSA(algorithm)
    plan.add(Row.of(EC, "1/s", rates(plan, lambda: ec_key.sign(DIGEST, ecdsa))))
