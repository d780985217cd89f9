"""Pipeline: swap mixers, compress, distill; then the result goes on as a run."""

import copy
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from efficient_tx import train
from efficient_tx.checks import OptionError
from efficient_tx.compare.progress import counted
from efficient_tx.compress.asked import Asked
from efficient_tx.compress.distillation import begin
from efficient_tx.compress.result import RECORD, Result, checksum, record, table
from efficient_tx.compress.source import calibration, mean_loss, too_few
from efficient_tx.compression import Compressed, compress
from efficient_tx.compression.distillation import variances
from efficient_tx.compression.model import select
from efficient_tx.compression.swapping import Swapped, mixer_places, swap
from efficient_tx.config.build import build_model, build_task, share_cores
from efficient_tx.config.check import check
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.flags import Run
from efficient_tx.config.keys import assign, parse
from efficient_tx.config.methods import named_method
from efficient_tx.config.names import parse_mixers
from efficient_tx.config.schema import complete
from efficient_tx.config.stored import restore, to_store, workdir_of
from efficient_tx.config.structure import entries, entry, fitting, in_config
from efficient_tx.config.trained import trained_run
from efficient_tx.data.batching import check_examples
from efficient_tx.files import clear
from efficient_tx.linear.replacement import dotted, transfer
from efficient_tx.task import Task, data_directory
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.disk import write_checked, writing
from efficient_tx.training.errors import Refused, refusing
from efficient_tx.training.objective import objective_of
from efficient_tx.training.step import check_batch_size
from efficient_tx.training.workdir import Workdir, read_config


def run(asked: Asked, console: Console) -> None:
    """Compresses and distills, unless that is done, and then trains and evaluates as train.py does.

    Raises:
      RunError: it cannot be done, in one line.
    """
    result = Result(asked)
    known = result.stored()
    with refusing(str(asked.workdir)):
        first = restore(read_config(asked.workdir))
        if not asked.settings.keys() & {"batch_size", "grad_accum"}:  # devices for the run might not divide it
            share_cores(first)
        keep_programs(data_directory(first.task.get("data_dir")) / "compilation")
    if known is None or not (result.checkpoints.steps() or result.distillation.checkpoints.steps()):
        compressed(asked, result, console)
    if not result.checkpoints.steps():
        distilled(asked, result)
    result.distillation.clear()
    with refusing(str(result.path)):
        config = restore(read_config(result.path))
    departures = sorted({"structure", "steps", *asked.settings})
    train.proceed(Run(config, departures, ()), workdir_of(result.path, config, warn=print))


# Keys of the result's config that no setting gives, and why.
GIVEN = {
    "steps": "is how long the result is tuned",
    "mixers": "is what the model is given",
    "init_from": "has no effect: the result begins with the compressed run",
}


class Impossible(Refused):
    """The method cannot make these layers as small as asked, or cannot change them."""

    @classmethod
    def by(cls, method: str, error: ValueError) -> "Impossible":
        """Of a method as typed; an option that it has is no flag of the command."""
        if isinstance(error, OptionError) and error.option != "budget":
            return cls(f"{method}: {error}", option="method")
        return cls.of(error)


class Opened(NamedTuple):
    """A run to compress: config, task, model and step, and the config of the result without `structure`."""

    config: ConfigDict
    task: Task
    model: nnx.Module
    step: int
    new: ConfigDict


def opened(asked: Asked) -> Opened:
    """The run to compress.

    Raises:
      Refused: what can be known before work begins: of the run, of `--set`, `--where` and of mixers.
    """
    config, task, model, step = trained_run(asked.workdir, asked.checkpoint)
    with refusing(str(asked.workdir)):
        check_examples(task)
    new = result_config(config, task, asked)
    with refusing():
        if asked.distill:
            check_batch_size(new.batch_size, devices=jax.device_count(), grad_accum=new.grad_accum)
        if asked.method is not None and asked.mixers is None:
            select(model, asked.where)
    if asked.mixers is None:
        check_sizes(model, new, task, asked)
    return Opened(config, task, model, step, new)


def check_sizes(model: nnx.Module, new: ConfigDict, task: Task, asked: Asked) -> None:
    """Raises Refused, which names `--set`, unless the config makes a model of these sizes."""
    try:
        transfer(model, nnx.eval_shape(lambda: build_model(new, task)))
    except ValueError as error:
        settings = " ".join(f"{key}={text}" for key, text in asked.settings.items())
        raise Refused(f"{settings}: the model has other sizes, {error}", option="set") from None


def compressed(asked: Asked, result: Result, console: Console) -> None:
    """Swaps mixers and compresses; writes the result as the workdir of a run at step 0, or of its distillation."""
    config, task, model, step, new = opened(asked)
    lines: list[str | Table] = []
    about: dict[str, Any] = {"asked": result.asked, "step": step, "parameters": checksum(model)}
    if asked.mixers is not None:
        model, became = swapped(model, new, task)
        lines += [f"mixers {config.mixers} become {new.mixers}: {became}"]
        about["mixers"] = {name: [dotted(path) for path in paths] for name, paths in became._asdict().items()}
    if asked.method is not None:
        done = by_method(model, task, new.batch_size, asked, console)
        changed = {dotted(change.path): entry(change.form) for change in done.changes}
        changed |= {dotted(path): {"heads": heads} for path, heads in done.heads.items()}
        with new.unlocked():
            new.structure = in_config({**entries(new), **changed})
        check(new)
        lines.append(table(done.changes, done.before, done.after, asked.unit))
        about |= record(done)
    check_sizes(model, new, task, asked)
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, str))
    workdir = Workdir(result.path, to_store(new))
    workdir.claim()
    with writing(result.path):
        result.path.mkdir(parents=True, exist_ok=True)
        clear(result.path, RECORD)
    # First of all, so that the same command knows this folder again.
    write_checked(result.path / RECORD, about)
    workdir.begin()
    if asked.distill:
        result.distillation.begin(new, model)
    else:
        begin(result.checkpoints, new, model, objective_of(task))
    workdir.release()


def result_config(config: ConfigDict, task: Task, asked: Asked) -> ConfigDict:
    """The config of the result: that of the run, with other mixers, `--tune` steps and the values of `--set`.

    Raises:
      Refused: a key that `--set` names, or mixers that cannot be; the line names the flag.
    """
    new = copy.deepcopy(config)
    new.steps, new.init_from, new.densify_at = asked.tune, None, None
    new.optimizer.warmup = min(config.optimizer.warmup, asked.tune // 10)
    try:
        if asked.mixers is not None:
            new.mixers = asked.mixers
            new = complete(new)
        for key, text in asked.settings.items():
            if key in GIVEN:
                raise ConfigError(key, GIVEN[key])
            assign(new, key, parse(new, key, text))
        if asked.mixers is not None:
            structure = entries(new)
            with new.unlocked():
                new.structure = ConfigDict()
                new.structure = in_config(fitting(structure, nnx.eval_shape(lambda: build_model(new, task))))
        check(new)
    except (ConfigError, TypeError) as error:
        # A TypeError is that of a call, of parameters whose sizes do not fit each other.
        key, line = getattr(error, "key", None), str(error).partition("\n")[0]
        if key in asked.settings:
            raise Refused(f"{key}={asked.settings[key]}: {line}", option="set") from None
        swap_to = f"{asked.mixers}: " if asked.mixers else ""
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


def by_method(
    model: nnx.Module, task: Task, batch_size: int, asked: Asked, console: Console
) -> Compressed:  # fmt: skip
    """Compresses a model in place, by `--method`, with a progress bar."""
    method = named_method(asked.method)
    with refusing(str(asked.workdir)):
        batches = calibration(task, asked, batch_size)
    if line := too_few(task, asked.calibration):
        console.print(line, soft_wrap=True)
    with refusing():
        steps = method.steps(len(batches), len(select(model, asked.where)))
    with counted(console) as bar:
        work = bar.add_task("", total=steps)
        try:
            return compress(
                model, method, asked.budget, where=asked.where, unit=asked.unit, batches=batches,
                loss=partial(mean_loss, objective_of(task)),
                progress=lambda what: bar.update(work, description=what, advance=1),
            )  # fmt: skip
        except ValueError as error:
            raise Impossible.by(asked.method, error) from None


def distilled(asked: Asked, result: Result) -> None:
    """Distills the result from the run, and writes it as the workdir of a run at step 0."""
    step = str(result.stored()["step"])  # the best one of a run that goes on may be another by now
    _, task, teacher, _ = trained_run(asked.workdir, step)
    with refusing(str(result.path)):
        config = restore(read_config(result.path))
        own_task = build_task(config)
    with refusing(str(asked.workdir)):
        spread = variances(teacher, calibration(task, asked, config.batch_size))
    workdir = Workdir(result.path, to_store(config))
    workdir.claim()
    model = result.distillation.run(config, own_task, teacher, spread, title=f"{result.path.name}: {config.mixers}")
    begin(result.checkpoints, config, model, objective_of(own_task))
    workdir.release()
