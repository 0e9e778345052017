"""``python -m demo``: see the package."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from demo.installation import LONGEST_FOLDER
from demo.narrator import Narrator
from demo.stack import CardKind
from demo.story import Kept, tell
from secfunet.errors import SecFuNetError
from secfunet.service.files import private_folder


def demo_folder() -> Path:
    """``.demo`` in this checkout; if its path is too long for Unix sockets, a private folder for this checkout under /tmp."""
    here = Path.cwd() / ".demo"
    if len(os.fsencode(here)) <= LONGEST_FOLDER:
        return here
    name = hashlib.sha256(os.fsencode(here)).hexdigest()[:8]
    folder = private_folder(Path(tempfile.gettempdir()) / f"secfunet-demo-{os.getuid()}-{name}")
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise SecFuNetError(f"{folder} belongs to somebody else, or is open to others: remove it")
    return folder / "demo"


async def _main(folder: Path, *, keep: bool, cards: CardKind) -> None:
    kept = Kept() if keep else None
    story = asyncio.create_task(tell(folder, Narrator.for_stream(sys.stdout), keep=kept, cards=cards))

    def asked_to_end() -> None:
        if kept is not None and kept.waits:
            kept.end()
        else:
            story.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_end)
    await story


def main() -> int:
    """Runs the story; 0 if everything happened as it must, 1 if not, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(
        prog="demo", description="A VM signs with a key that it never holds; then four attacks fail."
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave everything running until Ctrl-C, with commands to try"
    )
    parser.add_argument("--folder", type=Path, help="where the installation is kept (default: .demo in this checkout)")
    parser.add_argument(
        "--cards",
        choices=("socket", "pcsc"),
        default="socket",
        help="how cards are reached: a Unix socket each, or virtual readers of a pcscd of the demo's own",
    )
    arguments = parser.parse_args()
    logging.getLogger().addHandler(
        logging.NullHandler()
    )  # what the rooms log inside the story is told by the story itself
    try:
        asyncio.run(_main((arguments.folder or demo_folder()).absolute(), keep=arguments.keep, cards=arguments.cards))
    except asyncio.CancelledError:
        sys.stderr.write("demo: interrupted; everything is stopped\n")
        return 130
    except SecFuNetError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
