"""What the settings name, looked at when the daemon starts: a wrong file is told then, and by its key."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509

from dom0_middleware.errors import SettingUnusable
from dom0_middleware.orchestrator_authority import Orchestrators
from dom0_middleware.settings import MiddlewareSettings
from gose_client.trial import Link, LinkState
from secfunet.identity import MAX_CERTIFICATE_SIZE, IdentityError, check_validity, load_certificate

log = logging.getLogger(__name__)


class Expiry(NamedTuple):
    """Whose certificate ends when (UTC seconds)."""

    what: str
    at: float


def expiries(settings: MiddlewareSettings) -> Iterator[Expiry]:
    """Of the certificates in files here that can be read."""
    state = settings.state
    files = {
        "the grid's CA": settings.grid.authority,
        "guest authority": state / "guest-authority.pem",
        "orchestrator authority": state / "orchestrator-authority.pem",
    }
    for what, path in files.items():
        with contextlib.suppress(OSError, IdentityError):
            yield Expiry(what, load_certificate(path.read_bytes()).not_valid_after_utc.timestamp())
    for each in Orchestrators(state).list():
        yield Expiry(f"orchestrator {each.name}", each.not_after)


def require_right(links: Iterable[Link], settings: MiddlewareSettings) -> None:
    """Raises SettingUnusable for the first link that a setting breaks; logs a warning for each other one that does not work."""
    for link in links:
        if link.state is LinkState.WRONG:
            raise SettingUnusable(setting_of(link, settings), link.message)
        if link.state is not LinkState.OK:
            log.warning("not now: %s", link.message, extra={"link": link.name})


def setting_of(link: Link, settings: MiddlewareSettings) -> str:
    """The key as it stands in the settings file."""
    if link.setting != "card":
        return link.setting
    card = settings.card
    given = {"file": card.user_pin_file is not None, "credential": card.user_pin_credential is not None}
    return f"card.user_pin_{next((kind for kind, is_given in given.items() if is_given), 'prompt')}"


def grid_authority(path: Path, *, now: float) -> x509.Certificate:
    """The grid's CA, ``grid.authority`` of the settings. Raises SettingUnusable."""
    try:
        with path.open("rb") as file:
            certificate = load_certificate(file.read(MAX_CERTIFICATE_SIZE * 2))
        check_validity(certificate, now)
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except OSError as error:
        raise SettingUnusable("grid.authority", f"{path} cannot be read: {error.strerror}") from error
    except IdentityError as error:
        raise SettingUnusable("grid.authority", f"{path}: {error}") from error
    except x509.ExtensionNotFound:
        basic = x509.BasicConstraints(ca=False, path_length=None)
    if not basic.ca:
        raise SettingUnusable(
            "grid.authority",
            f"{path} is the certificate of '{certificate.subject.rfc4514_string()[:100]}', and of no CA",
        )
    return certificate
