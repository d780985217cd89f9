"""compare attention: parameters, errors, time and memory of the attention variants."""

import argparse

from rich.console import Console

from efficient_tx.attention import ATTENTION
from efficient_tx.checks import OptionError
from efficient_tx.commands import names_of
from efficient_tx.compare.attention import plots, report
from efficient_tx.compare.attention.measure import Settings, compare
from efficient_tx.compare.flags import path, positive, whole, wholes
from efficient_tx.compare.progress import progress
from efficient_tx.compare.timing import machine
from efficient_tx.files import write

LENGTHS = (1024, 4096, 16384)
QUICK = {"lengths": (256, 1024), "rounds": 2, "max_seconds": 2.0}
HELP = "parameters, errors, time and memory of the attention variants"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Settings(())
    add("--lengths", type=wholes, help="default " + ",".join(map(str, LENGTHS)))
    add("--quick", action="store_true",
        help="defaults for a first look: lengths {}, {} rounds, {} seconds".format(
            ",".join(map(str, QUICK["lengths"])), QUICK["rounds"], QUICK["max_seconds"]))  # fmt: skip
    add("--variants", type=names_of(ATTENTION, "variant"), default=list(ATTENTION), metavar="A,B", help="default: all")
    add("--budget", type=whole, default=default.budget, help="keys, landmarks or features that a query meets")
    add("--max_seconds", type=positive,
        help="calls that would take longer, as the shorter lengths predict, are not made: — in the tables")  # fmt: skip
    add("--batch", type=whole, default=default.batch)
    add("--heads", type=whole, default=default.heads)
    add("--head_dim", type=whole, default=default.head_dim)
    add("--rounds", type=whole, help="turns in which all are measured; medians are shown")
    add(
        "--error_length",
        type=whole,
        help="one of --lengths, where errors are measured, by exact attention too; default: the shortest",
    )
    add("--out", type=path, help="folder for attention.csv, attention.json, error_time.png and time_length.png")


def check(args: argparse.Namespace) -> None:
    usual = {"lengths": LENGTHS, "rounds": Settings(()).rounds, "max_seconds": Settings(()).max_seconds}
    for name, value in (QUICK if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.error_length = args.error_length or args.lengths[0]
    if args.error_length not in args.lengths:
        among = ", ".join(map(str, args.lengths))
        raise OptionError("error_length", args.error_length, f"use one of the lengths, {among}")


def run(args: argparse.Namespace, console: Console) -> None:
    settings = Settings(
        args.lengths, args.budget, args.max_seconds, args.batch, args.heads, args.head_dim, args.rounds,
        args.error_length,
    )  # fmt: skip
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    ran_on = machine()
    console.print(ran_on, highlight=False)
    with progress(console) as say:
        rows = compare(args.variants, settings, say)
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
