"""The OpenID provider (OP): associations, authentication requests, assertions. It takes parameters and gives back bodies and URLs.

Who the user is, and whether he may be asserted, is the application's to know. The rules here:

1. A MAC key travels in the clear only inside TLS (§8.4.1).
2. Nobody is answered at a return_to outside of the realm (§9.2), nor at a realm that the provider does not serve.
3. An assertion names the endpoint, the identifier, the return_to, a fresh nonce and the association, all signed (§10.1).
4. A relying party without an association (or with one that ended) gets a private association, good for one check_authentication of one
   assertion (§11.4.2.1): it is gone with the first valid check.
5. A shared association is never used to answer check_authentication, else the holder of its key could not be told from the provider.
"""

from __future__ import annotations

import base64
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from secfunet.openid.association import Association, AssociationKind, AssociationType, SessionType, check_handle
from secfunet.openid.diffie_hellman import (
    DEFAULT_GENERATOR,
    DEFAULT_MODULUS,
    DhGroup,
    DhKey,
    decode_number,
    encode_number,
)
from secfunet.openid.errors import CheckidError, OpenIdFormatError, RealmError
from secfunet.openid.form import IDENTIFIER_SELECT, NAMESPACE, encode_key_values, message_of, url_with_message
from secfunet.openid.nonce import make_nonce
from secfunet.openid.realm import check_realm, check_return_to, parse_url, same_url
from secfunet.openid.store import OpenIdStore

_log = logging.getLogger(__name__)

ASSOCIATION_LIFETIME = 3600  # seconds
PRIVATE_LIFETIME = 300  # seconds in which an assertion may be asked about
# §10.1 wants op_endpoint, return_to, response_nonce, assoc_handle, claimed_id and identity signed; mode and ns cost nothing.
SIGNED_FIELDS = "ns,mode,op_endpoint,claimed_id,identity,return_to,response_nonce,assoc_handle"


@dataclass(frozen=True)
class DirectResponse:
    """The answer to a direct request (§5.1.2), as the HTTP shell must send it."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class CheckidRequest:
    """An authentication request whose realm and return_to were checked. All plain text: it may be kept in a cookie's session."""

    immediate: bool
    claimed_id: str  # "" if the request is not about an identifier of the relying party's choice
    identity: str
    return_to: str
    realm: str
    assoc_handle: str  # "": the relying party has none

    @property
    def provider_chooses(self) -> bool:
        """The relying party leaves it to the provider who the user is (identifier_select)."""
        return self.identity == IDENTIFIER_SELECT


class _UnsupportedTypeError(Exception):
    """An association or session type that is not made (§8.2.4)."""


class OpenIdProvider:
    """One OP endpoint.

    ``accepts_realm`` is asked about every realm (normalised): a provider of a closed house serves its own relying parties only.
    """

    def __init__(
        self,
        endpoint_url: str,
        store: OpenIdStore,
        clock: Callable[[], float] = time.time,
        randbytes: Callable[[int], bytes] = secrets.token_bytes,
        *,
        accepts_realm: Callable[[str], bool] | None = None,
        association_lifetime: int = ASSOCIATION_LIFETIME,
    ) -> None:
        parse_url(endpoint_url)
        self.endpoint_url = endpoint_url
        self._store = store
        self._clock = clock
        self._randbytes = randbytes
        self._accepts_realm = accepts_realm
        self._lifetime = association_lifetime

    # Direct requests

    def direct(self, params: Mapping[str, str], over_tls: bool) -> DirectResponse:
        """Answers a direct request (a POST of a relying party) by its openid.mode."""
        mode = params.get("openid.mode", "")
        if mode == "associate":
            return self.associate(params, over_tls)
        if mode == "check_authentication":
            return self.check_authentication(params)
        return _error_response("openid.mode is not that of a direct request")

    def associate(self, params: Mapping[str, str], over_tls: bool) -> DirectResponse:
        """Makes an association (§8). ``over_tls`` says whether the request came through TLS."""
        try:
            message = message_of(params)
            answer = self._associate(message, over_tls)
        except OpenIdFormatError as error:
            return _error_response(str(error))
        except _UnsupportedTypeError as error:
            preferred = SessionType.NO_ENCRYPTION if over_tls else SessionType.DH_SHA256
            return _error_response(
                str(error),
                error_code="unsupported-type",
                assoc_type=AssociationType.HMAC_SHA256.value,
                session_type=preferred.value,
            )
        return DirectResponse(200, encode_key_values(answer.items()))

    def _associate(self, message: dict[str, str], over_tls: bool) -> dict[str, str]:
        try:
            association_type = AssociationType(message.get("assoc_type", ""))
            session_type = SessionType(message.get("session_type", ""))
        except ValueError:
            raise _UnsupportedTypeError("this association or session type is not known") from None
        if not session_type.fits(association_type):
            raise _UnsupportedTypeError("this session type does not fit the association type")
        if session_type is SessionType.NO_ENCRYPTION and not over_tls:
            raise _UnsupportedTypeError("no-encryption is for TLS connections only")
        key: DhKey | None = None
        consumer_public = 0
        if session_type is not SessionType.NO_ENCRYPTION:
            group = DhGroup(
                decode_number(message["dh_modulus"]) if "dh_modulus" in message else DEFAULT_MODULUS,
                decode_number(message["dh_gen"]) if "dh_gen" in message else DEFAULT_GENERATOR,
            )
            if group != DhGroup():
                # A larger one costs several times as much, and whether it is a group at all cannot be told at a glance.
                raise _UnsupportedTypeError("the only Diffie-Hellman group here is the default one (OpenID 2.0, 8.1.2)")
            consumer_public = decode_number(message.get("dh_consumer_public", ""))
            key = DhKey.generate(group, self._randbytes)
        secret = self._randbytes(association_type.key_size)
        # Masked before it is stored: a number that is refused leaves no association behind.
        hidden = key.mask(consumer_public, secret, session_type.hash_name) if key is not None else secret
        association = self._new(AssociationKind.SHARED, association_type, secret, self._lifetime)
        answer = {
            "ns": NAMESPACE,
            "assoc_handle": association.handle,
            "session_type": session_type.value,
            "assoc_type": association_type.value,
            "expires_in": str(self._lifetime),
        }
        if key is None:
            answer["mac_key"] = base64.b64encode(hidden).decode("ascii")
        else:
            answer["dh_server_public"] = encode_number(key.public)
            answer["enc_mac_key"] = base64.b64encode(hidden).decode("ascii")
        return answer

    def check_authentication(self, params: Mapping[str, str]) -> DirectResponse:
        """Says whether an assertion is ours (§11.4.2): once for each assertion, and only for those made with a private association."""
        try:
            message = message_of(params)
        except OpenIdFormatError as error:
            return _error_response(str(error))
        answer = {"ns": NAMESPACE, "is_valid": "true" if self._is_ours(message) else "false"}
        invalid = message.get("invalidate_handle")
        if invalid is not None and self._find(AssociationKind.SHARED, invalid) is None:
            answer["invalidate_handle"] = invalid
        try:
            return DirectResponse(200, encode_key_values(answer.items()))
        except OpenIdFormatError as error:
            return _error_response(str(error))

    def _is_ours(self, message: dict[str, str]) -> bool:
        association = self._find(AssociationKind.PRIVATE, message.get("assoc_handle", ""))
        if association is None:
            return False
        try:
            # The relying party sends back all that it got, but for the mode (§11.4.2.1).
            association.verify({**message, "mode": "id_res"})
        except OpenIdFormatError:
            return False
        if not set(SIGNED_FIELDS.split(",")) <= set(message.get("signed", "").split(",")):
            return False
        # The handle is that of this one assertion, so of its nonce; of several that ask at once, the store lets one through.
        return self._store.remove_association(AssociationKind.PRIVATE, self.endpoint_url, association.handle)

    # Indirect requests

    def parse_checkid(self, params: Mapping[str, str]) -> CheckidRequest:
        """The authentication request (§9) in the parameters of a browser's (or client's) GET or POST. Raises CheckidError."""
        try:
            message = message_of(params)
        except OpenIdFormatError as error:
            raise CheckidError(str(error)) from None
        return_to = message.get("return_to", "")
        realm = message.get("realm", "") or return_to.partition("?")[0]
        if not return_to:
            raise CheckidError("the request has no return_to")
        try:
            whom = check_realm(realm)
            check_return_to(return_to, realm)
        except RealmError as error:
            raise CheckidError(str(error)) from None
        if self._accepts_realm is not None and not self._accepts_realm(str(whom)):
            raise CheckidError("this provider does not serve that realm")

        def refused(text: str) -> CheckidError:
            return CheckidError(text, redirect=self._answer(return_to, {"mode": "error", "error": text}))

        mode = message.get("mode", "")
        if mode not in ("checkid_setup", "checkid_immediate"):
            raise refused("openid.mode is not that of an authentication request")
        claimed_id, identity = message.get("claimed_id", ""), message.get("identity", "")
        if not claimed_id or not identity:
            raise refused("only requests about an identifier are answered: claimed_id and identity must be there")
        if (claimed_id == IDENTIFIER_SELECT) != (identity == IDENTIFIER_SELECT):
            raise refused("claimed_id and identity do not fit each other")
        if len(claimed_id) > 2048 or len(identity) > 2048:
            raise refused("an identifier is too long")
        handle = message.get("assoc_handle", "")
        try:
            if handle:
                check_handle(handle)
        except OpenIdFormatError as error:
            raise refused(str(error)) from None
        return CheckidRequest(mode == "checkid_immediate", claimed_id, identity, return_to, realm, handle)

    def positive_assertion(self, request: CheckidRequest, claimed_id: str) -> str:
        """The URL that carries the signed statement that its bearer is ``claimed_id`` to the relying party (§10.1).

        Raises CheckidError if the relying party asked about somebody else.
        """
        if not request.provider_chooses and not same_url(request.claimed_id, claimed_id):
            text = "the relying party asks about another identifier"
            raise CheckidError(text, redirect=self.cancel(request))
        now = self._clock()
        association = self._find(AssociationKind.SHARED, request.assoc_handle) if request.assoc_handle else None
        message = {
            "ns": NAMESPACE,
            "mode": "id_res",
            "op_endpoint": self.endpoint_url,
            "claimed_id": claimed_id,
            "identity": claimed_id if request.provider_chooses else request.identity,
            "return_to": request.return_to,
            "response_nonce": make_nonce(now, self._randbytes),
        }
        if association is None:
            if request.assoc_handle:
                message["invalidate_handle"] = request.assoc_handle
            secret = self._randbytes(AssociationType.HMAC_SHA256.key_size)
            association = self._new(AssociationKind.PRIVATE, AssociationType.HMAC_SHA256, secret, PRIVATE_LIFETIME)
        message["assoc_handle"] = association.handle
        message["signed"] = SIGNED_FIELDS
        message["sig"] = association.sign(message, SIGNED_FIELDS)
        return url_with_message(request.return_to, message)

    def setup_needed(self, request: CheckidRequest) -> str:
        """The answer to checkid_immediate where the user would have to be asked (§10.2.1)."""
        return self._answer(request.return_to, {"mode": "setup_needed"})

    def cancel(self, request: CheckidRequest) -> str:
        """The answer where the user could not be authenticated (§10.2.2); to checkid_immediate that is setup_needed."""
        return self._answer(request.return_to, {"mode": "setup_needed" if request.immediate else "cancel"})

    @staticmethod
    def _answer(return_to: str, message: dict[str, str]) -> str:
        return url_with_message(return_to, {"ns": NAMESPACE, **message})

    def _find(self, kind: AssociationKind, untrusted_handle: str) -> Association | None:
        try:
            handle = check_handle(untrusted_handle)
        except OpenIdFormatError:
            return None
        return self._store.find_association(kind, self.endpoint_url, handle, self._clock())

    def _new(self, kind: AssociationKind, type_: AssociationType, secret: bytes, lifetime: int) -> Association:
        handle = base64.urlsafe_b64encode(self._randbytes(18)).decode("ascii")
        association = Association(kind, self.endpoint_url, handle, type_, secret, self._clock() + lifetime)
        self._store.save_association(association)
        return association


def _error_response(text: str, **fields: str) -> DirectResponse:
    """A direct error (§5.1.2.2)."""
    _log.debug("direct request refused", extra={"problem": text})
    text = text.replace("\n", " ")
    return DirectResponse(400, encode_key_values([("ns", NAMESPACE), ("error", text), *fields.items()]))
