"""VM-Auth-Tokens: the token authority's statement that a VM may use its key from one hypervisor, for these operations, until then.

A JWS in compact serialisation (RFC 7515), ASCII, at most 4096 characters. Protected header, exactly: ``typ`` = ``vm-auth+jwt``,
``alg`` = ``PS256`` or ``ES256`` (whatever the authority's key is for), ``kid`` = the JWK thumbprint (RFC 7638) of that key.
Claims (RFC 7519):

    iss, aud     the authority, and the service provider whose token it is; strings
    sub          the VM: thumbprint of its certificate (VMID)
    cnf          {"x5t#S256": thumbprint of the hypervisor's certificate (HVID)}; the meaning of RFC 8705, 3.1: the token is worth
                 nothing to whoever does not hold that hypervisor's key
    iat nbf exp  UTC seconds, integers
    jti          the token's name, 1 to 64 characters of base64url: by it the token is revoked
    ops          a list of "sign", "decrypt", "encrypt", at least one, none twice
    res          "card": the VM's card is bound to that hypervisor, and signs the containers of its results itself; not there: the
                 container authority does
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, RSAKey

from secfunet.errors import SecFuNetError
from secfunet.identity import IdentityError, check_thumbprint
from secfunet.operation import OPERATIONS

TOKEN_TYPE: Final = "vm-auth+jwt"  # noqa: S105 - a media type, no password
MAX_TOKEN_SIZE: Final = 4096
"""Characters of the longest token that is looked at."""
LEEWAY: Final = 5.0
"""Seconds by which the clocks of the authority and the service provider may differ."""

_JTI: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_MAX_TIME: Final = 2**53
_THUMBPRINT_CLAIM: Final = "x5t#S256"
_CLAIMS: Final = frozenset({"iss", "aud", "sub", "cnf", "iat", "nbf", "exp", "jti", "ops"})
_OPTIONAL: Final = frozenset({"res"})
_FROM_CARD: Final = "card"
_HEADER: Final = frozenset({"typ", "alg", "kid"})

TokenPublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
TokenPrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class TokenRefusal(Enum):
    """Why a token is refused: for the log of the service provider. Outside it is one refusal."""

    OVERSIZE = "it is longer than 4096 characters"
    MALFORMED = "it is no JWS whose header and claims are JSON objects of the expected members"
    TYPE = "its typ is not vm-auth+jwt"
    ALGORITHM = "its alg is not the one of the authority's key"
    UNKNOWN_KEY = "no key of the authority has its kid"
    SIGNATURE = "its signature is wrong"
    ISSUER = "another authority issued it"
    AUDIENCE = "it is meant for another service provider"
    NOT_YET_VALID = "it is not valid yet"
    EXPIRED = "it has expired"
    VM = "it is another VM's"
    HYPERVISOR = "it is for another hypervisor"
    REVOKED = "it was revoked"


class TokenError(SecFuNetError):
    """The VM-Auth-Token is refused; ``refusal`` says why."""

    def __init__(self, refusal: TokenRefusal) -> None:
        super().__init__(f"the VM-Auth-Token is refused: {refusal.value}")
        self.refusal = refusal


@dataclass(frozen=True)
class VmAuthToken:
    """What an accepted token says. Times are UTC seconds."""

    jti: str
    vmid: str
    hvid: str
    audience: str
    issuer: str
    operations: frozenset[str]
    issued_at: int
    not_before: int
    expires_at: int
    from_card: bool = False


def key_id(key: TokenPublicKey) -> str:
    """The ``kid`` of a token authority's key: its JWK thumbprint, SHA-256 (RFC 7638)."""
    return _jwk(key).thumbprint()


def algorithm_of(key: TokenPublicKey | TokenPrivateKey) -> str:
    """The one algorithm that a token authority's key is for: PS256 (RSA of at least 2048 bits) or ES256 (P-256).

    Other keys are a ValueError.
    """
    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey) and key.key_size >= 2048:
        return "PS256"
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return "ES256"
    raise ValueError("a token authority's key is RSA of at least 2048 bits, or P-256")


def issue_token(
    key: TokenPrivateKey,
    *,
    issuer: str,
    audience: str,
    vmid: str,
    hvid: str,
    operations: Iterable[str],
    issued_at: float,
    expires_at: float,
    jti: str | None = None,
    from_card: bool = False,
) -> str:
    """A token, valid from ``issued_at`` until ``expires_at`` (UTC seconds; fractions are dropped). ``jti`` None: 128 random bits.

    What no verifier would accept is a ValueError.
    """
    claims: dict[str, Any] = {
        "iss": issuer,
        "aud": audience,
        "sub": vmid,
        "cnf": {_THUMBPRINT_CLAIM: hvid},
        "iat": int(issued_at),
        "nbf": int(issued_at),
        "exp": int(expires_at),
        "jti": secrets.token_urlsafe(16) if jti is None else jti,
        "ops": sorted(operations),
    }
    if from_card:
        claims["res"] = _FROM_CARD
    try:
        _parse_claims(claims)
    except TokenError:
        raise ValueError("these claims make no VM-Auth-Token") from None
    if claims["exp"] <= claims["iat"]:
        raise ValueError("a token ends after it begins")
    algorithm = algorithm_of(key)
    header = {"typ": TOKEN_TYPE, "alg": algorithm, "kid": key_id(key.public_key())}
    payload = json.dumps(claims, separators=(",", ":")).encode()
    token = jws.serialize_compact(header, payload, _jwk(key), algorithms=[algorithm])
    if len(token) > MAX_TOKEN_SIZE:
        raise ValueError("the token would be longer than any verifier reads")
    return token


class TokenVerifier:
    """The service provider's side. ``keys``: the authority's public keys by key_id; ``leeway``: seconds that clocks may differ."""

    def __init__(self, issuer: str, audience: str, keys: Mapping[str, TokenPublicKey], leeway: float = LEEWAY) -> None:
        if not keys:
            raise ValueError("a verifier without keys could accept nothing")
        self._issuer = issuer
        self._audience = audience
        self._keys = {kid: (_jwk(key), algorithm_of(key)) for kid, key in keys.items()}
        self._leeway = leeway

    def verify(
        self, untrusted_token: str, *, vmid: str, hvid: str, now: float, is_revoked: Callable[[str], bool]
    ) -> VmAuthToken:
        """What the token says, if it holds for this VM on this hypervisor at ``now`` (UTC seconds). Raises TokenError with the
        first rule that fails.

        The rules, in their order:

        1. it has at most 4096 characters (OVERSIZE) and is three parts of base64url without padding, the first one a JSON
           object (MALFORMED);
        2. its header: ``typ`` is ours (TYPE), ``alg`` is PS256 or ES256 (ALGORITHM: neither none nor an HMAC), it has no
           further member such as ``crit`` or ``jwk`` (MALFORMED), ``kid`` names a key of ours (UNKNOWN_KEY), and that key is
           for that ``alg`` (ALGORITHM);
        3. the signature is that key's (SIGNATURE);
        4. the claims are the ones above, each of its type, none twice (MALFORMED);
        5. issuer (ISSUER) and audience (AUDIENCE) are the expected ones;
        6. ``iat`` and ``nbf`` have come (NOT_YET_VALID) and ``exp`` has not (EXPIRED), both with the leeway;
        7. it is this VM's (VM), on this hypervisor (HYPERVISOR);
        8. its jti was not revoked (REVOKED).
        """
        header = _parse_header(untrusted_token)
        algorithm = header.get("alg")
        if header.get("typ") != TOKEN_TYPE:
            raise TokenError(TokenRefusal.TYPE)
        if algorithm not in ("PS256", "ES256"):
            raise TokenError(TokenRefusal.ALGORITHM)
        if header.keys() != _HEADER:
            raise TokenError(TokenRefusal.MALFORMED)
        known = self._keys.get(header["kid"]) if isinstance(header["kid"], str) else None
        if known is None:
            raise TokenError(TokenRefusal.UNKNOWN_KEY)
        key, expected_algorithm = known
        if algorithm != expected_algorithm:
            raise TokenError(TokenRefusal.ALGORITHM)
        try:
            verified = jws.deserialize_compact(untrusted_token, key, algorithms=[expected_algorithm])
        except (JoseError, ValueError) as error:
            raise TokenError(TokenRefusal.SIGNATURE) from error
        token = _parse_claims(_object(verified.payload))
        if token.issuer != self._issuer:
            raise TokenError(TokenRefusal.ISSUER)
        if token.audience != self._audience:
            raise TokenError(TokenRefusal.AUDIENCE)
        if now + self._leeway < max(token.not_before, token.issued_at):
            raise TokenError(TokenRefusal.NOT_YET_VALID)
        if now - self._leeway >= token.expires_at:
            raise TokenError(TokenRefusal.EXPIRED)
        if not hmac.compare_digest(token.vmid.encode(), vmid.encode()):
            raise TokenError(TokenRefusal.VM)
        if not hmac.compare_digest(token.hvid.encode(), hvid.encode()):
            raise TokenError(TokenRefusal.HYPERVISOR)
        if is_revoked(token.jti):
            raise TokenError(TokenRefusal.REVOKED)
        return token


def unverified_claims(untrusted_token: str) -> VmAuthToken:
    """What a token claims, without any proof: for whoever carries it and wants to know when to ask for the next one.

    Raises TokenError (OVERSIZE, MALFORMED).
    """
    _parse_header(untrusted_token)
    return _parse_claims(_object(_base64url(untrusted_token.split(".")[1])))


def unverified_expiry(untrusted_token: str) -> int:
    """When the token says that it ends, UTC seconds; see unverified_claims."""
    return unverified_claims(untrusted_token).expires_at


def _jwk(key: TokenPublicKey | TokenPrivateKey) -> RSAKey | ECKey:
    # Handing over the key object spares the 40 ms that checking an RSA private key anew would take.
    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        return RSAKey(key, key)
    return ECKey(key, key)


def _parse_header(untrusted_token: str) -> dict[str, Any]:
    if len(untrusted_token) > MAX_TOKEN_SIZE:
        raise TokenError(TokenRefusal.OVERSIZE)
    parts = untrusted_token.split(".")
    if len(parts) != 3:
        raise TokenError(TokenRefusal.MALFORMED)
    header = _object(_base64url(parts[0]))
    _base64url(parts[1])
    _base64url(parts[2])
    return header


def _base64url(part: str) -> bytes:
    """RFC 7515, 2: no padding, and one text a value."""
    try:
        raw = part.encode("ascii")
        value = base64.b64decode(raw + b"=" * (-len(raw) % 4), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise TokenError(TokenRefusal.MALFORMED) from None
    if base64.urlsafe_b64encode(value).rstrip(b"=") != raw:
        raise TokenError(TokenRefusal.MALFORMED)
    return value


def _object(raw: bytes) -> dict[str, Any]:
    """A JSON object without a member that stands twice (RFC 7519, 4)."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_members, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise TokenError(TokenRefusal.MALFORMED) from None
    if not isinstance(value, dict):
        raise TokenError(TokenRefusal.MALFORMED)
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _parse_claims(untrusted: dict[str, Any]) -> VmAuthToken:
    if untrusted.keys() - _OPTIONAL != _CLAIMS or untrusted.get("res", _FROM_CARD) != _FROM_CARD:
        raise TokenError(TokenRefusal.MALFORMED)
    confirmation = untrusted["cnf"]
    operations = untrusted["ops"]
    if (
        not isinstance(confirmation, dict)
        or confirmation.keys() != {_THUMBPRINT_CLAIM}
        or not isinstance(operations, list)
    ):
        raise TokenError(TokenRefusal.MALFORMED)
    if not operations or not all(isinstance(operation, str) for operation in operations):
        raise TokenError(TokenRefusal.MALFORMED)
    if len(set(operations)) != len(operations) or not set(operations) <= set(OPERATIONS):
        raise TokenError(TokenRefusal.MALFORMED)
    jti = untrusted["jti"]
    if not isinstance(jti, str) or _JTI.fullmatch(jti) is None:
        raise TokenError(TokenRefusal.MALFORMED)
    try:
        return VmAuthToken(
            jti=jti,
            vmid=check_thumbprint(untrusted["sub"]),
            hvid=check_thumbprint(confirmation[_THUMBPRINT_CLAIM]),
            audience=_text(untrusted["aud"]),
            issuer=_text(untrusted["iss"]),
            operations=frozenset(operations),
            issued_at=_time(untrusted["iat"]),
            not_before=_time(untrusted["nbf"]),
            expires_at=_time(untrusted["exp"]),
            from_card="res" in untrusted,
        )
    except IdentityError:
        raise TokenError(TokenRefusal.MALFORMED) from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TokenError(TokenRefusal.MALFORMED)
    return value


def _time(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_TIME:
        raise TokenError(TokenRefusal.MALFORMED)
    return value
