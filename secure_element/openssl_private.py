"""The few things of OpenSSL that pyOpenSSL binds and does not offer, in one place.

They are private names of pyOpenSSL (``OpenSSL._util``); everything else in this package uses its public API. What is needed: the
certificate callback with a chosen error (so that an expired certificate gets the alert certificate_expired), sessions as bytes,
whether a session was resumed, the list of groups, and the client's random with the time in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cryptography import x509
from OpenSSL import SSL, crypto

# pyOpenSSL ships no public module with these; see the module's docstring.
from OpenSSL._util import ffi, lib

from secfunet.card.ber import decode_elements

_ffi: Any = ffi
_lib: Any = lib

NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME: validity is checked by the callback, against the time that the host gave."""
MODE_NO_AUTO_CHAIN: Final = 0x08
"""SSL_MODE_NO_AUTO_CHAIN: do not send certificates of the trust store along, roots among them."""
_MODE_SEND_CLIENTHELLO_TIME: Final = 0x20
OP_NO_RENEGOTIATION: Final = 1 << 30

CERT_NOT_YET_VALID: Final = 9
CERT_HAS_EXPIRED: Final = 10
CERT_REJECTED: Final = 28
"""X509_V_ERR_…"""

CheckCertificate = Callable[[SSL.Connection, x509.Certificate, int, int], int]
"""(connection, certificate, depth, error so far) -> X509_V_OK (0) or the X509_V_ERR_… to fail with."""


def certificate_callback(check: CheckCertificate) -> Any:
    """A verify callback for ``set_certificate_callback``. The caller keeps it alive as long as a Context uses it."""

    def verify(ok: int, store_context: Any) -> int:
        # As in SSL._VerifyHelper, but with the error that we choose. An exception in here is a refusal (error=0).
        pointer = _lib.X509_STORE_CTX_get_current_cert(store_context)
        if pointer == _ffi.NULL:
            return 0
        _lib.X509_up_ref(pointer)
        try:
            certificate = crypto.X509._from_raw_x509_ptr(pointer).to_cryptography()
        except ValueError:
            # OpenSSL reads some DER that cryptography, being strict, does not (a time that is none).
            _lib.X509_STORE_CTX_set_error(store_context, CERT_REJECTED)
            return 0
        ssl = _lib.X509_STORE_CTX_get_ex_data(store_context, _lib.SSL_get_ex_data_X509_STORE_CTX_idx())
        connection = SSL.Connection._reverse_mapping[ssl]
        error = 0 if ok else _lib.X509_STORE_CTX_get_error(store_context)
        depth = _lib.X509_STORE_CTX_get_error_depth(store_context)
        verdict = check(connection, certificate, depth, error)
        if verdict:
            _lib.X509_STORE_CTX_set_error(store_context, verdict)
            return 0
        return int(ok)

    return _ffi.callback("int (*)(int, X509_STORE_CTX *)", verify, error=0)


def set_certificate_callback(context: SSL.Context, callback: Any) -> None:
    """Peer certificates are always demanded, and judged by ``callback`` after OpenSSL."""
    mode = SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT
    context.set_verify(mode)
    _lib.SSL_CTX_set_verify(context._context, mode, callback)


def error_text(error: int) -> str:
    """What OpenSSL says of an X509_V_ERR_… number."""
    return str(_ffi.string(_lib.X509_verify_cert_error_string(error)).decode())


def set_groups(context: SSL.Context, names: bytes) -> bool:
    """The key exchange groups, most wanted first; False if OpenSSL does not have one of them."""
    done: bool = _lib.SSL_CTX_set1_curves_list(context._context, names) == 1
    if not done:
        _lib.ERR_clear_error()
    return done


def send_time_in_hello(connection: SSL.Connection) -> None:
    """The first four bytes of the client's random become the machine's Unix time."""
    _lib.SSL_set_mode(connection._ssl, _MODE_SEND_CLIENTHELLO_TIME)


def was_resumed(connection: SSL.Connection) -> bool:
    """Whether the handshake resumed a session."""
    return bool(_lib.SSL_session_reused(connection._ssl))


def session_bytes(connection: SSL.Connection) -> bytes | None:
    """The session as DER, secrets included, or None if there is none."""
    session = connection.get_session()
    if session is None:
        return None
    length = _lib.i2d_SSL_SESSION(session._session, _ffi.NULL)
    if length <= 0:
        return None
    buffer = _ffi.new("unsigned char[]", length)
    pointer = _ffi.new("unsigned char **", buffer)
    _lib.i2d_SSL_SESSION(session._session, pointer)
    return bytes(_ffi.buffer(buffer, length))


_MAX_FRAGMENT_MODE: Final = 0xB1
"""[17] of OpenSSL's SSL_SESSION: 1 to 4 for 512 to 4096 bytes."""


def max_fragment_length(connection: SSL.Connection) -> int:
    """Most bytes of content in a record that the session agrees on (RFC 6066, 4), or 0 if it agrees on nothing.

    It holds for the session and its resumptions.
    """
    session = session_bytes(connection)
    if session is None:
        return 0
    (whole,) = decode_elements(session)
    for field in decode_elements(whole.value):
        if field.tag == _MAX_FRAGMENT_MODE:
            mode = int.from_bytes(decode_elements(field.value)[0].value)
            return 256 << mode if 1 <= mode <= 4 else 0
    return 0


def offer_session(connection: SSL.Connection, session: bytes) -> bool:
    """Have the next handshake offer a session that ``session_bytes`` gave; False if OpenSSL does not take it."""
    buffer = _ffi.from_buffer("unsigned char[]", session)
    pointer = _ffi.new("unsigned char **", buffer)
    loaded = _lib.d2i_SSL_SESSION(_ffi.NULL, pointer, len(session))
    if loaded == _ffi.NULL:
        _lib.ERR_clear_error()
        return False
    owned = _ffi.gc(loaded, _lib.SSL_SESSION_free)
    return bool(_lib.SSL_set_session(connection._ssl, owned) == 1)
