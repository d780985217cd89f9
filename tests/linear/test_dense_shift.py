"""DenseShift: signed powers of two without zeros, their codes, the start for all numbers of bits, the best scale."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import DenseShift
from efficient_tx.linear.dense_shift import decode

bits = pytest.mark.parametrize("bits", [2, 3, 5])
N, M = 40, 30


def levels(layer):
    return np.asarray(layer.to_dense(), np.float64) / float(layer.gain[...] / layer.unit)


@bits
def test_weights_are_signed_powers_of_two_in_range(bits):
    layer = DenseShift(N, M, bits=bits, rngs=nnx.Rngs(0))
    # Latents over the range and outside of it, and signs at zero.
    layer.shift[...] = np.linspace(-3, layer.most + 3, N * M).reshape(N, M) / np.sqrt(N)
    layer.sign[...] = layer.sign[...].at[0].set(0.0)
    exponents = np.log2(np.abs(levels(layer)))
    np.testing.assert_allclose(exponents, np.round(exponents), atol=1e-6)  # float32 products by the scale
    assert set(np.round(exponents).ravel().astype(int)) == set(range(2 ** (bits - 1)))
    assert (layer.to_dense()[0] > 0).all()


@bits
def test_codes_hold_the_weight(bits):
    layer = DenseShift(N, M, bits=bits, rngs=nnx.Rngs(0))
    codes = layer.codes()
    assert codes.dtype == jnp.uint8
    assert codes.max() < 2**bits
    np.testing.assert_array_equal(decode(codes, bits) * (layer.gain[...] / layer.unit), layer.to_dense())
    every = np.arange(2**bits, dtype=np.uint8)
    expected = [(-1.0) ** (code >> (bits - 1)) * 2.0 ** (code % 2 ** (bits - 1)) for code in range(2**bits)]
    np.testing.assert_array_equal(decode(jnp.asarray(every), bits), expected)


@bits
def test_variance_at_the_start_is_a_dense_layers(bits):
    layer = DenseShift(256, 256, bits=bits, rngs=nnx.Rngs(0))
    weight = np.asarray(layer.to_dense())
    assert np.square(weight).sum(0).mean() == pytest.approx(1.0, rel=0.02)  # 65,536 squares of relative deviation < 1.2
    assert abs(weight.mean()) < 4 / np.sqrt(weight.size * 256)
    # Low variance: the two magnitudes in the middle of the range, equally often, are nearly all.
    shifts = np.asarray(layer.codes()) % 2 ** (bits - 1)
    lower, upper = (np.mean(shifts == shift) for shift in (layer.most // 2, layer.most // 2 + 1))
    assert lower == pytest.approx(0.5, abs=0.05)
    assert upper == pytest.approx(0.5, abs=0.05)


def test_gradients_pass_the_roundings():
    """By hand: dW = |W| √in du + ln 2 W √in dv + W/γ dγ, at the rounded weight."""
    layer = DenseShift(N, M, use_bias=False, rngs=nnx.Rngs(0))
    layer.shift[...] = layer.shift[...].at[0].set(5.0)  # outside the clip
    graphdef, params = nnx.split(layer)
    x, g = (np.random.default_rng(0).normal(size=(6, width)).astype(np.float32) for width in (N, M))
    grads = jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) * g)))(params)
    weight, by_weight, root = np.asarray(layer.to_dense()), x.T @ g, np.sqrt(N)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # float32
    np.testing.assert_allclose(grads["sign"][...], by_weight * np.abs(weight) * root, **tolerance)
    np.testing.assert_allclose(grads["shift"][...], by_weight * weight * np.log(2) * root, **tolerance)
    np.testing.assert_allclose(grads["gain"][...], (by_weight * weight).sum(), **tolerance)


@pytest.mark.slow
def test_projection_is_the_best_of_all_shifts():
    """Brute force over the 4⁵ shifts of five weights, each with its best scale."""
    kernel = np.random.default_rng(0).normal(size=(5, 1))
    shifts = 2.0 ** np.array(list(itertools.product(range(4), repeat=5)))
    scales = shifts @ np.abs(kernel.ravel()) / (shifts**2).sum(1)
    best = np.linalg.norm(np.abs(kernel.ravel()) - scales[:, None] * shifts, axis=1).min()
    with jax.enable_x64(True):
        found = np.asarray(DenseShift.from_dense(jnp.asarray(kernel)).to_dense())
    assert np.linalg.norm(kernel - found) == pytest.approx(best, rel=1e-12)


@bits
@pytest.mark.quick
def test_projection_takes_the_nearest_levels(bits):
    kernel = np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)
    layer = DenseShift.from_dense(jnp.asarray(kernel), bits=bits)
    scale = float(layer.gain[...] / layer.unit)
    choices = scale * 2.0 ** np.arange(2 ** (bits - 1))
    distance = np.abs(np.abs(kernel)[..., None] - choices).min(-1)
    np.testing.assert_allclose(np.abs(kernel - np.asarray(layer.to_dense())), distance, atol=1e-6)  # float32
    np.testing.assert_array_equal(np.sign(layer.to_dense()), np.sign(kernel))


@pytest.mark.quick
def test_a_weight_of_zeros_is_a_scale_of_zero():
    layer = DenseShift.from_dense(jnp.zeros((N, M)))
    np.testing.assert_array_equal(layer(jnp.ones((2, N))), np.zeros((2, M)))


@pytest.mark.quick
@pytest.mark.parametrize("bits", [1, 6])
def test_refuses_other_bits(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}: it must be from 2 to 5"):
        DenseShift(4, 4, bits=bits, rngs=nnx.Rngs(0))
