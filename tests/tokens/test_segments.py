"""Means of segments and of the cells of a grid against loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.tokens.segments import grid_means, grid_sides, segment_means, segment_starts


def by_loop(x, mask, count):
    means, valid = np.zeros((len(x), count, *x.shape[2:])), np.zeros((len(x), count), bool)
    for b in range(len(x)):
        real = x[b][mask[b]]
        for s in range(count):
            members = [real[i] for i in range(len(real)) if i * count // len(real) == s]
            if members:
                means[b, s], valid[b, s] = np.mean(members, axis=0), True
    return means, valid


def masks(length):
    r = np.random.default_rng(1)
    return np.stack([np.ones(length, bool), np.arange(length) < 11, r.random(length) < 0.5, np.zeros(length, bool)])


@pytest.mark.quick
@pytest.mark.parametrize("count", (1, 5, 16, 40))
def test_means_are_those_of_a_loop(count):
    x, mask = np.random.default_rng(0).normal(size=(4, 30, 2, 3)), masks(30)
    expected, exists = by_loop(x, mask, count)
    hostile = np.where(mask[..., None, None], x, np.nan)
    with jax.enable_x64(True):
        means, valid = jax.jit(segment_means, static_argnums=2)(hostile, mask, count)
        np.testing.assert_array_equal(valid, exists)
        np.testing.assert_allclose(means, expected, rtol=0, atol=1e-14)  # float64 rounding


@pytest.mark.quick
def test_gradient_is_the_transposed_map():
    x, mask = np.random.default_rng(0).normal(size=(4, 30, 3)), masks(30)
    w = np.random.default_rng(2).normal(size=(4, 7, 3))
    with jax.enable_x64(True):
        grad = jax.jit(jax.grad(lambda x: jnp.vdot(segment_means(x, mask, 7)[0], w)))(x)
        # The map is linear: its derivative along y is its value at y.
        for y in np.random.default_rng(3).normal(size=(3, *x.shape)):
            np.testing.assert_allclose(np.vdot(grad, y), np.vdot(by_loop(y, mask, 7)[0], w), rtol=1e-12)


@pytest.mark.slow
def test_without_mask_all_tokens_are_real_and_bfloat16_is_summed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 30, 3)), jnp.bfloat16)
    means, valid = segment_means(x, None, 4)
    assert means.dtype == jnp.float32
    assert bool(valid.all())
    expected, _ = by_loop(np.asarray(x, np.float64), np.ones((2, 30), bool), 4)
    np.testing.assert_allclose(means, expected, atol=1e-6)  # float32 rounding of eight terms


@pytest.mark.quick
def test_starts_are_exact_where_the_product_overflows():
    n, count = 2**24 - 3, 1000
    expected = [-(-s * n // count) for s in range(count + 1)]
    np.testing.assert_array_equal(jax.jit(segment_starts, static_argnums=1)(n, count), expected)


@pytest.mark.parametrize("count", (1, 3, 5))
def test_means_of_cells_are_those_of_a_loop(count):
    """The real tokens, 30, 11 or so and none, are images of side 6, 4, ⌈√n⌉ and nothing, the last row incomplete."""
    x, mask = np.random.default_rng(0).normal(size=(4, 30, 3)), masks(30)
    hostile = np.where(mask[..., None], x, np.nan)
    with jax.enable_x64(True):
        means, valid = jax.jit(grid_means, static_argnums=2)(hostile, mask, count)
    for b in range(4):
        real = x[b, mask[b]]
        side = int(np.ceil(np.sqrt(len(real))))
        places = [(i // side * count // side, i % side * count // side) for i in range(len(real))]
        for cell in np.ndindex(count, count):
            members = [token for token, place in zip(real, places) if place == cell]
            at = cell[0] * count + cell[1]
            assert valid[b, at] == bool(members)
            np.testing.assert_allclose(means[b, at], np.mean(members, axis=0) if members else 0, atol=1e-14)


@pytest.mark.quick
@pytest.mark.slow
def test_the_side_of_a_grid_is_the_root_rounded_up():
    n = np.arange(1, 101)
    np.testing.assert_array_equal(grid_sides(jnp.asarray(n), 100), np.ceil(np.sqrt(n)))
