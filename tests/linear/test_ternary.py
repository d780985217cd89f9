"""Ternary weights: levels, straight-through gradients, the exact projection, and the packed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import Ternary
from efficient_tx.linear.ternary import eight_bits, ternary_levels

N, M = 26, 16  # 26 inputs are six and a half bytes
run = jax.jit(lambda layer, x: layer(x))


def layer(**options):
    made = Ternary(N, M, rngs=nnx.Rngs(0), **options)
    if made.bias is not None:
        made.bias[...] = np.linspace(-1, 1, M)
    return made


def batch():
    return np.random.default_rng(0).normal(size=(6, N)).astype(np.float32)


@pytest.mark.quick
def test_levels_are_those_of_the_mean_size():
    kernel = np.random.default_rng(0).normal(size=(50, 30))
    with jax.enable_x64(True):
        levels, scale = map(np.asarray, jax.jit(ternary_levels)(kernel))
    assert set(np.unique(levels)) == {-1, 0, 1}
    assert float(scale) == pytest.approx(np.abs(kernel).mean(), rel=1e-14)
    size = np.abs(kernel) / np.abs(kernel).mean()
    np.testing.assert_array_equal(levels, np.sign(kernel) * (size > 0.5))


@pytest.mark.quick
def test_inputs_are_whole_steps_of_their_token():
    x = np.random.default_rng(0).normal(size=(3, 5, 40)).astype(np.float32)
    x[0, 0] = 0
    x[0, 1] *= 1e-30  # no floor under the largest: any scale of an input is as good
    steps, unit = map(np.asarray, jax.jit(eight_bits)(x))
    np.testing.assert_array_equal(steps, np.round(steps))
    peaks = np.abs(steps).max(-1)
    assert peaks[0, 0] == 0
    assert (peaks.ravel()[1:] == 127).all()
    assert (np.abs(steps * unit - x) <= unit * 0.5001).all()


@pytest.mark.quick
def test_the_output_and_its_gradients_are_those_of_a_product_of_the_rounded_matrices():
    """∂/∂x is g Wᵀ with the ternary W, ∂/∂w is x̂ᵀ g with the rounded x̂: both roundings have the identity as slope."""
    made, x, g = layer(), batch(), np.random.default_rng(1).normal(size=(6, M)).astype(np.float32)
    graphdef, params = nnx.split(made)

    @jax.jit
    def forward_and_back(params, x):
        out, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
        return out, *pull(g)

    out, grads, grad_x = forward_and_back(params, x)
    latent, bias = np.asarray(made.kernel[...], np.float64), np.asarray(made.bias[...])
    scale, unit = np.abs(latent).mean(), np.abs(x).max(-1, keepdims=True) / 127
    weight, rounded = np.clip(np.round(latent / scale), -1, 1) * scale, np.round(x / unit) * unit
    tolerance = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of up to 26 numbers
    np.testing.assert_allclose(out, rounded @ weight + bias, **tolerance)
    np.testing.assert_allclose(grad_x, g @ weight.T, **tolerance)
    np.testing.assert_allclose(grads["kernel"][...], rounded.T @ g, **tolerance)
    np.testing.assert_allclose(grads["bias"][...], g.sum(0), **tolerance)
    assert np.abs(latent).max() > 1.5 * scale  # outside the clip


def test_projection_is_the_best_of_all_ternary_matrices():
    """Brute force over 3⁶ sign patterns, each with its best scale."""
    kernel = np.random.default_rng(0).normal(size=(2, 3))
    patterns = np.array(list(itertools.product([-1, 0, 1], repeat=6)))[1:]
    patterns = patterns[np.abs(patterns).sum(1) > 0]
    scales = patterns @ kernel.ravel() / (patterns**2).sum(1)
    best = np.linalg.norm(kernel.ravel() - scales[:, None] * patterns, axis=1).min()
    with jax.enable_x64(True):
        found = np.asarray(Ternary.from_dense(jnp.asarray(kernel)).to_dense())
    assert np.linalg.norm(kernel - found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("heavy", [False, True])
def test_projection_keeps_the_order_of_the_weights(heavy):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 32)) ** (3 if heavy else 1)
    with jax.enable_x64(True):
        made = Ternary.from_dense(jnp.asarray(kernel))
        latent, weight = np.asarray(made.kernel[...]), np.asarray(made.to_dense())
    ordered = np.sort(np.abs(kernel), axis=None)[::-1]
    gains = np.cumsum(ordered) ** 2 / np.arange(1, kernel.size + 1)
    count = gains.argmax() + 1
    scale = ordered[:count].mean()
    kept = np.abs(kernel) >= ordered[count - 1]
    np.testing.assert_allclose(weight, scale * np.sign(kernel) * kept, rtol=1e-12)
    assert (np.argsort(np.abs(latent), axis=None) == np.argsort(np.abs(kernel), axis=None)).all()
    np.testing.assert_array_equal(np.sign(latent), np.sign(kernel))
    np.testing.assert_array_equal(latent[~kept], kernel[~kept])


def test_a_weight_of_zeros_is_zero():
    np.testing.assert_array_equal(run(Ternary.from_dense(jnp.zeros((N, M))), batch()), np.zeros((6, M)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.first(1)
def test_the_packed_form_has_the_same_output(dtype):
    made, plain, x = layer(dtype=dtype), layer(dtype=dtype, use_bias=False), batch()
    np.testing.assert_array_equal(made.pack().to_dense(), made.to_dense())
    # The same whole numbers are summed, and the scales are multiplied in the same order: not a bit differs.
    product = run(plain, x)
    np.testing.assert_array_equal(run(plain.pack(), x), product)
    # The bias may be added in one rounding or two.
    packed, whole = run(made.pack(), x), run(made, x)
    assert packed.dtype == whole.dtype == dtype
    packed, whole, product = (np.asarray(out, np.float32) for out in (packed, whole, product))
    assert np.abs(packed - whole).max() <= (np.abs(product).max() + 1) * float(jnp.finfo(dtype).eps)


def test_the_packed_form_multiplies_whole_numbers():
    text = run.lower(layer(use_bias=False).pack(), batch()).as_text()
    assert f"(tensor<6x{N}xi8>, tensor<{N}x{M}xi8>) -> tensor<6x{M}xi32>" in text


def test_packed_weights_take_two_bits():
    packed = Ternary(1024, 256, use_bias=False, rngs=nnx.Rngs(0)).pack()
    held = jax.tree.leaves(nnx.state(packed))
    bits = 8 * sum(np.asarray(leaf).nbytes for leaf in held) / (1024 * 256)
    assert 2 <= bits < 2.001  # and a scale of 32 bits
    assert packed.bytes_stored == sum(np.asarray(leaf).nbytes for leaf in held)
    assert not jax.tree.leaves(nnx.state(packed, nnx.Param))
