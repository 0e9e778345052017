"""The names of operations and schemes, as policy files and audit records write them."""

from __future__ import annotations

from secfunet.operation import OPERATIONS, encryption_scheme_names, signature_scheme_names

SCHEMES: dict[str, tuple[str, ...]] = {
    "sign": signature_scheme_names(),
    "decrypt": encryption_scheme_names(),
    "encrypt": encryption_scheme_names(),
}

__all__ = ["OPERATIONS", "SCHEMES"]
