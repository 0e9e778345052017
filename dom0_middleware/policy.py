"""Which VM may run which operation with which scheme, and how often: a TOML file, default deny.

.. code-block:: toml

    [[rule]]
    names = ["web-*"]                 # or uuids = [...], vmids = [...]; every selector given must match (fnmatch patterns)
    operations = ["sign"]
    schemes = ["rsassa-pss-*", "ecdsa-*"]
    rate = { per_second = 50, burst = 100 }   # optional: a token bucket a VM

Rules are read from the top; the first that matches VM, operation and scheme decides, its rate included. No rule: denied. A file that is
missing or invalid in any point refuses every call of every guest (POLICY_INVALID) until it is mended and read again (SIGHUP).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dom0_middleware.errors import Reason, Refused
from dom0_middleware.schemes import OPERATIONS, SCHEMES
from secfunet.service.rate import TokenBuckets
from secfunet.service.settings import Settings, SettingsError, form, load_settings

log = logging.getLogger(__name__)

Pattern = Annotated[
    str,
    Field(max_length=128),
    form(r"^[\x21-\x7e]+$", "a pattern of printable ASCII characters, without blanks (web-*)"),
]


class Rate(Settings):
    """A token bucket: ``per_second`` operations on the long run, ``burst`` at once."""

    per_second: float = Field(gt=0, le=1e6, allow_inf_nan=False)
    burst: int = Field(ge=1, le=1_000_000)


class Rule(Settings):
    """One permission; see the module."""

    names: tuple[Pattern, ...] | None = None
    uuids: tuple[Pattern, ...] | None = None
    vmids: tuple[Pattern, ...] | None = None
    operations: tuple[Literal["sign", "decrypt", "encrypt"], ...]
    schemes: tuple[Pattern, ...]
    rate: Rate | None = None

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        selectors = {"names": self.names, "uuids": self.uuids, "vmids": self.vmids}
        if all(patterns is None for patterns in selectors.values()):
            raise ValueError("a rule needs at least one of names, uuids, vmids")
        lists = {**selectors, "operations": self.operations, "schemes": self.schemes}
        for key, values in lists.items():
            if values is not None and not values:
                raise ValueError(f"'{key}' is empty, so the rule could never match")
        for pattern in self.schemes:
            if not any(fnmatchcase(scheme, pattern) for operation in self.operations for scheme in SCHEMES[operation]):
                raise ValueError(f"no scheme of {', '.join(self.operations)} matches '{pattern}'")
        return self

    def selects(self, subject: Subject) -> bool:
        return (
            _any_matches(self.names, subject.name)
            and _any_matches(self.uuids, subject.uuid)
            and _any_matches(self.vmids, subject.vmid)
        )

    def allows(self, operation: str, scheme: str) -> bool:
        return operation in self.operations and _any_matches(self.schemes, scheme)


class PolicyFile(Settings):
    """The whole file."""

    rule: tuple[Rule, ...] = Field(default=(), max_length=10_000)


@dataclass(frozen=True)
class Subject:
    """The VM that a question is about, as dom0 knows it."""

    uuid: str
    name: str
    vmid: str


class Policy:
    """The policy in force. ``monotonic``: seconds, for rates."""

    def __init__(self, path: Path, *, monotonic: Callable[[], float]) -> None:
        self._path = path
        self._monotonic = monotonic
        self._rules: tuple[tuple[Rule, TokenBuckets | None], ...] | None = None
        self.problems: list[str] = ["the policy was not read yet"]

    def reload(self) -> None:
        """Reads the file. Never raises: an invalid file leaves a policy that refuses everything, with its ``problems``."""
        before = dict(self._rules or ())
        try:
            file = load_settings(PolicyFile, self._path)
        except SettingsError as error:
            self._rules, self.problems = None, error.problems
            log.error("the policy is invalid, every call of a guest is refused: %s", error)
            return
        # The buckets of a rule live on over a reload that leaves it as it was.
        self._rules = tuple((rule, before.get(rule) or self._buckets(rule.rate)) for rule in file.rule)
        self.problems = []
        log.info("policy read", extra={"rules": len(self._rules), "file": str(self._path)})

    def require_valid(self) -> None:
        """Raises Refused (POLICY_INVALID)."""
        self._valid()

    def permit(self, subject: Subject, operation: str, scheme: str) -> None:
        """Returns if the operation may run now. Raises Refused: POLICY_INVALID, POLICY_DENIED, RATE_LIMITED (with ``retry_after``)."""
        for rule, buckets in self._valid():
            if rule.selects(subject) and rule.allows(operation, scheme):
                if buckets is not None:
                    wait = buckets.take(subject.uuid)
                    if wait > 0:
                        raise Refused(
                            Reason.RATE_LIMITED, "this VM asks more often than policy allows", retry_after=wait
                        )
                return
        raise Refused(Reason.POLICY_DENIED, f"policy does not let this VM {operation} with {scheme}")

    def operations(self, subject: Subject) -> frozenset[str]:
        """The operations that some scheme is allowed for. Raises Refused (POLICY_INVALID)."""
        return frozenset(
            operation
            for rule, _ in self._valid()
            if rule.selects(subject)
            for operation in OPERATIONS
            if operation in rule.operations and any(_any_matches(rule.schemes, scheme) for scheme in SCHEMES[operation])
        )

    def _buckets(self, rate: Rate | None) -> TokenBuckets | None:
        """One a VM; None for a rule without a rate."""
        return TokenBuckets(rate.per_second, rate.burst, self._monotonic) if rate is not None else None

    def _valid(self) -> tuple[tuple[Rule, TokenBuckets | None], ...]:
        if self._rules is None:
            raise Refused(Reason.POLICY_INVALID, "the policy of this hypervisor is invalid; every call is refused")
        return self._rules


def _any_matches(patterns: tuple[str, ...] | None, text: str) -> bool:
    return patterns is None or any(fnmatchcase(text, pattern) for pattern in patterns)
