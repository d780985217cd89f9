"""Promises of every structured weight, over the table and over awkward sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import LINEAR, LowRank, Monarch, monarch

SIZES = [(13, 7), (1, 5), (40, 6)]  # prime, one, tall
# Fits that end in a local optimum: how far a second projection may move, relative to the weight, by their docstring.
FITTED = {"low_rank_plus_sparse": 0.15}
both = pytest.mark.parametrize("name", LINEAR)


def layer(name, n, m, seed=0, **options):
    return LINEAR[name](n, m, rngs=nnx.Rngs(seed), **options)


@both
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_is_affine_with_its_dense_weight(name, n, m):
    with jax.enable_x64(True):
        made = layer(name, n, m, param_dtype=jnp.float64)
        made.bias[...] = jnp.arange(m, dtype=jnp.float64)
        x = jax.random.normal(jax.random.key(1), (2, 3, n), jnp.float64)
        weight = np.asarray(made.to_dense())
        assert weight.shape == (n, m)
        # float64 rounding, and half a step in every input where a structure rounds its inputs
        step = made.input_step * np.abs(x).max(-1, keepdims=True)
        allowed = 1e-12 + step / 2 * np.abs(weight).sum(0)
        assert (np.abs(made(x) - (x @ weight + np.arange(m))) <= allowed).all()
        np.testing.assert_allclose(made(jnp.eye(n)), weight + np.arange(m), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_projection_is_deterministic_idempotent_and_keeps_the_bias(name, n, m):
    with jax.enable_x64(True):
        kernel = jax.random.normal(jax.random.key(0), (n, m), jnp.float64)
        bias = jnp.arange(m, dtype=jnp.float64)
        once = LINEAR[name].from_dense(kernel, bias)
        again = LINEAR[name].from_dense(kernel, bias)
        twice = LINEAR[name].from_dense(once.to_dense(), bias)
        np.testing.assert_array_equal(once.to_dense(), again.to_dense())
        tolerance = FITTED.get(name, 1e-12)  # float64 rounding of an SVD
        assert jnp.linalg.norm(twice.to_dense() - once.to_dense()) <= tolerance * jnp.linalg.norm(kernel)
        np.testing.assert_array_equal(once.bias[...], bias)
        assert LINEAR[name].from_dense(kernel).bias is None
        # An orthogonal projection never lengthens, and what it leaves over is orthogonal to what it keeps.
        left = kernel - once.to_dense()
        assert abs(float(jnp.vdot(left, once.to_dense()))) <= tolerance * float(jnp.vdot(kernel, kernel))


def test_low_rank_projection_is_the_truncated_svd():
    kernel = np.random.default_rng(0).normal(size=(12, 9)).astype(np.float32)
    singular = np.linalg.svd(kernel, compute_uv=False)
    made = LowRank.from_dense(jnp.asarray(kernel), rank=3)
    error = np.linalg.norm(kernel - np.asarray(made.to_dense()))
    assert error == pytest.approx(np.sqrt((singular[3:] ** 2).sum()), rel=1e-5)  # float32


@pytest.mark.parametrize(("n", "m", "blocks"), [(16, 16, 4), (16, 16, 2), (24, 36, 3), (10, 14, 4), (8, 8, 1)])
def test_monarch_projection_error_is_the_tail_of_its_slices(n, m, blocks):
    """Independent of the layer: slices are cut by index arithmetic from the definition."""
    kernel = np.random.default_rng(0).normal(size=(n, m))
    with jax.enable_x64(True):
        made = Monarch.from_dense(jnp.asarray(kernel), blocks=blocks)
        error = np.linalg.norm(kernel - np.asarray(made.to_dense())) ** 2
    p, s = -(-n // blocks), -(-m // blocks)
    rank = -(-min(p, s) // blocks)
    padded = np.zeros((p * blocks, s * blocks))
    padded[:n, :m] = kernel
    tail = 0.0
    for k in range(blocks):
        for l in range(blocks):
            singular = np.linalg.svd(padded[k * p : (k + 1) * p, l::blocks], compute_uv=False)
            tail += (singular[rank:] ** 2).sum()
    assert error == pytest.approx(tail, abs=1e-10)


def test_monarch_equals_its_permuted_block_diagonals():
    """Dense P-matrix build: block-diagonal, permutation, block-diagonal, permutation."""
    k, q, p, l, s = 3, 4, 5, 2, 7
    r = k * q // l
    rng = np.random.default_rng(0)
    w1, w2 = rng.normal(size=(k, q, p)), rng.normal(size=(l, s, r))
    first = np.zeros((k * q, k * p))
    for i in range(k):
        first[i * q : (i + 1) * q, i * p : (i + 1) * p] = w1[i]
    gather = np.zeros((l * r, k * q))  # row (l, r) takes hidden (r, l)
    for i in range(l):
        for j in range(r):
            gather[i * r + j, j * l + i] = 1
    second = np.zeros((l * s, l * r))
    for i in range(l):
        second[i * s : (i + 1) * s, i * r : (i + 1) * r] = w2[i]
    scatter = np.zeros((s * l, l * s))  # row (s, l) takes (l, s)
    for i in range(l):
        for j in range(s):
            scatter[j * l + i, i * s + j] = 1
    x = rng.normal(size=(6, k * p))
    with jax.enable_x64(True):
        ours = monarch(jnp.asarray(x), jnp.asarray(w1), jnp.asarray(w2))
    np.testing.assert_allclose(ours, x @ (scatter @ second @ gather @ first).T, atol=1e-12)


def test_fourier_transform_with_permuted_columns_is_one_monarch_matrix():
    """Dao et al. 2022: the DFT of size m² with columns (i, j) -> (j, i) is Monarch with m blocks, exactly."""
    blocks = 4
    n = blocks**2
    dft = np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n)
    permuted = dft.reshape(n, blocks, blocks).transpose(0, 2, 1).reshape(n, n)
    # Each slice has rank one over the complex numbers: its real rank-one projection of the complex SVD is exact.
    weight = permuted.T  # our kernels are [in, out]
    slices = weight.reshape(blocks, blocks, blocks, blocks).transpose(0, 3, 1, 2)
    singular = np.linalg.svd(slices, compute_uv=False)
    assert singular[..., 1:].max() < 1e-12
    with jax.enable_x64(True):
        made = Monarch.from_dense(jnp.asarray(weight), blocks=blocks)
        np.testing.assert_allclose(made.to_dense(), weight, atol=1e-12)


@both
@pytest.mark.parametrize(("n", "m"), [(130, 515), (515, 130)])
def test_output_variance_at_the_start_is_a_dense_layers(name, n, m):
    x = jax.random.normal(jax.random.key(1), (256, n))
    variance = jnp.mean(jnp.stack([jnp.var(layer(name, n, m, seed)(x)) for seed in range(4)]))
    assert float(variance) == pytest.approx(1.0, rel=0.1)  # 4 draws of ≥ 10^4 factor entries: sd about 2 %


def held_still(monkeypatch):
    """From now on `stop_gradient` gives what it gave in the first call of a function, again in every further call.

    The function then is one whose derivative, in every direction, is what autodiff computes. For a structure that
    rounds straight through, it is the layer with the roundings' errors as constants.

    Returns:
      Tells that a further call begins.
    """
    first, calls = [], []

    def stop_gradient(x):
        if len(calls) <= 1:
            first.append(x)
            return x
        return next(calls[-1])

    monkeypatch.setattr(jax.lax, "stop_gradient", stop_gradient)
    return lambda: calls.append(iter(first))


@both
def test_gradient_matches_finite_differences(name, monkeypatch):
    with jax.enable_x64(True):
        made = layer(name, 6, 9, param_dtype=jnp.float64)
        graphdef, params = nnx.split(made)
        x = jax.random.normal(jax.random.key(1), (2, 6), jnp.float64)

        def loss(params, x):
            return jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x)))

        direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), p.shape, p.dtype), params)
        slope = sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (jax.grad(loss)(params, x), direction))))
        step, again = 1e-6, held_still(monkeypatch)

        def along(distance):
            again()
            return loss(jax.tree.map(lambda p, d: p + distance * d, params, direction), x)

        along(0)
        difference = (along(step) - along(-step)) / (2 * step)
        assert float(slope) == pytest.approx(float(difference), abs=1e-7)  # rounding 1e-15 / step, curvature step²


@both
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_counts_are_what_is_stored(name, n, m):
    made = layer(name, n, m)
    made.bias[...] = jnp.ones(m)
    stored = jax.tree.leaves(nnx.state(made))
    assert made.parameters == sum(np.count_nonzero(leaf) for leaf in stored)  # a zero of a sparse matrix is not there
    assert made.bytes_stored == 4 * sum(leaf.size for leaf in stored)


@both
def test_computes_in_the_dtype_asked_for(name):
    made = layer(name, 8, 8, dtype=jnp.bfloat16)
    assert made(jnp.ones((2, 8))).dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(made))} == {jnp.dtype(jnp.float32)}


@both
def test_holds_parameters_only(name):
    variables = [v for _, v in nnx.to_flat_state(nnx.split(layer(name, 8, 8))[1])]
    assert variables
    assert all(type(v) is nnx.Param for v in variables)


@both
def test_refuses_what_is_no_matrix(name):
    with pytest.raises(ValueError, match="from_dense takes a matrix"):
        LINEAR[name].from_dense(jnp.ones((2, 3, 4)))


@pytest.mark.parametrize(
    ("name", "option"), [("low_rank", "rank"), ("monarch", "blocks"), ("low_rank_plus_sparse", "rank")]
)
def test_refuses_sizes_below_one(name, option):
    with pytest.raises(ValueError, match="must be at least 1"):
        layer(name, 4, 4, **{option: 0})
