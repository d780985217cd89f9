"""Compresses a trained model, or swaps its mixers.

python -m efficient_tx.compress --workdir=RUN --method=NAME[+eora] --budget=0.5 --out=RUN2 [--tune=STEPS]
python -m efficient_tx.compress --workdir=RUN --mixers=softmax,lev --distill=300 --out=RUN2 [--set KEY=VALUE]
python -m efficient_tx.compress --workdir=RUN --budget=0.5 --estimate [--where=PATTERN]

The result is the workdir of a run: eval.py evaluates it, `train.py --config.init_from=RUN2` and --tune=STEPS go on from
it, and it can be compressed again. The budget is the share that the layers which the method touches may keep, of bytes
or of another --unit. A method may have options: --method="low_rank(rank=8)".

Other mixers take over the parameters that both have. With --distill=STEPS the result learns the outputs of the run's
blocks, in the first half of the steps each block on the run's own inputs, then all together and the logits as well.
With --method and --mixers, the mixers are swapped first: to compress what was distilled, compress the result again.

With --estimate nothing is compressed and written: a table says about how much of each layer low rank at this budget
would lose.

The same command goes on after a stop. Exit status: as train.py.
"""

import os

# Set before jax is imported: its CPU solvers run in OpenBLAS, whose threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx import commands

if __name__ == "__main__":
    commands.leave_quietly()

from efficient_tx.extras import require

require("train", "grain", "matplotlib", "ml_collections", "orbax", "rich")

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console

from efficient_tx import train
from efficient_tx.checks import OptionError
from efficient_tx.compress.asked import Asked
from efficient_tx.compress.estimate import show
from efficient_tx.compress.pipeline import run
from efficient_tx.compression import METHODS
from efficient_tx.compression.budget import check_budget
from efficient_tx.compression.cost import UNITS
from efficient_tx.config import trust
from efficient_tx.config.flags import TRUST
from efficient_tx.config.methods import named_method
from efficient_tx.files import local_path

# What is set of a result, which --estimate does not make.
OF_RESULTS = {flag: flag for flag in ("method", "mixers", "out", "calibration", "draw", "distill", "tune")} | {
    "set": "settings"
}


def parse_flags(arguments: list[str]) -> tuple[Callable[[Console], None], list[str]]:
    """The work that the command line asks for, and modules to trust; a mistake ends in one line and exit status 2."""

    parser = commands.Parser(
        prog="python -m efficient_tx.compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods, after which +eora may stand:\n" + "\n".join(f"  {line}" for line in described()),
    )
    add = parser.add_argument
    add("--workdir", required=True, type=local_path, help="the run to compress; it is only read")
    add("--method", help="one of those below, with options in parentheses")
    add("--budget", type=float, help="share of the cost that may stay, above 0 and at most 1")
    add("--mixers", metavar="PATTERN", help='other mixers of the layers, repeated to depth: "softmax*3,lev*3"')
    add("--out", type=local_path, help="workdir of the result, a new folder")
    add("--estimate", action="store_true", help="only say about what low rank would lose, from sketches of the weights")
    add("--unit", default="bytes", choices=UNITS, help="of the budget; milliseconds are measured here; default bytes")
    add("--where", default="mlp|projections", metavar="PATTERN",
        help="layers: mlp, projections, or a regular expression in their paths; default mlp|projections")  # fmt: skip
    add("--calibration", type=int, default=256, metavar="N", help="training examples for statistics; default 256")
    add("--draw", type=int, default=0, metavar="SEED", help="which training examples these are; default 0")
    add("--distill", type=int, default=0, metavar="STEPS", help="steps of learning from the run; default 0")
    add("--tune", type=int, default=0, metavar="STEPS", help="steps of training afterwards; default 0")
    add("--checkpoint", default="best", help="of the run: best (on validation), last, or a step")
    add("--set", action="extend", nargs="+", default=[], type=commands.setting, metavar="KEY=VALUE", dest="settings",
        help="keys of the config of the result, as optimizer.learning_rate=1e-4")  # fmt: skip
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    options = parser.parse_args(arguments)
    for name, least in {"calibration": 1, "draw": 0, "distill": 0, "tune": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name}={getattr(options, name)}: must be at least {least}")
    if options.estimate:
        for flag, name in OF_RESULTS.items():
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{flag} is of a result, and --estimate makes none: leave one of them out")
        if options.budget is None:
            parser.error("--budget is missing: --estimate needs it")
    elif options.out is None:
        parser.error("--out is missing: name a new folder for the result")
    elif options.method is None and options.mixers is None:
        parser.error("--method is missing: name one of those that --help shows, or other --mixers")
    for one, other in (("method", "budget"), ("budget", "method")) if not options.estimate else ():
        if getattr(options, one) is None and getattr(options, other) is not None:
            parser.error(f"--{one} is missing: --{other}={getattr(options, other)} needs it")
    try:
        if options.budget is not None:
            check_budget(options.budget)
        if options.method is not None:
            named_method(options.method)
    except OptionError as error:
        parser.error(f"--{error.option}={error.value}: {error.rule}")
    if options.estimate:
        of = (options.workdir, options.checkpoint, options.budget, options.where, options.unit)
        return partial(show, *of), options.trust
    values = vars(options) | {"settings": dict(options.settings)}
    asked = Asked(**{field.name: values[field.name] for field in dataclasses.fields(Asked)})
    return partial(run, asked), options.trust


def described() -> Iterator[str]:
    """A line on each method."""
    for name in METHODS:
        method = named_method(name)
        needs = "calibration" if method.needs else "no data"
        yield f"{name:21s} {method.computes}; {needs}" + (f" ({method.paper})" if method.paper else "")


def main(arguments: list[str]) -> int:
    work, trusted = parse_flags(arguments)
    trust.allow(*trusted, remedy="--trust={} allows it")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    return train.concluded(lambda: work(console), "compress")


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(
        lambda: main(sys.argv[1:]), prints=False, smaller="a smaller --calibration, or --where with fewer layers"
    )


if __name__ == "__main__":
    command()
