"""Measurements of compressed models: scores with and without tuning, bytes, multiplications and milliseconds.

Every cell is a run of `efficient_tx.compress` in its own workdir, so that a second call goes on where the first one
stopped, and each result can be evaluated, tuned and looked at by itself.
"""

import contextlib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from efficient_tx.compare.embeddings import agreement, embed
from efficient_tx.compare.timing import compile_pass, in_turns
from efficient_tx.compress.asked import Asked
from efficient_tx.compress.pipeline import run
from efficient_tx.compress.result import RECORD
from efficient_tx.compress.source import load
from efficient_tx.compression.cost import multiplications, stored
from efficient_tx.compression.model import linear_layers
from efficient_tx.config.methods import named_method
from efficient_tx.data.batching import evaluation_batches
from efficient_tx.task import Task
from efficient_tx.training.disk import read_checked
from efficient_tx.training.errors import RunError

# Test texts whose embeddings are compared.
EMBEDDED = 500


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison.

    Attributes:
      run: workdir of the model.
      methods: as of `compress --method`.
      budgets: shares of the bytes of the touched layers, descending.
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
        steps = {"distilled": self.distill, "tuned": self.tune}
        return ", ".join(f"{name} {count}" for name, count in steps.items() if count)


@dataclass
class Row:
    """One method at one budget.

    Attributes:
      method: its name; "dense" for the model itself.
      budget: share of the bytes of the touched layers that may stay.
      refused: why there is no result, in one line; None if there is one.
      share: of these bytes that stayed.
      stored: bytes of all the model's linear layers, packed where they can be.
      multiplications: of all linear layers, for one token.
      scores: test metric of each draw.
      tuned: the same after distilling and tuning; empty without.
      agreement: Spearman's correlation of the similarities of all pairs of test texts with those in the model itself
        (`embeddings.agreement`), of the first draw; None for a model without sentence embeddings.
      tuned_agreement: the same after distilling and tuning.
      error: largest relative error of a layer, of the first draw.
      theory: name -> largest value over the layers of what the method's theory gives, of the first draw.
      milliseconds: median time of a forward pass; None if it was not timed.
      front: whether no other row has a better score with as few bytes.
    """

    method: str
    budget: float
    refused: str | None = None
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


def draws_of(method: str, settings: Settings) -> int:
    """Draws of calibration of a method: one if it needs none."""
    return settings.draws if named_method(method).needs else 1


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
      RunError: the model cannot be read.
    """
    rows = [whole(settings)]
    cells = list(itertools.product(settings.methods, settings.budgets))
    ways = dict.fromkeys(("", settings.trained))
    each = {method: draws_of(method, settings) * len(ways) for method in settings.methods}
    total, done = sum(each[method] for method, _ in cells), 0
    for method, budget in cells:
        row = Row(method, budget)
        rows.append(row)
        for draw, trained in itertools.product(range(draws_of(method, settings)), ways):
            name = cell(method, budget, draw, trained)
            progress(name, done, total)
            done += 1
            if row.refused is None:
                try:
                    fill(row, result(settings, out / name, row, draw, trained), draw, trained)
                except RunError as error:
                    row.refused = error.flag
        jax.clear_caches()
    examine(rows, settings, out, lambda what: progress(what, total, total))
    for row in front(rows, lambda row: row.stored):
        row.front = True
    return rows


def whole(settings: Settings) -> Row:
    """The row of the model itself."""
    row = Row("dense", 1.0)
    summary = read_checked(settings.run / "summary.json")
    row.scores = [score_of(summary)]
    return row


def score_of(summary: Mapping) -> float:
    """The test score of the best checkpoint."""
    return next(value for key, value in summary.items() if key.startswith("test_"))


def metric_of(run: Path) -> str:
    """The name of the test metric of a finished run."""
    return next(key for key in read_checked(run / "summary.json") if key.startswith("test_")).removeprefix("test_")


def result(settings: Settings, path: Path, row: Row, draw: int, trained: str) -> Path:
    """Compresses into a workdir, or finds that this is done; returns the workdir."""
    asked = Asked(
        settings.run, path, row.method, row.budget, where=settings.where, calibration=settings.calibration, draw=draw,
    )  # fmt: skip
    if trained:
        asked = replace(asked, distill=settings.distill, tune=settings.tune, settings=settings.settings)
    with contextlib.redirect_stdout(io.StringIO()):
        run(asked, Console(file=io.StringIO()))
    return path


def fill(row: Row, path: Path, draw: int, trained: str) -> None:
    """Reads the result of a cell."""
    score = score_of(read_checked(path / "summary.json"))
    (row.tuned if trained else row.scores).append(score)
    if draw or trained:
        return
    record = read_checked(path / RECORD)
    row.share = record["share"]
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
        _, task, model, _ = load(path, "best")
        measure_size(rows[i], model)
        if hasattr(model, "embed"):
            own = embedded(model, task)
            original = own if original is None else original
            rows[i].agreement = agreement(original, own).rank_correlation
        batch = evaluation_batches(task.test, task, batch_size=settings.rows)[0]
        features = {name: array for name, array in batch.items() if name in ("inputs", "mask", "inputs2", "mask2")}
        graphdef, params = nnx.split(model)

        def call(params, features, graphdef=graphdef):
            return nnx.merge(graphdef, params)(**features, key=None)

        runs[i], _ = compile_pass("forward", call, params, features)
    for row in rows if settings.trained and original is not None else ():
        if row.refused is None and row.method != "dense":
            progress(f"{row.method} at {row.budget:g}: embeddings")
            _, task, model, _ = load(out / cell(row.method, row.budget, 0, settings.trained), "best")
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
            yield i, settings.run if row.method == "dense" else out / cell(row.method, row.budget, 0)


def front(rows: Sequence[Row], cost: Callable[[Row], float]) -> list[Row]:
    """The rows with a result that no other one beats in cost and score at once."""
    there = [(cost(row), -row.score, row) for row in rows if row.refused is None]
    return [row for x, y, row in there if not any(u <= x and v <= y and (u, v) != (x, y) for u, v, _ in there)]
