"""What a node's administrator decides: which cards it lends, to whom, and for which commands. What is not written there is not allowed."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gose.racs.rules import ApduRule, RuleError, parse_rules
from gose.settings import Address, Count, ListenAddress, RacsSeid, Seconds
from secfunet.card.place import CardPlace
from secfunet.card.settings import LocalCardSettings
from secfunet.identity import IdentityError, Role, check_name, check_thumbprint
from secfunet.racs.errors import RacsValueError
from secfunet.racs.syntax import check_token
from secfunet.service.doorkeeper import KEPT_DESCRIPTORS, METRICS_BOUNDS, DoorBounds
from secfunet.service.settings import FilePath, Settings


def _sen(untrusted: str) -> str:
    try:
        return check_token(untrusted)
    except RacsValueError as error:
        raise ValueError(str(error)) from None


def _rule(untrusted: str) -> str:
    try:
        parse_rules(untrusted)
    except RuleError as error:
        raise ValueError(str(error)) from None
    return untrusted


def _thumbprint(untrusted: str) -> str:
    try:
        return check_thumbprint(untrusted)
    except IdentityError as error:
        raise ValueError(str(error)) from None


def _holder_name(untrusted: str) -> str:
    try:
        return check_name(untrusted)
    except IdentityError as error:
        raise ValueError(str(error)) from None


Rule = Annotated[str, AfterValidator(_rule)]


class HostedElementSettings(LocalCardSettings):
    """One card of the node. ``sen`` is its name for TLS clients, where its answer to reset does not say one."""

    seid: RacsSeid
    sen: Annotated[str, AfterValidator(_sen)] | None = None

    @property
    def place(self) -> CardPlace:
        """Where the card is."""
        if self.local_place is None:
            raise AssertionError("the settings give every card one place")
        return self.local_place

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        if (self.socket is None) == (self.pcsc is None):
            raise ValueError(f"the secure element '{self.seid}' has either a 'socket' or 'pcsc'")
        return self


class GrantSettings(Settings):
    """Some cards, and the commands that may be sent to them: those that ``allow`` means, except those that ``deny`` means."""

    secure_elements: Annotated[tuple[RacsSeid, ...], Field(min_length=1)]
    allow: Annotated[tuple[Rule, ...], Field(min_length=1)]
    deny: tuple[Rule, ...] = ()
    # May give the card another SEN.
    may_name: bool = False

    def allows(self) -> tuple[ApduRule, ...]:
        """What ``allow`` stands for."""
        return tuple(rule for text in self.allow for rule in parse_rules(text))

    def denies(self) -> tuple[ApduRule, ...]:
        """What ``deny`` stands for."""
        return tuple(rule for text in self.deny for rule in parse_rules(text))


class UserSettings(Settings):
    """Who: the holder of a certificate of the authority (``role`` and ``name``), or of one certificate (``thumbprint``)."""

    role: Literal["node", "hypervisor", "server", "vm"] = "node"
    name: Annotated[str, AfterValidator(_holder_name)] | None = None
    thumbprint: Annotated[str, AfterValidator(_thumbprint)] | None = None
    grants: Annotated[tuple[GrantSettings, ...], Field(min_length=1)]

    @property
    def holder_role(self) -> Role:
        """``role``."""
        return Role(self.role)

    @property
    def label(self) -> str:
        """What logs and metrics call this user."""
        return f"{self.role}:{self.name}" if self.name is not None else f"thumbprint:{self.thumbprint}"

    @model_validator(mode="after")
    def _is_one_user(self) -> Self:
        if (self.name is None) == (self.thumbprint is None):
            raise ValueError("a user has a 'name' (and a 'role'), or a 'thumbprint'")
        if self.thumbprint is not None and "role" in self.model_fields_set:
            raise ValueError("a user who is known by a 'thumbprint' needs no 'role'")
        seids = [seid for grant in self.grants for seid in grant.secure_elements]
        if len(seids) != len(set(seids)):
            raise ValueError("a secure element is in one grant of a user only")
        return self


class NodeLimits(Settings):
    """Bounds on what a node takes upon itself; times are seconds."""

    connections: Count = 256  # of users, at the same time; strangers have places of their own
    sessions_per_user: Count = 128
    handshake_timeout: Seconds = 10.0
    request_timeout: Seconds = 20.0  # from a request's first byte to its last
    idle_timeout: Seconds = 600.0  # between two requests
    dead_peer_timeout: Seconds = 10.0  # a user whose machine is gone loses its cards after this
    requests_waiting: Count = 4  # of one session, behind the one in work
    card_connect_timeout: Seconds = 5.0
    apdu_timeout: Seconds = 120.0  # then the card counts as dead; a card may take tens of seconds to make a key
    shutdown_timeout: Seconds = 5.0


class NodeSettings(Settings):
    """The whole file of ``gose racs serve``."""

    listen: ListenAddress = Address("127.0.0.1", 7777)
    key: FilePath
    certificate: FilePath
    authority: FilePath
    secure_elements: Annotated[tuple[HostedElementSettings, ...], Field(min_length=1)]
    users: tuple[UserSettings, ...] = ()
    limits: NodeLimits = NodeLimits()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None

    @property
    def descriptors(self) -> int:
        """What the node may need when every bound is reached."""
        return (
            DoorBounds().descriptors
            + self.limits.connections
            + METRICS_BOUNDS.descriptors
            + 4 * len(self.secure_elements)
            + KEPT_DESCRIPTORS
            + 256
        )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        seids = [element.seid for element in self.secure_elements]
        for what, values in (
            ("seid", seids),
            ("place", [str(element.place) for element in self.secure_elements]),
            ("user", [user.label for user in self.users]),
        ):
            twice = {value for value in values if values.count(value) > 1}
            if twice:
                raise ValueError(f"two have the same {what}: {', '.join(sorted(twice))}")
        granted = {seid for user in self.users for grant in user.grants for seid in grant.secure_elements}
        if granted - set(seids):
            raise ValueError(
                f"grants name secure elements that are not there: {', '.join(sorted(granted - set(seids)))}"
            )
        return self
