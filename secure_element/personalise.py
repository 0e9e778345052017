"""Personalising a served card from beside it: a request comes out, a certificate goes in, its PIN and its keys are changed.

The certification authority is often on another host. Then the card's own host makes the request, the authority signs it there, and the
certificate is loaded here; the private key stays in the card all the while.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import AsyncIterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from secfunet.apdu import PinError, StatusError
from secfunet.card import CardClient, KeyAlgorithm
from secfunet.card.administrator import AdministratorRefusedError, CardAdministrator, open_secure_channel
from secfunet.card.administrator_keys import AdministratorKeys
from secfunet.card.place import CardPlace, connect_card, segmentation_at
from secfunet.card.ready import MIN_PIN_ATTEMPTS
from secfunet.scp03.put_key import MAX_KEY_VERSION
from secfunet.service.files import sync_folder
from secure_element.errors import SecureElementError

CONNECT_TIMEOUT = 5.0  # seconds


class PersonalisationError(SecureElementError):
    """The card cannot be personalised so."""


@contextlib.asynccontextmanager
async def administrator_of(place: CardPlace, keys: AdministratorKeys) -> AsyncIterator[CardClient]:
    """The card at ``place``, its applet selected, through a secure channel. Raises AdministratorRefusedError, CardError."""
    client = await _client_at(place)
    try:
        await client.select()
        yield await open_secure_channel(client, keys)
    finally:
        await client.close()


async def request_certificate(
    client: CardClient, *, label: str, name: str, algorithm: KeyAlgorithm, renew: bool
) -> bytes:
    """A PKCS#10 request (PEM) for ``name``, by the key of the TLS-Id ``label``.

    A new key is made for a TLS-Id that is not there; one that waits for its certificate keeps its key, so this may be run again. Raises
    PersonalisationError if the TLS-Id is complete, unless it is to be renewed with its key.
    """
    names = await client.identities()
    if label in names:
        if await _is_complete(client, label) and not renew:
            raise PersonalisationError(
                f"the card holds '{label}' already: --renew asks for a new certificate for its key"
            )
    elif renew:
        raise PersonalisationError(f"the card holds no '{label}' to renew")
    else:
        await client.generate_key(label, algorithm)
    request = await client.certificate_signing_request(label, name)
    return x509.load_der_x509_csr(request).public_bytes(Encoding.PEM)


async def install_certificate(client: CardClient, *, label: str, certificate: bytes, authority: bytes) -> str:
    """Loads a certificate (PEM) for the card's key, with the one authority (PEM) that the card trusts; its subject's name.

    The card checks that the certificate is for its key. Raises PersonalisationError.
    """
    try:
        leaf, root = x509.load_pem_x509_certificate(certificate), x509.load_pem_x509_certificate(authority)
        leaf.verify_directly_issued_by(root)
        (name,) = (str(one.value) for one in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
    except Exception as error:  # noqa: BLE001 - InvalidSignature; and what the library makes of such bytes
        raise PersonalisationError(f"this is no certificate of that authority: {error or 'its signature'}") from None
    der = leaf.public_bytes(Encoding.DER)
    try:
        await client.load_identity(label, name.encode("ascii"), der, [root.public_bytes(Encoding.DER)])
    except StatusError as error:
        raise PersonalisationError(f"the card refuses the certificate for '{label}': {error}") from None
    if not hmac.compare_digest(await client.certificate(label), der):
        raise PersonalisationError("the card does not hold the certificate that it was given: it is not to be trusted")
    return name


async def change_pin(place: CardPlace, old: bytes, new: bytes) -> None:
    """Raises PersonalisationError; a wrong PIN costs one attempt, the last one is never spent."""
    client = await _client_at(place)
    try:
        await client.select()
        left = await client.pin_attempts()
        if left < MIN_PIN_ATTEMPTS:
            raise PersonalisationError(f"the PIN was not tried: {left} attempts are left")
        try:
            await client.change_pin(old, new)
        except PinError as error:
            raise PersonalisationError(f"the PIN is refused; {error.attempts_remaining} attempts are left") from None
    finally:
        await client.close()


async def rotate_keys(place: CardPlace, path: Path) -> AdministratorKeys:
    """New administrator's keys for the card, in the file ``path``; the old ones are worth nothing then.

    The new ones are on disk, in ``path``.new, before the card has them: whenever this dies, a second run finds out which the card holds.
    Raises AdministratorRefusedError, CardError.
    """
    old, coming = AdministratorKeys.read(path), path.with_name(path.name + ".new")
    client = await _client_at(place)
    try:
        if coming.exists():
            new = AdministratorKeys.read(coming)
            with contextlib.suppress(AdministratorRefusedError):
                await CardAdministrator.open(client, new)
                coming.replace(path)
                return new
        new = AdministratorKeys.generate(old.version % MAX_KEY_VERSION + 1, size=len(old.keys.enc))
        administrator = await CardAdministrator.open(client, old)
        new.write(coming)
        await administrator.put_keys(new, replaced=old.version)
        await CardAdministrator.open(client, new)
    finally:
        await client.close()
    coming.replace(path)
    sync_folder(path.parent)
    return new


async def _client_at(place: CardPlace) -> CardClient:
    port = await connect_card(place, timeout=CONNECT_TIMEOUT)
    return CardClient(port, segmentation=segmentation_at(place))


async def _is_complete(client: CardClient, label: str) -> bool:
    try:
        return bool(await client.certificate(label))
    except StatusError:
        return False
