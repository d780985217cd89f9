"""Weights of a few bits: parity with qwix, the search of scales, straight-through gradients, and the packed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from efficient_tx.linear import Integer
from efficient_tx.linear.integer import START, grouped, largest, mean_square, to_scale

N, M = 48, 10
QTYPES = {8: jnp.int8, 4: jnp.int4} | {bits: f"int{bits}" for bits in (2, 3, 5, 6, 7)}


def drawn(n=N, m=M, seed=0, heavy=False):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, size=(n, m)) if heavy else rng.normal(size=(n, m))).astype(np.float32)


def absmax(kernel, **options):
    """The layer whose clipping levels are the largest weights of their groups."""
    made = Integer(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0), **options)
    kernel = jnp.asarray(kernel, made.param_dtype)
    made.kernel[...], made.clip[...] = kernel, jnp.abs(grouped(kernel, made.group)).max(1)
    return made


@pytest.mark.quick
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", QTYPES)
def test_absmax_is_that_of_qwix(bits, group):
    """Bit for bit, but for qwix's lowest level −2^(bits − 1), which only −max |w| may get: it is between two levels."""
    kernel = drawn(heavy=True)
    made, tiles = absmax(kernel, bits=bits, group=group), {} if group is None else {0: group}
    theirs = qwix.quantize(jnp.asarray(kernel), QTYPES[bits], channelwise_axes=[1], tiled_axes=tiles)
    np.testing.assert_array_equal(to_scale(made.clip[...], bits)[:, 0], theirs.scale)
    levels, lowest = np.asarray(theirs.qvalue, int), -largest(bits)
    np.testing.assert_array_equal(made.levels().reshape(N, M), np.maximum(levels, lowest))
    same = levels >= lowest
    assert (~same).sum() <= M * (N // (group or N))  # one in each group
    np.testing.assert_array_equal(np.asarray(made.to_dense())[same], np.asarray(qwix.dequantize(theirs))[same])
    peaks = np.repeat(made.clip[...], group or N, axis=0)
    np.testing.assert_array_equal(np.abs(kernel[~same]), peaks[~same])


def exact(kernel, bits):
    """The least squared error of a group `[n]` over all scales: an entry changes its level at size / (k − ½)."""
    size, k = np.abs(kernel), np.arange(1, largest(bits) + 1)[:, None]
    order = np.argsort(-(size / (k - 0.5)), axis=None)
    inner = np.cumsum(np.broadcast_to(size, (len(k), len(size))).ravel()[order])
    square = np.cumsum(np.broadcast_to(2 * k - 1, (len(k), len(size))).ravel()[order])
    return np.sum(size**2) - np.max(inner**2 / square)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("bits", "most", "mean"), [(2, 1.001, 1.001), (4, 1.001, 1.001), (8, 1.25, 1.015)])
def test_the_search_of_scales_ends_at_the_best_of_all_or_close_to_it(bits, most, mean, heavy):
    """As the docstring says; and it beats absmax."""
    ratios = []
    with jax.enable_x64(True):
        for n in (16, 32, 128):
            kernel = drawn(n, 12, seed=n, heavy=heavy).astype(float)
            left = np.sum((kernel - np.asarray(Integer.from_dense(jnp.asarray(kernel), bits=bits).to_dense())) ** 2, 0)
            ratios += list(left / [exact(column, bits) for column in kernel.T])
            plain = Integer(n, 12, bits=bits, use_bias=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
            plain.kernel[...], plain.clip[...] = kernel, np.abs(kernel).max(0, keepdims=True)
            assert (left <= np.sum((kernel - np.asarray(plain.to_dense())) ** 2, 0)).all()
    assert min(ratios) > 1 - 1e-9  # nothing is better than the best of all
    assert max(ratios) < most and np.mean(ratios) < mean


def test_groups_are_fitted_for_themselves_and_the_last_one_may_be_shorter():
    """26 inputs in groups of 10: as three layers, of the rows 0 to 9, 10 to 19 and 20 to 25."""
    kernel = jnp.asarray(drawn(26, 7))
    whole = Integer.from_dense(kernel, bits=4, group=10)
    parts = [Integer.from_dense(kernel[start : start + 10], bits=4) for start in (0, 10, 20)]
    np.testing.assert_array_equal(whole.to_dense(), jnp.concatenate([part.to_dense() for part in parts]))
    np.testing.assert_array_equal(whole.clip[...], jnp.concatenate([part.clip[...] for part in parts]))
    assert Integer(26, 7, group=100, rngs=nnx.Rngs(0)).group == 26


@pytest.mark.quick
def test_zeros_stay_zeros_and_a_group_of_zeros_has_the_scale_zero():
    kernel = drawn()
    kernel[:16, 3], kernel[20, :] = 0, 0
    made = Integer.from_dense(jnp.asarray(kernel), group=16)
    assert np.asarray(made.clip[...])[0, 3] == 0
    assert (np.asarray(made.to_dense())[kernel == 0] == 0).all()
    gradient = jax.grad(lambda layer: jnp.sum(layer(jnp.ones((2, N)))))(made)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(gradient)))


def test_gradients_are_those_of_learned_step_sizes():
    """Esser et al.: with G = ∂L/∂W, ∂L/∂w is G within the clipping levels, ∂L/∂s the sum of G (Q − w / s), or ±most."""
    made = absmax(drawn(), bits=3)
    made.clip[...] *= 0.6
    x, g = drawn(6, N, seed=1), drawn(6, M, seed=2)
    graphdef, params = nnx.split(made)
    _, pull = jax.vjp(lambda params: nnx.merge(graphdef, params)(x), params)
    (grads,) = pull(g)
    kernel, clip = np.asarray(made.kernel[...], float), np.asarray(made.clip[...], float)
    scale, outer = clip / 3.5, x.T.astype(float) @ g
    inside = np.abs(kernel) < 3 * scale
    assert 0 < inside.mean() < 1
    levels = np.clip(np.round(kernel / scale), -3, 3)
    slopes = np.where(inside, levels - kernel / scale, np.sign(kernel) * 3)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums of 48 numbers
    np.testing.assert_allclose(grads["kernel"][...], outer * inside, **tolerance)
    np.testing.assert_allclose(grads["clip"][...], np.sum(outer * slopes, 0, keepdims=True) / 3.5, **tolerance)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_first_weights_have_the_variance_of_a_dense_layers(bits):
    made = Integer(64, 2000, bits=bits, rngs=nnx.Rngs(0))
    mean = float(jnp.mean(jnp.square(made.to_dense())))
    assert 64 * mean == pytest.approx(1, abs=0.02)  # 128,000 draws: 5 deviations
    # By quadrature.
    w = np.linspace(-9, 9, 400_001)
    step = START / (largest(bits) + 0.5)
    squares = (step * np.clip(np.round(w / step), -largest(bits), largest(bits))) ** 2
    density = np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi)
    assert mean_square(bits) == pytest.approx(np.sum(squares * density) * (w[1] - w[0]), rel=1e-4)


@pytest.mark.quick
def test_codes_by_hand():
    """Nine weights in one column, the largest at 7.5 levels of 4 bits: two rows in each plane."""
    kernel = np.array([[7.5, -7, 3.2, 0.4, -0.6, 1, 2, -3, 4]], np.float32).T
    packed = absmax(kernel, bits=4).pack()
    # Plus 7; number 2 i + p of the column, at bit i of row p.
    codes = np.array([14, 0, 10, 7, 6, 8, 9, 4, 11])
    for bit in range(4):
        even, odd = codes[::2] >> bit & 1, codes[1::2] >> bit & 1
        np.testing.assert_array_equal(
            packed.codes[bit, :, 0], [sum(one << place for place, one in enumerate(row)) for row in (even, odd)]
        )
    np.testing.assert_array_equal(packed.to_dense()[:, 0], [7, -7, 3, 0, -1, 1, 2, -3, 4])
    whole = absmax(kernel, bits=8).pack()
    assert whole.codes.dtype == jnp.int8 and whole.codes.shape == (9, 1)
    np.testing.assert_array_equal(whole.codes[:, 0], np.clip(np.round(kernel[:, 0] * 17), -127, 127))


@pytest.mark.quick
def test_what_cannot_be_is_refused():
    for options, line in [
        ({"bits": 1}, "bits is 1: it must be from 2 to 8"),
        ({"bits": 16}, "bits is 16: it must be from 2 to 8"),
        ({"group": 0}, "group is 0: it must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=line):
            Integer(4, 4, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("bits", [3, 8])
def test_no_group_is_worse_than_absmax_after_rounding_to_fewer_bits(bits, dtype):
    """The search is in float32; what is stored is not."""
    for seed in range(3):
        for kernel in (drawn(seed=seed), jnp.asarray(drawn(seed=seed), dtype)):
            made, plain = (f(kernel, bits=bits, group=16, param_dtype=dtype) for f in (Integer.from_dense, absmax))
            found, most = (
                np.sum(np.square(np.asarray(grouped(jnp.asarray(kernel, jnp.float32) - layer.to_dense(), 16))), axis=1)
                for layer in (made, plain)
            )
            assert (found <= most * (1 + 1e-5)).all()  # sums in float32
