"""compare table: the tables of token mixers, weight structures and methods of compression."""

import argparse

from rich.console import Console

from efficient_tx.compare import readme
from efficient_tx.compare.flags import path
from efficient_tx.files import write

HELP = "the tables of mixers, structures and methods of compression, as Markdown"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--write",
        type=path,
        metavar="PAGE",
        help="replace the tables between the markers of README.md or docs/compressing.md",
    )


def check(args: argparse.Namespace) -> None:
    """There is nothing to check."""


def run(args: argparse.Namespace, console: Console) -> None:
    if args.write is None:
        console.out("\n".join(readme.tables().values()), end="", highlight=False)
        return
    write(args.write, readme.replaced(args.write.read_text()))
