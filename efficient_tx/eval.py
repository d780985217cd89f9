"""Evaluates runs: python -m efficient_tx.eval --workdir=RUN [--workdir=RUN ...] [--checkpoint=best|last|STEP]

Needs only the workdirs and runs on any number of devices. Prints one table for each protocol and writes the results
into each workdir. `--set KEY=VALUE` evaluates the same parameters with another mixer, budget or length that they fit. A
RUN that does not exist is a pattern: --workdir='runs/*'. `--draws=5` scores the mixers that draw landmarks or features
under further draws, `--save_predictions` keeps what the model answers to each item. Exit status: 0; 2 a workdir could
not be evaluated, the others were; 1 a file could not be written; 143 or 130 stopped by SIGTERM or Ctrl-C.
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
import contextlib
import glob
import re
import signal
import statistics
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console
from rich.table import Table as RichTable

from efficient_tx.compare.flags import whole
from efficient_tx.config import trust
from efficient_tx.config.build import build_model, build_stages, build_task
from efficient_tx.config.check import check
from efficient_tx.config.errors import ConfigError
from efficient_tx.config.evaluation import apply_settings, without_dropout
from efficient_tx.config.flags import TRUST, refuse
from efficient_tx.data.batching import evaluation_batches
from efficient_tx.files import local_path
from efficient_tx.tables import FORMATS, Table
from efficient_tx.task import data_directory
from efficient_tx.training import summary
from efficient_tx.training.compilation import keep_programs
from efficient_tx.training.devices import divide_cores
from efficient_tx.training.disk import read_checked, write_json
from efficient_tx.training.errors import Refused, RunError, refusing
from efficient_tx.training.evaluation import make_evaluate, trained_parameters
from efficient_tx.training.objective import objective_of
from efficient_tx.training.predictions import Predictions
from efficient_tx.training.stages import stage_at
from efficient_tx.training.workdir import FREE_KEYS, read_config

# Rows that a batch may have although the split has fewer items.
MOST_ROWS = 4096
# Of the table on a terminal: characters of a column of words, and columns that are shown in any case.
NARROWEST, LEAST_COLUMNS = 8, 5
LONGEST_NAME = 200  # bytes of a file's name; file systems take 255


def warn(line: str) -> None:
    """Prints one line on standard error."""
    print(line, file=sys.stderr)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parses the command line; a mistake ends in one line and exit status 2."""

    parser = commands.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workdir", action="extend", nargs="+", required=True, help="folders of runs, or patterns; may be repeated"
    )
    parser.add_argument("--checkpoint", default="best", help="best (on validation), last, or a step")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--batch_size", type=int, help="default: that of the training run")
    parser.add_argument(
        "--draws", type=whole, default=1, metavar="N", help="score N draws of landmarks, features or hashes, not one"
    )
    parser.add_argument(
        "--save_predictions", action="store_true", help="write predictions_<split>_<checkpoint>.npz beside the results"
    )
    parser.add_argument("--format", default="table", choices=("table", *FORMATS), help="of what is printed")
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE", help=TRUST)
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], type=commands.setting, metavar="KEY=VALUE", dest="settings"
    )
    options = parser.parse_args(arguments)
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch_size={options.batch_size}: must be at least 1")
    keys = [key for key, _ in options.settings]
    if twice := [key for key in keys if keys.count(key) > 1]:
        parser.error(f"--set {twice[0]} is given twice: one evaluation has one value")
    options.settings = dict(options.settings)
    return options


def workdirs(given: str) -> list[str]:
    """The folders that a --workdir names. One that exists is literal, any other a pattern that runs may match."""
    path = str(local_path(given))
    if os.path.lexists(path):
        return [path]
    return sorted(run for run in glob.glob(path) if (Path(run) / "config.json").is_file()) or [path]


@contextlib.contextmanager
def naming_setting(settings: Mapping[str, str]) -> Iterator[None]:
    """Puts `--set KEY=VALUE` in front of the error of a setting."""
    try:
        yield
    except ConfigError as error:
        if error.key not in settings:
            raise
        raise ValueError(f"--set {error.key}={settings[error.key]}: {error}") from None


@contextlib.contextmanager
def enough_memory(path: str, batch_size: int) -> Iterator[None]:
    """Turns a lack of memory into a line that names the batch size."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not commands.out_of_memory(error):
            raise
        raise Refused(
            f"{path}: {batch_size} rows at once need more memory than there is: use a smaller --batch_size"
        ) from None


def evaluate(path: str, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of the run in `path` under the options of the command line."""
    with refusing(path), naming_setting(options.settings):
        config = apply_settings(read_config(path), options.settings, options.split)
        check(config)
        task = build_task(config)
        objective = objective_of(task)
        stages, _ = build_stages(config, nnx.eval_shape(lambda: build_model(config, task)), objective)
        quiet = without_dropout(config)
        drawn, _ = build_stages(quiet, nnx.eval_shape(lambda: build_model(quiet, task)), objective)
    divide_cores(options.batch_size or config.batch_size, parameters=lambda: summary.parameter_count(stages[-1].model))
    step, stage, parameters = trained_parameters(path, options.checkpoint, stages, warn)
    dead = [key for key in options.settings if key.startswith("linear.") and stage.start]
    if dead:
        raise Refused(f"{path}: --set {dead[0]}: the weights of step {step} are dense, as from step {stage.start} on")
    # Every device gets the same number of rows; rows that fill up the last batch do not count.
    devices = jax.device_count()
    batch_size = -(-(options.batch_size or config.batch_size) // devices) * devices
    items = len(getattr(task, options.split))
    if options.batch_size and batch_size > max(items, MOST_ROWS):
        rule = f"the {options.split} split of {path} has {items} items: use at most {max(items, MOST_ROWS)}"
        raise Refused(f"{options.batch_size}: {rule}", option="batch_size")
    batches = evaluation_batches(getattr(task, options.split), task, batch_size=batch_size, numbered=True)
    predictions = Predictions(objective, classes=task.objective is None, outputs=options.save_predictions)
    with enough_memory(path, batch_size):
        scores = make_evaluate(nnx.split(stage.model)[0], objective, keep=predictions.keep)(parameters, batches)
        other = nnx.split(stage_at(drawn, step).model)[0]
        draws = [make_evaluate(other, objective, draw=draw)(parameters, batches) for draw in range(1, options.draws)]
    row = {
        "task": task.name,
        "source": task.source,
        "protocol": config.protocol,
        "split": options.split,
        "checkpoint": options.checkpoint,
        "step": step,
        "seed": config.seed,
        "set": {key: value for key, value in options.settings.items() if key not in FREE_KEYS},
        "metrics": objective.metrics,
        **scores.means,
        "standard_error": predictions.standard_errors(),
        "baselines": dict(task.baselines) if options.split == "test" else {},
        "count": scores.count,
        "examples_per_second": scores.examples_per_second,
        "parameters": summary.parameter_count(stage.model),
        "batch_size": batch_size,
        "versions": summary.versions(),
        "device": summary.device(),
        **trained_with(path),
    }
    if options.save_predictions:  # of the first draw, however many there are
        predictions.write(Path(path) / file_name(row, "predictions", "npz"), step=step)
    if draws:
        means = [each.means for each in (scores, *draws)]
        row["draws"] = {name: [each[name] for each in means] for name in scores.means}
    return row


def save(path: str, row: Mapping[str, Any]) -> None:
    """Writes the results into the workdir; with draws also into a file that no evaluation without them replaces."""
    plain = {key: value for key, value in row.items() if key != "draws"}
    write_json(Path(path) / file_name(plain), plain)
    if "draws" in row:
        write_json(Path(path) / file_name(row), row)


def trained_with(path: str) -> dict[str, Any]:
    """Speed and memory of the training of a finished run; of another one nothing is known."""
    try:
        result = read_checked(Path(path) / "summary.json")
    except (OSError, ValueError):
        return {}
    return {key: result.get(key) for key in ("steps_per_second", "peak_memory_bytes", "peak_memory_of")}


def settings_of(row: Mapping[str, Any]) -> str:
    """The settings of `--set` as "key=value,key=value", in one string."""
    return ",".join(f"{key}={value}" for key, value in row["set"].items())


def file_name(row: Mapping[str, Any], what: str = "eval", ending: str = "json") -> str:
    """eval_<split>_<checkpoint>[_<set>][_draws=<N>].json; of very many settings the first ones, and a checksum."""
    draws = [f"draws={len(row['draws']['loss'])}"] if "draws" in row else []
    parts = [what, row["split"], row["checkpoint"], *filter(None, [settings_of(row)]), *draws]
    name = re.sub(r"[^\w.=,*+()&|~-]", "-", "_".join(parts))
    if len(name.encode()) > LONGEST_NAME:  # the file itself says which settings it is of
        name = f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}_{zlib.crc32(name.encode()):08x}"
    return f"{name}.{ending}"


def table(protocol: str, rows: list[tuple[str, Mapping[str, Any]]]) -> Table:
    """The table of one protocol, with one row for each (workdir, result)."""
    head = rows[0][1]
    metrics = list(dict.fromkeys(name for _, row in rows for name in (*row["metrics"], "loss")))
    columns = ["task|", "run|", "seed", "step", *metrics, "count", "parameters", "examples/s", "steps/s", "memory"]
    cells = []
    for path, row in rows:
        cells.append(
            [
                row["task"],
                " ".join([path, *filter(None, [settings_of(row)])]),
                str(row["seed"]),
                str(row["step"]),
                *(score_of(row, name) for name in metrics),
                str(row["count"]),
                f"{row['parameters']:,}",
                "-" if row["examples_per_second"] is None else f"{row['examples_per_second']:.0f}",
                "-" if row.get("steps_per_second") is None else f"{row['steps_per_second']:.2f}",
                "-" if row.get("peak_memory_bytes") is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            ]
        )
    return Table(f"{head['split']} split, {head['checkpoint']} checkpoint, protocol {protocol}", columns, cells)


def score_of(row: Mapping[str, Any], name: str) -> str:
    """A score, and after ± its standard error."""
    if name not in row:
        return "-"
    error = row["standard_error"][name]
    return f"{row[name]:.4f}" + (f" ±{error:.4f}" if error is not None else "")


def notes(rows: list[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """What the tables do not say by themselves: the answers to beat, and what ± and the draws are."""
    lines = ["±: standard error over the items of the split alone; what other seeds or draws change is not in it"]
    for _, row in rows:
        if row["baselines"]:
            scores = ", ".join(f"{name} {score:.4f}" for name, score in row["baselines"].items())
            lines.append(f"to beat on {row['task']} ({row['source']}): {scores}")
    for path, row in rows:
        if "draws" in row and len(set(row["draws"]["loss"])) == 1:
            lines.append(f"{path}: the draws are equal, as its mixers draw nothing, or all there is")
        elif "draws" in row:
            for name in row["metrics"]:
                draws = row["draws"][name]
                spread = f"mean {statistics.fmean(draws):.4f}, standard deviation {statistics.stdev(draws):.4f}"
                lines.append(f"{path}: {name} over {len(draws)} draws: {spread}, {min(draws):.4f} to {max(draws):.4f}")
    return list(dict.fromkeys(lines))


def on_terminal(table: Table, width: int) -> tuple[RichTable, list[str]]:
    """The table, without its last columns as far as they do not fit, and the heads of these; the files have them."""
    needed = [
        max(len(head), *(len(row[i]) for row in table.rows)) if not left else NARROWEST
        for i, (head, left) in enumerate(zip(table.heads, table.left))
    ]
    shown = len(needed)
    while shown > LEAST_COLUMNS and sum(needed[:shown]) + 3 * shown + 1 > width:
        shown -= 1
    result = RichTable(title=table.title)
    for name, left in list(zip(table.heads, table.left))[:shown]:
        words = {"justify": "left", "overflow": "fold", "min_width": NARROWEST}
        result.add_column(name, **(words if left else {"justify": "right", "no_wrap": True}))
    for row in table.rows:
        result.add_row(*row[:shown])
    return result, table.heads[shown:]


def main(arguments: list[str]) -> int:
    """Evaluates every workdir. One that fails gets a line, and then the exit status is 2 (1: a full disk)."""
    options = parse(arguments)
    trust.allow(*options.trust, remedy="--trust={} allows it")
    try:
        paths = [path for given in options.workdir for path in workdirs(given)]
        keep_programs(data_directory() / "compilation")
    except ValueError as error:
        refuse(error)
    rows, status = [], 0
    for path in dict.fromkeys(paths):
        try:
            row = evaluate(path, options)
            rows.append((path, row))
            save(path, row)
        except RunError as error:
            warn(error.flag)
            status = max(status, error.status)
    # A fixed width if standard output is not a terminal: rows must not be cut.
    console = Console(width=None if sys.stdout.isatty() else 300, highlight=False, markup=False, emoji=False)
    for protocol in dict.fromkeys(row["protocol"] for _, row in rows):
        made = table(protocol, [(path, row) for path, row in rows if row["protocol"] == protocol])
        if options.format != "table":
            print(FORMATS[options.format](made), end="")  # a console would break long rows
            continue
        shown, left_out = on_terminal(made, console.width)
        console.print(shown, end="")
        if left_out:
            console.print(f"left out for want of width: {', '.join(left_out)}; --format=md has all", soft_wrap=True)
    if rows:  # those of CSV and TeX, which may be read by a program, on standard error
        print("", *notes(rows), sep="\n", file=sys.stdout if options.format in ("table", "md") else sys.stderr)
    return status


def stoppable(arguments: list[str]) -> int:
    """`main`; a signal that stops it is one line, which says what is done."""
    try:
        return main(arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        status = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if status in (130, 143):
            warn(f"stopped by {signal.Signals(status - 128).name}: the runs before this one are evaluated")
        return status


def command() -> None:
    """The command line."""
    sys.path.append(os.getcwd())  # for a task or a mixer of the user's own
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    commands.run(lambda: stoppable(sys.argv[1:]), smaller="a smaller --batch_size")


if __name__ == "__main__":
    command()
