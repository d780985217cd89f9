"""Floating-point operations of a traced program: two for each multiplication of its matrix products."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Uncounted(Exception):
    """A loop whose number of turns is not known before it runs."""


def of_program(jaxpr: Any) -> float | None:
    """Operations of a closed jaxpr, of one device where it is mapped; None if they cannot be counted.

    Counted are matrix products and convolutions: what is done for each element, such as softmax, is not, nor are
    Fourier transforms. Where a program has several implementations, that of a CPU or an accelerator without a kernel of
    ours is counted.
    """
    try:
        return 2.0 * products(jaxpr.jaxpr)
    except Uncounted:
        return None


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
