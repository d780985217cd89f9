"""Verifies the kernels: without an accelerator, by interpreters and the vendors' compilers, or on the one there is.

python -m efficient_tx.kernels.verify --all [--quick] [--jobs=4]
python -m efficient_tx.kernels.verify --all --kernels=monarch --targets=h100,v5e
python -m efficient_tx.kernels.verify --hardware
"""

from efficient_tx.commands import Parser, leave_quietly, names_of, run

if __name__ == "__main__":
    leave_quietly()

from efficient_tx.extras import require

require("train", "rich")

import argparse
import datetime
import json
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from efficient_tx.compare.flags import whole
from efficient_tx.compare.progress import progress
from efficient_tx.files import local_path, write
from efficient_tx.kernels.case import OPERATIONS
from efficient_tx.kernels.verify import figures, hardware, ladder, report, sections
from efficient_tx.kernels.verify.plan import GATES, everything, selection
from efficient_tx.kernels.verify.targets import TARGETS


def parse(argv: Sequence[str]) -> argparse.Namespace:
    first, _, examples = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m efficient_tx.kernels.verify", description=first, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="run what needs no accelerator, write kernels.json and .md")
    what.add_argument("--hardware", action="store_true", help="run and time the kernels on this machine's accelerator")
    parser.add_argument("--quick", action="store_true",
                        help="of --all the programs of CI, and no mixers for TPUs: an hour, not several")  # fmt: skip
    parser.add_argument("--kernels", type=names_of(OPERATIONS, "operation with cases"), default=list(OPERATIONS),
                        metavar="A,B", help="default: all of " + ", ".join(OPERATIONS))  # fmt: skip
    parser.add_argument("--targets", type=names_of(tuple(TARGETS), "target"), default=list(TARGETS),
                        metavar="A,B", help="default: all of " + ", ".join(TARGETS))  # fmt: skip
    parser.add_argument("--jobs", type=whole, default=1, metavar="N",
                        help="of --all: so many processes, each with a core and 2 GiB; default: 1")  # fmt: skip
    parser.add_argument("--out", type=local_path, default=Path("benchmarks"), help="folder; default: benchmarks")
    args = parser.parse_args(argv)
    if not args.all and not args.hardware:
        parser.error("say --all (no accelerator needed) or --hardware (on this machine's accelerator)")
    if args.quick and not args.all:
        parser.error("--quick is a part of --all, and --hardware is quick: leave it out")
    if args.jobs > 1 and not args.all:
        parser.error(f"--jobs={args.jobs} is of --all, and --hardware is one process: leave it out")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    # Compiling for accelerators uses none; what kernels compute on one is computed on the host, too.
    platforms = jax.config.jax_platforms.split(",") if args.hardware and jax.config.jax_platforms else []
    if args.all or platforms:
        jax.config.update("jax_platforms", ",".join(dict.fromkeys([*platforms, "cpu"])))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    try:
        return on_accelerator(args, console) if args.hardware else without_accelerator(args, console)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def without_accelerator(args: argparse.Namespace, console: Console) -> int:
    """Returns 1 if a kernel is wrong, races or has a fault for a target that gates, or a section has a fault."""
    if lacking := ladder.missing(args.targets):
        raise ValueError("; ".join(lacking))
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "kernels.json"
    implementations = list(dict.fromkeys(TARGETS[name].implementation for name in args.targets))
    with progress(console) as say:
        of_ci = selection(args.kernels, [name for name in args.targets if name in GATES])
        rest = [] if args.quick else selection(args.kernels, args.targets, strength=3)
        planned = {c.name: c for c in of_ci + rest}
        interpreted = list(ladder.interpreted(args.kernels, say, args.jobs))
        moved = list(ladder.accounts(args.kernels, implementations, say, args.jobs))
        rows = ladder.compilations(list(planned.values()), figures.read(path), say, args.jobs)
        compiled = list(kept(rows, path))
        complete = set(args.kernels) == set(OPERATIONS) and set(args.targets) == set(TARGETS)
        further, sound = sections.of_all(say, quick=args.quick, jobs=args.jobs) if complete else ([], True)
    date = datetime.date.today().isoformat()
    page = report.markdown(date, interpreted, moved, compiled, further, quick=args.quick)
    console.print(page, highlight=False, markup=False, soft_wrap=True)
    if complete:
        write(args.out / "kernels.md", page)
        console.print(f"wrote {args.out}/kernels.json, kernels.md")
    else:
        console.print(f"wrote {args.out}/kernels.json; kernels.md has all kernels and targets, and was not written")
    failed = any(row["faults"] and TARGETS[row["target"]].gate for row in compiled)
    wrong = any(row["races"] or not report.holds(row) for row in interpreted)
    return int(failed or not sound or wrong)


KEEP_EVERY = 20


def kept(rows: Iterator[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """The rows, and their figures in a file meanwhile: who is interrupted goes on with the same command."""
    known, programs = {compilation.name for compilation in everything()}, {}
    for number, row in enumerate(rows):
        programs |= {row["name"]: row["figures"]} if "figures" in row else {}
        if number % KEEP_EVERY == KEEP_EVERY - 1:
            figures.store(path, programs, known)
        yield row
    figures.store(path, programs, known)


# A run of --hardware is over within eight minutes: a compilation that has begun may take one of them.
ERRORS_SECONDS, STEPS_SECONDS, ALL_SECONDS = 160, 60, 420


def on_accelerator(args: argparse.Namespace, console: Console) -> int:
    """Returns 1 if something of ours does not run, or is further from float64 than rounding explains."""
    device, began, seed = hardware.accelerator(), time.monotonic(), random.randrange(2**31)
    folder = args.out / "hardware"
    folder.mkdir(parents=True, exist_ok=True)
    head = {
        "device": device.device_kind, "driver": hardware.driver(), "date": datetime.date.today().isoformat(),
        "versions": figures.versions(), "seed": seed,
    }  # fmt: skip
    console.print(f"{head['device']}, driver {head['driver']}", highlight=False)
    with progress(console) as say:
        clock = hardware.Clock.start(ERRORS_SECONDS)
        errors = list(hardware.checked(args.kernels, hardware.KERNELS[device.platform], clock, seed, say))
        steps = list(hardware.trained(hardware.Clock.start(STEPS_SECONDS), say))
        clock = hardware.Clock.start(ALL_SECONDS - (time.monotonic() - began))
        times = list(hardware.timed(args.kernels, clock, seed, say))
    for line in (*report.of_errors(errors), "", *report.of_steps(steps), "", *report.of_times(times)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    path = folder / f"{re.sub('[^a-z0-9]+', '-', device.device_kind.lower())}.json"
    done = head | {"seconds": round(time.monotonic() - began), "errors": errors, "training": steps, "times": times}
    write(path, json.dumps(done, indent=1) + "\n")
    console.print(f"wrote {path} after {done['seconds']} s")
    return int(not report.sound(errors, steps, times))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), smaller="fewer --kernels")
