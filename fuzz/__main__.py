"""``python -m fuzz``: run, one (a single target in this process), seeds, list."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
WORK = Path(".build") / "fuzz"
MAX_INPUT = 4096  # bytes
SLOW_INPUT = 10  # seconds for one input: a fault, too
MEMORY = 1024  # MiB


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if no target found a fault."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Coverage-guided fuzzing of every parser.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run targets, each for a while")
    run.add_argument("targets", nargs="*", metavar="TARGET", help="all, if none is named")
    run.add_argument("--time", type=int, default=60, help="seconds for each target (default: 60)")
    run.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="targets side by side")
    run.set_defaults(act=_run)
    one = commands.add_parser("one", help="one target in this process; give it an input's file to see what it does")
    one.add_argument("target", choices=TARGETS)
    one.add_argument("options", nargs=argparse.REMAINDER, help="libFuzzer's, and files or folders of inputs")
    one.set_defaults(act=_one)
    commands.add_parser("seeds", help="write the real messages of the corpus anew").set_defaults(act=_seeds)
    commands.add_parser("list", help="name the targets").set_defaults(act=lambda _: print("\n".join(TARGETS)) or 0)
    chosen = parser.parse_args(arguments)
    return int(chosen.act(chosen) or 0)


def _run(arguments: argparse.Namespace) -> int:
    unknown = set(arguments.targets) - TARGETS.keys()
    if unknown:
        print(
            f"fuzz: there is no target {', '.join(sorted(unknown))}; 'python -m fuzz list' names them", file=sys.stderr
        )
        return 2
    names = arguments.targets or list(TARGETS)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        sound = list(pool.map(lambda name: _fuzz(name, arguments.time), names))
    faults = [name for name, found_nothing in zip(names, sound, strict=True) if not found_nothing]
    print(f"fuzz: {len(names) - len(faults)} of {len(names)} targets found nothing in {arguments.time} s each")
    return 1 if faults else 0


def _fuzz(name: str, seconds: int) -> bool:
    """Runs one target in a process of its own. What it learns goes to the work folder, a fault's input beside it."""
    learned, faults = WORK / name / "corpus", WORK / name / "faults"
    for folder in (learned, faults):
        folder.mkdir(parents=True, exist_ok=True)
    dictionary = CORPUS / f"{name}.dict"
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_INPUT}",
        f"-timeout={SLOW_INPUT}",
        f"-rss_limit_mb={MEMORY}",
        f"-artifact_prefix={faults}/",
        "-print_final_stats=1",
        *([f"-dict={dictionary}"] if dictionary.exists() else []),
    ]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", "one", name, *options, str(learned), str(CORPUS / name)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
    )
    runs = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    figures = f"{int(runs[1]) if runs else 0:>9,} inputs, {covered[-1] if covered else '?':>5} edges"
    if done.returncode == 0:
        print(f"fuzz: {name:14} {figures}, {time.monotonic() - began:.0f} s", flush=True)
        return True
    log = WORK / name / "log"
    log.write_text(done.stderr + done.stdout)
    said = (done.stdout + done.stderr).splitlines()
    what = [line for line in said if re.match(r"\s*[\w.]*(Error|Exception)\b|.*ERROR: libFuzzer", line)]
    print(
        f"fuzz: {name:14} FAULT: {what[0].strip() if what else 'see the log'}; log {log}, input in {faults}", flush=True
    )
    return False


def _one(arguments: argparse.Namespace) -> None:
    import atheris

    with atheris.instrument_imports(
        include=["secfunet", "secure_element", "gose", "gose_client", "dom0_middleware", "vm_agent"]
    ):
        run = TARGETS[arguments.target].make()
    atheris.Setup([f"fuzz {arguments.target}", *arguments.options], run, internal_libfuzzer=True)
    atheris.Fuzz()


def _seeds(_: argparse.Namespace) -> None:
    from fuzz.seeds import SEEDS

    for name, make in SEEDS.items():
        folder = CORPUS / name
        for old in folder.glob("seed-*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        for index, content in enumerate(make()):
            (folder / f"seed-{index:02}").write_bytes(content)
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
