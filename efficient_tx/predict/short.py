"""A short run: the first steps of a run, as `train` would take them, and what is seen until then."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from efficient_tx.config.build import build_stages
from efficient_tx.data.batching import evaluation_batches, train_batches
from efficient_tx.task import Task
from efficient_tx.training import metrics
from efficient_tx.training.errors import NonFinite
from efficient_tx.training.evaluation import make_evaluate, prefetch
from efficient_tx.training.objective import objective_of
from efficient_tx.training.optimizer import evaluation_params
from efficient_tx.training.step import clear_window, init_state, make_train_step

# Validation examples that are looked at, the first ones.
EXAMPLES = 512


class Short(NamedTuple):
    """Attributes:
    losses: of training, of each step.
    validation: mean loss and metrics of the first validation examples, after the last step.
    seconds: that a step takes once it is compiled; None of one step.
    """

    losses: list[float]
    validation: dict[str, float]
    seconds: float | None


def short_run(config: ConfigDict, task: Task, model: nnx.Module, steps: int, say: Callable[[str], None]) -> Short:
    """Takes the first `steps` steps of the run of a config, with its schedule, batches, keys and devices.

    It ends before a stage in which the model changes its form. `model` keeps its parameters.

    Raises:
      NonFinite: a loss or a gradient is not finite.
    """
    objective = objective_of(task)
    stages, _ = build_stages(config, model, objective)
    stage = stages[0]
    steps = min([steps, *(later.start for later in stages[1:])])
    graphdef = nnx.split(model)[0]
    step = make_train_step(
        graphdef, stage.optimizer, seed=config.seed, objective=objective, given=stage.given,
        grad_accum=config.grad_accum, lengths=config.lengths,
    )  # fmt: skip
    state = init_state(model, stage.optimizer, objective)
    losses, times = [], []
    for batch in prefetch(train_batches(task, batch_size=config.batch_size, seed=config.seed), 0, steps):
        began = time.perf_counter()
        state = step(state, batch)
        if int(state.bad_step) >= 0:
            raise NonFinite(f"the loss or a gradient of step {len(losses) + 1} is not finite")
        losses.append(metrics.means(state.window)["loss"])
        state = clear_window(state)
        times.append(time.perf_counter() - began)
        say(f"step {len(losses)} of {steps}")
    few = [task.validation[i] for i in range(min(EXAMPLES, len(task.validation)))]
    batches = evaluation_batches(few, task, batch_size=config.batch_size)
    evaluate = make_evaluate(graphdef, objective, given=stage.given)
    found = evaluate(evaluation_params(state.optimizer, state.params), batches)
    return Short(losses, found.means, float(np.median(times[1:])) if len(times) > 1 else None)


def steps_of(config: ConfigDict, budget: float) -> int:
    """The steps of a short run: a share of those of the run, at least one."""
    return max(1, round(budget * config.steps))
