"""Draws by weight, ridge leverage scores of a kernel and Lloyd's k-means against NumPy and exact probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.landmarks import draw_by_weight, kernel_leverage, lloyd, tokens_at


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def gaussian(x, y):
    return jnp.exp(-jnp.square(x[..., :, None, :] - y[..., None, :, :]).sum(-1) / 2)


@pytest.mark.quick
def test_draws_are_without_replacement_by_their_weights():
    """Of 4000 draws of two out of five: how often each is among them, against the sum over the two orders."""
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    log_p = np.broadcast_to(np.log(np.insert(p, 2, 1.0)), (4000, 6))[..., None]  # padding at place 2, of large weight
    mask = np.broadcast_to(np.arange(6) != 2, (4000, 6))
    drawn = np.asarray(draw_by_weight(jax.random.split(jax.random.key(0), 4000), log_p, mask, 2))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    share = np.bincount(drawn.ravel(), minlength=6) / 4000
    expected = p + [sum(p[j] * p[i] / (1 - p[j]) for j in range(5) if j != i) for i in range(5)]
    assert share[2] == 0
    np.testing.assert_allclose(np.delete(share, 2), expected, atol=0.032)  # 4 standard deviations of a share


@pytest.mark.slow
def test_draws_belong_to_ranks_and_heads():
    """More padding, and padding in between, choose the same tokens; each head chooses its own; real tokens first."""
    keys, weight = jax.random.split(jax.random.key(0), 2), normal(0, 2, 9, 3)
    places = np.array([1, 2, 4, 5, 6, 9, 11, 12, 14])
    spread, mask = np.full((2, 16, 3), np.nan), np.zeros((2, 16), bool)
    spread[:, places], mask[:, places] = weight, True
    short, long = np.asarray(draw_by_weight(keys, weight, None, 4)), np.asarray(draw_by_weight(keys, spread, mask, 12))
    np.testing.assert_array_equal(long[:, :4], places[short])
    assert len({tuple(column) for example in short for column in example.T}) == 6
    np.testing.assert_array_equal(np.sort(long[:, :9], axis=1), np.broadcast_to(places[None, :, None], (2, 9, 3)))
    x = normal(1, 2, 16, 3, 5).astype(np.float32)
    for b, h in np.ndindex(2, 3):
        np.testing.assert_array_equal(np.asarray(tokens_at(x, long))[b, :, h], x[b, long[b, :, h], h])


@pytest.mark.slow
def test_kernel_leverage_is_exact_with_every_token_a_pilot():
    """λ diag(K (K + λ)⁻¹), for five and for all of 12 tokens; the padding holds NaN."""
    x, ridge = normal(0, 2, 12, 2, 3).astype(np.float32), 0.1
    mask = np.stack([np.arange(12) < 12, np.isin(np.arange(12), (0, 3, 4, 8, 10))])
    x[~mask] = np.nan
    keys = jax.random.split(jax.random.key(0), 2)
    score = np.asarray(kernel_leverage(keys, x, mask, kernel=gaussian, pilots=12, ridge=ridge))
    for b, h in np.ndindex(2, 2):
        kernel = np.asarray(gaussian(x[b, mask[b], h], x[b, mask[b], h]), np.float64)
        expected = ridge * np.diag(kernel @ np.linalg.inv(kernel + ridge * np.eye(len(kernel))))
        np.testing.assert_allclose(score[b, mask[b], h], expected, rtol=1e-4)  # float32, condition 100


@pytest.mark.slow
def test_kernel_leverage_of_few_pilots_is_an_upper_bound_and_finds_what_is_rare():
    """480 tokens in one place and 20 scattered, 24 pilots: those that no pilot is near score 50 times a common one."""
    x = np.concatenate([0.05 * normal(0, 480, 3), 6 * normal(1, 20, 3)])[None, :, None]
    matrix = np.asarray(gaussian(x[0, :, 0], x[0, :, 0]), np.float64)
    exact = 0.1 * np.diag(matrix @ np.linalg.inv(matrix + 0.1 * np.eye(500)))
    keys, mask = jax.random.split(jax.random.key(0), 1), np.ones((1, 500), bool)
    score = np.asarray(kernel_leverage(keys, x, mask, kernel=gaussian, pilots=24, ridge=0.1))[0, :, 0]
    assert (score > exact - 1e-4).all()  # float32
    assert np.median(score[480:]) > 50 * np.median(score[:480])


def plain_lloyd(x, centres, steps):
    for _ in range(steps):
        label = np.square(x[:, None] - centres[None]).sum(-1).argmin(1)
        centres = np.stack([x[label == j].mean(0) if (label == j).any() else c for j, c in enumerate(centres)])
    return centres, label


def test_lloyd_is_the_plain_algorithm_and_its_gradient_that_of_the_means():
    x, mask = normal(0, 3, 30, 2, 4), np.zeros((3, 30), bool)
    for b, n in enumerate((30, 17, 3)):
        mask[b, np.random.default_rng(b).choice(30, n, replace=False)] = True
    x[~mask] = np.nan
    x[0, 7] = x[0, 8]  # of two centres in one place the second gets no token, and stays
    order = np.argsort(~mask, axis=1, kind="stable")
    order[0] = np.concatenate([[7, 8], np.setdiff1d(np.arange(30), (7, 8))])
    start = np.repeat(order[:, :5, None], 2, axis=2)
    w = normal(1, 3, 5, 2, 4)
    with jax.enable_x64(True):
        value = jax.value_and_grad(lambda x: jnp.vdot(jnp.where(w > 0, 1, w) * (c := lloyd(x, mask, start)), c) / 2)
        centres = np.asarray(jax.jit(lloyd)(x, mask, start))
        by_x = np.asarray(jax.jit(value)(x)[1])
    weight = np.where(w > 0, 1, w)
    for b, h in np.ndindex(3, 2):
        real = np.flatnonzero(mask[b])
        count = min(5, len(real))
        expected, label = plain_lloyd(x[b, real, h], x[b, start[b, :count, h], h], 4)
        np.testing.assert_allclose(centres[b, :count, h], expected, atol=1e-12)
        assert (centres[b, count:, h] == 0).all()
        size = np.bincount(label, minlength=count)[label]
        slope = weight[b, label, h] * expected[label] / size[:, None]
        np.testing.assert_allclose(by_x[b, real, h], slope, atol=1e-12)
    assert (by_x[~mask] == 0).all()
