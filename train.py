"""Trains a model: python train.py --config=FILE.py[:MIXERS+LINEAR] --workdir=FOLDER [--config.KEY=VALUE ...]

The same command resumes a run that was stopped or killed. Exit status: 0 finished; 2 refused; 3 the loss, a gradient or
a parameter is not finite; 143 or 130 stopped by SIGTERM or Ctrl-C; 1 something could not be written.
"""

import os

# Before jax is imported: its CPU solvers run in OpenBLAS, whose threads collide with XLA's.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import dataclasses
import shlex
import signal
import sys

import jax
from absl import app, flags, logging
from flax import nnx
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from configs import resolve
from efficient_tx import build
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.linear.replace import dotted, relative_error, transfer
from efficient_tx.models.pretrained import SUFFIXES, load_pretrained
from efficient_tx.task import Task, data_directory
from efficient_tx.training import summary
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.errors import NonFinite, Refused, RunError, refusing
from efficient_tx.training.evaluation import make_evaluate, trained_parameters
from efficient_tx.training.history import History
from efficient_tx.training.loop import Loop, Plan
from efficient_tx.training.optimizer import evaluation_params
from efficient_tx.training.report import Report
from efficient_tx.training.step import check_batch_size
from efficient_tx.training.workdir import Workdir, read_config, write_json

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Config file and its argument, FILE.py:MIXERS+LINEAR+PROJECTIONS.")
flags.DEFINE_string("workdir", None, "Folder of the run; the same command goes on in it.", required=True)
flags.register_validator("workdir", bool, "--workdir is empty: name a folder")
flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0, for a run over several processes.")
flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def connect() -> None:
    """Joins the other processes of the run, if there are any."""
    given = [FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id]
    if given == [None] * 3:
        return
    if None in given:
        raise Refused("a run over several processes needs all of --coordinator_address, --num_processes, --process_id")
    jax.distributed.initialize(*given)


def train(config: ConfigDict, workdir: Workdir) -> None:
    """Trains, from the newest checkpoint if there is one, and writes summary.json."""
    with refusing():
        check_batch_size(config.batch_size, devices=jax.device_count(), grad_accum=config.grad_accum)
        task = build.build_task(config)
        model = build.build_model(config, task)
        stages, schedule = build.build_stages(config, model)
        # Before the run: the config file may be another one when it ends.
        terms = {
            "protocol": config.protocol,
            "protocol_departures": resolve.departures(config, FLAGS["config"].config_filename),
            "versions": summary.versions(),
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
        baselines=task.baselines,
        active=workdir.writer,
    )
    count = summary.parameter_count(model)
    report.say(f"{task.name} ({task.source}): {len(task.train):,} training examples; model: {count:,} parameters")
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
    )
    state = loop.run()
    # All processes wait until the last checkpoint and line are on disk.
    multihost_utils.sync_global_devices("trained")

    test = evaluation_batches(task.test, task, **rows)
    last = loop.evaluate(evaluation_params(state.optimizer, state.params), test)
    best_step, stage, parameters = trained_parameters(workdir.path, "best", stages, report.say)
    evaluate = loop.evaluate if stage is stages[-1] else make_evaluate(nnx.split(stage.model)[0])
    best = evaluate(parameters, test)
    result = {
        "task": task.name,
        "source": task.source,
        "best_step": best_step,
        "val_accuracy": next(line["accuracy"] for line in history.of("validation") if line["step"] == best_step),
        "test_accuracy": best.accuracy,
        "last_test_accuracy": last.accuracy,
        "baselines": dict(task.baselines),
        "parameters": summary.parameter_count(stages[-1].model),
        "steps_per_second": summary.steps_per_second(history.of("train"), config.batch_size),
        "compile_seconds": loop.compile_seconds,
        **summary.peak_memory(),
        **terms,
    }
    if workdir.writer:
        report.draw(last=True)
        write_json(workdir.path / "summary.json", result)
    for line in summary.sentences(result, workdir.path):
        report.say(line)


def warm_start(model: nnx.Module, task: Task, config: ConfigDict) -> list[str]:
    """Gives `model` the parameters of `config.init_from`, another run or a file; returns the lines that tell of it.

    Linear layers of another structure, or with other options of it, become the nearest ones to those there.
    """
    path = config.init_from
    try:
        source, lines = (from_file if path.endswith(SUFFIXES) else from_run)(config, task)
        with refusing():
            projections = transfer(source, model)
    except Refused as error:
        raise Refused(f"config.init_from={path}: {error}") from None
    for projection in projections:
        lines.append(f"  {dotted(projection.path)} projected, relative error {relative_error([projection]):.4f}")
    if projections:
        lines.append(f"  all {len(projections)} projected layers, relative error {relative_error(projections):.4f}")
    return lines


def from_run(config: ConfigDict, task: Task) -> tuple[nnx.Module, list[str]]:
    """The model of the best checkpoint of the run that `config` starts from, and a line that names it."""
    path = config.init_from
    with refusing():
        other = resolve.restore(read_config(path))
        # The other run's data are not needed: what depends on their sizes has to fit this run's.
        kind = build.task_module(other.task.name).KIND
        if (kind == "image") != (task.kind == "image"):
            raise ValueError(f"its task {other.task.name} is of kind {kind!r}, and this one of {task.kind!r}")
        task = dataclasses.replace(task, kind=kind)
        stages, _ = build.build_stages(other, nnx.eval_shape(lambda: build.build_model(other, task)))
    step, stage, parameters = trained_parameters(path, "best", stages, print)
    model = nnx.merge(nnx.split(stage.model)[0], parameters)
    return model, [f"parameters of {path}, step {step}, its best on validation"]


def from_file(config: ConfigDict, task: Task) -> tuple[nnx.Module, list[str]]:
    """A model as `config` has it, but with dense weights and those of a published checkpoint; and lines about it."""
    with refusing():
        if (task.kind, config.model.name) != ("image", "vit"):
            raise ValueError(f"a file has the parameters of a vit for images, here is {config.model.name}")
        model = build.build_model(build.with_dense_weights(config), task)
        return model, load_pretrained(model, config.init_from)


def run() -> None:
    """Does what the flags say, unless it is done already."""
    connect()
    config = resolve.run_config()
    keep_programs(data_directory(config.task.data_dir) / "compilation")
    jax.config.update("jax_debug_nans", config.debug_nans)
    workdir = Workdir(
        FLAGS.workdir,
        config.to_dict(),
        writer=jax.process_index() == 0,
        complete=lambda stored: resolve.restore(stored).to_dict(),
    )
    workdir.claim()
    result = workdir.summary()
    if result is None:
        train(config, workdir)
    elif workdir.writer:
        print(f"{workdir.path} is finished: {config.steps} steps are done")
        print("\n".join(summary.sentences(result, workdir.path)))


def main(_: list[str]) -> int:
    """Runs, and ends with one line and an exit status where a person, a signal or the disk is to blame."""
    if FLAGS.verbosity == logging.INFO:
        # absl's default, at which jax tells which backends it looked for.
        logging.set_verbosity(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    again = f"the same command goes on: {shlex.join(['python', *sys.argv])}"
    try:
        run()
    except RunError as error:
        print(f"{error}; {again}" if error.resumable else error, file=sys.stderr)
        return error.status
    except FloatingPointError as error:
        # What jax raises under debug_nans.
        print(f"not finite: {str(error).splitlines()[0]}", file=sys.stderr)
        return NonFinite.status
    except (KeyboardInterrupt, SystemExit) as stop:
        # Outside the loop there is nothing to save: data, checkpoints and lines are written whole or not at all.
        status = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        print(f"stopped by {signal.Signals(status - 128).name}; {again}", file=sys.stderr)
        return status
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=resolve.parse_flags)
