"""Compares token mixers and weight structures on the machine that runs it.

python -m efficient_tx.compare attention --lengths=1024,4096,16384 --budget=128 --max_seconds=20 --out=DIR
python -m efficient_tx.compare linear --features=1024,2048 --tokens=8192 --out=DIR
python -m efficient_tx.compare decode --lengths=1024,16384,262144 --out=DIR
python -m efficient_tx.compare compression --workdir=RUN --budgets=0.75,0.5,0.25 --tune=300 --out=DIR
python -m efficient_tx.compare table [--write README.md]
"""

import os

# Set before jax is imported: OpenBLAS's threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx.commands import Parser, leave_quietly, no_flag, run

if __name__ == "__main__":
    leave_quietly()

from efficient_tx.extras import require

require("train", "matplotlib", "ml_collections", "orbax", "rich")

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from efficient_tx.checks import OptionError, nearest
from efficient_tx.compare.commands import COMMANDS


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake ends in one line and exit code 2."""
    parser = Parser(prog="python -m efficient_tx.compare", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar=" | ".join(COMMANDS))
    for name, command in COMMANDS.items():
        command.add_flags(commands.add_parser(name, help=command.HELP))
    if argv and argv[0] not in COMMANDS and not argv[0].startswith("-"):
        parser.error(
            f"{argv[0]!r} is no command: choose one of {', '.join(COMMANDS)} (nearest: {nearest(argv[0], COMMANDS)!r})"
        )
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        parser.error(f"there is no command: choose one of {', '.join(COMMANDS)}")
    if unknown:
        flags = [f"--{name}" for name in vars(args) if name != "command"]
        parser.error(no_flag(unknown[0], flags, of=f" of {args.command}"))
    try:
        COMMANDS[args.command].check(args)
    except ValueError as error:
        parser.error(line(error))
    return args


def line(error: Exception) -> str:
    """The line that is printed for an error; an option is written as a flag."""
    return f"--{error.option}={error.value}: {error.rule}" if isinstance(error, OptionError) else str(error)


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    try:
        return COMMANDS[args.command].run(args, console) or 0
    except (OSError, ValueError) as error:
        print(line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]), smaller="shorter --lengths, smaller --features or fewer --tokens")
