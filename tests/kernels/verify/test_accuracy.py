"""Errors of an implementation and races of a kernel are found where there are some."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.verify import accuracy


def square(x, *, implementation=None, interpret=False, off=1e-3):
    """x², by a tenth of a per cent too large in all implementations but the reference."""
    return (x * x if implementation == "reference" else (1 + off) * x * x), None


def test_errors_are_relative_to_float64_and_of_both_passes():
    found = accuracy.errors(Case(square, (shape("float32", 50),)), 0, implementation="xla")
    # The error is the same share of every entry, the largest one included.
    assert found == {"forward": pytest.approx(1e-3, rel=1e-3), "gradient": pytest.approx(1e-3, rel=1e-3)}


@pytest.mark.quick
def test_an_infinity_is_an_error_where_the_formula_has_none():
    exact = np.array([1.0, -np.inf])
    assert accuracy.error(jnp.array([1.0, -jnp.inf]), exact) == 0
    assert accuracy.error(jnp.array([jnp.nan, -jnp.inf]), exact) == np.inf
    assert accuracy.error(jnp.array([1.0, 0.0]), exact) == np.inf


@pytest.mark.quick
def test_beside_zeros_the_error_itself_counts():
    assert accuracy.error(jnp.array([0.0, 3e-8]), np.zeros(2)) == pytest.approx(3e-8)


@pytest.mark.parametrize(("meaning", "some"), [("parallel", True), ("arbitrary", False)])
def test_a_sum_over_an_axis_said_to_be_parallel_is_a_race(meaning, some):
    def total(x, *, implementation=None, interpret=False):
        def kernel(x, out):
            @pl.when(pl.program_id(0) == 0)
            def _():
                out[...] = jnp.zeros_like(out)

            out[...] += x[...]

        @jax.custom_vjp
        def call(x):
            return pl.pallas_call(
                kernel, grid=(4,), in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
                out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)), out_shape=jax.ShapeDtypeStruct((8, 128), x.dtype),
                compiler_params=pltpu.CompilerParams(dimension_semantics=(meaning,)), interpret=interpret,
            )(x)  # fmt: skip

        call.defvjp(lambda x: (call(x), None), lambda _, g: (jnp.tile(g, (4, 1)),))
        return call(x)

    assert (accuracy.races(Case(total, (shape("float32", 32, 128),)), 0) > 0) == some
