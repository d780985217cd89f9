"""compare table: the README's tables of token mixers and of weight structures."""

import argparse

from rich.console import Console

from efficient_tx.compare import readme
from efficient_tx.compare.flags import path
from efficient_tx.files import write

HELP = "the README's tables of mixers and structures, as Markdown"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", type=path, metavar="README.md", help="replace the tables between the file's markers")


def check(args: argparse.Namespace) -> None:
    """There is nothing to check."""


def run(args: argparse.Namespace, console: Console) -> None:
    if args.write is None:
        console.out(readme.tables(), end="", highlight=False)
        return
    write(args.write, readme.replaced(args.write.read_text()))
