"""Sigmoid attention against NumPy: formula and gradient, small weights, row sums, and the module's options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Sigmoid, sigmoid
from efficient_tx.tokens.rotary import rotate

attend = jax.jit(sigmoid, static_argnames=("bias", "causal"))


def formula(q, k, v, bias, mask=None, causal=False):
    """One head of one example at a time, all weights at once, in float64."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    queries, keys = q.shape[1], k.shape[1]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        weights = 1 / (1 + np.exp(-(q[b, :, h] @ k[b, :, g].T / q.shape[-1] ** 0.5 + bias)))
        if mask is not None:
            weights = weights * mask[b]
        if causal:
            weights = np.tril(weights, keys - queries)
        out[b, :, h] = weights @ v[b, :, g]
    return out


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize(("queries", "causal", "masked"), [(9, False, True), (9, True, True), (1, True, True)])
def test_output_and_gradient_are_those_of_the_formula(queries, causal, masked):
    """Grouped heads, values of another width; one causal query sees every real key, as in decoding."""
    q, k, v, w = (normal(i, 2, *s) for i, s in enumerate([(queries, 4, 6), (9, 2, 6), (9, 2, 3), (queries, 4, 3)]))
    mask = np.arange(9) < np.array([[9], [5]])
    options = {"bias": -2.0, "causal": causal}
    with jax.enable_x64(True):
        out = attend(q, k, v, mask=mask, **options)
        np.testing.assert_allclose(out, formula(q, k, v, mask=mask, **options), atol=1e-14)  # float64 rounding
        grads = jax.jit(jax.grad(lambda *x: jnp.vdot(attend(*x, mask=mask, **options), w), argnums=(0, 1, 2)))(q, k, v)
    for i, grad in enumerate(grads):
        along, step = normal(7, *grad.shape), 1e-6
        ends = [[x + sign * step * along if i == j else x for j, x in enumerate((q, k, v))] for sign in (1, -1)]
        up, down = (np.vdot(formula(*end, mask=mask, **options), w) for end in ends)
        # Central differences: step² from the third derivative, 1e-16 / step from rounding.
        np.testing.assert_allclose(np.vdot(grad, along), (up - down) / (2 * step), rtol=1e-7, atol=1e-8)


@pytest.mark.quick
@pytest.mark.parametrize("bias", (-10.0, -30.0, -80.0))
def test_small_weights_keep_their_relative_accuracy(bias):
    """(1 + tanh(x/2)) / 2 in float32 is off by 1e-3 at −10, and zero from −17 on."""
    q, k = normal(0, 1, 5, 1, 8).astype(np.float32), normal(1, 1, 1, 1, 8).astype(np.float32)
    out = attend(q, k, np.ones((1, 1, 1, 1), np.float32), bias=bias)
    expected = formula(q.astype(np.float64), k.astype(np.float64), np.ones((1, 1, 1, 1)), bias)
    # The logit, of size |bias|, is rounded to 24 bits: exp makes that a relative error.
    np.testing.assert_allclose(out, expected, rtol=(4 + abs(bias)) * 2**-23)


@pytest.mark.quick
@pytest.mark.parametrize(("n", "batch"), [(256, 32), (4096, 2)])
def test_a_row_sums_to_about_the_same_at_any_length(n, batch):
    """Under standard normal logits and the bias −ln n: 1.637 at 256 keys, 1.648 in the limit (√e)."""
    q = normal(0, batch, 64, 2, 32)
    q *= 32**0.5 / np.linalg.norm(q, axis=-1, keepdims=True)  # so that the logits are exactly standard normal
    k, ones = normal(1, batch, n, 2, 32), np.ones((batch, n, 2, 1))
    x, weight = np.polynomial.hermite_e.hermegauss(80)
    expected = (weight / weight.sum()) @ (n / (1 + np.exp(-(x - np.log(n)))))
    assert 1.6 < expected < 1.65
    sums = np.asarray(attend(*(z.astype(np.float32) for z in (q, k, ones)), bias=-float(np.log(n))))
    # One row has the standard deviation √(E e^{2x} / n) = 2.7 / √n; rows of one example and head share their keys.
    assert sums.mean() == pytest.approx(expected, abs=4 * 2.7 / (n * batch * 2) ** 0.5)


@pytest.mark.slow
def test_a_bias_towards_minus_infinity_makes_it_vanish():
    q, k, v = (normal(i, 1, 5, 2, 4) for i in range(3))
    with jax.enable_x64(True):
        far, farther, none = (np.asarray(attend(q, k, v, bias=bias)) for bias in (-100.0, -110.0, -1e9))
    np.testing.assert_allclose(far, farther * np.exp(10), rtol=1e-10)  # exp alone is left of the logistic
    assert (none == 0).all()


def tokens():
    return normal(0, 2, 9, 8), np.arange(9) < np.array([[9], [5]])


def run(mixer, x, mask):
    return jax.jit(lambda x: mixer(x, mask=mask))(x)


def test_the_bias_is_that_of_the_longest_sequence():
    x, mask = tokens()
    with jax.enable_x64(True):
        mixer = Sigmoid(8, heads=2, max_len=40, rngs=nnx.Rngs(0))
        q, k, v = (getattr(mixer, name)(x).reshape(2, 9, 2, 4) for name in "qkv")
        heads = formula(*map(np.asarray, (q, k, v)), -np.log(40), mask)
        expected = np.where(mask[..., None], mixer.out(heads.reshape(2, 9, 8)), 0)
        np.testing.assert_allclose(run(mixer, x, mask), expected, rtol=1e-12, atol=1e-14)


def test_queries_and_keys_are_normalised_before_they_turn():
    x, mask = tokens()
    with jax.enable_x64(True):
        mixer = Sigmoid(8, heads=2, max_len=40, positions="rope", qk_norm=True, rngs=nnx.Rngs(0))
        heads = []
        for projection in (mixer.q, mixer.k):
            scale, shift = np.array([0.5, 1, 2, 3], np.float32), np.array([0, 1, -1, 0.25], np.float32)
            projection.norm.scale[...], projection.norm.bias[...] = scale, shift
            z = np.asarray(projection.layer(x)).reshape(2, 9, 2, 4)
            z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + projection.norm.epsilon)
            heads.append(np.asarray(rotate(z * scale + shift, jnp.asarray(mask))))
        heads = formula(*heads, np.asarray(mixer.v(x)).reshape(2, 9, 2, 4), -np.log(40), mask)
        expected = np.where(mask[..., None], mixer.out(heads.reshape(2, 9, 8)), 0)
        np.testing.assert_allclose(run(mixer, x, mask), expected, rtol=1e-10, atol=1e-12)


def test_layer_scale_scales_each_channel_of_the_output():
    x, mask = tokens()
    plain, scaled = (Sigmoid(8, heads=2, max_len=40, layer_scale=s, rngs=nnx.Rngs(0)) for s in (None, 1e-4))
    assert (scaled.layer_scale[...] == np.float32(1e-4)).all()
    scaled.layer_scale[...] = jnp.arange(8.0)
    x = x.astype(np.float32)
    np.testing.assert_allclose(run(scaled, x, mask), run(plain, x, mask) * np.arange(8), rtol=1e-6)  # float32
    with pytest.raises(ValueError, match="layer_scale is 0"):
        Sigmoid(8, heads=2, max_len=40, layer_scale=0.0, rngs=nnx.Rngs(0))
