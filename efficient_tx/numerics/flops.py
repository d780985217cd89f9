"""Floating-point operations of a traced program: two for each multiplication of its matrix products and solves."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Within `counting(True)` a program is traced to be counted: without loops whose number of turns only a run tells, as
# those that pass over what a mask empties.
counting = jax.make_user_context(False)


class Uncounted(Exception):
    """A loop whose number of turns is not known before it runs, or a decomposition without a known number."""


def of_program(trace: Callable[[], Any]) -> float | None:
    """Operations of the program that `trace()` returns traced, of one device where it is mapped; None if unknown.

    Counted are matrix products, convolutions, triangular solves, factorisations (Golub and Van Loan 2013, without lower
    powers of n) and Fourier transforms (by 5 n log₂ n, half of it for real ones): what is done for each element, such
    as softmax or a scan of decays, is not. Exact attention has all its pairs of tokens, also those that a mask empties,
    and keeps its weights for the backward pass. Where a program has several implementations, that of a CPU or an
    accelerator without a kernel of ours is counted; where it takes one of several branches, the most expensive one.
    """
    try:
        with counting(True):
            return 2.0 * products(trace().jaxpr)
    except Uncounted:
        return None


def products(jaxpr: Any) -> float:
    """Multiplications of the matrix products and solves in a jaxpr. Raises Uncounted."""
    return sum(map(of_equation, jaxpr.eqns))


def of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name in COUNTS:
        return COUNTS[name](equation)
    inner = list(inside(equation))
    if name == "cond":
        if params.get("branches_platforms"):
            inner = [jaxpr for jaxpr in inner if not has_kernel(jaxpr)]
        return max(map(products, inner), default=0)
    count = sum(map(products, inner))
    if count and name == "while":
        raise Uncounted
    return count * (params["length"] if name == "scan" else 1)


def of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def of_convolution(equation: Any) -> int:
    features = equation.params["dimension_numbers"].out_spec[1]
    out, kernel = equation.outvars[0].aval, equation.invars[1].aval
    return out.size * kernel.size // out.shape[features]


def of_fourier(equation: Any) -> float:
    """Of n numbers 5 n log₂ n operations: of complex ones, on one side or on both."""
    lengths = equation.params["fft_lengths"]
    x, out = equation.invars[0].aval, equation.outvars[0].aval
    full = max(x, out, key=lambda one: one.size)
    real = x.dtype.kind != "c" or out.dtype.kind != "c"
    return (1.25 if real else 2.5) * full.size * math.log2(math.prod(lengths))


def of_cholesky(equation: Any) -> float:
    x = equation.outvars[0].aval
    return x.size * x.shape[-1] / 6


def of_solve(equation: Any) -> float:
    """A triangle, which each number of the right side meets."""
    triangle, right = (operand.aval for operand in equation.invars)
    return right.size * triangle.shape[-1] / 2


def of_qr(equation: Any) -> float:
    """Householder's: the reflections, and Q from them."""
    *batch, m, n = equation.invars[0].aval.shape
    m, n = max(m, n), min(m, n)
    return math.prod(batch) * 2 * (m * n**2 - n**3 / 3)


def of_eigenvectors(equation: Any) -> float:
    """The symmetric QR algorithm's."""
    x = equation.invars[0].aval
    return x.size * x.shape[-1] * 4.5


def refuse(equation: Any) -> float:
    raise Uncounted(equation.primitive.name)


COUNTS: dict[str, Callable[[Any], float]] = {
    "dot_general": of_product,
    "conv_general_dilated": of_convolution,
    "fft": of_fourier,
    "cholesky": of_cholesky,
    "triangular_solve": of_solve,
    "qr": of_qr,
    "eigh": of_eigenvectors,
    **dict.fromkeys(("eig", "svd", "lu", "schur", "tridiagonal", "hessenberg"), refuse),
}


def inside(equation: Any) -> Iterator[Any]:
    """The jaxprs in the parameters of an equation."""
    is_jaxpr = lambda value: hasattr(value, "eqns") or hasattr(value, "jaxpr")  # noqa: E731
    for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
        if is_jaxpr(value):
            yield getattr(value, "jaxpr", value)


def has_kernel(jaxpr: Any) -> bool:
    return any(e.primitive.name == "pallas_call" or any(map(has_kernel, inside(e))) for e in jaxpr.eqns)
