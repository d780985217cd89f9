"""compare decode: bytes of the state, time of a token and of a prompt, against the length of the context."""

import argparse

from rich.console import Console

from efficient_tx.commands import names_of
from efficient_tx.compare.decode import plots, report
from efficient_tx.compare.decode.measure import Settings, compare, decoders
from efficient_tx.compare.flags import path, positive, whole, wholes
from efficient_tx.compare.progress import progress
from efficient_tx.compare.timing import machine
from efficient_tx.files import write

HELP = "state, time of a token and of a prompt of the causal mixers, against the context"
LENGTHS = (1024, 4096, 16384, 65536, 262144)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add, default, names = parser.add_argument, Settings(()), decoders()
    add("--lengths", type=wholes, default=LENGTHS, help="default " + ",".join(map(str, LENGTHS)))
    add("--mixers", type=names_of(names, "mixer that decodes"), default=names, metavar="A,B", help="default: all")
    add("--budget", type=whole, default=default.budget, help="keys or features that a query meets")
    add("--max_seconds", type=positive, default=default.max_seconds,
        help="calls that would take longer, as the shorter lengths predict, are not made: — in the table")  # fmt: skip
    add("--batch", type=whole, default=default.batch)
    add("--heads", type=whole, default=default.heads)
    add("--head_dim", type=whole, default=default.head_dim)
    add("--rounds", type=whole, default=default.rounds, help="turns in which all are measured; medians are shown")
    add("--out", type=path, help="folder for decode.csv, decode.json and decode.png")


def check(args: argparse.Namespace) -> None:
    """There is nothing to check."""


def run(args: argparse.Namespace, console: Console) -> None:
    settings = Settings(
        args.lengths, args.budget, args.max_seconds, args.batch, args.heads, args.head_dim, args.rounds
    )  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    ran_on = machine()
    console.print(ran_on, highlight=False)
    with progress(console) as say:
        rows = compare(args.mixers, settings, say)
    console.print(report.table(rows, settings))
    console.print(
        f"{report.ABSENT}: a call would take more than {settings.max_seconds:g} s, as shorter lengths predict"
    )
    found = report.verdicts(rows)
    for line, _ in found:
        console.print(line, highlight=False)
    grew = [line.partition(":")[0] for line, constant in found if not constant]
    if found:
        console.print(f"not constant, though the state is: {', '.join(grew) or 'none'}", highlight=False)
    if args.out:
        write(args.out / "decode.csv", report.to_csv(rows))
        write(args.out / "decode.json", report.to_json(rows, settings, ran_on))
        write(args.out / "decode.png", plots.against_context(rows, settings, ran_on))
        console.print(f"wrote {args.out}/decode.csv, decode.json, decode.png")
