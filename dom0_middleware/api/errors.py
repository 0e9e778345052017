"""The one table from errors to what leaves the daemon: code, domain, reason, message and retry time."""

from __future__ import annotations

from dom0_middleware.errors import GridFailed, MiddlewareError
from gose_client.errors import GoseClientError
from secfunet.apdu import ApduError
from secfunet.card.errors import CardError
from secfunet.rpc.facts import Facts
from secfunet.rpc.reasons import Domain, Reason

_INTERNAL_MESSAGE = "a fault of the middleware; its log says more"


def facts_of(error: Exception) -> Facts:
    """Total: what is nobody's refusal is INTERNAL, and its text stays here."""
    if isinstance(error, GridFailed):
        return error.facts
    if isinstance(error, MiddlewareError):
        return Facts.of(Domain.MIDDLEWARE, error.reason, str(error), error.retry_after)
    if isinstance(error, GoseClientError):
        return error.facts
    if isinstance(error, CardError | ApduError):
        return Facts.of(Domain.MIDDLEWARE, Reason.HYPERVISOR_CARD_UNAVAILABLE, retry_after=1.0)
    return Facts.of(Domain.MIDDLEWARE, Reason.INTERNAL, _INTERNAL_MESSAGE)
