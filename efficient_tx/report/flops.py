"""Floating-point operations of a training step: two for each multiplication of its matrix products, as traced."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.config.build import build_model
from efficient_tx.config.check import empty_inputs
from efficient_tx.config.names import task_module, task_sizes
from efficient_tx.config.stored import restore
from efficient_tx.task import Task


class Uncounted(Exception):
    """A loop whose number of turns is not known before it runs."""


def of_step(stored: Mapping[str, Any]) -> float | None:
    """Of a step of a run with this config.json; None if its program cannot be counted.

    Counted are matrix products and convolutions, forward and backward, on full-length examples: what is done for each
    element, such as softmax, is not, nor are Fourier transforms. Where a program has several implementations, that of a
    CPU or an accelerator without a kernel of ours is counted.
    """
    config = restore(stored)
    sizes = task_sizes(config.task)
    task = Task(*((),) * 3, kind=task_module(config.task.name).KIND, name="", source="", **sizes)
    model = nnx.eval_shape(lambda: build_model(config, task))
    graphdef, params = nnx.split(model)

    def total(params):
        return jnp.sum(nnx.merge(graphdef, params)(**full(empty_inputs(task)), key=jax.random.key(0)))

    try:
        jaxpr = jax.make_jaxpr(jax.grad(total))(params)
        return 2.0 * products(jaxpr.jaxpr) * config.batch_size
    except Uncounted:
        return None


def full(inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.ones_like(x) if name.startswith("mask") else x for name, x in inputs.items()}


def products(jaxpr: Any) -> int:
    """Multiplications of the matrix products and convolutions in a jaxpr. Raises Uncounted."""
    return sum(map(of_equation, jaxpr.eqns))


def of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
    if name == "conv_general_dilated":
        features = params["dimension_numbers"].out_spec[1]
        out, kernel = equation.outvars[0].aval, equation.invars[1].aval
        return out.size * kernel.size // out.shape[features]
    inner = list(inside(equation))
    if name == "cond":  # over platforms: kernels are for another one
        return max((products(jaxpr) for jaxpr in inner if not has_kernel(jaxpr)), default=0)
    count = sum(map(products, inner))
    if count and name == "while":
        raise Uncounted
    return count * (params["length"] if name == "scan" else 1)


def inside(equation: Any) -> Iterator[Any]:
    """The jaxprs in the parameters of an equation."""
    is_jaxpr = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
        if is_jaxpr(value):
            yield getattr(value, "jaxpr", value)


def has_kernel(jaxpr: Any) -> bool:
    return any(e.primitive.name == "pallas_call" or any(map(has_kernel, inside(e))) for e in jaxpr.eqns)
