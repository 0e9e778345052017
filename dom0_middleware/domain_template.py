"""The domain template of dom0's administrator: read and judged when the daemon starts, not when the first VM is made from it.

Memory and vCPUs are a VM's own, so nothing else in a template may say how many there are, or name one by its number: libvirt would refuse
the domain, or make one that is not what was asked for.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from dom0_middleware.errors import SettingUnusable

MAX_TEMPLATE: Final = 1 << 20  # bytes
_MEMORY: Final = "it says how much memory a domain has, which each VM says for itself"
_VCPUS: Final = "it says how many vCPUs a domain has, which each VM says for itself"
_NUMBERED: Final = "it names vCPUs by their numbers, and how many a domain has each VM says for itself"
_REFUSED: Final = {
    "maxMemory": _MEMORY,
    "devices/memory": _MEMORY,
    "cpu/numa": "it shares out vCPUs and memory, which each VM says for itself",
    "numatune/memnode": "it names cells of <numa>, which a template cannot have",
    "vcpus": _VCPUS,
    "cpu/topology": _VCPUS,
    "cputune/vcpupin": _NUMBERED,
    "cputune/vcpusched": _NUMBERED,
    "cputune/cachetune": _NUMBERED,
    "cputune/memorytune": _NUMBERED,
}


class TemplateError(SettingUnusable):
    """The template cannot be used; the message names the setting, the file and what is wrong in it."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__("libvirt.template", f"{path}: {problem}")
        self.path = path


class DomainTemplate:
    """A template that was read from ``path``."""

    def __init__(self, path: Path, root: ElementTree.Element) -> None:
        self.path = path
        self._root = root

    @classmethod
    def load(cls, path: Path) -> DomainTemplate:
        """Raises TemplateError."""
        try:
            with path.open("rb") as file:
                content = file.read(MAX_TEMPLATE + 1)
        except OSError as error:
            raise TemplateError(path, f"cannot be read: {error.strerror}") from error
        if len(content) > MAX_TEMPLATE:
            raise TemplateError(path, f"is larger than {MAX_TEMPLATE} bytes")
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> DomainTemplate:
        """Raises TemplateError. In any encoding that XML can declare."""
        try:
            # dom0's own file, not a guest's.
            root = ElementTree.fromstring(content)  # noqa: S314
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise TemplateError(path, f"is no XML: {error}") from error
        if root.tag != "domain":
            raise TemplateError(path, f"its root is <{root.tag}>, not <domain>")
        for where, why in _REFUSED.items():
            if root.find(where) is not None:
                raise TemplateError(path, f"take <{where}> out: {why}")
        return cls(path, root)

    def copy(self) -> ElementTree.Element:
        """Its tree, to be changed."""
        return copy.deepcopy(self._root)
