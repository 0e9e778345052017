"""OpenSSL Contexts of a TLS-Id: built once for an identity and a set of parameters, and kept.

Building one costs up to 40 ms (the private key is checked), and the sessions of a server card live in it. The rules, in the order in
which they are applied:

1. Both sides authenticate, always; there is no anonymous suite, and a TLS-Id without a CA runs no handshake.
2. The peer's chain ends at one of the TLS-Id's authorities, which need not be a root (X509_V_FLAG_PARTIAL_CHAIN), and nowhere else.
3. The peer's certificate may be used for its side of TLS (OpenSSL's purposes sslserver and sslclient: key usage, and extended key usage
   where the certificate has one).
4. Every certificate of the chain, authorities included, is valid at the time that the host gave, else at the card process's own time.
5. A session belongs to the Context that made it, so to one identity, one role and one set of parameters.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL, crypto

from secfunet.card.parameters import TLS_1_2, TLS_1_3, TlsParameters
from secfunet.errors import SecFuNetError
from secure_element import openssl_private, tls_names

MAX_CONTEXTS: Final = 16
"""Contexts that are kept; the one that was not used for longest goes first, and its sessions with it."""
SESSION_LIFETIME: Final = 3600
"""Seconds for which a session can be resumed, in either role: a revoked or expired peer must come again by then."""
MAX_SERVER_HANDSHAKES: Final = 4096
"""Handshakes of one server Context; then a new one takes its place. OpenSSL keeps up to 20480 sessions in a Context, 3 kB each, and
pyOpenSSL cannot tell it otherwise: this bounds them, at the price of a full handshake for each client once in a while."""
MAX_CHAIN_DEPTH: Final = 8


@dataclass(frozen=True)
class TlsIdView:
    """What a handshake needs of a TLS-Id. The private key is an object inside this process; it is never encoded."""

    name: str
    eap_id: bytes
    certificate: x509.Certificate
    authorities: Sequence[x509.Certificate]
    private_key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = field(repr=False)


class TlsParametersError(SecFuNetError):
    """The parameters ask for what this card does not do, or does not do unless its settings allow it."""


@dataclass(frozen=True)
class TlsProfile:
    """Parameters after all defaults and refusals: what makes one Context differ from another."""

    role: str
    min_version: int
    max_version: int
    suites: tuple[int, ...]
    groups: tuple[int, ...]
    resume: bool


def profile_of(parameters: TlsParameters, *, legacy_tls: bool) -> TlsProfile:
    """Fill in the card's defaults. Raises TlsParametersError for versions before TLS 1.2, unknown suites or groups, legacy suites
    where the card's settings do not allow them, and suites none of which belongs to an allowed version."""
    if parameters.min_version < TLS_1_2:
        raise TlsParametersError("TLS before 1.2 is not supported")
    suites = parameters.suites or tls_names.DEFAULT_SUITES
    versions = set()
    for number in suites:
        suite = tls_names.suite_of(number)
        if suite is None:
            raise TlsParametersError(f"the card does not know cipher suite {number:#06x}")
        if suite.is_legacy and not legacy_tls:
            raise TlsParametersError(f"cipher suite {number:#06x} is legacy, and the card's settings do not allow it")
        if parameters.min_version <= suite.version <= parameters.max_version:
            versions.add(suite.version)
    if not versions:
        raise TlsParametersError("no cipher suite belongs to an allowed version of TLS")
    groups = parameters.groups or tls_names.DEFAULT_GROUPS
    if tls_names.groups_of(groups) is None:
        raise TlsParametersError("the card does not know one of the groups")
    return TlsProfile(parameters.role, min(versions), max(versions), suites, groups, parameters.resume)


def fingerprint_of(tls_id: TlsIdView) -> bytes:
    """SHA-256 over the certificate and the authorities: what makes two identities the same for Contexts and sessions."""
    digest = hashlib.sha256()
    for certificate in (tls_id.certificate, *tls_id.authorities):
        encoded = certificate.public_bytes(Encoding.DER)
        digest.update(len(encoded).to_bytes(4) + encoded)
    return digest.digest()


def is_valid_at(certificate: x509.Certificate, unix_time: float) -> bool:
    """Whether the certificate's validity covers this time (UTC seconds)."""
    return _validity_error(certificate, unix_time) == 0


def _validity_error(certificate: x509.Certificate, unix_time: float) -> int:
    moment = datetime.fromtimestamp(unix_time, UTC)
    if moment < certificate.not_valid_before_utc:
        return openssl_private.CERT_NOT_YET_VALID
    if moment > certificate.not_valid_after_utc:
        return openssl_private.CERT_HAS_EXPIRED
    return 0


class HandshakeOwner(Protocol):
    """What callbacks of a Context find as the app data of a Connection."""

    @property
    def reference_time(self) -> float: ...
    def certificate_refused(self, error: int, depth: int) -> None: ...
    def choose_alpn(self, offered: list[bytes]) -> bytes | None: ...
    def key_logged(self, line: bytes) -> None: ...


class NoApplicationProtocolError(SecFuNetError):
    """None of the client's ALPN names is one of ours: the alert no_application_protocol is sent (RFC 7301, 3.2)."""


def _owner(connection: SSL.Connection) -> HandshakeOwner:
    owner: HandshakeOwner = connection.get_app_data()
    return owner


def _check_certificate(connection: SSL.Connection, certificate: x509.Certificate, depth: int, error: int) -> int:
    owner = _owner(connection)
    verdict = error or _validity_error(certificate, owner.reference_time)
    if verdict:
        owner.certificate_refused(verdict, depth)
    return verdict


_CERTIFICATE_CALLBACK = openssl_private.certificate_callback(_check_certificate)


def _select_alpn(connection: SSL.Connection, offered: list[bytes]) -> bytes:
    chosen = _owner(connection).choose_alpn(offered)
    if chosen is None:
        # pyOpenSSL answers an exception with a fatal no_application_protocol and raises it from do_handshake().
        raise NoApplicationProtocolError("the client offers none of our application protocols")
    return chosen


def _key_logged(connection: SSL.Connection, line: bytes) -> None:
    _owner(connection).key_logged(line)


def build_context(tls_id: TlsIdView, profile: TlsProfile, *, with_alpn: bool, session_context: bytes) -> SSL.Context:
    """A Context after the rules of this module. Raises TlsParametersError: no CA, a key that is not the certificate's, a group that
    this OpenSSL does not have."""
    if not tls_id.authorities:
        raise TlsParametersError("the TLS-Id has no certificate authority to check a peer against")
    is_server = profile.role == "server"
    context = SSL.Context(SSL.TLS_SERVER_METHOD if is_server else SSL.TLS_CLIENT_METHOD)
    _set_algorithms(context, profile)
    _set_trust(context, tls_id, is_server=is_server)
    try:
        context.use_certificate(tls_id.certificate)
        context.use_privatekey(tls_id.private_key)
        context.check_privatekey()
    except SSL.Error:
        raise TlsParametersError("the TLS-Id's key is not that of its certificate, or is too weak") from None
    for authority in tls_id.authorities:
        if authority.issuer != authority.subject:
            context.add_extra_chain_cert(authority)
    context.set_options(SSL.OP_NO_COMPRESSION | openssl_private.OP_NO_RENEGOTIATION)
    context.set_mode(openssl_private.MODE_NO_AUTO_CHAIN)
    context.set_keylog_callback(_key_logged)
    context.set_timeout(SESSION_LIFETIME)
    if is_server:
        # Sessions stay in the card: a session id or a short handle travels, not a ticket with the peer's certificate in it.
        context.set_options(SSL.OP_NO_TICKET | SSL.OP_CIPHER_SERVER_PREFERENCE)
        context.set_session_id(session_context)
        if with_alpn:
            context.set_alpn_select_callback(_select_alpn)
    context.set_session_cache_mode(SSL.SESS_CACHE_SERVER if is_server and profile.resume else SSL.SESS_CACHE_OFF)
    return context


def _set_algorithms(context: SSL.Context, profile: TlsProfile) -> None:
    context.set_min_proto_version(profile.min_version)
    context.set_max_proto_version(profile.max_version)
    suites12 = tls_names.tls12_suites(profile.suites)
    if suites12 and profile.min_version == TLS_1_2:
        context.set_cipher_list(suites12)
    if profile.max_version == TLS_1_3:
        context.set_tls13_ciphersuites(tls_names.tls13_suites(profile.suites))
    groups = tls_names.groups_of(profile.groups)
    if groups is None or not openssl_private.set_groups(context, groups):
        raise TlsParametersError("the card does not have one of the groups")


def _set_trust(context: SSL.Context, tls_id: TlsIdView, *, is_server: bool) -> None:
    store = context.get_cert_store()
    if store is None:
        raise TlsParametersError("OpenSSL gave a Context without a certificate store")
    for authority in tls_id.authorities:
        store.add_cert(crypto.X509.from_cryptography(authority))
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN | openssl_private.NO_CHECK_TIME)
    context.set_verify_depth(MAX_CHAIN_DEPTH)
    openssl_private.set_certificate_callback(context, _CERTIFICATE_CALLBACK)
    if is_server:
        for authority in tls_id.authorities:
            context.add_client_ca(authority)


@dataclass
class _Kept:
    context: SSL.Context
    handshakes: int


class ContextCache:
    """The Contexts of one card, by identity and profile."""

    def __init__(self, randbytes: Callable[[int], bytes]) -> None:
        self._randbytes = randbytes
        self._contexts: OrderedDict[tuple[bytes, TlsProfile, bool], _Kept] = OrderedDict()

    def context(self, tls_id: TlsIdView, fingerprint: bytes, profile: TlsProfile, *, with_alpn: bool) -> SSL.Context:
        """The Context for this identity and profile, built if need be. Raises TlsParametersError as build_context does."""
        key = (fingerprint, profile, with_alpn)
        kept = self._contexts.get(key)
        if kept is None or (profile.role == "server" and kept.handshakes >= MAX_SERVER_HANDSHAKES):
            kept = _Kept(
                build_context(tls_id, profile, with_alpn=with_alpn, session_context=self._randbytes(32)), handshakes=0
            )
            self._contexts[key] = kept
            if len(self._contexts) > MAX_CONTEXTS:
                self._contexts.popitem(last=False)
        kept.handshakes += 1
        self._contexts.move_to_end(key)
        return kept.context

    def __len__(self) -> int:
        return len(self._contexts)
