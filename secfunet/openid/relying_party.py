"""The relying party (RP): finds a provider, agrees on a key, asks it who somebody is, and believes the answer only if §11 allows.

An answer is checked in this order, each step with its own refusal: it came to the return_to for which it was made (§11.1); what it says
agrees with what discovery of the claimed identifier says (§11.2); its nonce is fresh and unused (§11.3); it is signed by the provider,
with all that matters among the signed fields (§11.4). The nonce is used up last, so that nobody can spend the nonce of an
assertion that he could not have signed.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from secfunet.openid.association import Association, AssociationKind, AssociationType, SessionType
from secfunet.openid.diffie_hellman import DhGroup, DhKey, decode_base64, decode_number, encode_number
from secfunet.openid.discovery import DiscoveredService, discover
from secfunet.openid.effects import Exchange, FetchPolicy, HttpRequest, HttpResponse
from secfunet.openid.errors import (
    AssertionRefusedError,
    AssociationRefusedError,
    AuthenticationCancelled,
    OpenIdError,
    OpenIdFormatError,
    ProviderError,
    RealmError,
    ReportedError,
    SetupNeeded,
)
from secfunet.openid.form import (
    FORM_CONTENT_TYPE,
    NAMESPACE,
    decode_form,
    decode_key_values,
    decode_query,
    encode_message,
    message_of,
    url_with_message,
)
from secfunet.openid.nonce import nonce_time
from secfunet.openid.realm import check_return_to, parse_url
from secfunet.openid.store import OpenIdStore

_log = logging.getLogger(__name__)

Preference = tuple[AssociationType, SessionType]
DEFAULT_PREFERENCES: tuple[Preference, ...] = (
    (AssociationType.HMAC_SHA256, SessionType.DH_SHA256),
    (AssociationType.HMAC_SHA256, SessionType.NO_ENCRYPTION),
    (AssociationType.HMAC_SHA1, SessionType.DH_SHA1),
)
REQUIRED_SIGNED = frozenset({"op_endpoint", "return_to", "response_nonce", "assoc_handle", "claimed_id", "identity"})
NONCE_WINDOW = 300.0  # seconds, either way
MAX_LIFETIME = 86400  # seconds that an association is kept at most, whatever the provider offers
_MIN_LEFT = 60.0  # an association with fewer seconds left is not used for a new request
_MAX_DISCOVERED = 1000


class RelyingParty:
    """One relying party. ``realm`` covers ``return_to``; ``policy`` says whom discovery may ask.

    ``discovery_lifetime``: seconds that what was discovered about an identifier is believed without asking again; 0: always ask.
    """

    def __init__(
        self,
        realm: str,
        return_to: str,
        store: OpenIdStore,
        policy: FetchPolicy,
        clock: Callable[[], float] = time.time,
        randbytes: Callable[[int], bytes] = secrets.token_bytes,
        *,
        preferences: Sequence[Preference] = DEFAULT_PREFERENCES,
        nonce_window: float = NONCE_WINDOW,
        discovery_lifetime: float = 0.0,
    ) -> None:
        check_return_to(return_to, realm)
        if not preferences:
            raise ValueError("a relying party needs at least one preference")
        self.realm = realm
        self.return_to = return_to
        self._store = store
        self._policy = policy
        self._clock = clock
        self._randbytes = randbytes
        self._preferences = tuple(preferences)
        self._nonce_window = nonce_window
        self._discovery_lifetime = discovery_lifetime
        self._discovered: OrderedDict[str, tuple[float, DiscoveredService]] = OrderedDict()

    # Before the login

    def discover(self, identifier: str) -> Exchange[DiscoveredService]:
        """Who speaks for an identifier (§7.3). Raises DiscoveryError, FetchRefusedError or HttpFailedError."""
        now = self._clock()
        known = self._discovered.get(identifier)
        if known is not None and now < known[0]:
            return known[1]
        service = yield from discover(identifier, self._policy)
        if self._discovery_lifetime > 0:
            self._discovered[identifier] = (now + self._discovery_lifetime, service)
            self._discovered.move_to_end(identifier)
            while len(self._discovered) > _MAX_DISCOVERED:
                self._discovered.popitem(last=False)
        return service

    def associate(self, service: DiscoveredService) -> Exchange[Association]:
        """The association with a provider: one that lives still, or a new one (§8).

        Raises AssociationRefusedError if the provider makes none of ours (an authentication request may then go without), or
        HttpFailedError, FetchRefusedError.
        """
        url = self._policy.check(service.endpoint)
        now = self._clock()
        known = self._store.find_association(AssociationKind.RELYING, service.endpoint, None, now + _MIN_LEFT)
        if known is not None:
            return known
        usable = [
            pair for pair in self._preferences if pair[1] is not SessionType.NO_ENCRYPTION or url.scheme == "https"
        ]
        if not usable:
            raise AssociationRefusedError("none of the preferred associations may be made without TLS")
        asked = usable[0]
        for attempt in range(2):
            key, request = self._associate_request(service.endpoint, *asked)
            response = yield request
            if response.status == 200:
                association = self._new_association(service.endpoint, asked, key, response)
                self._store.save_association(association)
                return association
            offered = _offered_types(response)
            # The provider may name what it would make instead (§8.2.4); taken once, and only if it is among ours.
            if attempt or offered not in usable:
                break
            asked = offered
        raise AssociationRefusedError("the provider makes no association of the kinds that are accepted here")

    def _associate_request(
        self, endpoint: str, type_: AssociationType, session: SessionType
    ) -> tuple[DhKey | None, HttpRequest]:
        message = {"ns": NAMESPACE, "mode": "associate", "assoc_type": type_.value, "session_type": session.value}
        key = None
        if session is not SessionType.NO_ENCRYPTION:
            key = DhKey.generate(DhGroup(), self._randbytes)
            message["dh_consumer_public"] = encode_number(key.public)
        return key, _post(endpoint, message)

    def _new_association(
        self, endpoint: str, asked: Preference, key: DhKey | None, response: HttpResponse
    ) -> Association:
        try:
            answer = _direct_answer(response)
            if (answer.get("assoc_type"), answer.get("session_type")) != (asked[0].value, asked[1].value):
                raise OpenIdFormatError("the provider made another association than was asked for")
            lifetime = answer.get("expires_in", "")
            if not (lifetime.isascii() and lifetime.isdigit() and len(lifetime) < 12):
                raise OpenIdFormatError("an association has no lifetime")
            if key is None:
                secret = decode_base64(answer.get("mac_key", ""), limit=128)
            else:
                hidden = decode_base64(answer.get("enc_mac_key", ""), limit=128)
                secret = key.mask(decode_number(answer.get("dh_server_public", "")), hidden, asked[1].hash_name)
            return Association(
                AssociationKind.RELYING,
                endpoint,
                answer.get("assoc_handle", ""),
                asked[0],
                secret,
                self._clock() + min(int(lifetime), MAX_LIFETIME),
            )
        except OpenIdFormatError as error:
            raise AssociationRefusedError(f"the provider's association cannot be used: {error}") from None

    def authentication_request(
        self,
        service: DiscoveredService,
        association: Association | None = None,
        *,
        return_to: str | None = None,
        immediate: bool = False,
    ) -> str:
        """The URL to which the user is sent (§9). ``return_to``: the party's own with, for instance, a state in its query.

        Raises RealmError if that is outside of the realm.
        """
        chosen = self.return_to if return_to is None else return_to
        check_return_to(chosen, self.realm)
        message = {
            "ns": NAMESPACE,
            "mode": "checkid_immediate" if immediate else "checkid_setup",
            "claimed_id": service.claimed_id,
            "identity": service.local_id,
            "return_to": chosen,
            "realm": self.realm,
        }
        if association is not None:
            message["assoc_handle"] = association.handle
        return url_with_message(service.endpoint, message)

    # After the login

    def verify_response(
        self, url: str, *, return_to: str | None = None, expected: DiscoveredService | None = None
    ) -> Exchange[str]:
        """The claimed identifier that a response asserts; ``url`` is the whole URL at which it arrived.

        ``return_to`` is the one that the request carried (default: the party's own) and must be matched exactly. ``expected`` is the
        service that the request was made for: an identifier that was named must come back as it was, from the provider that was asked.
        Raises AssertionRefusedError, or NegativeAssertion if the provider asserts nothing.
        """
        try:
            fields = decode_query(url)
            message = message_of(fields)
        except OpenIdFormatError as error:
            raise AssertionRefusedError("form", str(error)) from None
        _check_mode(message)
        own = self.return_to if return_to is None else return_to
        self._check_return_to(url, fields, message, own)
        missing = sorted(name for name in REQUIRED_SIGNED if not message.get(name))
        if missing:
            raise AssertionRefusedError("form", f"{missing[0]} is missing")
        unsigned = sorted(REQUIRED_SIGNED - set(message.get("signed", "").split(",")))
        if unsigned:
            raise AssertionRefusedError("signature", f"{unsigned[0]} is not signed")
        claimed_id = yield from self._check_discovered(message, expected)
        keep_until = self._check_nonce_time(message["response_nonce"])
        yield from self._check_signature(message)
        if not self._store.use_nonce(message["op_endpoint"], message["response_nonce"], keep_until, self._clock()):
            raise AssertionRefusedError("nonce", "it was used before")
        return claimed_id

    def verify_form(
        self, url: str, body: bytes, *, return_to: str | None = None, expected: DiscoveredService | None = None
    ) -> Exchange[str]:
        """The same for a response that came as a POST (§5.2.2): ``url`` where it arrived, ``body`` what arrived."""
        try:
            message = message_of(decode_form(body))
        except OpenIdFormatError as error:
            raise AssertionRefusedError("form", str(error)) from None
        return (yield from self.verify_response(url_with_message(url, message), return_to=return_to, expected=expected))

    def _check_return_to(self, url: str, fields: dict[str, str], message: dict[str, str], own: str) -> None:
        """§11.1: scheme, authority and path are the same, and each parameter of return_to is there with its value."""
        claimed = message.get("return_to", "")
        if claimed != own:
            raise AssertionRefusedError("return_to", "it was made for another return_to")
        try:
            arrived, meant = parse_url(url.partition("?")[0]), parse_url(own.partition("?")[0])
            wanted = decode_query(own)
            check_return_to(claimed, self.realm)
        except (OpenIdFormatError, RealmError) as error:
            raise AssertionRefusedError("return_to", str(error)) from None
        if (arrived.origin, arrived.path) != (meant.origin, meant.path):
            raise AssertionRefusedError("return_to", "it arrived at another place")
        if any(fields.get(key) != value for key, value in wanted.items()):
            raise AssertionRefusedError("return_to", "it arrived with other parameters")

    def _check_discovered(self, message: dict[str, str], expected: DiscoveredService | None) -> Exchange[str]:
        """§11.2: the provider that speaks is the one that the claimed identifier names."""
        claimed_id = message["claimed_id"]
        if expected is not None:
            if message["op_endpoint"] != expected.endpoint:
                raise AssertionRefusedError("discovery", "another provider answers than was asked")
            if not expected.provider_chooses and claimed_id != expected.claimed_id:
                raise AssertionRefusedError("discovery", "another identifier comes back than was asked about")
        try:
            service = yield from self.discover(claimed_id.partition("#")[0])
        except OpenIdError as error:
            raise AssertionRefusedError("discovery", str(error)) from None
        if service.provider_chooses:
            raise AssertionRefusedError("discovery", "the claimed identifier is that of a provider")
        if service.endpoint != message["op_endpoint"]:
            raise AssertionRefusedError("discovery", "the claimed identifier names another provider")
        if service.local_id != message["identity"]:
            raise AssertionRefusedError("discovery", "the claimed identifier has another identity at the provider")
        if service.claimed_id != claimed_id.partition("#")[0]:
            raise AssertionRefusedError("discovery", "the claimed identifier leads to another one")
        return claimed_id

    def _check_nonce_time(self, untrusted_nonce: str) -> float:
        try:
            made = nonce_time(untrusted_nonce)
        except OpenIdFormatError as error:
            raise AssertionRefusedError("nonce", str(error)) from None
        if abs(self._clock() - made) > self._nonce_window:
            raise AssertionRefusedError("nonce", "it is not fresh")
        return made + self._nonce_window

    def _check_signature(self, message: dict[str, str]) -> Exchange[None]:
        """§11.4: by the association if it is known here, else by asking the provider."""
        endpoint, handle = message["op_endpoint"], message["assoc_handle"]
        association = self._store.find_association(AssociationKind.RELYING, endpoint, handle, self._clock())
        if association is not None:
            try:
                association.verify(message)
            except OpenIdFormatError as error:
                raise AssertionRefusedError("signature", str(error)) from None
            return
        response = yield _post(endpoint, {**message, "mode": "check_authentication"})
        try:
            answer = _direct_answer(response)
        except OpenIdError as error:
            raise AssertionRefusedError("signature", str(error)) from None
        invalid = answer.get("invalidate_handle")
        if invalid is not None and invalid == message.get("invalidate_handle"):
            self._store.remove_association(AssociationKind.RELYING, endpoint, invalid)
        if answer.get("is_valid") != "true":
            raise AssertionRefusedError("signature", "the provider says that it is not its own")


def _check_mode(message: dict[str, str]) -> None:
    mode = message.get("mode", "")
    if mode == "cancel":
        raise AuthenticationCancelled
    if mode == "setup_needed":
        raise SetupNeeded
    if mode == "error":
        raise ReportedError(message.get("error", ""))
    if mode != "id_res":
        raise AssertionRefusedError("form", "openid.mode is not that of a response")


def _post(endpoint: str, message: dict[str, str]) -> HttpRequest:
    return HttpRequest("POST", endpoint, {"Content-Type": FORM_CONTENT_TYPE}, encode_message(message).encode("ascii"))


def _direct_answer(response: HttpResponse) -> dict[str, str]:
    """The answer to a direct request (§5.1.2). Raises OpenIdFormatError or ProviderError."""
    answer = decode_key_values(response.body)
    if response.status != 200:
        raise ProviderError(answer.get("error", f"status {response.status}"))
    if answer.get("ns") != NAMESPACE:
        raise OpenIdFormatError("the provider's answer is none of OpenID 2.0")
    return answer


def _offered_types(response: HttpResponse) -> Preference | None:
    try:
        answer = decode_key_values(response.body)
        if answer.get("error_code") != "unsupported-type":
            return None
        return AssociationType(answer.get("assoc_type", "")), SessionType(answer.get("session_type", ""))
    except (OpenIdFormatError, ValueError):
        return None
