"""Fourier mixing against NumPy's transform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import fourier
from efficient_tx.attention.fixed.fourier import Fourier, chirp_phase


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


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


@pytest.mark.quick
def test_fourier_module_is_orthonormal_on_the_real_tokens():
    x = normal(0, 1, 8, 4).astype(np.float32)
    mixed = Fourier(4, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(mixed[0], np.fft.fft2(x[0], norm="ortho").real, atol=1e-5)  # float32


def test_chirp_phases_stay_exact_where_the_square_overflows():
    n = 70001
    ours = np.asarray(jax.jit(chirp_phase, static_argnums=0)(n, jnp.int32(n)))
    np.testing.assert_array_equal(ours, np.arange(n, dtype=np.int64) ** 2 % (2 * n))
