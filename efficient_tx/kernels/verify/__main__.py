"""Verifies the kernels: without an accelerator, by interpreters and the vendors' compilers, or on the one there is.

python -m efficient_tx.kernels.verify --all
python -m efficient_tx.kernels.verify --all --kernels=monarch --targets=h100,v5e
python -m efficient_tx.kernels.verify --hardware
"""

import os
import sys

# Set before jax is imported: OpenBLAS's threads collide with XLA's, and compiling for accelerators uses none.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
if "--hardware" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

from efficient_tx.commands import Parser, leave_quietly, run

if __name__ == "__main__":
    leave_quietly()

from efficient_tx.extras import require

require("train", "rich")

import argparse
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from efficient_tx.checks import nearest
from efficient_tx.files import local_path, write
from efficient_tx.kernels.case import OPERATIONS
from efficient_tx.kernels.verify import figures, ladder, report
from efficient_tx.kernels.verify.plan import everything
from efficient_tx.kernels.verify.targets import TARGETS


def names_of(known: Sequence[str], noun: str) -> Callable[[str], list[str]]:
    """The parser of a flag that lists some of the `known` names."""

    def names(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                near = nearest(name, known)
                raise argparse.ArgumentTypeError(
                    f"{name!r} is no {noun}: choose of {', '.join(known)} (nearest: {near})"
                )
        return [name for name in known if name in text.split(",")]

    return names


def parse(argv: Sequence[str]) -> argparse.Namespace:
    first, _, examples = __doc__.partition("\n\n")
    parser = Parser(
        prog="python -m efficient_tx.kernels.verify", description=first, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--all", action="store_true", help="run what needs no accelerator, write kernels.json and .md")
    what.add_argument("--hardware", action="store_true", help="run and time the kernels on this machine's accelerator")
    parser.add_argument("--kernels", type=names_of(OPERATIONS, "operation with cases"), default=list(OPERATIONS),
                        metavar="A,B", help="default: all of " + ", ".join(OPERATIONS))  # fmt: skip
    parser.add_argument("--targets", type=names_of(tuple(TARGETS), "target"), default=list(TARGETS),
                        metavar="A,B", help="default: all of " + ", ".join(TARGETS))  # fmt: skip
    parser.add_argument("--out", type=local_path, default=Path("benchmarks"), help="folder; default: benchmarks")
    args = parser.parse_args(argv)
    if not args.all and not args.hardware:
        parser.error("say --all (no accelerator needed) or --hardware (on this machine's accelerator)")
    return args


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    try:
        return without_accelerator(args, console)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def without_accelerator(args: argparse.Namespace, console: Console) -> int:
    """Returns 1 if a kernel races, or has a fault for a target that gates."""
    if lacking := ladder.missing(args.targets):
        raise ValueError("; ".join(lacking))
    args.out.mkdir(parents=True, exist_ok=True)
    planned = list(everything(args.kernels, args.targets))
    with console.status("starting") as status:
        interpreted = list(ladder.interpreted(args.kernels, status.update))
        compiled = list(ladder.compilations(planned, status.update))
    page = report.markdown(datetime.date.today().isoformat(), interpreted, compiled)
    console.print(page, highlight=False, markup=False, soft_wrap=True)
    programs = {row["name"]: row["figures"] for row in compiled if "figures" in row}
    figures.store(args.out / "kernels.json", programs, (compilation.name for compilation in everything()))
    if set(args.kernels) == set(OPERATIONS) and set(args.targets) == set(TARGETS):
        write(args.out / "kernels.md", page)
        console.print(f"wrote {args.out}/kernels.json, kernels.md")
    else:
        console.print(f"wrote {args.out}/kernels.json; kernels.md has all kernels and targets, and was not written")
    failed = any(row["faults"] and TARGETS[row["target"]].gate for row in compiled)
    return int(failed or any(row["races"] for row in interpreted))


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), smaller="fewer --kernels")
