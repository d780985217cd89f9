"""Monarch against its dense permutations and block-diagonals, the tail of its slices, and its published start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import Monarch, monarch


@pytest.mark.parametrize(("n", "m", "blocks"), [(16, 16, 4), (16, 16, 2), (24, 36, 3), (10, 14, 4), (8, 8, 1)])
@pytest.mark.first(1)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_published_monarch_start_loses_a_factor_of_nine():
    """Two uniform factors of variance 1 / (3 fan-in) one after the other; a dense layer's own loses 3."""
    x = jax.random.normal(jax.random.key(1), (256, 512))
    published, ours = (jnp.var(Monarch(512, 512, rngs=nnx.Rngs(0), init=init)(x)) for init in ("published", "variance"))
    assert float(published) == pytest.approx(1 / 9, rel=0.03)  # four deviations of 2 · 10^5 entries and inputs
    assert float(ours) == pytest.approx(1.0, rel=0.03)
    assert float(jnp.abs(Monarch(512, 256, rngs=nnx.Rngs(0), init="published").w2[...]).max()) <= 64**-0.5
    with pytest.raises(ValueError, match="init is 'theirs': choose 'variance' or 'published'"):
        Monarch(4, 4, rngs=nnx.Rngs(0), init="theirs")
