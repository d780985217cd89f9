"""Linformer and Fourier against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import fourier, linformer
from efficient_tx.attention.fixed.fourier import Fourier, chirp_phase


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_linformer_is_its_formula_and_exact_with_the_identity():
    with jax.enable_x64(True):
        q, k, v = (normal(seed, 2, 9, 3, 4) for seed in range(3))
        e, f = normal(3, 5, 12), normal(4, 5, 12)
        lengths, expected = (9, 4), np.zeros_like(v)
        for b, n in enumerate(lengths):
            for h in range(3):
                keys, values = e[:, :n] @ k[b, :n, h], f[:, :n] @ v[b, :n, h]
                expected[b, :, h] = softmax(q[b, :, h] @ keys.T / 2) @ values
        mask = np.arange(9) < np.array(lengths)[:, None]
        attend = jax.jit(linformer)
        ours = attend(*map(jnp.asarray, (q, k, v)), e=jnp.asarray(e), f=jnp.asarray(f), mask=jnp.asarray(mask))
        np.testing.assert_allclose(ours, expected, atol=1e-12)  # float64 rounding

        ours = attend(*map(jnp.asarray, (q, k, v)), e=jnp.eye(9), f=jnp.eye(9))
        exact = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 2) @ v.swapaxes(1, 2)
        np.testing.assert_allclose(ours, exact.swapaxes(1, 2), atol=1e-12)


def test_linformer_takes_grouped_heads_other_queries_and_other_values():
    with jax.enable_x64(True):
        q, k, v = normal(0, 2, 5, 4, 6), normal(1, 2, 9, 2, 6), normal(2, 2, 9, 2, 3)
        e, f = jnp.asarray(normal(3, 7, 9)), jnp.asarray(normal(4, 7, 9))
        grouped = linformer(*map(jnp.asarray, (q, k, v)), e=e, f=f)
        repeated = linformer(jnp.asarray(q), *(jnp.repeat(x, 2, axis=2) for x in (k, v)), e=e, f=f)
        assert grouped.shape == (2, 5, 4, 3)
        np.testing.assert_allclose(grouped, repeated, atol=1e-12)
        with pytest.raises(ValueError, match="max_len=9"):
            linformer(*(jnp.zeros((1, 10, 1, 2)),) * 3, e=e, f=f)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 37])
def test_fourier_is_numpys_transform_of_the_real_tokens(n):
    x = normal(0, 2, 37, 6)
    mask = np.zeros((2, 37), bool)
    mask[0, :n] = mask[1, 37 - n :] = True
    expected = [np.fft.fft2(x[b][mask[b]]).real for b in range(2)]
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(fourier)(jnp.asarray(x), mask=jnp.asarray(mask)))
    for b in range(2):
        np.testing.assert_allclose(ours[b][mask[b]], expected[b], atol=1e-10)
        assert (ours[b][~mask[b]] == 0).all()
    single = np.asarray(jax.jit(fourier)(jnp.asarray(x, jnp.float32), mask=jnp.asarray(mask)))
    scale = max(1.0, np.abs(expected[0]).max())
    np.testing.assert_allclose(single[0][mask[0]] / scale, expected[0] / scale, atol=2e-6)  # float32, three FFTs


def test_fourier_module_is_orthonormal_on_the_real_tokens():
    x = normal(0, 1, 8, 4).astype(np.float32)
    mixed = Fourier(4, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(mixed[0], np.fft.fft2(x[0], norm="ortho").real, atol=1e-5)  # float32


def test_chirp_phases_stay_exact_where_the_square_overflows():
    n = 70001
    ours = np.asarray(jax.jit(chirp_phase, static_argnums=0)(n, jnp.int32(n)))
    np.testing.assert_array_equal(ours, np.arange(n, dtype=np.int64) ** 2 % (2 * n))
