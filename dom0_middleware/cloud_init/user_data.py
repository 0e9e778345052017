"""The two documents of a NoCloud seed, and what they say. No IO.

Sources: cloud-init's documentation of cloud config (modules *Runcmd* and *Final message*) and of the data source *NoCloud*.
The documents are JSON, which YAML 1.2 contains: nothing in a value can become a key.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from secfunet.errors import SecFuNetError

LABEL = "cidata"  # of the seed's file system
FOLDER = "secfunet"  # on the seed: the packages
ENROL_TIMEOUT = 300  # seconds that the first boot waits for the agent's enrolment before it is told as failed
MAX_PACKAGES = 32
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~_-]{0,199}\.deb")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z0-9._~:/?\[\]@!$&'()*+,;=%-]{1,2048}")


class CloudInitError(SecFuNetError):
    """This cannot be made into user data; the text says why."""


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package: the agent, or one that it depends on. ``url`` "": it is on the seed.

    Raises CloudInitError if a name, a digest or a URL is none.
    """

    name: str  # of the file
    sha256: str  # hexadecimal
    url: str = ""

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.name):
            raise CloudInitError(f"'{self.name[:200]}' is no name of a Debian package's file")
        if not _SHA256.fullmatch(self.sha256):
            raise CloudInitError(f"the SHA-256 of {self.name} is not 64 hexadecimal digits")

    @classmethod
    def from_url(cls, text: str) -> Package:
        """``URL#sha256=DIGEST``: a package that the guest fetches itself; the digest makes plain HTTP as good as HTTPS."""
        url, _, fragment = text.partition("#")
        kind, _, digest = fragment.partition("=")
        try:
            parts = urlsplit(url)
            named = bool(parts.hostname)
        except ValueError:
            named = False
        if not named or kind != "sha256" or parts.scheme not in ("http", "https") or not _URL.fullmatch(url):
            raise CloudInitError(f"'{text[:200]}' is not of the form http://HOST/NAME.deb#sha256=DIGEST (or https)")
        return cls(PurePosixPath(parts.path).name, digest, url)


def user_data(packages: list[Package]) -> bytes:
    """Cloud config that installs ``packages`` if they are what they should be, and waits for its enrolment. Raises CloudInitError."""
    if not 0 < len(packages) <= MAX_PACKAGES:
        raise CloudInitError(f"there are 1 to {MAX_PACKAGES} packages")
    if len({package.name for package in packages}) != len(packages):
        raise CloudInitError("two packages have files of the same name")
    # In the last stage: everything else that a first boot does is done, a network (where there is one) is up.
    config = {"runcmd": [["sh", "-euc", _script(packages)]]}
    return b"#cloud-config\n" + _json(config)


def meta_data(uuid: str, name: str) -> bytes:
    """The instance is the domain: a copy of its disk is another one, and begins anew."""
    fields = {"instance-id": uuid}
    if _HOST_NAME.fullmatch(name):
        fields["local-hostname"] = name
    return _json(fields)


def _script(packages: list[Package]) -> str:
    carried = [package for package in packages if not package.url]
    lines = ["folder=$(mktemp -d)", 'cd "$folder"', "trap 'cd /; rm -rf \"$folder\"' EXIT"]
    if carried:
        lines += [
            "mkdir seed",
            f"mount -o ro LABEL={LABEL} seed || mount -o ro LABEL={LABEL.upper()} seed",
            *(f"cp seed/{FOLDER}/{shlex.quote(package.name)} ." for package in carried),
            "umount seed",
        ]
    for package in packages:
        if package.url:
            fetch = "import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])"
            lines.append(f"python3 -c {shlex.quote(fetch)} {shlex.quote(package.url)} {shlex.quote(package.name)}")
    sums = "".join(f"{package.sha256}  {package.name}\n" for package in packages)
    lines += [
        f"printf %s {shlex.quote(sums)} | sha256sum --check --strict -",
        "chmod 0755 .",
        # With what the packages depend on, where it is not here and a network is there.
        "DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends --no-remove"
        f" {' '.join(shlex.quote('./' + package.name) for package in packages)}",
        f"end=$(($(date +%s) + {ENROL_TIMEOUT}))",
        'until vm-agent status; do [ "$(date +%s)" -lt "$end" ]; sleep 2; done',
    ]
    return "\n".join(lines) + "\n"


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
