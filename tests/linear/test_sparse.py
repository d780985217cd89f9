"""Sparse weights: the pattern, the exact projection, the gradient at absent entries, and the packed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_tx.linear import Sparse
from efficient_tx.linear.sparsity import count_kept
from efficient_tx.training.optimizer import make_optimizer

N, M = 26, 16  # 26 inputs are three bytes and a quarter
PATTERNS = [{"pattern": "2:4"}, {"density": 0.3}]
patterns = pytest.mark.parametrize("options", PATTERNS, ids=["2:4", "top"])


def layer(**options):
    made = Sparse(N, M, rngs=nnx.Rngs(0), **options)
    if made.bias is not None:
        made.bias[...] = jnp.linspace(-1, 1, M, dtype=made.param_dtype)
    return made


def batch():
    return np.random.default_rng(0).normal(size=(6, N)).astype(np.float32)


def error_of(kernel, **options):
    with jax.enable_x64(True):
        return np.linalg.norm(kernel - np.asarray(Sparse.from_dense(jnp.asarray(kernel), **options).to_dense()))


def test_projection_is_the_best_of_all_patterns():
    """Brute force over all choices of entries of 3 × 4, and over all pairs in each column of a group of 5 × 2."""
    kernel = np.random.default_rng(0).normal(size=(3, 4))
    for kept in (1, 5, 12):
        chosen = (np.delete(kernel.ravel(), places) for places in itertools.combinations(range(12), kept))
        best = min(map(np.linalg.norm, chosen))
        assert error_of(kernel, density=kept / 12) == pytest.approx(best, rel=1e-12)
    kernel = np.random.default_rng(1).normal(size=(5, 2))
    pairs = list(itertools.combinations(range(4), 2))
    best = np.inf
    for rows in itertools.product(pairs, pairs):
        left = kernel.copy()
        left[4] = 0  # a group of one keeps it
        for column, kept in enumerate(rows):
            left[list(kept), column] = 0
        best = min(best, np.linalg.norm(left))
    assert error_of(kernel, pattern="2:4") == pytest.approx(best, rel=1e-12)


@pytest.mark.quick
def test_what_is_kept_is_counted():
    for options, kept in [({}, 208), ({"density": 0.3}, 125), ({"pattern": "2:4"}, 14 * 16), ({"density": 1e-9}, 1)]:
        made = layer(**options)
        there = np.asarray(made.sparse[...]) != 0
        assert there.sum() == made.kept == made.multiplies == kept == made.parameters - M
        assert np.square(made.sparse[...]).sum() / M == pytest.approx(1, rel=1e-5)  # float32: scaled to it
    groups = np.pad(np.asarray(layer(pattern="2:4").sparse[...]) != 0, [(0, 2), (0, 0)]).reshape(7, 4, M)
    assert (groups.sum(1) == 2).all()


@pytest.mark.quick
@pytest.mark.parametrize(("n", "m"), [(1, 5), (13, 7), (64, 48)])
def test_sizes_are_of_increasing_storage(n, m):
    option, values = Sparse.sized_by(n, m)
    kept = [count_kept(n, m, pattern="top", default=0.5, **{option: value}) for value in values]
    assert kept == sorted(set(kept)) and kept[-1] == n * m


@patterns
def test_absent_entries_get_no_gradient_and_stay_zero(options):
    made, x, g = layer(**options), batch(), np.random.default_rng(1).normal(size=(6, M)).astype(np.float32)
    graphdef, params = nnx.split(made)
    optimizer, _ = make_optimizer(steps=3, name="muon", learning_rate=0.1, schedule="constant", warmup=0)

    @jax.jit
    def step(params):
        grads = jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) * g))(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return grads, optax.apply_updates(params, updates)

    before = np.asarray(params["sparse"][...])
    grads, params = step(params)
    gradient, after = np.asarray(grads["sparse"][...]), np.asarray(params["sparse"][...])
    assert (gradient[before == 0] == 0).all() and (after[before == 0] == 0).all()
    np.testing.assert_allclose(gradient[before != 0], (x.T @ g)[before != 0], rtol=1e-5, atol=1e-5)  # float32
    assert (after[before != 0] != before[before != 0]).all()


@pytest.mark.quick
def test_bits_and_values_are_where_they_are_said_to_be():
    kernel = np.zeros((10, 3), np.float32)
    kernel[0, 1], kernel[3, 0], kernel[9, 2], kernel[3, 2] = 5, 6, 7, 8
    packed = Sparse.from_dense(jnp.asarray(kernel), density=6 / 30).pack()
    np.testing.assert_array_equal(packed.values[...], [5, 6, 8, 7, 0, 0])  # row after row, then what is not there
    # Two rows of bytes: input i + 2 p is bit p of row i.
    np.testing.assert_array_equal(packed.bitmask[...], [[0, 1, 0], [2, 0, 2 + 16]])
    np.testing.assert_array_equal(packed.to_dense(), kernel)
    assert packed.bytes_stored == 6 * 4 + 2 * 3


def test_packed_bytes_by_hand():
    held = {jnp.float32: 4, jnp.bfloat16: 2}
    for dtype, size in held.items():
        packed = layer(density=0.25, param_dtype=dtype).pack()
        assert packed.bytes_stored == 104 * size + 4 * 16 + 16 * size  # values, ⌈26 / 8⌉ × 16 bytes of bits, bias
        assert not jax.tree.leaves(nnx.state(packed, nnx.Param))


@pytest.mark.quick
def test_a_weight_that_its_pattern_cannot_hold_is_not_packed():
    made = layer(density=0.25)
    made.sparse[...] = np.ones((N, M), np.float32)
    with pytest.raises(ValueError, match="the weight has 416 nonzero entries, and its pattern keeps 104"):
        made.pack()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "1:4"}, "pattern is '1:4': choose '2:4' or 'top'"),
        ({"pattern": "2:4", "density": 0.3}, "density is 0.3: pattern '2:4' keeps a half"),
        ({"density": 0.0}, "density is 0.0: it must be above 0"),
        ({"density": float("nan")}, "density is nan: it must be above 0"),
    ],
)
def test_refuses_patterns_that_do_not_exist(options, words):
    with pytest.raises(ValueError, match=words):
        Sparse(4, 4, rngs=nnx.Rngs(0), **options)
