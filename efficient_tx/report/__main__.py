"""Compares runs, of a sweep or any: tables and pictures in one HTML file, or the tables as Markdown, CSV or TeX.

python -m efficient_tx.report runs/sweep1 --out=report.html
python -m efficient_tx.report runs/sweep1 runs/sweep2 --baseline=softmax --format=md

Runs that differ in their seeds only are one method. Tasks, data and protocols that differ never share a column. Paired
differences need predictions: python -m efficient_tx.eval --workdir 'runs/sweep1/*' --save_predictions
"""

import os

# Set before jax is imported: OpenBLAS's threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx import commands

if __name__ == "__main__":
    commands.leave_quietly()

from efficient_tx.extras import require

require("train", "matplotlib", "ml_collections", "orbax", "rich")

import argparse
import sys
from collections.abc import Sequence

import jax
from rich.console import Console

from efficient_tx.checks import nearest
from efficient_tx.compare.flags import path
from efficient_tx.config import trust
from efficient_tx.config.flags import TRUST, answered
from efficient_tx.files import write
from efficient_tx.report import content, plots
from efficient_tx.report.flops import Costs, of_steps
from efficient_tx.report.page import page
from efficient_tx.report.runs import Problem, find, labels_of, problems
from efficient_tx.tables import FORMATS, Table

ENDINGS = ("html", *FORMATS)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake ends in one line and exit status 2."""
    parser = commands.Parser.of("report", __doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=path, metavar="DIR", help="a folder of runs, as of a sweep, or a run")
    add("--format", choices=ENDINGS, help="default: as the ending of --out, else html")
    add("--baseline", metavar="NAME", help="the method that others are compared with; default: softmax, else the first")
    add("--out", type=path, help="default: DIR/report.html, with report.csv beside it; other formats are printed")
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    options = parser.parse_args(argv)
    if options.out is not None:
        ending = options.out.suffix.removeprefix(".")
        if ending not in ENDINGS:
            parser.error(f"--out={options.out}: end it in {', '.join('.' + ending for ending in ENDINGS)}")
        if options.format not in (None, ending):
            parser.error(f"--out={options.out} and --format={options.format}: leave out one of the two")
        if options.out.is_dir():
            parser.error(f"--out={options.out} is a folder: name a file in it")
        options.format = ending
    options.format = options.format or "html"
    if options.out is None and options.format == "html":
        options.out = options.folders[0] / "report.html"
    return options


def flops_of(found: Sequence[Problem], console: Console) -> list[Costs]:
    """For each problem: method -> what its training steps cost."""
    every = []
    with console.status("counting operations") as status:
        for problem in found:
            every.append({})
            for method in problem.methods:
                status.update(f"counting operations of {method.label}")
                try:
                    every[-1][method.label], why = of_steps(method.config), "its program has loops of unknown length"
                except ValueError as error:  # a mixer or a task of another place
                    every[-1][method.label], why = None, str(error)
                if every[-1][method.label] is None:
                    print(f"{method.label}: operations are not counted: {why}", file=sys.stderr)
    return every


def check_baseline(name: str | None, found: Sequence[Problem]) -> None:
    labels = labels_of(found)
    if name is not None and name not in labels:
        raise ValueError(f"--baseline={name}: the methods are {'; '.join(labels)} (nearest: {nearest(name, labels)!r})")


def text(form: str, tables: Sequence[Table], sections: Sequence[content.Section]) -> str:
    """The tables in a form; in Markdown with the sentences."""
    if form != "md":
        return "\n".join(map(FORMATS[form], tables))
    parts = [FORMATS["md"](tables[0])]
    for section in sections:
        parts.append(f"## {section.problem.title}\n")
        parts += map(FORMATS["md"], section.tables)
        parts.append("\n".join(f"- {line}" for line in [*section.notes, *map(": ".join, section.facts.items())]) + "\n")
    return "\n".join(parts)


def report(options: argparse.Namespace) -> int:
    def warn(line: str) -> None:
        print(line, file=sys.stderr)

    for folder in options.folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: name one that holds runs")
    if options.out and not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out={options.out}: there is no folder {options.out.parent}")
    found = problems(find(options.folders, warn), warn)
    if not found:
        raise ValueError(f"{', '.join(map(str, options.folders))}: there are no runs to compare")
    check_baseline(options.baseline, found)
    every = flops_of(found, Console(stderr=True))
    sections = [content.section(problem, flops, options.baseline) for problem, flops in zip(found, every)]
    tables = [content.overview(found), *(table for section in sections for table in section.tables)]
    if options.format != "html":
        made = text(options.format, tables, sections)
        if options.out is None:
            print(made, end="")
            return 0
        write(options.out, made)
    else:
        labels = labels_of(found)
        title = f"Comparison of {len(labels)} methods"
        drawn = [plots.pictures(problem, f"p{i}", labels) for i, problem in enumerate(found)]
        write(options.out, page(title, tables[0], sections, drawn))
        beside = options.out.with_suffix(".csv")
        write(beside, text("csv", tables, sections))
        print(f"wrote {beside}")
    print(f"wrote {options.out}")
    return 0


def main(argv: Sequence[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # only traced: no accelerator is needed
    options = parse(argv)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    return answered(lambda: report(options))


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(lambda: main(sys.argv[1:]), smaller="fewer runs")


if __name__ == "__main__":
    command()
