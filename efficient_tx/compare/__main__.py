"""Measures what this project holds, side by side, on the machine that runs it.

python -m efficient_tx.compare attention --lengths=1024,4096,16384 --budget=128 --max_seconds=20 --out=DIR
python -m efficient_tx.compare table [--write README.md]
"""

import os

# Before jax is imported: OpenBLAS's threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import argparse
import difflib
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import jax
from rich.console import Console

from efficient_tx.attention import ATTENTION
from efficient_tx.compare import plots, readme, report
from efficient_tx.compare.attention import Settings, compare
from efficient_tx.compare.files import write


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message}\n")


def nearest(name: str, choices: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(choices), 1, 0.0)[0]


def whole(text: str) -> int:
    """A flag's value, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted({whole(part) for part in text.split(",")}))


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def variants(text: str) -> list[str]:
    for name in text.split(","):
        if name not in ATTENTION:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no variant: choose of {', '.join(ATTENTION)} (nearest: {nearest(name, ATTENTION)!r})"
            )
    return [name for name in ATTENTION if name in text.split(",")]


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each command."""
    whole_parser = Parser(
        prog="python -m efficient_tx.compare", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = whole_parser.add_subparsers(dest="command", metavar="attention | table")
    default = Settings(())

    attention = commands.add_parser(
        "attention", help="parameters, errors, time and memory of the attention variants", allow_abbrev=False
    )
    add = attention.add_argument
    add("--lengths", type=lengths, default=(1024, 4096, 16384), help="default 1024,4096,16384")
    add("--variants", type=variants, default=list(ATTENTION), metavar="A,B", help="default: all")
    add("--budget", type=whole, default=default.budget, help="keys, landmarks or features that a query meets")
    add("--max_seconds", type=positive, default=default.max_seconds,
        help="calls that would take longer, as the shorter lengths predict, are not made: — in the tables")  # fmt: skip
    add("--batch", type=whole, default=default.batch)
    add("--heads", type=whole, default=default.heads)
    add("--head_dim", type=whole, default=default.head_dim)
    add("--rounds", type=whole, default=default.rounds, help="turns in which all are measured; medians are shown")
    add(
        "--error_length",
        type=whole,
        help="one of --lengths, where errors are measured, by exact attention too; default: the shortest",
    )
    add("--out", type=Path, help="folder for attention.csv, attention.json, error_time.png and time_length.png")

    table = commands.add_parser("table", help="the README's table of variants, as Markdown", allow_abbrev=False)
    table.add_argument("--write", type=Path, metavar="README.md", help="replace the table between the file's markers")
    return whole_parser, {"attention": attention, "table": table}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; one line and exit code 2 where they are wrong."""
    everything, commands = parser()
    if argv and argv[0] not in commands and not argv[0].startswith("-"):
        everything.error(
            f"{argv[0]!r} is no command: choose one of {', '.join(commands)} (nearest: {nearest(argv[0], commands)!r})"
        )
    args, unknown = everything.parse_known_args(argv)
    if args.command is None:
        everything.error(f"there is no command: choose one of {', '.join(commands)}")
    if unknown:
        flags = [f"--{name}" for name in vars(args) if name != "command"]
        flag = unknown[0].partition("=")[0]
        everything.error(f"{flag} is no flag of {args.command}: the nearest is {nearest(flag, flags)}")
    if args.command == "attention":
        args.error_length = args.error_length or args.lengths[0]
        if args.error_length not in args.lengths:
            among = ", ".join(map(str, args.lengths))
            everything.error(f"--error_length={args.error_length} is none of --lengths: use one of {among}")
    return args


def machine() -> str:
    """The device and the versions that figures were measured with."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        name = f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    versions = ", ".join(f"{package} {version(package)}" for package in ("jax", "jaxlib", "flax"))
    return f"{device.platform}: {name}; {versions}, Python {platform.python_version()}"


def compare_attention(args: argparse.Namespace, console: Console) -> None:
    settings = Settings(
        args.lengths, args.budget, args.max_seconds, args.batch, args.heads, args.head_dim, args.rounds,
        args.error_length,
    )  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    ran_on = machine()
    console.print(ran_on, highlight=False)
    with console.status("starting") as status:
        rows = compare(args.variants, settings, status.update)
    console.print(report.properties(rows, settings), report.speed(rows, settings))
    console.print(
        f"{report.ABSENT}: a call would take more than {settings.max_seconds:g} s, as shorter lengths predict"
    )
    found = report.verdicts(rows, settings)
    for line, _ in found:
        console.print(line, highlight=False)
    misses = {line.partition(":")[0]: missed for line, missed in found if missed}
    if found:
        console.print("misses:" if misses else "misses: none")
    for name, missed in misses.items():
        console.print(f"  {name}: {', '.join(missed)}", highlight=False)
    if args.out:
        write(args.out / "attention.csv", report.to_csv(rows))
        write(args.out / "attention.json", report.to_json(rows, settings, ran_on))
        write(args.out / "error_time.png", plots.error_against_time(rows, settings, ran_on))
        write(args.out / "time_length.png", plots.time_against_length(rows, settings, ran_on))
        console.print(f"wrote {args.out}/attention.csv, attention.json, error_time.png, time_length.png")


def print_table(args: argparse.Namespace, console: Console) -> None:
    if args.write is None:
        console.out(readme.mixer_table(), end="", highlight=False)
        return
    write(args.write, readme.replaced(args.write.read_text()))


COMMANDS: dict[str, Callable[[argparse.Namespace, Console], None]] = {
    "attention": compare_attention,
    "table": print_table,
}


def main(argv: Sequence[str]) -> int:
    args = parse(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    try:
        COMMANDS[args.command](args, console)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
