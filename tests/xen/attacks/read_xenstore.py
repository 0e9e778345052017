"""Reads the paths in xenstore; tells the sizes of the values, and the errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from secfunet.xen.errors import XenstoreError
from secfunet.xen.xenstore import Xenstore


def main(paths: Sequence[str]) -> dict[str, object]:
    answers: dict[str, object] = {}
    with Xenstore() as xenstore:
        for path in paths:
            try:
                value = xenstore.read(path)
                answers[path] = None if value is None else len(value)
            except XenstoreError as error:
                answers[path] = {"errno": error.errno}
    return answers


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
