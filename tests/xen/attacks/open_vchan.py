"""Opens the vchan that dom0 serves at the path."""

from __future__ import annotations

import asyncio
import json
import sys

from secfunet.xen.errors import VchanError
from secfunet.xen.vchan import Vchan


async def main(path: str) -> dict[str, object]:
    try:
        channel = await Vchan.connect(0, path)
    except VchanError as error:
        return {"refused": str(error), "errno": error.errno}
    await channel.close()
    return {"opened": True}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1]))))
