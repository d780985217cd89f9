"""Floating-point operations of a training step of a run, from its config."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.config.build import build_model
from efficient_tx.config.check import empty_inputs
from efficient_tx.config.names import task_without_data
from efficient_tx.config.stored import restore
from efficient_tx.numerics.flops import of_program


def of_step(stored: Mapping[str, Any]) -> float | None:
    """Of a step of a run with this config.json; None if its program cannot be counted.

    Counted is what `of_program` counts, forward and backward, on full-length examples.
    """
    config = restore(stored)
    task = task_without_data(config.task)
    model = nnx.eval_shape(lambda: build_model(config, task))
    graphdef, params = nnx.split(model)

    def total(params):
        return jnp.sum(nnx.merge(graphdef, params)(**full(empty_inputs(task)), key=jax.random.key(0)))

    count = of_program(lambda: jax.make_jaxpr(jax.grad(total))(params))
    return None if count is None else count * config.batch_size


def full(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.ones_like(x) if name.startswith("mask") else x for name, x in inputs.items()}
