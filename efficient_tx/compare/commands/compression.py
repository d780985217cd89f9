"""compare compression: one trained model made smaller by all methods, in the same bytes."""

import argparse

from rich.console import Console

from efficient_tx.checks import at_least
from efficient_tx.commands import parts, setting
from efficient_tx.compare.flags import path, whole
from efficient_tx.compare.progress import counted
from efficient_tx.compare.timing import machine
from efficient_tx.compression import COMPARED
from efficient_tx.compression.budget import check_budget
from efficient_tx.config.methods import named_method
from efficient_tx.files import write

HELP = "one trained model made smaller by all methods, in the same bytes"


def budgets(text: str) -> tuple[float, ...]:
    """Shares of the bytes, the largest first."""
    try:
        values = [float(part) for part in parts(text)]
        for value in values:
            check_budget(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return tuple(sorted(set(values), reverse=True))


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", type=path, required=True, help="a finished run")
    add("--out", type=path, required=True, help="for compression.csv, .json and .png, and all runs")
    add("--methods", type=parts, default=list(COMPARED), metavar="A;B",
        help="as of compress --method, split on ; where there is one, else on commas; default: all but"
             " low_rank, which is svd; also ternary+eora and flap+eora")  # fmt: skip
    add("--budgets", type=budgets, default=(0.75, 0.5, 0.25), help="shares of the bytes; default 0.75,0.5,0.25")
    add("--distill", type=int, default=0, metavar="STEPS", help="steps of learning from the run after each compression")
    add("--tune", type=int, default=0, metavar="STEPS", help="steps of training after that")
    add("--set", action="extend", nargs="+", default=[], type=setting, metavar="KEY=VALUE",
        dest="settings",
        help="keys of the trained results, as optimizer.learning_rate=1e-4")  # fmt: skip
    add("--draws", type=whole, default=3, help="samples of calibration examples, for methods that need them; default 3")
    add("--calibration", type=whole, default=256, help="examples of each; default 256")
    add("--where", default="mlp|projections", help="layers, as of compress --where")
    add("--rows", type=whole, default=32, help="examples of a timed call; default 32")
    add("--rounds", type=whole, default=7, help="turns in which all models are timed; medians are shown")


def check(args: argparse.Namespace) -> None:
    for method in args.methods:
        named_method(method)
    at_least(0, distill=args.distill, tune=args.tune)
    if not (args.workdir / "summary.json").is_file():
        raise ValueError(f"--workdir={args.workdir}: there is no finished run, it has no summary.json")


def run(args: argparse.Namespace, console: Console) -> int:
    """Exit status as `compress`: a stop leaves the cells that are done, from which the same command goes on."""
    from efficient_tx.train import concluded  # here and not above: the other comparisons need no configs

    return concluded(lambda: page(args, console), "compare")


def page(args: argparse.Namespace, console: Console) -> None:
    from efficient_tx.compare.compression import plots, report
    from efficient_tx.compare.compression.measure import Settings, compare, metric_of

    settings = Settings(
        args.workdir, tuple(args.methods), args.budgets, args.distill, args.tune, args.draws, args.calibration,
        args.where, dict(args.settings), args.rows, args.rounds,
    )  # fmt: skip
    ran_on = machine()
    console.print(ran_on, highlight=False)
    with counted(console) as bar:
        work = bar.add_task("")

        def progress(what: str, done: int, of: int) -> None:
            bar.update(work, description=what, completed=done, total=of)
            if not console.is_terminal:
                console.print(f"{done}/{of}  {what}", highlight=False)

        rows = compare(settings, args.out / "runs", progress)
    metric = metric_of(args.workdir)
    console.print(report.table(rows, settings, metric))
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "compression.csv", report.to_csv(rows))
    write(args.out / "compression.json", report.to_json(rows, settings, ran_on))
    write(args.out / "compression.png", plots.against_cost(rows, settings, ran_on, metric))
    console.print(f"wrote {args.out}/compression.csv, compression.json, compression.png")
