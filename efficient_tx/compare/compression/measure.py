"""Measurements of compressed models: scores with and without tuning, bytes, multiplications and milliseconds.

Every cell is a run of `efficient_tx.compress` in its own workdir, so that a second call goes on where the first one
stopped, and each result can be evaluated, tuned and looked at by itself.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from efficient_tx.compare.embeddings import agreement, embed
from efficient_tx.compare.timing import compile_pass, in_turns
from efficient_tx.compress.asked import Asked
from efficient_tx.compress.pipeline import Impossible, opened, run
from efficient_tx.compress.result import RECORD, checksum
from efficient_tx.compress.source import too_few
from efficient_tx.compression.budget import of_touched
from efficient_tx.compression.cost import multiplications, stored
from efficient_tx.compression.model import linear_layers, select
from efficient_tx.config.methods import named_method
from efficient_tx.config.trained import trained_run
from efficient_tx.data.batching import evaluation_batches
from efficient_tx.task import Task, model_inputs
from efficient_tx.training import summary
from efficient_tx.training.disk import read_checked
from efficient_tx.training.errors import NonFinite, Refused, RunError

# Test texts whose embeddings are compared.
EMBEDDED = 500
# The method of the row of the model itself.
DENSE = "dense"


class Metric(NamedTuple):
    """The test score of a run: its name, and whether a higher one is better."""

    name: str
    higher_is_better: bool


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison.

    Attributes:
      run: workdir of the model.
      methods: as of `compress --method`.
      budgets: shares of the bytes of all layers that `where` selects, descending; those that a method leaves as they
        are count as they are.
      distill: steps of learning from the model itself after each compression; 0: none.
      tune: steps of training after that; 0: none.
      draws: samples of calibration examples, for methods that need them.
      calibration: examples of a draw.
      where: which layers.
      settings: keys of the trained results' configs, with values as typed.
      rows: examples of a timed call.
      rounds: turns in which all models are timed.
    """

    run: Path
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    distill: int = 0
    tune: int = 0
    draws: int = 3
    calibration: int = 256
    where: str = "mlp|projections"
    settings: Mapping[str, str] = field(default_factory=dict)
    rows: int = 32
    rounds: int = 7

    @property
    def trained(self) -> str:
        """What is done with a compressed model, "" if nothing: "distilled 500, tuned 100"."""
        return Part(0, self.distill, self.tune).trained


class Part(NamedTuple):
    """A cell of a row: the draw of calibration, and steps of distilling and of tuning."""

    draw: int
    distill: int = 0
    tune: int = 0

    @property
    def trained(self) -> str:
        steps = {"distilled": self.distill, "tuned": self.tune}
        return ", ".join(f"{name} {count}" for name, count in steps.items() if count)


@dataclass
class Row:
    """One method at one budget.

    Attributes:
      method: its name; DENSE for the model itself.
      budget: share of the bytes of all selected layers that may stay.
      refused: why there is no result, in one line; None if there is one.
      failed: name of a cell -> why there is no score of it, in one line, if there are others.
      share: of the selected layers' bytes that stayed.
      stored: bytes of all the model's linear layers, packed where they can be.
      multiplications: of all linear layers, for one token.
      scores: test metric of each draw.
      tuned: the same after distilling and tuning, of the model itself after tuning only; empty without.
      agreement: Spearman's correlation of the similarities of all pairs of test texts with those in the model itself
        (`embeddings.agreement`), of the first draw; None for a model without sentence embeddings.
      tuned_agreement: the same after distilling and tuning.
      error: largest relative error of the outputs of a layer on the calibration examples, of the first draw.
      theory: name -> largest value over the layers of what the method's theory gives, of the first draw.
      milliseconds: median time of a forward pass; None if it was not timed.
      front: whether no other row has a better score with as few bytes.
    """

    method: str
    budget: float
    refused: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    stored: int = 0
    multiplications: int = 0
    scores: list[float] = field(default_factory=list)
    tuned: list[float] = field(default_factory=list)
    agreement: float | None = None
    tuned_agreement: float | None = None
    error: float = 0.0
    theory: dict[str, float] = field(default_factory=dict)
    milliseconds: float | None = None
    front: bool = False

    @property
    def score(self) -> float:
        """Mean over the draws, after tuning if there is any."""
        found = self.tuned or self.scores
        return sum(found) / len(found)


def parts_of(method: str, settings: Settings) -> list[Part]:
    """The cells of a row, of each draw first the one without training; a method without calibration has one draw.

    The model itself is there already, and has nothing to learn from itself.
    """
    if method == DENSE:
        return [Part(0, tune=settings.tune)] if settings.tune else []
    draws = settings.draws if named_method(method).needs else 1
    steps = dict.fromkeys(((0, 0), (settings.distill, settings.tune)))
    return [Part(draw, *one) for draw in range(draws) for one in steps]


def cell(method: str, budget: float, draw: int, trained: str = "") -> str:
    """The name of a workdir, without characters that a shell minds."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "_", method).strip("_")
    return f"{plain}-{budget:g}-{draw}" + "".join(f"-{part.replace(' ', '')}" for part in trained.split(", ") if part)


def compare(
    settings: Settings, out: Path, progress: Callable[[str, int, int], None] = lambda what, done, of: None
) -> list[Row]:
    """Compresses the model by all methods, at all budgets; the first row is the model itself.

    Args:
      settings: what to compare.
      out: the cells' workdirs go below it.
      progress: called with a line and the numbers of cells done and in all.

    Raises:
      RunError: the model cannot be read, `where` or `settings` names nothing of it, a cell is of another checkpoint of
        it, or was stopped or cannot be written. What a method cannot do, and training that diverges, stand in the rows.
    """
    trained = Part(0, settings.distill, settings.tune)
    _, task, model, step, _ = opened(asked(settings, out, settings.methods[0], 1.0, trained))
    rows = [Row(DENSE, 1.0, scores=[score_of(settings.run)])]
    rows += [Row(method, budget) for method in settings.methods for budget in settings.budgets]
    parts = [(row, part) for row in rows for part in parts_of(row.method, settings)]
    paths = [out / cell(row.method, row.budget, part.draw, part.trained) for row, part in parts]
    check_source(paths, settings.run, step, checksum(model))
    left = [left_for(row, model, settings.where) for row in rows]
    whole = sum(stored(layer.module) for layer in select(model, settings.where))
    del model
    if line := too_few(task, settings.calibration):
        progress(line, 0, 1)
    total, done = len(parts), 0
    for row, budget in zip(rows, left, strict=True):
        for part in parts_of(row.method, settings):
            name = cell(row.method, row.budget, part.draw, part.trained)
            progress(name, done, total)
            done += 1
            if row.refused is None:
                try:
                    compressed(asked(settings, out / name, row.method, budget, part))
                except (Impossible, NonFinite) as error:
                    fail(row, name, reason(error, row.budget, budget))
                else:
                    fill(row, out / name, part, whole)
        jax.clear_caches()
    examine(rows, settings, out, lambda what: progress(what, total, total))
    for row in front(rows, lambda row: row.stored, metric_of(settings.run)):
        row.front = True
    return rows


def check_source(paths: Sequence[Path], run: Path, step: int, parameters: int) -> None:
    """Raises Refused if a cell that is there came from other parameters than those of the run's best checkpoint.

    Args:
      paths: of cells, there or not.
      run: that all cells begin with.
      step, parameters: of its best checkpoint, and the `checksum` of its model.
    """
    for path in paths:
        try:
            record = read_checked(path / RECORD)
        except (OSError, ValueError):
            continue  # of what is damaged the cell itself says so
        there = record.get("step"), record.get("parameters", parameters)  # absent in a record of an older version
        if there != (step, parameters):
            of = f"is of step {there[0]} of {run}, whose best is now step {step}" if there[0] != step else (
                f"is of another run in {run}, with other parameters at step {step}")  # fmt: skip
            raise Refused(f"{path} {of}: use a new folder, or delete {path.parent}", option="out")


def left_for(row: Row, model: nnx.Module, where: str) -> float:
    """What the budget of all selected layers leaves for those that the row's method changes: a share of their bytes.

    A row that has no result for that is refused.
    """
    if row.method == DENSE:
        return row.budget
    try:
        return of_touched(named_method(row.method), model, row.budget, where)
    except ValueError as error:
        row.refused = Impossible.of(error).flag
        return row.budget


def reason(error: RunError, budget: float, left: float) -> str:
    """The line of a cell without a result: of a budget as asked for, and what it leaves for the layers that change."""
    if getattr(error, "option", None) != "budget" or left == budget:
        return error.flag
    line = f"{budget}, {left:.3f} of the layers that change: {str(error).partition(': ')[2]}"
    return Impossible(line, option="budget").flag


def score_of(run: Path) -> float:
    """The test score of the best checkpoint of a finished run."""
    found = read_checked(run / "summary.json")
    return found[f"test_{summary.metric(found)}"]


def metric_of(run: Path) -> Metric:
    """The test metric of a finished run."""
    found = read_checked(run / "summary.json")
    return Metric(summary.metric(found), summary.higher_is_better(found))


def asked(settings: Settings, path: Path, method: str, budget: float, part: Part) -> Asked:
    """What a cell, in the workdir `path`, asks of `compress`."""
    by_method = {} if method == DENSE else {"method": method, "budget": budget}
    return Asked(
        settings.run, path, **by_method, where=settings.where, calibration=settings.calibration, draw=part.draw,
        distill=part.distill, tune=part.tune, settings=settings.settings if part.trained else {},
    )  # fmt: skip


def compressed(asked: Asked) -> None:
    """Compresses into a workdir, or finds that this is done."""
    with contextlib.redirect_stdout(io.StringIO()):
        run(asked, Console(file=io.StringIO()))


def fail(row: Row, name: str, why: str) -> None:
    """Notes that a cell has no result; a row whose first cell has none has no result at all."""
    if row.scores:
        row.failed[name] = why
    else:
        row.refused = why


def fill(row: Row, path: Path, part: Part, whole: float) -> None:
    """Reads the result of a cell; `whole`: bytes of all selected layers of the model itself."""
    (row.tuned if part.trained else row.scores).append(score_of(path))
    if part.draw or part.trained:
        return
    record = read_checked(path / RECORD)
    row.share = 1 - (record["before"] - record["after"]) / whole
    row.error = max(layer["error"] for layer in record["layers"].values())
    for layer in record["layers"].values():
        for name, value in layer.items():
            if name != "error":
                row.theory[name] = max(value, row.theory.get(name, 0.0))


def measure_size(row: Row, model: nnx.Module) -> None:
    """Bytes and multiplications of all linear layers of a model."""
    layers = [layer.module for layer in linear_layers(model)]
    row.stored = sum(map(stored, layers))
    row.multiplications = sum(map(multiplications, layers))


def examine(rows: Sequence[Row], settings: Settings, out: Path, progress: Callable[[str], None]) -> None:
    """Loads every model, once: its size, its embeddings if it has any, and the time of a forward pass, in turns."""
    runs, original = {}, None
    for i, path in workdirs(rows, settings, out):
        progress(f"compiling {path.name}")
        _, task, model, _ = trained_run(path, "best")
        measure_size(rows[i], model)
        if hasattr(model, "embed"):
            own = embedded(model, task)
            original = own if original is None else original
            rows[i].agreement = agreement(original, own).rank_correlation
        batch = evaluation_batches(task.test, task, batch_size=settings.rows)[0]
        features = model_inputs(batch)
        graphdef, params = nnx.split(model)

        def call(params, features, graphdef=graphdef):
            return nnx.merge(graphdef, params)(**features, key=None)

        runs[i], _ = compile_pass("forward", call, params, features)
    for row in rows if original is not None else ():
        trained = next((part.trained for part in parts_of(row.method, settings) if part.trained), "")
        name = cell(row.method, row.budget, 0, trained)
        if trained and row.refused is None and name not in row.failed:
            progress(f"{name}: embeddings")
            _, task, model, _ = trained_run(out / name, "best")
            row.tuned_agreement = agreement(original, embedded(model, task)).rank_correlation
    progress("timing")
    for i, seconds in in_turns(runs, settings.rounds, math.inf).items():
        rows[i].milliseconds = 1e3 * seconds


def embedded(model: nnx.Module, task: Task) -> np.ndarray:
    """The embeddings of the first test texts, at most EMBEDDED."""
    (batch, *_) = evaluation_batches(task.test, task, batch_size=min(EMBEDDED, len(task.test)))[:1]
    return embed(model, batch["inputs"], batch["mask"])


def workdirs(rows: Sequence[Row], settings: Settings, out: Path) -> Iterator[tuple[int, Path]]:
    """The number of each row that has a result, and the workdir of its first draw without tuning."""
    for i, row in enumerate(rows):
        if row.refused is None:
            yield i, settings.run if row.method == DENSE else out / cell(row.method, row.budget, 0)


def front(rows: Sequence[Row], cost: Callable[[Row], float], metric: Metric) -> list[Row]:
    """The rows with a result that no other one beats in cost and score at once."""
    sign = -1 if metric.higher_is_better else 1
    there = [(cost(row), sign * row.score, row) for row in rows if row.refused is None]
    return [row for x, y, row in there if not any(u <= x and v <= y and (u, v) != (x, y) for u, v, _ in there)]
