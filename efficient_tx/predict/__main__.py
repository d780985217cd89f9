"""Ranks methods before they are trained, from the first steps of their runs, and says how far to trust that.

python -m efficient_tx.predict --config=lra_listops --mixers=softmax,skyformer,gla --budget=0.01 --out=predicted.json
python -m efficient_tx.predict --score runs/sweep1 runs/sweep2 --out=known.json
python -m efficient_tx.predict --config=lra_text --mixers=softmax,linear --known=known.json

Each method takes a share of its steps, with the schedule, batches and keys of the whole run. What is measured then and
before is weighed as it told the order of finished runs of other tasks: of those that come with the package, or of
--known. With --score the methods are those of finished runs, and the table shows how well each measure tells their
final order, next to the number of parameters and the score seen last, which need no predictor. Lists are split at
semicolons if they have any, else at commas. Exit status: 0; 2 refused.
"""

import os

# Set before jax is imported: its CPU solvers run in OpenBLAS, whose threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx import commands

if __name__ == "__main__":
    commands.leave_quietly()

from efficient_tx.extras import require

require("train", "grain", "matplotlib", "ml_collections", "orbax", "rich")
require("data", "scipy")

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from efficient_tx.checks import OptionError
from efficient_tx.compare.flags import path
from efficient_tx.compare.progress import progress
from efficient_tx.config import trust
from efficient_tx.config.build import build_task, share_cores
from efficient_tx.config.flags import OVERRIDE, TRUST, answered
from efficient_tx.config.stored import restore
from efficient_tx.data.batching import check_examples
from efficient_tx.predict import records
from efficient_tx.predict.measures import MEASURES, TRIVIAL, measure
from efficient_tx.predict.ranking import Known, learn, places, scored
from efficient_tx.report.runs import Method, find, problems
from efficient_tx.sweep.plan import Grid, check_runs, methods_of
from efficient_tx.task import data_directory
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.errors import refusing
from efficient_tx.training.step import check_batch_size
from efficient_tx.training.workdir import read_config


class Candidate(NamedTuple):
    """A method to measure.

    Attributes:
      task: for people, the same for methods that are compared.
      final: its score at the end, more is better; None if nobody knows.
    """

    task: str
    method: str
    config: ConfigDict
    final: float | None = None


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share of the steps, above 0 and at most 1")
    return number


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and --config.KEY=VALUE; a mistake ends in one line and exit status 2."""
    parser = commands.Parser.of("predict", __doc__)
    add = parser.add_argument
    add("--config", help="the path of a config file, or a shipped config's name")
    add("--config.KEY", metavar="VALUE", dest="constant", help="a value for all methods, as of train.py")
    add("--mixers", type=commands.parts, metavar="A,B", help="token mixers, or patterns: 'gla*3,softmax;softmax'")
    add("--linears", type=commands.parts, metavar="C,D", help="weight structures: dense,monarch,monarch+low_rank")
    add("--score", nargs="+", type=path, metavar="DIR",
        help="in place of --config: folders of finished runs, as of sweeps, whose order is known")  # fmt: skip
    add("--budget", type=share, default=0.01, help="share of a run's steps to take; default 0.01")
    add("--known", nargs="+", type=path, metavar="FILE",
        help="what --score has written, to learn from in place of what comes with the package")  # fmt: skip
    add("--out", type=path, metavar="FILE", help="the numbers, as JSON; a second call measures what is missing")
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    constants = [argument for argument in argv if OVERRIDE.fullmatch(argument)]
    options = parser.parse_args([argument for argument in argv if argument not in constants])
    if (options.config is None) == (options.score is None):
        parser.error("--config says what to rank, --score what to learn from: use one of them")
    if options.score and (constants or options.mixers or options.linears or options.known):
        parser.error("--score takes the configs of its runs: leave out --config.KEY, --mixers, --linears and --known")
    if options.out and options.out.suffix != ".json":
        parser.error(f"--out={options.out}: it is written as JSON: end its name in .json")
    if options.out and not options.out.absolute().parent.is_dir():
        parser.error(f"--out={options.out}: there is no folder {options.out.parent}")
    return options, constants


def asked(options: argparse.Namespace, constants: Sequence[str]) -> list[Candidate]:
    """The methods of --config."""
    name, methods = methods_of(options.config, options.mixers, options.linears)
    grid = Grid(name, methods, {}, {}, constants, Path(), options.trust)
    runs = [grid.run(cell, {}, 0, "run") for cell in grid.cells()]
    check_runs(runs)
    for run in runs:
        if run.config.init_from:
            raise OptionError("config.init_from", run.config.init_from, "the models here start from new parameters")
    return [Candidate(name, str(run.cell.method), run.config) for run in runs]


def finished(folders: Sequence[Path]) -> Iterator[Candidate]:
    """The methods of finished runs, of tasks with enough of them."""

    def warn(line: str) -> None:
        print(line, file=sys.stderr)

    for folder in folders:
        if not folder.is_dir():
            raise OptionError("score", str(folder), "it is no folder of runs")
    for problem in problems(find(folders, warn), warn):
        sign = 1 if problem.higher_is_better else -1
        methods = [method for method in problem.methods if method.finished and not begun(method)]
        if len(methods) < records.LEAST:
            warn(f"{problem.title}: it has {len(methods)} finished methods, and needs {records.LEAST}: it is left out")
            continue
        for method in methods:
            with refusing(str(method.runs[0].path)):
                config = restore(read_config(method.finished[0].path))
            yield Candidate(problem.title, method.label, config, sign * statistics.fmean(method.scores("test")))


def begun(method: Method) -> bool:
    """Whether its runs began with the parameters of others, as compressed ones do: new ones learn otherwise."""
    return bool(method.config.get("init_from")) or any(key.startswith("structure.") for key in method.config)


def measured(
    candidates: Sequence[Candidate], options: argparse.Namespace, say: Callable[[str], None]
) -> list[records.Row]:
    """The rows of the candidates; those that --out has are not measured again."""
    before = {}
    if options.out and options.out.exists():
        before = {row.get("id"): row for row in records.read(options.out, "out")}
    rows: list[records.Row] = []
    tasks: dict[str, Any] = {}
    keys = [records.identity(candidate.config, options.budget) for candidate in candidates]
    if new := [candidate.config for key, candidate in zip(keys, candidates) if key not in before]:
        share_cores(*new)
    for key, candidate in zip(keys, candidates):
        about = {"id": key, "budget": options.budget, "task": candidate.task, "method": candidate.method,
                 "final": candidate.final}  # fmt: skip
        found = before.get(key)
        if found is None:
            config = candidate.config
            check_batch_size(config.batch_size, devices=jax.device_count(), grad_accum=config.grad_accum)
            if (options_of := str(config.task)) not in tasks:
                tasks = {options_of: build_task(config)}  # one at a time is in memory
                check_examples(tasks[options_of])
            found = measure(config, tasks[options_of], options.budget,
                            lambda line, method=candidate.method: say(f"{method}: {line}"))  # fmt: skip
        rows.append({**found, **about})
        if options.out:
            known = found.get("final") is not None and candidate.final is None
            before[key] = found if known else rows[-1]  # what others learn from stays
            records.save(options.out, [*before.values()])
    return rows


def order(rows: Sequence[records.Row], tasks: Sequence[Known]) -> Table:
    """The methods, the likely best first."""
    found = places(learn(tasks), rows)
    made = Table(title="likely order at the end of the runs, of 90 % of draws the ranks")
    made.add_column("method", overflow="fold")
    for head in ("rank", "90 %", "seen", "loss seen", "at the end", "90 %", "parameters", "s a step"):
        made.add_column(head, justify="right")

    def number(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None else format(value, form)

    for at in sorted(range(len(rows)), key=lambda i: found[i].rank):
        row, place = rows[at], found[at]
        interval = f"{number(row.get('low'))} to {number(row.get('high'))}" if row.get("low") is not None else "–"
        made.add_row(
            row["method"], f"{place.rank:.1f}", f"{place.low} to {place.high}", number(row["seen"]),
            number(row["validation_loss"]), number(row["extrapolated"]), interval, f"{row['parameters']:,}",
            number(row.get("seconds"), ".3g"),
        )  # fmt: skip
    return made


def scores(tasks: Sequence[Known]) -> Table:
    """How well each measure tells the order, by task."""
    made = Table(title="Spearman's correlation with the final order")
    made.add_column("by", overflow="fold")
    for task in tasks:
        made.add_column(f"{task.task}: {len(task.methods)} methods", justify="right", overflow="fold")
    made.add_column("mean", justify="right")
    words = {"all": "all of these, weighed on the other tasks"} | {name: one.words for name, one in MEASURES.items()}
    for name, found in scored(tasks).items():
        there = [x for x in found if x is not None]
        mean = f"{statistics.fmean(there):.2f}" if there else "–"
        trivial = " (needs no predictor)" if name in TRIVIAL else ""
        made.add_row(words[name] + trivial, *("–" if x is None else f"{x:.2f}" for x in found), mean)
    return made


def trusted(tasks: Sequence[Known], budget: float) -> list[str]:
    """What the predictor was learnt from, and how it did on what it was not; `budget` is that of the methods here."""
    if not tasks:
        return ["nothing is known of finished runs: all measures count alike"]
    count = sum(len(task.methods) for task in tasks)
    lines = [f"learnt from {count} methods of {len(tasks)} tasks: {'; '.join(task.task for task in tasks)}"]
    found = {name: [x for x in column if x is not None] for name, column in scored(tasks).items()}
    if len(tasks) > 1 and found["all"]:
        by = [f"by {name.replace('_', ' ')} {statistics.fmean(found[name]):.2f}" for name in TRIVIAL if found[name]]
        said = f"{statistics.fmean(found['all']):.2f} ({min(found['all']):.2f} to {max(found['all']):.2f})"
        lines.append(
            f"on a task left out of the learning, Spearman's correlation with the final order was {said}; "
            f"{', '.join(by)}; on one task a guess has 0 ± {(count / len(tasks) - 1) ** -0.5:.2f}"
        )
    shares = sorted({row["budget"] for task in tasks for row in task.measures})
    if shares != [budget]:
        lines.append(
            f"these were measured after {' and '.join(f'{share:.4g}' for share in shares)} of the steps, the methods "
            f"here after {budget:.4g}: how much each measure counts, and that correlation, are of the former"
        )
    return lines


def repeated(rows: Sequence[records.Row]) -> list[str]:
    """A line on each function that several methods of a task are."""
    return [
        f"{', '.join(row['method'] for row in alike)} are one function on {task}"
        for task in dict.fromkeys(row["task"] for row in rows)
        for alike in records.functions(row for row in rows if row["task"] == task)
        if len(alike) > 1
    ]


def predict(options: argparse.Namespace, constants: Sequence[str]) -> None:
    candidates = list(finished(options.score)) if options.score else asked(options, constants)
    if len(candidates) < 2:
        what = "--score: there are no finished runs to learn from" if options.score else "--mixers: name two or more"
        raise ValueError(f"{what}: there is no order to tell")
    files = options.known or [records.SHIPPED]
    found = [] if options.score else [row for file in files for row in records.read(file, "known")]
    tasks = records.known(found, options.budget)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False)
    keep_programs(data_directory() / "compilation")
    with progress(console) as say:
        rows = measured(candidates, options, say)
    for row in rows:
        if row.get("fault"):
            console.print(f"{row['method']}: {row['fault']}", soft_wrap=True)
    if options.score:
        tasks = records.known(rows, options.budget)
        console.print(scores(tasks))
        for line in repeated(rows):
            console.print(f"{line}, and count once", soft_wrap=True)
        for task in tasks:
            guess = (len(task.methods) - 1) ** -0.5
            console.print(f"{task.task}: a guess has 0 ± {guess:.2f}", soft_wrap=True)
    else:
        console.print(order(rows, tasks))
        for line in repeated(rows):
            console.print(line, soft_wrap=True)
        for line in trusted(tasks, options.budget):
            console.print(line, soft_wrap=True)
    if options.out:
        console.print(f"wrote {options.out}", soft_wrap=True)


def main(argv: Sequence[str]) -> int:
    options, constants = parse(argv)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    return answered(lambda: predict(options, constants))


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(lambda: main(sys.argv[1:]), smaller="a smaller batch_size, or more of grad_accum")


if __name__ == "__main__":
    command()
