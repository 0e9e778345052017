"""The one table from errors to what leaves the daemon: code, domain, reason, message and retry time."""

from __future__ import annotations

import dataclasses

from dom0_middleware.errors import GridFailed, MiddlewareError
from gose_client.errors import GoseClientError
from secfunet.apdu import ApduError
from secfunet.card.errors import CardError
from secfunet.rpc.correlation import with_id
from secfunet.rpc.facts import MAX_MESSAGE, Facts
from secfunet.rpc.reasons import Domain, Reason, find_reason

_INTERNAL_MESSAGE = "a fault of the middleware; its log says more"
_UNKNOWN_SENTENCE = "the grid refused"


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


def told_to_guest(error: Exception, correlation: str) -> Facts:
    """What a guest learns of ``error``: reason, a sentence of fixed words, and the id under which dom0's records tell the rest.

    Never a text of what lies behind (an address, a file, a count of attempts, the words of a library).
    """
    facts = facts_of(error)
    reason = find_reason(facts.reason)
    told = error.told if isinstance(error, MiddlewareError) else ""
    sentence = told or (reason.sentence if reason is not None else _UNKNOWN_SENTENCE)
    return dataclasses.replace(facts, message=with_id(sentence, correlation))


def told_to_orchestrator(error: Exception, correlation: str) -> Facts:
    """What an orchestrator learns: what was found, in full, and the id of the call in dom0's records."""
    facts = facts_of(error)
    return dataclasses.replace(facts, message=with_id(facts.message[: MAX_MESSAGE - 80], correlation))
