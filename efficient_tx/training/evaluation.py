"""Evaluation of one set of parameters on one split, and the parameters that a finished run is worth."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
from flax import nnx

from efficient_tx.task import Batch, Objective
from efficient_tx.training import metrics
from efficient_tx.training.checkpoint import Checkpoints, Damaged
from efficient_tx.training.errors import Refused, refusing
from efficient_tx.training.history import History
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.optimizer import evaluation_params
from efficient_tx.training.stages import Stage, stage_at
from efficient_tx.training.step import make_eval_step, replicate, split_batch


class Scores(NamedTuple):
    """What a model scores on a split.

    Attributes:
      means: of the loss and of every metric of the objective, over the items.
      count: items (labels, where there is one per token) that were counted.
      examples_per_second: rows of batches over wall time, without the first batch of each shape, which compiles; None
        if there are no others.
    """

    means: dict[str, float]
    count: int
    examples_per_second: float | None


def prefetch(batches: grain.MapDataset, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Batches start..stop, split over the local devices, a few of them prepared ahead in threads.

    Raises:
      Refused: (from the iterator) an example cannot be read.
    """
    split = partial(split_batch, devices=jax.local_devices())
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    with refusing():
        yield from batches[start:stop].map(split).to_iter_dataset(read)


def make_evaluate(graphdef: nnx.GraphDef, objective: Objective = CLASSIFICATION) -> Callable[..., Scores]:
    """evaluate(params, batches, check=None) -> Scores over all devices and processes, each item counted once.

    `check` is called before each batch; what it raises ends the evaluation.
    """
    step = make_eval_step(graphdef, objective=objective)

    def evaluate(params: nnx.State, batches: grain.MapDataset, check: Callable[[], None] | None = None) -> Scores:
        params = replicate(params)
        sums, pending, compiled = metrics.zeros(*objective.names), None, set()
        rows, seconds, started = 0, 0.0, None
        for batch in prefetch(batches):
            if check is not None:
                check()
            shape = batch["inputs"].shape
            first = shape not in compiled
            if first and started is not None:
                jax.block_until_ready(pending)
                seconds += time.perf_counter() - started
            part = step(params, batch)
            # One batch behind, so that the device need not wait for the host; Python's floats add up exactly.
            if pending is not None:
                sums = metrics.add(sums, metrics.fetch(pending))
            pending = part
            if first:
                jax.block_until_ready(part)
                compiled.add(shape)
                started = time.perf_counter()
            else:
                rows += batch["label"].shape[0] * batch["label"].shape[1] * jax.process_count()
        sums = metrics.add(sums, metrics.fetch(pending))
        speed = rows / (seconds + time.perf_counter() - started) if rows else None
        return Scores(metrics.means(sums), round(sums["loss"][1]), speed)

    return evaluate


def trained_parameters(
    path: str,
    which: str,
    stages: Sequence[Stage],
    warn: Callable[[str], None],
) -> tuple[int, Stage, nnx.State]:
    """(step, its stage, parameters to evaluate) of a checkpoint of the run in the workdir `path`.

    Args:
      which: "best" (on validation, by the objective), "last", or a step. Of a damaged best or last one `warn` gets a
        line, and the next best or next older one is used.
      stages: the run's own, which say what the state of a step looks like; the model's values are not looked at.

    Raises:
      Refused: there is no such checkpoint, none that opens, or its parameters do not fit the model of its stage.
    """
    checkpoints = Checkpoints(Path(path) / "checkpoints")
    steps = checkpoints.steps()
    if not steps:
        raise Refused(f"{path} has no checkpoint yet: train it first")
    if which == "last":
        wanted = steps[::-1]
    elif which == "best":
        ranked = History(Path(path) / "metrics.jsonl", writer=False).ranked(stages[0].objective)
        wanted = [step for step in ranked if step in steps] or steps[::-1]
    elif which.isdecimal() and int(which) in steps:
        wanted = [int(which)]
    else:
        known = f"{path} has best, last and the steps {', '.join(map(str, steps))}"
        raise Refused(f"{which}: {known}", option="checkpoint")
    step, state = checkpoints.first_usable(wanted, lambda step: stage_at(stages, step).like(), warn, passing=Damaged)
    return step, stage_at(stages, step), evaluation_params(state.optimizer, state.params)
