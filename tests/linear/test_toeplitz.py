"""Toeplitz weights against scipy.linalg.toeplitz, numpy's means of diagonals and the definition of causal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

from efficient_tx.linear import Toeplitz

SIZES = [(13, 7), (6, 17)]
sizes = pytest.mark.parametrize(("n", "m"), SIZES)
kinds = pytest.mark.parametrize("kind", ["plain", "causal", "circulant"])


def options(kind):
    return {} if kind == "plain" else {kind: True}


def oracle(t, kind, n, m):
    """The matrix [in, out] by scipy, whose first column is what stays behind the diagonal, of `t` by rising lag."""
    if kind == "plain":
        return scipy.linalg.toeplitz(t[n - 1 :: -1], t[n - 1 :])
    if kind == "causal":
        return scipy.linalg.toeplitz(np.append(t[0], np.zeros(n - 1)), t)
    return scipy.linalg.circulant(t).T[:n, :m]


@kinds
@sizes
def test_multiplies_with_scipys_matrix(n, m, kind):
    with jax.enable_x64(True):

        @jax.jit
        def run(x):
            layer = Toeplitz(n, m, param_dtype=jnp.float64, use_bias=False, rngs=nnx.Rngs(0), **options(kind))
            return layer.diagonals[...], layer.to_dense(), layer(x)

        x = np.random.default_rng(0).normal(size=(3, 2, n))
        diagonals, dense, out = map(np.asarray, run(x))
    weight = oracle(diagonals, kind, n, m)
    np.testing.assert_array_equal(dense, weight)
    np.testing.assert_allclose(out, x @ weight, atol=1e-13)  # rounding of transforms of about 30 numbers
    assert diagonals.size == {"plain": n + m - 1, "causal": m, "circulant": max(n, m)}[kind]


@kinds
@sizes
def test_projection_is_the_mean_of_every_diagonal(n, m, kind):
    """Least squares over the matrices with a one on each diagonal, by numpy."""
    kernel = np.random.default_rng(0).normal(size=(n, m))
    with jax.enable_x64(True):
        found = jax.jit(lambda kernel: Toeplitz.from_dense(kernel, **options(kind)).diagonals[...])(kernel)
        basis = np.stack([oracle(unit, kind, n, m).ravel() for unit in np.eye(len(found))], axis=1)
        best = np.linalg.lstsq(basis, kernel.ravel(), rcond=None)[0]
        np.testing.assert_allclose(found, best, atol=1e-13)  # float64


@kinds
@sizes
def test_mean_variance_over_the_outputs_is_one(n, m, kind):
    """Exactly, over the draws: the variance of a number times how often it appears in an output."""
    layer = nnx.eval_shape(lambda: Toeplitz(n, m, rngs=nnx.Rngs(0), **options(kind)))
    factor = layer.factors()["diagonals"]
    appearances = np.count_nonzero(oracle(np.ones(factor.shape), kind, n, m), axis=0).mean()
    assert factor.variance is None
    assert appearances / factor.fan_in == pytest.approx(1.0)


def test_transforms_are_float32_in_bfloat16():
    """A float16 or bfloat16 transform of 1000 numbers would be off by several parts in 1000 of the whole output."""
    layer = Toeplitz(500, 500, dtype=jnp.bfloat16, use_bias=False, rngs=nnx.Rngs(0))
    run = jax.jit(lambda layer, x: layer(x))
    x = jax.random.normal(jax.random.key(0), (4, 500)).astype(jnp.bfloat16)
    t = layer.diagonals[...].astype(jnp.bfloat16).astype(jnp.float32)
    exact = np.asarray(x, np.float64) @ oracle(np.asarray(t, np.float64), "plain", 500, 500)
    out = run(layer, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float64), exact, rtol=2**-8, atol=1e-5)  # rounding of the output only


@pytest.mark.quick
def test_refuses_causal_and_circulant_at_once():
    with pytest.raises(ValueError, match="causal=True and circulant=True"):
        Toeplitz(4, 4, causal=True, circulant=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("least", "length"), [(1, 1), (7, 8), (11, 12), (31, 32), (121, 125), (1009, 1024), (97, 100)])
def test_lengths_have_small_factors(least, length):
    assert nnx.eval_shape(lambda: Toeplitz(1, least, rngs=nnx.Rngs(0))).length == length
