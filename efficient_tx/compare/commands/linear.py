"""compare linear: size, speed beside a dense layer, and projection error of the weight structures."""

import argparse

from rich.console import Console

from efficient_tx.commands import names_of
from efficient_tx.compare.flags import path, positive, whole, wholes
from efficient_tx.compare.linear import plots, report, weights
from efficient_tx.compare.linear.measure import Settings, compare, project
from efficient_tx.compare.progress import progress
from efficient_tx.compare.timing import machine
from efficient_tx.files import write
from efficient_tx.linear import LINEAR

HELP = "size, speed and projection errors of the weight structures"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, Settings(())
    add("--features", type=wholes, default=(1024, 2048), help="widths that are timed; default 1024,2048")
    add("--tokens", type=whole, default=default.tokens, help=f"default {default.tokens}")
    add("--structures", type=names_of(LINEAR, "structure"), default=list(LINEAR), metavar="A,B",
        help="default: all; dense is timed in any case")  # fmt: skip
    add("--rounds", type=whole, default=default.rounds, help="turns in which all are timed; medians are shown")
    add("--share", type=positive, default=default.share,
        help="of the bytes of a dense weight, which a structure may store when it is projected")  # fmt: skip
    add("--weight", type=path, metavar="FILE.npy", help="dense weight [in, out] to project; default: one trained here")
    add("--run", type=path, metavar="WORKDIR", help="take it from the newest checkpoint of a run")
    add("--layer", help="which layer of the run, as encoder.blocks.0.mlp.up; default: the largest")
    add("--out", type=path, help="folder for linear.csv, linear.json and linear.png")


def check(args: argparse.Namespace) -> None:
    if args.weight and args.run:
        raise ValueError("--weight and --run both name a weight: use one of the two")
    if args.layer and not args.run:
        raise ValueError("--layer names a layer of a run: name the run with --run")


def run(args: argparse.Namespace, console: Console) -> None:
    settings = Settings(args.features, args.tokens, args.rounds, args.share)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    ran_on = machine()
    console.print(ran_on, highlight=False)
    with progress(console) as say:
        if args.weight:
            kernel, source = weights.from_file(args.weight)
        elif args.run:
            kernel, source = weights.from_run(args.run, args.layer)
        else:
            kernel, source = weights.trained(say)
        rows = compare(args.structures, settings, say)
        projected = project(args.structures, kernel, settings.share, say)
    for width in settings.features:
        console.print(report.speed(rows, width, settings))
    console.print("rate: multiplications a second, forward and backward, as a share of the dense layer's")
    for line in report.verdicts(rows):
        console.print(line, highlight=False)
    n, m = kernel.shape
    source = f"{n} × {m}, {source}; 99 % of its squares are in {weights.directions(kernel)} singular directions"
    console.print(report.errors(projected, settings))
    console.print(f"error: ‖W − Ŵ‖ / ‖W‖; W is {source}", highlight=False)
    if any(report.share_stored(row) > settings.share for row in projected):
        console.print("*: its smallest size stores more")
    if args.out:
        write(args.out / "linear.csv", report.to_csv(rows, projected))
        write(args.out / "linear.json", report.to_json(rows, projected, source, settings, ran_on))
        write(args.out / "linear.png", plots.gains_and_losses(rows, projected, f"W is {source}", settings, ran_on))
        console.print(f"wrote {args.out}/linear.csv, linear.json, linear.png")
