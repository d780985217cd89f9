"""Trains a model: python -m efficient_tx.train --config=NAME[:MIXERS+LINEAR] --workdir=FOLDER [--config.KEY=VALUE ...]

NAME is a shipped config or the path of a file. The same command resumes a run that was stopped or killed. Exit status:
0 finished; 2 refused; 3 the loss, a gradient or a parameter is not finite; 143, 130 or 129 stopped by SIGTERM, Ctrl-C
or a closed terminal (SIGHUP); 1 a file could not be written, or another process of the run was lost.
"""

import os

# Set before jax is imported: its CPU solvers run in OpenBLAS, whose threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from efficient_tx import commands

if __name__ == "__main__":
    commands.leave_quietly()

from efficient_tx.extras import require

require("train", "grain", "matplotlib", "ml_collections", "orbax", "rich")

import dataclasses
import functools
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from efficient_tx.config import flags as command_line
from efficient_tx.config import trust
from efficient_tx.config.build import build_model, build_stages, build_task, share_cores
from efficient_tx.config.check import check_objective
from efficient_tx.config.names import task_module
from efficient_tx.config.schema import with_dense_weights
from efficient_tx.config.stored import config_of_weights, restore, to_store, workdir_of
from efficient_tx.config.trained import model_of_weights, trained_model
from efficient_tx.data.batching import check_examples, evaluation_batches, train_batches
from efficient_tx.files import local_path
from efficient_tx.linear.replacement import dotted, relative_error, transfer
from efficient_tx.models.pretrained import is_published, load_pretrained
from efficient_tx.task import Task, data_directory
from efficient_tx.training import processes, summary
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.errors import NonFinite, Refused, RunError, not_finite, refusing
from efficient_tx.training.evaluation import make_evaluate, trained_parameters
from efficient_tx.training.history import History
from efficient_tx.training.identity import identity
from efficient_tx.training.loop import Loop, Plan
from efficient_tx.training.memory import check_memory
from efficient_tx.training.objective import objective_of
from efficient_tx.training.optimizer import evaluation_params, make_optimizer
from efficient_tx.training.profiler import Profiler
from efficient_tx.training.report import Report
from efficient_tx.training.step import check_batch_size
from efficient_tx.training.workdir import Workdir, read_config

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "folder of the run; the same command goes on in it", required=True)
flags.register_validator("workdir", bool, "--workdir is empty: name a folder")
flags.DEFINE_boolean("extend", False, "go on with a run that has ended, up to a larger number of steps")
flags.DEFINE_string("profile", None, "START:STOP: jax's profiler traces these steps into the workdir's profile/")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for a run over several processes")
flags.DEFINE_integer("num_processes", None, "how many processes the run has")
flags.DEFINE_integer("process_id", None, "which of them this is, from 0")
flags.DEFINE_integer("join_timeout", processes.JOIN_WITHIN, "seconds to wait until all have started", lower_bound=1)
flags.DEFINE_integer(
    "heartbeat_timeout", processes.LOST_AFTER, "seconds without a sign of life after which one is lost", lower_bound=1
)


def train(asked: command_line.Run, workdir: Workdir, profile: str | None) -> None:
    """Trains, from the newest checkpoint if there is one, and writes summary.json; `profile` as of the flag."""
    config, profiled = asked.config, steps_to_profile(profile, asked.config.steps)
    with refusing():
        check_batch_size(config.batch_size, devices=jax.device_count(), grad_accum=config.grad_accum)
        task = build_task(config)
        if jax.process_count() > 1:
            processes.agree(identity(to_store(config), task))
        objective = objective_of(task)
        check_memory(
            nnx.eval_shape(lambda: build_model(config, task)),
            task,
            features=config.model.features,
            batch_size=config.batch_size,
            grad_accum=config.grad_accum,
        )
        model = build_model(config, task)
        check_examples(task)
        check_objective(model, task)
        stages, schedule = build_stages(config, model, objective)
        terms = {
            "protocol": config.protocol,
            "protocol_departures": asked.departures,
            "versions": summary.versions(),
            "commit": summary.commit(),
            "device": summary.device(),
        }
    checkpoints = Checkpoints(workdir.path / "checkpoints")
    started = warm_start(model, task, config) if config.init_from and not checkpoints.steps() else []
    workdir.begin()

    rows = {
        "batch_size": config.batch_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    history = History(workdir.path / "metrics.jsonl", writer=workdir.writer)
    report = Report(
        workdir.path,
        history,
        steps=config.steps,
        batch_size=config.batch_size,
        config=workdir.config,
        loggers=config.loggers,
        title=f"{workdir.path.name}: {task.name}, {config.mixers}",
        objective=objective,
        baselines=task.baselines,
        active=workdir.writer,
    )
    count = summary.parameter_count(model)
    report.say(f"{task.name} ({task.source}): {len(task.train):,} training examples; model: {count:,} parameters")
    parts = summary.parameters_by_module(model).items()
    report.say("  " + "   ".join(f"{part} {number:,}" for part, number in parts))
    for line in started:
        report.say(line)
    loop = Loop(
        stages,
        schedule,
        batches=train_batches(task, seed=config.seed, **rows),
        validation=evaluation_batches(task.validation, task, **rows),
        plan=Plan(**{field.name: config[field.name] for field in dataclasses.fields(Plan)}),
        checkpoints=checkpoints,
        history=history,
        report=report,
        seed=config.seed,
        grad_accum=config.grad_accum,
        lengths=config.lengths,
        profiler=Profiler(workdir.path / "profile", *profiled) if workdir.writer else None,
    )
    state = loop.run()
    # All processes wait until the last checkpoint and line are on disk.
    multihost_utils.sync_global_devices("trained")

    test = evaluation_batches(task.test, task, **rows)
    last = loop.evaluate(evaluation_params(state.optimizer, state.params), test)
    best_step, stage, parameters = trained_parameters(workdir.path, "best", stages, report.say)
    evaluate = loop.evaluate if stage is stages[-1] else make_evaluate(nnx.split(stage.model)[0], objective)
    best = evaluate(parameters, test)
    metric = objective.best
    result = {
        "task": task.name,
        "source": task.source,
        "best_step": best_step,
        f"val_{metric}": next(line[metric] for line in history.of("validation") if line["step"] == best_step),
        f"test_{metric}": best.means[metric],
        f"last_test_{metric}": last.means[metric],
        "higher_is_better": objective.higher_is_better,
        "baselines": dict(task.baselines),
        "parameters": summary.parameter_count(stages[-1].model),
        "steps_per_second": summary.steps_per_second(history.of("train"), config.batch_size),
        "compile_seconds": loop.compile_seconds,
        **summary.peak_memory(),
        **({"extended_from": workdir.extended()} if workdir.extended() else {}),
        **terms,
    }
    if workdir.writer:
        workdir.verify()
        report.draw(last=True)
        report.summarise(config.steps, result)
        workdir.finish(result)
    for line in sentences(result, workdir.path):
        report.say(line)


def steps_to_profile(text: str | None, steps: int) -> tuple[int, ...]:
    """The first and the last step of "START:STOP"; nothing if it is None. Raises Refused."""
    if text is None:
        return ()
    parts = re.fullmatch(r"(\d+):(\d+)", text)
    start, stop = map(int, parts.groups()) if parts else (0, 0)
    if not 1 <= start <= stop <= steps:
        rule = f"give the first and the last step to trace, of 1 to {steps}, as 11:15 (a few: traces are large)"
        raise Refused(f"{text}: {rule}", option="profile")
    return start, stop


def sentences(result: Mapping[str, Any], path: Path) -> list[str]:
    """The lines that are printed at the end of a run, from its summary."""
    metric = summary.metric(result)
    baselines = ", ".join(f"{name} {value:.4f}" for name, value in result["baselines"].items())
    score, step = result[f"test_{metric}"], result["best_step"]
    evaluator, trusted = command_line.invoked("eval"), [f"--trust={name}" for name in trust.allowed()]
    return [
        f"test {metric} {score:.4f} (checkpoint of step {step}, best on validation)"
        + (f"; to beat: {baselines}" if baselines else ""),
        f"summary: {path / 'summary.json'}   learning curve: {path / 'curve.png'}",
        f"evaluate it: {shlex.join([*evaluator, f'--workdir={path}', *trusted])}",
    ]


def warm_start(model: nnx.Module, task: Task, config: ConfigDict) -> list[str]:
    """Gives `model` the parameters of `config.init_from`, another run or a file; returns lines that report it.

    A linear layer with another structure, or with other options of it, gets the nearest approximation of the layer
    there.
    """
    path = config.init_from
    try:
        with refusing():
            place = str(local_path(path))
        source, lines = (from_file if is_published(place) else from_run)(place, config, task)
        with refusing():
            projections = transfer(source, model)
    except Refused as error:
        raise Refused(f"{path}: {error}", option="config.init_from") from None
    for projection in projections:
        lines.append(f"  {dotted(projection.path)} projected, relative error {relative_error([projection]):.4f}")
    if projections:
        lines.append(f"  all {len(projections)} projected layers, relative error {relative_error(projections):.4f}")
    return lines


def from_run(path: str, config: ConfigDict, task: Task) -> tuple[nnx.Module, list[str]]:
    """The model of the best checkpoint of the run in `path`, and a line that names it."""
    with refusing():
        other = restore(read_config(path))
        step, _, model = trained_model(path, "best", other, sized_alike(other, task), print)
    return model, [f"parameters of {path}, step {step}, its best on validation"]


def sized_alike(other: ConfigDict, task: Task) -> Task:
    """`task` as one of the kind of another run's, whose data are not needed: its parameters must fit these sizes.

    Raises:
      ValueError: one has images, and the other has none.
    """
    kind = task_module(other.task.name).KIND
    if (kind == "image") != (task.kind == "image"):
        raise ValueError(f"its task {other.task.name} is of kind {kind!r}, and this one of {task.kind!r}")
    return dataclasses.replace(task, kind=kind)


def from_file(path: str, config: ConfigDict, task: Task) -> tuple[nnx.Module, list[str]]:
    """A model with the weights of a file, and lines that report it.

    It is that of the run whose weights `export_weights` wrote; of a published checkpoint, one as in `config` with dense
    weights.
    """
    with refusing():
        if stored := config_of_weights(Path(path)):
            return model_of_weights(path, sized_alike(restore(stored), task))[1], [f"parameters of {path}, of a run"]
        if config.model.name not in ("vit", "bert"):
            raise ValueError(
                f"a file has the parameters of a vit for images or of a bert for texts, here is {config.model.name}"
            )
        model = build_model(with_dense_weights(config), task)
        return model, load_pretrained(model, path)


def extend(workdir: Workdir, config: ConfigDict) -> None:
    """Gives a run in the workdir the larger number of steps of `config`; says what it means for the learning rate."""
    before = workdir.extend()
    if before is None:
        return

    def rate(steps, updates):
        return float(make_optimizer(steps=steps, **config.optimizer)[1](updates))

    last, following = rate(before, before - 1), rate(config.steps, before)
    print(
        f"extended from {before} to {config.steps} steps: after a learning rate of {last:.2g} it goes on with "
        f"{following:.2g}, as a run of {config.steps} has there. What was trained so far followed the old schedule"
    )


def run(asked: command_line.Run) -> None:
    """Does what the flags say, unless the run is finished."""
    processes.join(
        FLAGS.coordinator_address,
        FLAGS.num_processes,
        FLAGS.process_id,
        within=FLAGS.join_timeout,
        lost_after=FLAGS.heartbeat_timeout,
    )
    config = asked.config
    with refusing():
        share_cores(config)
        keep_programs(data_directory(config.task.get("data_dir")) / "compilation")
    jax.config.update("jax_debug_nans", config.debug_nans)
    writer = jax.process_index() == 0
    workdir = workdir_of(
        FLAGS.workdir, config, typed=asked.typed, writer=writer, warn=print if writer else lambda line: None
    )
    if FLAGS.extend and writer:
        extend(workdir, config)
    proceed(asked, workdir, FLAGS.profile)


def proceed(asked: command_line.Run, workdir: Workdir, profile: str | None = None) -> None:
    """Trains in the workdir, or says that this is done. Other commands call it too: it reads no flags."""
    config = asked.config
    workdir.claim()
    result = workdir.summary()
    if result is None:
        try:
            train(asked, workdir, profile)
        except (NonFinite, FloatingPointError) as error:
            workdir.diverge(not_finite(error))
            raise
    elif workdir.writer:
        print(f"{workdir.path} is finished: {config.steps} steps are done")
        print("\n".join(sentences(result, workdir.path)))
        history = History(workdir.path / "metrics.jsonl", writer=False)
        if history.damaged:
            print(f"{history.path}: {history.damage}; each checkpoint has a copy")


def main(asked: command_line.Run) -> int:
    """Runs. Errors of the user, signals and a full disk end in one line and an exit status."""
    if FLAGS.verbosity == logging.INFO:
        # At INFO, absl's default, jax logs which backends it looked for.
        logging.set_verbosity(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    return concluded(lambda: run(asked), "train")


def concluded(work: Callable[[], None], command: str) -> int:
    """The exit status of `work`, the work of a command; one line on an error that ends it says how to go on."""
    again = f"the same command goes on: {shlex.join([*command_line.invoked(command), *sys.argv[1:]])}"
    try:
        work()
    except RunError as error:
        status = processes.last_words(f"{error.flag}; {again}" if error.resumable else error.flag, error.status)
        if error.together:
            processes.part()
        return status
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or commands.out_of_memory(error):
            raise
        return processes.last_words(f"{processes.Lost.of(error)}; {again}", processes.Lost.status)
    except FloatingPointError as error:
        # What jax raises under debug_nans.
        return processes.last_words(not_finite(error), NonFinite.status)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Outside the loop there is nothing to save: data, checkpoints and lines are written whole or not at all.
        status = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        return processes.last_words(f"stopped by {signal.Signals(status - 128).name}; {again}", status)
    return 0


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    own = (
        "workdir",
        "extend",
        "profile",
        "coordinator_address",
        "num_processes",
        "process_id",
        "join_timeout",
        "heartbeat_timeout",
    )
    parse = functools.partial(command_line.parse, usage=__doc__, own=own)
    smaller = "a smaller --config.batch_size, a larger --config.grad_accum or a smaller model"
    # The results are files: a run whose output nobody reads goes on, and is a run like any other.
    commands.run(lambda: app.run(main, flags_parser=parse), prints=False, smaller=smaller)


if __name__ == "__main__":
    command()
