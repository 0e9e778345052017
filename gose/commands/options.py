"""Arguments and options that several commands have, and how their values are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final

import typer

from secfunet.card.parameters import KeyAlgorithm
from secfunet.operation import OPERATIONS

_DURATION: Final = re.compile(r"([0-9]{1,9})([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_ALGORITHMS: Final = {
    "rsa-2048": KeyAlgorithm.RSA_2048,
    "rsa-3072": KeyAlgorithm.RSA_3072,
    "rsa-4096": KeyAlgorithm.RSA_4096,
    "p-256": KeyAlgorithm.P_256,
    "p-384": KeyAlgorithm.P_384,
}


def parse_duration(text: str) -> float:
    """``90s``, ``30m``, ``8h`` or ``365d`` in seconds; anything else is a usage error."""
    match = _DURATION.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise typer.BadParameter("a duration is a number and s, m, h or d: 90s, 30m, 8h, 365d")
    return float(int(match[1]) * _SECONDS[match[2]])


def parse_algorithm(text: str) -> KeyAlgorithm:
    """The key algorithm of that name; anything else is a usage error."""
    if text not in _ALGORITHMS:
        raise typer.BadParameter(f"a key is one of {', '.join(_ALGORITHMS)}")
    return _ALGORITHMS[text]


def parse_operations(text: str) -> tuple[str, ...]:
    """``sign,decrypt,encrypt`` or some of them; anything else is a usage error."""
    names = tuple(dict.fromkeys(text.split(",")))
    if not set(names) <= set(OPERATIONS):
        raise typer.BadParameter(f"operations are one or several of {','.join(OPERATIONS)}")
    return names


ConfigOption = Annotated[
    Path, typer.Option("--config", envvar="GOSE_CONFIG", help="The grid's settings (TOML).", show_default=True)
]
SecureElementOption = Annotated[str, typer.Option("--seid", help="The secure element, as the settings name it.")]
KeyOption = Annotated[
    KeyAlgorithm, typer.Option("--key", parser=parse_algorithm, metavar="ALGORITHM", help=", ".join(_ALGORITHMS))
]
ValidOption = Annotated[
    float, typer.Option("--valid", parser=parse_duration, metavar="DURATION", help="How long: 90s, 30m, 8h, 365d.")
]
CertificateOption = Annotated[Path, typer.Option("--out", help="Where to write the certificate (PEM).")]
ReplaceOption = Annotated[
    bool,
    typer.Option(
        "--replace",
        help="Destroy the key that is there, and make a new one. The old certificate is worth nothing then.",
    ),
]
CONFIG: Final = Path("/etc/secfunet/gose.toml")
