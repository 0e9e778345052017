"""Build hook: generates the gRPC stubs from ``protos/`` whenever the package is built or installed.

The stubs land beside the code, as ``secfunet.{gose,middleware,agent}.v1``; they are ignored by git.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate_stubs(root: Path) -> list[Path]:
    """Runs protoc for every file under ``protos/``; returns the packages that now hold stubs.

    Raises RuntimeError if protoc refuses a file (it has then printed why).
    """
    import grpc_tools
    from grpc_tools import protoc

    protos = root / "protos"
    files = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    plugin = Path(sys.executable).parent / "protoc-gen-mypy_grpc"
    arguments = [
        "protoc",
        f"--proto_path={protos}",
        f"--proto_path={well_known}",
        f"--python_out={root}",
        f"--pyi_out={root}",
        f"--grpc_python_out={root}",
    ]
    if plugin.exists():
        arguments += [f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out={root}"]
    if protoc.main([*arguments, *files]) != 0:
        raise RuntimeError("protoc refused the files under protos/: see above")
    packages = sorted({(root / name).parent for name in files})
    for package in packages:
        for folder in (package, package.parent):
            (folder / "__init__.py").write_text('"""Generated from protos/; do not edit."""\n')
    return packages


class StubsBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Hatchling calls this before it collects the files of a wheel (an editable one too)."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "wheel":
            generate_stubs(Path(self.root))
