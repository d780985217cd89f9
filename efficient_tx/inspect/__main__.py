"""Looks inside a trained run, on test examples: errors of its attention, budgets that would do, ranks, what is read.

python -m efficient_tx.inspect --workdir=RUN --out=DIR [--examples=8]
python -m efficient_tx.inspect --workdir=RUN --out=DIR --budget [--against=skyformer,lev] [--sizes=16,64,256]

An error is that of a mixer against the exact attention that it approximates, on the model's own queries, keys and
values, head by head. With --budget: the smallest budgets for 1, 5 and 10 % of error, and the flags of
`python -m efficient_tx.eval` and `python -m efficient_tx.compress` that apply them. Writes inspect.json, inspect.png
and attention.png. Exit status: 0; 2 it cannot be done; 1 a file could not be written.
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
import sys
from collections.abc import Sequence

from rich.console import Console

from efficient_tx.attention import ATTENTION
from efficient_tx.checks import OptionError
from efficient_tx.compare.flags import path, whole, wholes
from efficient_tx.compare.progress import progress
from efficient_tx.config import trust
from efficient_tx.config.flags import TRUST, answered
from efficient_tx.config.names import mixer_class, parse_mixers
from efficient_tx.config.trained import trained_run
from efficient_tx.data.batching import first_examples
from efficient_tx.inspect import plots, reading, report
from efficient_tx.inspect.captured import capture
from efficient_tx.inspect.example import longest_example
from efficient_tx.inspect.look import advice, look
from efficient_tx.training.disk import write_bytes, writing
from efficient_tx.training.errors import Refused, refusing


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; a mistake ends in one line and exit status 2."""
    parser = commands.Parser.of("inspect", __doc__)
    add = parser.add_argument
    add("--workdir", required=True, type=path, help="the run; it is only read")
    add("--out", required=True, type=path, help="folder for inspect.json, inspect.png and attention.png")
    add("--checkpoint", default="best", help="best (on validation), last, or a step")
    add("--examples", type=whole, default=8, metavar="N", help="the first test examples; default 8")
    add("--budget", action="store_true", help="find the smallest budgets for 1, 5 and 10 %% of error")
    add("--against", type=commands.names_of(ATTENTION, "variant"), metavar="A,B",
        help="variants to measure in place of the run's mixers; default, with --budget or --sizes: a mixer that "
        "approximates is measured itself, an exact one against all that approximate it")  # fmt: skip
    add("--sizes", type=wholes, metavar="A,B", help="budgets to measure; default: powers of two up to the length")
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    return parser.parse_args(argv)


def inspect(options: argparse.Namespace, console: Console) -> None:
    """Measures, prints and writes.

    Raises:
      RunError: it cannot be done, in one line.
    """
    if options.out.exists() and not options.out.is_dir():
        raise Refused(f"{options.out}: that is no folder", option="out")
    config, task, model, step = trained_run(options.workdir, options.checkpoint)
    with refusing(str(options.workdir)):
        pattern = parse_mixers(config.mixers)
        batch = first_examples(task.test, task, options.examples)
        count = len(batch["label"])
    with progress(console) as say:
        say("one pass through the model")
        inside, example = capture(model, batch), longest_example(task, batch)
        try:
            found = look(
                model, inside, capture(model, example.batch), {mixer_class(name): name for name in pattern},
                against=options.against, sizes=options.sizes or None,
                budget=options.budget, progress=say,
            )  # fmt: skip
        except OptionError as error:
            raise Refused.of(error) from None
    advised = advice(found, pattern)
    console.print(report.mixers(found), report.states(found))
    if inside.others:
        console.print(
            f"not measured, as they are no function of q, k and v: {', '.join(inside.others)}", soft_wrap=True
        )
    if any(one.errors for one in found.layers):
        console.print(report.errors(found))
    if options.budget:
        console.print(report.budgets(found))
        for line in report.lines(advised):
            console.print(line, soft_wrap=True)
    about = {"workdir": str(options.workdir), "step": step, "task": task.name, "source": task.source,
             "examples": count, "mean_tokens": found.length, "ranks": "estimates from a sketch",
             "drawn": {"example": example.number, "texts": example.texts}}  # fmt: skip
    title = f"{options.workdir}, step {step}\n{count} test examples of {task.name}, {report.lengths(found)}"
    longest = f"how much each token of example {example.number} is read; none of the others is longer"
    with writing(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "inspect.png": plots.overview(found, title),
        "attention.png": reading.attention(found, example, f"{title}\n{longest}"),
    }
    write_bytes(options.out / "inspect.json", report.to_json(found, advised, about).encode())
    written = ["inspect.json"]
    for name, picture in pictures.items():
        if picture is not None:
            write_bytes(options.out / name, picture)
            written.append(name)
    console.print(f"wrote {', '.join(str(options.out / name) for name in written)}", soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    return answered(lambda: inspect(options, console))


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(lambda: main(sys.argv[1:]), smaller="fewer --examples")


if __name__ == "__main__":
    command()
