"""Evaluation of parameters on a split, and the choice of the checkpoint to evaluate."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from flax import nnx

from efficient_tx.task import Batch, Objective
from efficient_tx.training import metrics
from efficient_tx.training.checkpoint import Checkpoints, Damaged, Vanished
from efficient_tx.training.disk import CHECKSUMS
from efficient_tx.training.errors import Refused, refusing
from efficient_tx.training.history import NAME, History, copies_in
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.optimizer import evaluation_params
from efficient_tx.training.stages import Stage, stage_at
from efficient_tx.training.step import NOTHING, make_eval_step, replicate, split_batch

# How often a checkpoint is looked for anew that a live run deleted while it was read.
TRIES = 10


class Scores(NamedTuple):
    """Scores of a model on a split.

    Attributes:
      means: the mean loss and the mean of every metric of the objective, over the items.
      count: items that were counted; an item is a label if there is one per token, else an example.
      examples_per_second: rows of batches over wall time. The first batch of each shape compiles and is not timed; None
        if there is no other batch.
    """

    means: dict[str, float]
    count: int
    examples_per_second: float | None


def prefetch(batches: grain.MapDataset, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields `batches[start:stop]`, split over the local devices; threads prepare a few batches ahead.

    Raises:
      Refused: (while iterating) an example cannot be read.
    """
    split = partial(split_batch, devices=jax.local_devices())
    read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    with refusing():
        yield from batches[start:stop].map(split).to_iter_dataset(read)


def make_evaluate(
    graphdef: nnx.GraphDef,
    objective: Objective = CLASSIFICATION,
    *,
    given: Mapping[str, Any] = NOTHING,
    draw: int = 0,
    keep: Callable[[Batch, dict[str, jax.Array]], None] | None = None,
) -> Callable[..., Scores]:
    """Returns evaluate(params, batches, check=None) -> Scores over all devices and processes; each item counts once.

    `check` is called before each batch; an exception from it ends the evaluation. `given` and `draw` are those of
    `eval_step`; `keep` gets each batch with the rows of `eval_step`, both `[devices, b, ...]`.
    """
    step = make_eval_step(graphdef, objective=objective, given=given, draw=draw, rows=keep is not None)

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
            if keep is not None:
                part, answers = part
                keep(batch, answers)
            # One batch behind, so the device does not wait for the host. Python's floats add up exactly.
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
    """Returns (step, its stage, parameters to evaluate) of a checkpoint of the run in the workdir `path`.

    A run that is going on may delete the checkpoint meanwhile; then the best or last one is looked for again.

    Args:
      which: "best" (on validation, by the objective), "last", or a step. If the best or last one is damaged, `warn`
        gets one line, and the next best or next older one is used.
      stages: stages of this run; they define the structure of the state at each step. The values of the models are not
        used.

    Raises:
      Refused: there is no such checkpoint, none opens, or the parameters do not fit the model of their stage.
    """
    checkpoints = Checkpoints(Path(path) / "checkpoints")
    for tries in reversed(range(TRIES)):
        wanted, notes = _choice(Path(path), which, checkpoints, stages[0].objective)
        try:
            step, state = checkpoints.first_usable(
                wanted, lambda step: stage_at(stages, step).like(), notes.append, passing=Damaged
            )
            break
        except Vanished:
            notes.clear()
            if not tries:
                raise
        finally:
            for note in notes:
                warn(note)
    return step, stage_at(stages, step), evaluation_params(state.optimizer, state.params)


def _choice(path: Path, which: str, checkpoints: Checkpoints, objective: Objective) -> tuple[list[int], list[str]]:
    """The steps that `which` may mean, the first one first; and lines about what is damaged or missing."""
    steps = checkpoints.steps()
    if not steps:
        raise Refused(f"{path} has no checkpoint yet: train it first")
    notes = [] if (path / CHECKSUMS).exists() else [f"{path} has no {CHECKSUMS}, as in older versions: read unchecked"]
    named = [step for step in steps if str(step) == (which.lstrip("0") or which[-1:])]
    if named or which == "last":
        return named or steps[::-1], notes
    if which != "best":
        known = f"{path} has best, last and the steps {', '.join(map(str, steps))}"
        raise Refused(f"{which}: {known}", option="checkpoint")
    ranked, damage = _ranked(path, checkpoints, objective)
    steps = checkpoints.steps()
    if ranked and ranked[0] not in steps:
        # Of a run that is going on, another may have become the best meanwhile.
        ranked, damage = _ranked(path, checkpoints, objective)
        steps = checkpoints.steps()
    there = [step for step in ranked if step in steps]
    if not there:
        damage.append(f"{path} has no checkpoint that was validated: the newest stands for the best")
    elif there[0] != ranked[0]:
        damage.append(f"{path} has no checkpoint of step {ranked[0]}, its best; using {there[0]} instead")
    return there or steps[::-1], notes + damage


def _ranked(path: Path, checkpoints: Checkpoints, objective: Objective) -> tuple[list[int], list[str]]:
    """Validated steps, best first; and a line if metrics.jsonl is damaged, whose lines the checkpoints have as well."""
    # In this order: of a run that is going on, metrics.jsonl is ahead of the copies.
    copies = copies_in(checkpoints.directory)
    history = History(path / NAME, writer=False)
    if not any(line["split"] == "validation" for line in history.complete(copies)) and not history.damaged:
        # Of an older version the whole workdir is unchecked, which is said already.
        return history.ranked(objective), [history.unchecked] if history.unchecked and (
            path / CHECKSUMS
        ).exists() else []
    complete = copies and not copies[-1].damaged
    known = (
        "but the checkpoints have copies of all validation lines" if complete else "another checkpoint may be the best"
    )
    return history.ranked(objective), [f"{history.path}: {history.damage}; {known}"]
