"""Floating-point operations of the training steps of a run, from its config."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.config.build import build_model, build_stages
from efficient_tx.config.check import empty_inputs
from efficient_tx.config.names import task_without_data
from efficient_tx.config.stored import restore
from efficient_tx.numerics.flops import of_program
from efficient_tx.task import Task


class From(NamedTuple):
    """What each step costs from one on: steps done before, and operations."""

    start: int
    operations: float


# Label of a method -> its steps; None where their operations cannot be counted.
Costs = Mapping[str, Sequence[From] | None]


def of_steps(stored: Mapping[str, Any]) -> list[From] | None:
    """Of the steps of a run with this config.json, stage by stage; None if a program cannot be counted.

    Counted is what `of_program` counts, forward and backward, on full-length examples.
    """
    config = restore(stored)
    task = task_without_data(config.task)
    stages, _ = build_stages(config, nnx.eval_shape(lambda: build_model(config, task)))
    found = [From(stage.start, of_model(stage.model, task, config.batch_size)) for stage in stages]
    return None if any(stage.operations is None for stage in found) else found


def of_model(model: nnx.Module, task: Task, batch_size: int) -> float | None:
    """Of a step with a batch of full-length examples; None if its program cannot be counted."""
    graphdef, params = nnx.split(model)

    def total(params):
        return jnp.sum(nnx.merge(graphdef, params)(**full(empty_inputs(task)), key=jax.random.key(0)))

    count = of_program(lambda: jax.make_jaxpr(jax.grad(total))(params))
    return None if count is None else count * batch_size


def used(stages: Sequence[From], steps: np.ndarray) -> np.ndarray:
    """Operations until each of the steps."""
    ends = [stage.start for stage in stages[1:]] + [np.inf]
    return sum(
        stage.operations * np.clip(steps - stage.start, 0, end - stage.start) for stage, end in zip(stages, ends)
    )


def full(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.ones_like(x) if name.startswith("mask") else x for name, x in inputs.items()}
