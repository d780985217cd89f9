"""Compresses a trained model.

python -m efficient_tx.compress --workdir=RUN --method=NAME[+eora] --budget=0.5 --out=RUN2 [--tune=STEPS]

The result is the workdir of a run: eval.py evaluates it, `train.py --config.init_from=RUN2` and --tune=STEPS go on from
it, and it can be compressed again. The budget is the share that the layers which the method touches may keep, of bytes
or of another --unit. A method may have options: --method="low_rank(rank=8)". The same command goes on after a stop.
Exit status: as train.py.
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
import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from efficient_tx import train
from efficient_tx.checks import OptionError
from efficient_tx.compression import METHODS, Compressed, compress
from efficient_tx.compression.budget import check_budget
from efficient_tx.compression.cost import UNITS
from efficient_tx.compression.method import Change
from efficient_tx.compression.model import select
from efficient_tx.config import trust
from efficient_tx.config.build import build_model, build_stages, build_task
from efficient_tx.config.check import check
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.flags import TRUST, Run
from efficient_tx.config.keys import assign, parse
from efficient_tx.config.methods import named_method
from efficient_tx.config.schema import with_dense_weights
from efficient_tx.config.stored import restore, to_store
from efficient_tx.config.structure import entry, in_config
from efficient_tx.data.batching import check_examples, train_batches
from efficient_tx.files import local_path
from efficient_tx.linear.replacement import dotted
from efficient_tx.task import Batch, Objective, Task, data_directory
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.disk import read_checked, write_checked, writing
from efficient_tx.training.errors import Refused, refusing
from efficient_tx.training.evaluation import trained_parameters
from efficient_tx.training.objective import objective_of
from efficient_tx.training.step import init_state, score
from efficient_tx.training.workdir import Workdir, read_config

# What a compression was asked for and did, in its workdir.
RECORD = "compression.json"


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line; a mistake ends in one line and exit status 2."""

    def setting(text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, as optimizer.learning_rate=1e-4")
        return key, value

    parser = commands.Parser(
        prog="python -m efficient_tx.compress",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="methods, after which +eora may stand:\n" + "\n".join(f"  {line}" for line in described()),
    )
    add = parser.add_argument
    add("--workdir", required=True, type=local_path, help="the run to compress; it is only read")
    add("--method", required=True, help="one of those below, with options in parentheses")
    add("--budget", required=True, type=float, help="share of the cost that may stay, above 0 and at most 1")
    add("--out", required=True, type=local_path, help="workdir of the result, a new folder")
    add("--unit", default="bytes", choices=UNITS, help="of the budget; milliseconds are measured here; default bytes")
    add("--where", default="mlp|projections", metavar="PATTERN",
        help="layers: mlp, projections, or a regular expression in their paths; default mlp|projections")  # fmt: skip
    add("--calibration", type=int, default=256, metavar="N", help="training examples for statistics; default 256")
    add("--draw", type=int, default=0, metavar="SEED", help="which training examples these are; default 0")
    add("--tune", type=int, default=0, metavar="STEPS", help="steps of training afterwards; default 0")
    add("--checkpoint", default="best", help="of the run: best (on validation), last, or a step")
    add("--set", action="extend", nargs="+", default=[], type=setting, metavar="KEY=VALUE", dest="settings",
        help="keys of the config of the result, as optimizer.learning_rate=1e-4")  # fmt: skip
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    options = parser.parse_args(arguments)
    for name, least in {"calibration": 1, "draw": 0, "tune": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name}={getattr(options, name)}: must be at least {least}")
    try:
        check_budget(options.budget)
        named_method(options.method)
    except OptionError as error:
        parser.error(f"--{error.option}={error.value}: {error.rule}")
    options.settings = dict(options.settings)
    return options


def described() -> Iterator[str]:
    """A line on each method."""
    for name in METHODS:
        method = named_method(name)
        needs = "calibration" if method.needs else "no data"
        yield f"{name:21s} {method.computes}; {needs}" + (f" ({method.paper})" if method.paper else "")


class Result:
    """The workdir of a compression: the run that goes on from the compressed model."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.path = options, options.out
        keys = ("method", "budget", "unit", "where", "calibration", "draw", "tune", "checkpoint", "settings")
        self.asked = {"workdir": str(options.workdir.absolute())} | {key: getattr(options, key) for key in keys}

    def stored(self) -> dict[str, Any] | None:
        """What an earlier call recorded here; None if there is nothing.

        Raises:
          Refused: the folder holds something else, or the compression of another call.
        """
        if not self.path.exists():
            return None
        try:
            record = read_checked(self.path / RECORD)
        except FileNotFoundError:
            if {entry.name for entry in self.path.iterdir()} <= {"lock"}:
                return None
            raise Refused(f"{self.path} holds something else: name a new folder", option="out") from None
        except (OSError, ValueError) as error:
            raise Refused(f"{self.path / RECORD} {error}: use a new folder", option="out") from None
        asked = record.get("asked", {})
        if different := [key for key in self.asked if asked.get(key) != self.asked[key]]:
            there, here = (values.get(different[0]) for values in (asked, self.asked))
            what = f"{different[0]} was {there!r} there and is {here!r} here"
            raise Refused(f"{self.path} has the result of another call: {what}; use a new folder", option="out")
        return record


def load(options: argparse.Namespace) -> tuple[ConfigDict, Task, nnx.Module, int]:
    """The run to compress: its config, whose layers are those of the checkpoint; its task, its model and the step."""
    path = str(options.workdir)
    with refusing(path):
        config = restore(read_config(path))
        with config.unlocked():
            config.remat = False
        task = build_task(config)
        stages, _ = build_stages(config, nnx.eval_shape(lambda: build_model(config, task)), objective_of(task))
    step, stage, parameters = trained_parameters(path, options.checkpoint, stages, print)
    model = nnx.merge(nnx.split(stage.model)[0], parameters)
    return with_dense_weights(config) if stage.start else config, task, model, step


def calibration(task: Task, options: argparse.Namespace, batch_size: int) -> Sequence[Batch]:
    """The batches of calibration, from examples of the training split as they are, without augmentation."""
    size = min(batch_size, options.calibration, len(task.train))
    batches = train_batches(dataclasses.replace(task, augment=None), batch_size=size, seed=options.draw)
    return [batches[i] for i in range(math.ceil(min(options.calibration, len(task.train)) / size))]


def mean_loss(objective: Objective, model: nnx.Module, batch: Batch) -> jax.Array:
    """The loss that training minimises, of a batch without dropout."""
    total, weight = score(model, batch, None, objective)["loss"]
    return total / jnp.where(weight > 0, weight, 1)


def result_config(config: ConfigDict, entries: dict[str, dict], options: argparse.Namespace) -> ConfigDict:
    """The config of the result: that of the run, with the structure, `--tune` steps and the values of `--set`.

    Raises:
      ConfigError: of a key that `--set` names.
    """
    new = copy.deepcopy(config)
    with new.unlocked():
        new.structure = in_config({**to_store(config)["structure"], **entries})
    new.steps, new.init_from, new.densify_at = options.tune, None, None
    new.optimizer.warmup = min(config.optimizer.warmup, options.tune // 10)
    for key, text in options.settings.items():
        assign(new, key, parse(new, key, text))
    check(new)
    return new


def compressed(options: argparse.Namespace, result: Result, console: Console) -> tuple[ConfigDict, Task]:
    """Compresses, and writes the result as the workdir of a run at step 0."""
    config, task, model, step = load(options)
    method = named_method(options.method)
    with refusing(str(options.workdir)):
        check_examples(task)
        batches = calibration(task, options, config.batch_size) if method.needs else []
    steps = method.steps(len(batches), len(select_or_refuse(model, options.where)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        work = bar.add_task("", total=steps)
        try:
            done = compress(
                model, method, options.budget, where=options.where, unit=options.unit, batches=batches,
                loss=partial(mean_loss, objective_of(task)),
                progress=lambda what: bar.update(work, description=what, advance=1),
            )  # fmt: skip
        except OptionError as error:
            raise Refused(f"{error.value}: {error.rule}", option=error.option) from None
        except ValueError as error:
            raise Refused(str(error)) from None
    entries = {dotted(change.path): entry(change.form) for change in done.changes}
    entries |= {dotted(path): {"heads": heads} for path, heads in done.heads.items()}
    try:
        new = result_config(config, entries, options)
    except ConfigError as error:
        raise Refused(f"{error.key}={options.settings.get(error.key)}: {error}", option="set") from None
    console.print(table(done.changes, done.before, done.after, options.unit))
    workdir = Workdir(result.path, to_store(new))
    workdir.claim()
    with writing(result.path):
        result.path.mkdir(parents=True, exist_ok=True)
    # First of all, so that the same command knows this folder again.
    write_checked(result.path / RECORD, record(result.asked, done, step))
    workdir.begin()
    stages, _ = build_stages(new, model, objective_of(task))
    checkpoints = Checkpoints(result.path / "checkpoints")
    checkpoints.open()
    checkpoints.save(0, init_state(model, stages[0].optimizer, objective_of(task)))
    workdir.release()
    return new, task


def select_or_refuse(model: nnx.Module, where: str) -> Sequence:
    """The selected layers; nothing selected is refused."""
    with refusing():
        return select(model, where)


def record(asked: dict[str, Any], done: Compressed, step: int) -> dict[str, Any]:
    """compression.json: what was asked for, costs, and errors by layer."""
    layers = {
        dotted(change.path): {"error": change.error} | ({change.theory[0]: change.theory[1]} if change.theory else {})
        for change in done.changes
    }
    costs = {"before": done.before, "after": done.after, "share": done.after / done.before}
    return {"asked": asked, "step": step, **costs, "layers": layers}


def table(changes: Sequence[Change], before: float, after: float, unit: str) -> Table:
    """Layer, new form and error; the last row the cost of all of them."""
    result = Table(title=f"{len(changes)} layers: {before:,.4g} {unit} become {after:,.4g} ({after / before:.1%})")
    for name in ("layer", "becomes", "sizes", "error", "theory"):
        result.add_column(name, justify="left" if name in ("layer", "becomes") else "right")
    for change in changes:
        form = change.form
        theory = f"{change.theory[0]} {change.theory[1]:.4f}" if change.theory else ""
        becomes = str(form.form)
        sizes = f"{form.in_features} × {form.out_features}"
        result.add_row(dotted(change.path), becomes, sizes, f"{change.error:.4f}", theory)
    return result


def run(options: argparse.Namespace) -> None:
    """Compresses, unless that is done, and then trains and evaluates as train.py does."""
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    result = Result(options)
    known = result.stored()
    with refusing(str(options.workdir)):
        first = restore(read_config(options.workdir))
        keep_programs(data_directory(first.task.get("data_dir")) / "compilation")
    if known is not None and Checkpoints(result.path / "checkpoints").steps():
        with refusing(str(result.path)):
            config = restore(read_config(result.path))
    else:
        config, _ = compressed(options, result, console)
    train.proceed(Run(config, sorted({"structure", "steps", *options.settings}), ()), result.path)


def main(arguments: list[str]) -> int:
    options = parse_flags(arguments)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    return train.concluded(lambda: run(options), "compress")


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(
        lambda: main(sys.argv[1:]), prints=False, smaller="a smaller --calibration, or --where with fewer layers"
    )


if __name__ == "__main__":
    command()
