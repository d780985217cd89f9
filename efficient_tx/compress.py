"""Compresses a trained model, or swaps its mixers.

python -m efficient_tx.compress --workdir=RUN --method=NAME[+eora] --budget=0.5 --out=RUN2 [--tune=STEPS]
python -m efficient_tx.compress --workdir=RUN --mixers=softmax,lev --distill=300 --out=RUN2 [--set KEY=VALUE]

The result is the workdir of a run: eval.py evaluates it, `train.py --config.init_from=RUN2` and --tune=STEPS go on from
it, and it can be compressed again. The budget is the share that the layers which the method touches may keep, of bytes
or of another --unit. A method may have options: --method="low_rank(rank=8)".

Other mixers take over the parameters that both have. With --distill=STEPS the result learns the outputs of the run's
blocks, in the first half of the steps each block on the run's own inputs, then all together and the logits as well.
With --method and --mixers, the mixers are swapped first: to compress what was distilled, compress the result again.

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
import copy
import dataclasses
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
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
from efficient_tx.compression.distillation import variances
from efficient_tx.compression.method import Change
from efficient_tx.compression.model import select
from efficient_tx.compression.swapping import Swapped, mixer_places, swap
from efficient_tx.config import trust
from efficient_tx.config.build import build_model, build_stages, build_task
from efficient_tx.config.check import check
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.flags import TRUST, Run
from efficient_tx.config.keys import assign, parse
from efficient_tx.config.methods import named_method
from efficient_tx.config.names import parse_mixers
from efficient_tx.config.schema import complete, with_dense_weights
from efficient_tx.config.stored import restore, to_store, workdir_of
from efficient_tx.config.structure import entries, entry, fitting, in_config
from efficient_tx.data.batching import check_examples, train_batches
from efficient_tx.distillation import Distillation, begin
from efficient_tx.files import local_path
from efficient_tx.linear.replacement import dotted, transfer
from efficient_tx.task import Batch, Objective, Task, data_directory
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.disk import read_checked, write_checked, writing
from efficient_tx.training.errors import Refused, refusing
from efficient_tx.training.evaluation import trained_parameters
from efficient_tx.training.objective import objective_of
from efficient_tx.training.step import check_batch_size, score
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
    add("--method", help="one of those below, with options in parentheses")
    add("--budget", type=float, help="share of the cost that may stay, above 0 and at most 1")
    add("--mixers", metavar="PATTERN", help='other mixers of the layers, repeated to depth: "softmax*3,lev*3"')
    add("--out", required=True, type=local_path, help="workdir of the result, a new folder")
    add("--unit", default="bytes", choices=UNITS, help="of the budget; milliseconds are measured here; default bytes")
    add("--where", default="mlp|projections", metavar="PATTERN",
        help="layers: mlp, projections, or a regular expression in their paths; default mlp|projections")  # fmt: skip
    add("--calibration", type=int, default=256, metavar="N", help="training examples for statistics; default 256")
    add("--draw", type=int, default=0, metavar="SEED", help="which training examples these are; default 0")
    add("--distill", type=int, default=0, metavar="STEPS", help="steps of learning from the run; default 0")
    add("--tune", type=int, default=0, metavar="STEPS", help="steps of training afterwards; default 0")
    add("--checkpoint", default="best", help="of the run: best (on validation), last, or a step")
    add("--set", action="extend", nargs="+", default=[], type=setting, metavar="KEY=VALUE", dest="settings",
        help="keys of the config of the result, as optimizer.learning_rate=1e-4")  # fmt: skip
    add("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    options = parser.parse_args(arguments)
    for name, least in {"calibration": 1, "draw": 0, "distill": 0, "tune": 0}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name}={getattr(options, name)}: must be at least {least}")
    if options.method is None and options.mixers is None:
        parser.error("--method is missing: name one of those that --help shows, or other --mixers")
    for one, other in (("method", "budget"), ("budget", "method")):
        if getattr(options, one) is None and getattr(options, other) is not None:
            parser.error(f"--{one} is missing: --{other}={getattr(options, other)} needs it")
    try:
        if options.method is not None:
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
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.distillation = Distillation(self.path / "distill", options.distill)
        self.asked = {"workdir": str(options.workdir.absolute())}
        self.asked |= {key: value for key, value in vars(options).items() if key not in ("workdir", "out", "trust")}

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


def load(workdir: Path, checkpoint: str) -> tuple[ConfigDict, Task, nnx.Module, int]:
    """The run to compress: its config, whose layers are those of the checkpoint; its task, its model and the step."""
    path = str(workdir)
    with refusing(path):
        config = restore(read_config(path))
        with config.unlocked():
            config.remat = False
        task = build_task(config)
        stages, _ = build_stages(config, nnx.eval_shape(lambda: build_model(config, task)), objective_of(task))
    step, stage, parameters = trained_parameters(path, checkpoint, stages, print)
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


def result_config(config: ConfigDict, task: Task, options: argparse.Namespace) -> ConfigDict:
    """The config of the result: that of the run, with other mixers, `--tune` steps and the values of `--set`.

    Raises:
      Refused: a key that `--set` names, or mixers that cannot be; the line names the flag.
    """
    new = copy.deepcopy(config)
    new.steps, new.init_from, new.densify_at = options.tune, None, None
    new.optimizer.warmup = min(config.optimizer.warmup, options.tune // 10)
    try:
        if options.mixers is not None:
            new.mixers = options.mixers
            new = complete(new)
        for key, text in options.settings.items():
            assign(new, key, parse(new, key, text))
        if options.mixers is not None:
            structure = entries(new)
            with new.unlocked():
                new.structure = ConfigDict()
                new.structure = in_config(fitting(structure, nnx.eval_shape(lambda: build_model(new, task))))
        check(new)
    except (ConfigError, TypeError) as error:
        # A TypeError is that of a call, of parameters whose sizes do not fit each other.
        key, line = getattr(error, "key", None), str(error).partition("\n")[0]
        if key in options.settings:
            raise Refused(f"{key}={options.settings[key]}: {line}", option="set") from None
        swap_to = f"{options.mixers}: " if options.mixers else ""
        raise Refused(swap_to + line, option="mixers" if swap_to else None) from None
    return new


def swapped(model: nnx.Module, new: ConfigDict, task: Task) -> tuple[nnx.Module, Swapped]:
    """The model of the config `new`, with the parameters that `model` has as well; and what became of the mixers'."""
    named, places = len(parse_mixers(new.mixers)), mixer_places(model)
    if places % named:
        rule = f"it names {named} mixers for {places} places: name {places}, or a number that divides it"
        raise Refused(f"{new.mixers}: {rule}", option="mixers")
    target = build_model(new, task)
    try:
        return target, swap(model, target)
    except ValueError as error:
        raise Refused(f"{new.mixers}: {error}", option="mixers") from None


def compressed(options: argparse.Namespace, result: Result, console: Console) -> None:
    """Swaps mixers and compresses; writes the result as the workdir of a run at step 0, or of its distillation."""
    config, task, model, step = load(options.workdir, options.checkpoint)
    with refusing(str(options.workdir)):
        check_examples(task)
    new = result_config(config, task, options)
    if options.distill:
        with refusing():
            check_batch_size(new.batch_size, devices=jax.device_count(), grad_accum=new.grad_accum)
    lines: list[str | Table] = []
    about: dict[str, Any] = {"asked": result.asked, "step": step}
    if options.mixers is not None:
        model, became = swapped(model, new, task)
        lines += [f"mixers {config.mixers} become {new.mixers}: {became}"]
        about["mixers"] = {name: [dotted(path) for path in paths] for name, paths in became._asdict().items()}
    if options.method is not None:
        done = by_method(model, task, new.batch_size, options, console)
        changed = {dotted(change.path): entry(change.form) for change in done.changes}
        changed |= {dotted(path): {"heads": heads} for path, heads in done.heads.items()}
        with new.unlocked():
            new.structure = in_config({**entries(new), **changed})
        check(new)
        lines.append(table(done.changes, done.before, done.after, options.unit))
        about |= record(done)
    try:
        transfer(model, build_model(new, task))
    except ValueError as error:
        asked = " ".join(f"{key}={text}" for key, text in options.settings.items())
        raise Refused(f"{asked}: the model has other sizes, {error}", option="set") from None
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str))
    workdir = Workdir(result.path, to_store(new))
    workdir.claim()
    with writing(result.path):
        result.path.mkdir(parents=True, exist_ok=True)
    # First of all, so that the same command knows this folder again.
    write_checked(result.path / RECORD, about)
    workdir.begin()
    if options.distill:
        result.distillation.begin(new, model)
    else:
        begin(result.checkpoints, new, model, objective_of(task))
    workdir.release()


def by_method(
    model: nnx.Module, task: Task, batch_size: int, options: argparse.Namespace, console: Console
) -> Compressed:  # fmt: skip
    """Compresses a model in place, by `--method`, with a progress bar."""
    method = named_method(options.method)
    with refusing(str(options.workdir)):
        batches = calibration(task, options, batch_size) if method.needs else []
    steps = method.steps(len(batches), len(select_or_refuse(model, options.where)))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        work = bar.add_task("", total=steps)
        try:
            return compress(
                model, method, options.budget, where=options.where, unit=options.unit, batches=batches,
                loss=partial(mean_loss, objective_of(task)),
                progress=lambda what: bar.update(work, description=what, advance=1),
            )  # fmt: skip
        except OptionError as error:
            raise Refused(f"{error.value}: {error.rule}", option=error.option) from None
        except ValueError as error:
            raise Refused(str(error)) from None


def distilled(options: argparse.Namespace, result: Result) -> None:
    """Distills the result from the run, and writes it as the workdir of a run at step 0."""
    step = str(result.stored()["step"])  # the best one of a run that goes on may be another by now
    _, task, teacher, _ = load(options.workdir, step)
    with refusing(str(result.path)):
        config = restore(read_config(result.path))
        own_task = build_task(config)
    with refusing(str(options.workdir)):
        spread = variances(teacher, calibration(task, options, config.batch_size))
    workdir = Workdir(result.path, to_store(config))
    workdir.claim()
    model = result.distillation.run(config, own_task, teacher, spread, title=f"{result.path.name}: {config.mixers}")
    begin(result.checkpoints, config, model, objective_of(own_task))
    workdir.release()


def select_or_refuse(model: nnx.Module, where: str) -> Sequence:
    """The selected layers; nothing selected is refused."""
    with refusing():
        return select(model, where)


def record(done: Compressed) -> dict[str, Any]:
    """What compression.json has on a method: costs, and errors by layer."""
    layers = {
        dotted(change.path): {"error": change.error} | ({change.theory[0]: change.theory[1]} if change.theory else {})
        for change in done.changes
    }
    costs = {"before": done.before, "after": done.after, "share": done.after / done.before}
    return {**costs, "layers": layers}


def table(changes: Sequence[Change], before: float, after: float, unit: str) -> Table:
    """Layer, new form and error; the last row the cost of all of them."""
    digits = 3 if unit == "milliseconds" else 0
    become = f"{before:,.{digits}f} {unit} become {after:,.{digits}f} ({after / before:.1%})"
    result = Table(title=f"{len(changes)} layers: {become}")
    for name in ("layer", "becomes", "sizes", "error", "theory"):
        result.add_column(name, justify="left" if name in ("layer", "becomes") else "right")
    for change in changes:
        form = change.form
        theory = f"{change.theory[0]} {change.theory[1]:.4f}" if change.theory else ""
        becomes = str(form.form)
        sizes = f"{form.in_features} × {form.out_features}"
        result.add_row(dotted(change.path), becomes, sizes, f"{change.error:.4f}", theory)
    return result


def run(options: argparse.Namespace, console: Console) -> None:
    """Compresses and distills, unless that is done, and then trains and evaluates as train.py does.

    Raises:
      RunError: it cannot be done, in one line.
    """
    result = Result(options)
    known = result.stored()
    with refusing(str(options.workdir)):
        first = restore(read_config(options.workdir))
        keep_programs(data_directory(first.task.get("data_dir")) / "compilation")
    if known is None or not (result.checkpoints.steps() or result.distillation.checkpoints.steps()):
        compressed(options, result, console)
    if not result.checkpoints.steps():
        distilled(options, result)
    result.distillation.clear()
    with refusing(str(result.path)):
        config = restore(read_config(result.path))
    departures = sorted({"structure", "steps", *options.settings})
    train.proceed(Run(config, departures, ()), workdir_of(result.path, config, warn=print))


def main(arguments: list[str]) -> int:
    options = parse_flags(arguments)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    return train.concluded(lambda: run(options, console), "compress")


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    commands.run(
        lambda: main(sys.argv[1:]), prints=False, smaller="a smaller --calibration, or --where with fewer layers"
    )


if __name__ == "__main__":
    command()
