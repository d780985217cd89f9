"""Counts the multiplications that a traced function makes for each row of its input."""

import math

import jax
import jax.numpy as jnp

ROWS = 128


def per_row(function, width, dtype=jnp.float32):
    """Multiplications of `function([rows, width])` for one more row, so that what is done once a call drops out.

    Counted are matrix products, products and squares of arrays (4 for complex numbers), and Fourier transforms:
    n ⌈log₂ n⌉ for n real numbers, twice that for complex ones.
    """
    some, more = (
        total(jax.make_jaxpr(function)(jax.ShapeDtypeStruct((rows, width), dtype)).jaxpr) for rows in (ROWS, 2 * ROWS)
    )
    each, rest = divmod(more - some, ROWS)
    assert rest == 0, f"{more - some} more multiplications for {ROWS} more rows"
    return each


def total(jaxpr):
    """Multiplications of a jaxpr, those of the jaxprs inside it included."""
    return sum(map(of_equation, jaxpr.eqns))


def of_equation(equation):
    name, params, out = equation.primitive.name, equation.params, equation.outvars[0].aval
    size = math.prod(out.shape) * (4 if jnp.issubdtype(out.dtype, jnp.complexfloating) else 1)
    if name in ("mul", "square"):
        return size
    if name == "integer_pow":
        return size * (abs(params["y"]).bit_length() + abs(params["y"]).bit_count() - 2)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return size * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    if name == "fft":
        (length,) = params["fft_lengths"]
        numbers = 2 if params["fft_type"] in (jax.lax.FftType.FFT, jax.lax.FftType.IFFT) else 1
        return math.prod(out.shape[:-1]) * numbers * length * math.ceil(math.log2(length))
    assert name not in ("while", "pallas_call", "conv_general_dilated"), f"cannot count {name}"
    return of_inner(equation, total)


def products(jaxpr):
    """Those of the matrix products and convolutions of a jaxpr alone; the zeros around an image count as any number."""
    return sum(map(of_product, jaxpr.eqns))


def of_product(equation):
    if equation.primitive.name == "dot_general":
        return of_equation(equation)
    if equation.primitive.name == "conv_general_dilated":
        features = equation.params["dimension_numbers"].out_spec[1]
        out, kernel = equation.outvars[0].aval, equation.invars[1].aval
        return out.size * kernel.size // out.shape[features]
    return of_inner(equation, products)


def of_inner(equation, count):
    """What `count` says of the jaxprs inside an equation, as often as they run."""
    name, params = equation.primitive.name, equation.params
    inside = jaxprs_in(equation)
    if name == "cond":
        inner = [count(jaxpr) for jaxpr in inside if not has_kernel(jaxpr)]  # kernels are for another platform
        assert len(set(inner)) == 1, f"the branches make {inner} multiplications"
        return inner[0]
    return sum(map(count, inside)) * (params["length"] if name == "scan" else 1)


def has_kernel(jaxpr):
    """Whether there is a Pallas kernel in a jaxpr or in one inside it."""
    return any(
        equation.primitive.name == "pallas_call" or any(map(has_kernel, jaxprs_in(equation))) for equation in jaxpr.eqns
    )


def jaxprs_in(equation):
    leaves = jax.tree.leaves(equation.params, is_leaf=is_jaxpr)
    return [getattr(value, "jaxpr", value) for value in leaves if is_jaxpr(value)]


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
