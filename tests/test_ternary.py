"""Ternary weights: levels, straight-through gradients, the exact projection, and the packed form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import PackedTernary, Ternary
from efficient_tx.linear.ternary import eight_bits, ternary_levels


def layer(n, m, seed=0, **options):
    made = Ternary(n, m, rngs=nnx.Rngs(seed), **options)
    if made.bias is not None:
        made.bias[...] = jnp.linspace(-1, 1, m).astype(made.param_dtype)
    return made


def test_levels_are_those_of_the_mean_size():
    kernel = np.random.default_rng(0).normal(size=(50, 30))
    with jax.enable_x64(True):
        levels, scale = ternary_levels(jnp.asarray(kernel))
    assert set(np.unique(levels)) == {-1, 0, 1}
    assert float(scale) == pytest.approx(np.abs(kernel).mean(), rel=1e-14)
    size = np.abs(kernel) / np.abs(kernel).mean()
    np.testing.assert_array_equal(levels, np.sign(kernel) * (size > 0.5))
    doubled, twice = ternary_levels(jnp.asarray(2 * kernel, jnp.float32))
    np.testing.assert_array_equal(doubled, levels)
    assert float(twice) == pytest.approx(2 * float(scale))


def test_inputs_are_whole_steps_of_their_token():
    x = np.random.default_rng(0).normal(size=(3, 5, 40)).astype(np.float32)
    x[0, 0] = 0
    x[0, 1] *= 1e-30  # no floor under the largest: any scale of an input is as good
    steps, unit = eight_bits(jnp.asarray(x))
    np.testing.assert_array_equal(steps, np.round(steps))
    peaks = np.abs(steps).max(-1)
    assert peaks[0, 0] == 0
    assert (peaks.ravel()[1:] == 127).all()
    assert (np.abs(steps * unit - x) <= np.asarray(unit) * 0.5001).all()


def test_gradients_are_those_of_a_product_of_the_rounded_matrices():
    """∂/∂x is g Wᵀ with the ternary W, ∂/∂w is x̂ᵀ g with the rounded x̂: both roundings have the identity as slope."""
    made = layer(24, 16)
    graphdef, params = nnx.split(made)
    x, g = (jax.random.normal(key, (6, width)) for key, width in zip(jax.random.split(jax.random.key(0)), (24, 16)))
    _, pull = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x), params, x)
    grads, grad_x = pull(g)
    steps, unit = eight_bits(x)
    np.testing.assert_allclose(grad_x, g @ made.to_dense().T, rtol=1e-4, atol=1e-5)  # float32 sums of 16
    np.testing.assert_allclose(grads["kernel"][...], (steps * unit).T @ g, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["bias"][...], g.sum(0), rtol=1e-5)
    assert np.abs(made.kernel[...]).max() > 1.5 * np.abs(made.kernel[...]).mean()  # some are outside the clip


def test_the_bias_is_added():
    made = layer(4, 3)
    np.testing.assert_array_equal(made(jnp.zeros((2, 4))), np.broadcast_to(made.bias[...], (2, 3)))


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
    made = Ternary.from_dense(jnp.zeros((5, 4)))
    np.testing.assert_array_equal(made(jnp.ones((2, 5))), np.zeros((2, 4)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("n", "m"), [(1, 3), (6, 5), (515, 130)])
def test_the_packed_form_has_the_same_output(n, m, dtype):
    made, plain = layer(n, m, dtype=dtype), layer(n, m, dtype=dtype, use_bias=False)
    x = jax.random.normal(jax.random.key(1), (2, 7, n))
    np.testing.assert_array_equal(made.pack().to_dense(), made.to_dense())
    # The same whole numbers are summed, and the scales are multiplied in the same order: not a bit differs.
    np.testing.assert_array_equal(plain.pack()(x), plain(x))
    # The bias may be added in one rounding or two.
    out = made.pack()(x)
    assert out.dtype == made(x).dtype == dtype
    largest = float(jnp.abs(plain(x)).max()) + 1
    difference = jnp.abs(out.astype(jnp.float32) - made(x).astype(jnp.float32)).max()
    assert difference <= largest * float(jnp.finfo(dtype).eps)


def test_the_packed_form_multiplies_whole_numbers():
    made = layer(40, 8, use_bias=False)
    text = jax.jit(lambda layer, x: layer(x)).lower(made.pack(), jnp.ones((3, 40))).as_text()
    assert "(tensor<3x40xi8>, tensor<40x8xi8>) -> tensor<3x8xi32>" in text


def test_packed_weights_take_two_bits():
    packed = layer(1024, 256, use_bias=False).pack()
    held = jax.tree.leaves(nnx.state(packed))
    bits = 8 * sum(np.asarray(leaf).nbytes for leaf in held) / (1024 * 256)
    assert 2 <= bits < 2.001  # and a scale of 32 bits
    assert packed.bytes_stored == sum(np.asarray(leaf).nbytes for leaf in held)
    assert not jax.tree.leaves(nnx.state(packed, nnx.Param))
    assert isinstance(packed, PackedTernary)
