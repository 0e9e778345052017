"""Enrolment: a card becomes the card of a hypervisor, of a VM or of a server.

The key pair is made in the card; a request comes out, the CA signs it, and the certificate goes in. Nothing of it is lost if
this process dies in between, and a second run heals what the first one left:

1. what is in the way is refused (a holder of that name, a card in use), unless it is to be replaced;
2. a certificate on the card that equals the pending one of the registry was loaded by a run that died before its last step: go
   on with 7;
3. the card makes the key pair (over an incomplete one that a dead run left; a complete identity is deleted first, if it is to
   be replaced);
4. the card's request is checked: signed by its own key, for that name, with a key that fits the role;
5. the certificate is issued, and recorded as pending before it leaves this process;
6. the card takes it (and checks that it is for its key), with the CA's certificate as the one authority that it trusts;
7. the certificate is read back: it must be, byte for byte, the one that was issued. Only then the identity is active.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from gose.authority.certificate_authority import CertificateAuthority, check_request
from gose.authority.errors import CardInUseError, EnrolmentError
from gose.authority.ledger import Action, AuthorityRecord
from gose.registry import AlreadyEnrolledError, Identity, NotEnrolledError, Registry
from secfunet.apdu import StatusError
from secfunet.card.administrator import AdministratorRefusedError, open_secure_channel
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError
from secfunet.card.parameters import KeyAlgorithm, Segmentation
from secfunet.card.place import CardPlace, connect_card, segmentation_at
from secfunet.card.ports import CardPort
from secfunet.identity import Holder, der_of, thumbprint

CONNECT_TIMEOUT: Final = 5.0
STOP_MIDDLEWARE: Final = "stop 'secure-middleware serve' meanwhile, if that has this hypervisor's card"
STOP_GRID: Final = (
    "if a running grid has it in service ('gose status' tells), stop 'gose serve' meanwhile. Where the key is to be worth nothing from now "
    "on, 'gose revoke' makes the grid let go of the card, too; that cannot be undone"
)
BUSY_PATIENCE: Final = 8.0
"""Seconds for a running grid to let go of a card: it looks after an idle one every 5 seconds unless the settings say otherwise."""
RETRY_PAUSE: Final = 0.1
ENROLMENT_TIMEOUT: Final = 180.0
"""Seconds for a whole enrolment: a card may take tens of them to make an RSA-4096 key pair."""

_SW_IDENTITY_IS_COMPLETE: Final = 0x6A89


@dataclass(frozen=True)
class CardAccess:
    """How to reach a card with the right to personalise it."""

    connect: Callable[[], Awaitable[CardClient]] = field(repr=False)
    keys: AdministratorKeys = field(repr=False)
    where: str = "the card"
    advice: str = STOP_MIDDLEWARE
    """Who most often has it, and how to have it meanwhile: what can be undone comes first."""

    @classmethod
    def at(cls, place: CardPlace, keys: AdministratorKeys) -> CardAccess:
        """A card of this host: a hypervisor's."""
        return cls.through(
            lambda: connect_card(place, timeout=CONNECT_TIMEOUT),
            keys,
            where=f"the card at {place}",
            segmentation=segmentation_at(place),
        )

    @classmethod
    def through(
        cls,
        connect_port: Callable[[], Awaitable[CardPort]],
        keys: AdministratorKeys,
        *,
        where: str,
        segmentation: Segmentation = Segmentation.EXTENDED,
        advice: str = STOP_MIDDLEWARE,
    ) -> CardAccess:
        """A card that ``connect_port`` reaches; ``where`` is what a person calls it."""

        async def connect() -> CardClient:
            # A running grid tries cards that it may not use now and then, and lets go of one whose holder was revoked.
            deadline = asyncio.get_running_loop().time() + BUSY_PATIENCE
            while True:
                try:
                    return CardClient(await connect_port(), segmentation=segmentation)
                except CardBusyError:
                    if asyncio.get_running_loop().time() >= deadline:
                        raise
                    await asyncio.sleep(RETRY_PAUSE)

        return cls(connect, keys, where=where, advice=advice)


@dataclass(frozen=True)
class EnrolmentOrder:
    """What is to be enrolled. ``label``: friendly name of the TLS-Id on the card; ``valid``: seconds; ``server_names``: for a
    server.
    """

    holder: Holder
    label: str
    algorithm: KeyAlgorithm
    valid: float
    seid: str | None = None
    server_names: tuple[str, ...] = ()
    replace: bool = False


async def enrol(
    order: EnrolmentOrder,
    card: CardAccess,
    authority: CertificateAuthority,
    registry: Registry,
    *,
    clock: Callable[[], float],
) -> Identity:
    """Personalises the card; see the module's docstring. Returns the identity, now active.

    Raises AlreadyEnrolledError, EnrolmentError, IssuanceError, AuditError, and what a card raises (CardError, ApduError).
    """
    _check_order(order, registry)
    try:
        async with asyncio.timeout(ENROLMENT_TIMEOUT), administered(card) as client:
            return await _personalise(client, order, card, authority, registry, clock)
    except TimeoutError:
        raise EnrolmentError(f"{card.where} was not ready within {ENROLMENT_TIMEOUT:g} s: run this again") from None


def sign_request(
    order: EnrolmentOrder,
    request: bytes,
    authority: CertificateAuthority,
    registry: Registry,
    *,
    clock: Callable[[], float],
) -> Identity:
    """Enrols the holder of a card on another host by its request (PKCS#10, DER): rules 1, 4 and 5.

    The CA cannot look into that card: the identity is active as soon as its certificate exists, which is worth nothing without the card.
    ``order.replace`` renews, or gives the name to another key. Raises AlreadyEnrolledError, IssuanceError, AuditError.
    """
    _check_order(order, registry)
    key = check_request(request, order.holder)
    certificate = authority.issue(
        order.holder, key, now=clock(), valid=order.valid, server_names=order.server_names, seid=order.seid
    )
    issued = der_of(certificate)
    ends = certificate.not_valid_after_utc.timestamp()
    registry.begin_enrolment(*order.holder, thumbprint(issued), issued, order.seid, ends)
    return _activate(order, thumbprint(issued), authority, registry)


async def _personalise(
    client: CardClient,
    order: EnrolmentOrder,
    card: CardAccess,
    authority: CertificateAuthority,
    registry: Registry,
    clock: Callable[[], float],
) -> Identity:
    """Rules 2 to 7."""
    pending = registry.pending(*order.holder)
    if pending is not None and pending.seid == order.seid and pending.expires_at > clock():
        loaded = await _read_certificate(client, order.label)
        if loaded is not None and hmac.compare_digest(loaded, pending.certificate):
            return _activate(order, pending.thumbprint, authority, registry)
    await _make_key(client, order, card)
    request = await client.certificate_signing_request(order.label, order.holder.name)
    key = check_request(request, order.holder)
    certificate = authority.issue(
        order.holder, key, now=clock(), valid=order.valid, server_names=order.server_names, seid=order.seid
    )
    issued = der_of(certificate)
    registry.begin_enrolment(
        *order.holder,
        thumbprint(issued),
        issued,
        order.seid,
        certificate.not_valid_after_utc.timestamp(),
    )
    await client.load_identity(order.label, order.holder.name.encode("ascii"), issued, [der_of(authority.certificate)])
    loaded = await _read_certificate(client, order.label)
    if loaded is None or not hmac.compare_digest(loaded, issued):
        raise EnrolmentError(f"{card.where} does not hold the certificate that it was given: it is not to be trusted")
    return _activate(order, thumbprint(issued), authority, registry)


def _activate(order: EnrolmentOrder, issued: str, authority: CertificateAuthority, registry: Registry) -> Identity:
    """From here on it is the one of its name; those before it are worth nothing, which is on record, too."""
    role, name = order.holder
    authority.record(
        AuthorityRecord(
            Action.ENROL,
            "permitted",
            role=role,
            name=name,
            seid=order.seid or "",
            thumbprint=issued,
            detail="in place of another" if order.replace else "",
        )
    )
    return registry.finish_enrolment(issued)


def _check_order(order: EnrolmentOrder, registry: Registry) -> None:
    """Rule 1. An enrolment that died on the way is no obstacle: it is what this run heals."""
    pending = registry.pending(*order.holder)
    if order.replace or (pending is not None and pending.seid == order.seid):
        return
    role, name = order.holder
    with contextlib.suppress(NotEnrolledError):
        registry.named(role, name)
        raise AlreadyEnrolledError(
            f"the {role} '{name}' is enrolled already: --replace gives it a new key, and destroys the old one", name
        )
    occupant = None if order.seid is None else registry.in_secure_element(order.seid)
    if occupant is not None:
        raise AlreadyEnrolledError(
            f"the secure element '{order.seid}' holds the key of the {occupant.role} '{occupant.name}': "
            "--replace destroys that key",
            occupant.name,
        )


@contextlib.asynccontextmanager
async def administered(card: CardAccess) -> AsyncIterator[CardClient]:
    """A card whose applet is selected, through its administrator's secure channel."""
    try:
        client = await card.connect()
    except CardBusyError as error:
        raise CardInUseError(f"{error}. A card is personalised while nobody else uses it: {card.advice}") from error
    try:
        await client.select()
        try:
            secure = await open_secure_channel(client, card.keys)
        except AdministratorRefusedError as error:
            raise EnrolmentError(f"{card.where}: {error}") from None
        yield secure
    finally:
        await client.close()


async def _make_key(client: CardClient, order: EnrolmentOrder, card: CardAccess) -> None:
    """Rule 3."""
    try:
        await client.generate_key(order.label, order.algorithm)
    except StatusError as error:
        if error.sw != _SW_IDENTITY_IS_COMPLETE:
            raise
        if not order.replace:
            raise EnrolmentError(
                f"{card.where} holds an identity '{order.label}' that this enrolment did not make: --replace destroys its key"
            ) from None
        await client.delete_identity(order.label)
        await client.generate_key(order.label, order.algorithm)


async def _read_certificate(client: CardClient, label: str) -> bytes | None:
    """The certificate of the identity ``label``, None if the card has none of that name that is complete."""
    try:
        return await client.certificate(label)
    except StatusError:
        return None
