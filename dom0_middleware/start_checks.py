"""What the settings name, looked at when the daemon starts: a wrong file is told then, and by its key."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from dom0_middleware.errors import SettingUnusable
from secfunet.identity import MAX_CERTIFICATE_SIZE, IdentityError, check_validity, load_certificate


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
