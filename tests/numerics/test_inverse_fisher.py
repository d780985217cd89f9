"""Products with the inverse Fisher against the matrix itself, and against the published recursion, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.inverse_fisher import empty, inverse_fisher, newest_times, slide

DAMPING = 1e-3


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def gradients(m=6, d=10, seed=0):
    return np.random.default_rng(seed).normal(size=(m, d))


def fisher(g, damping=DAMPING):
    return damping * np.eye(g.shape[1]) + g.T @ g / max(len(g), 1)


def recursion(g, x, damping=DAMPING):
    """H⁻¹ x by the published steps of rank one: v = H⁻¹ g, then H⁻¹ x − v vᵀ x / (m + gᵀ v), for each g in turn."""
    steps = []

    def times(y):
        return y / damping - sum((v * (v @ y) / denominator for v, denominator in steps), np.zeros_like(y))

    for one in g:
        v = times(one)
        steps.append((v, len(g) + one @ v))
    return times(x)


# Condition number of H at these sizes: |G|² / (m λ), some 1e4.
CLOSE = {"rtol": 1e-9, "atol": 1e-8}


@pytest.mark.quick
@pytest.mark.parametrize("m", [1, 6, 10, 17])
def test_it_is_the_inverse_of_all_gradients_and_the_published_recursion(m):
    """The reference code's loop leaves the last of the m gradients out."""
    g, x = gradients(m), gradients(1, seed=1)[0]
    inverse = inverse_fisher(g, DAMPING)
    whole = np.stack([inverse.times(column) for column in fisher(g)])
    np.testing.assert_allclose(whole, np.eye(10), atol=1e-9)
    np.testing.assert_allclose(inverse.times(x), recursion(g, x), **CLOSE)
    np.testing.assert_allclose(inverse.diagonal, np.diag(np.linalg.inv(fisher(g))), **CLOSE)
    short = np.linalg.solve(fisher(g[:-1]) if m > 1 else DAMPING * np.eye(10), x)
    assert np.abs(inverse.times(x) - short).max() > 1e-3


@pytest.mark.quick
def test_the_order_of_gradients_does_not_matter():
    g, x = gradients(), gradients(1, seed=1)[0]
    order = np.random.default_rng(2).permutation(len(g))
    one, other = inverse_fisher(g, DAMPING), inverse_fisher(g[order], DAMPING)
    np.testing.assert_allclose(one.times(x), other.times(x), **CLOSE)
    np.testing.assert_allclose(one.diagonal, other.diagonal, **CLOSE)


@pytest.mark.quick
def test_without_gradients_it_divides_by_the_damping():
    x = gradients(1)[0]
    for g in (np.zeros((0, 10)), np.zeros((4, 10))):
        inverse = inverse_fisher(g, DAMPING)
        np.testing.assert_allclose(inverse.times(x), x / DAMPING, rtol=1e-15)
        np.testing.assert_allclose(inverse.diagonal, 1 / DAMPING, rtol=1e-15)


@pytest.mark.quick
def test_blocks_are_each_their_own():
    blocks = np.stack([gradients(seed=seed) for seed in range(3)])
    x = gradients(3, seed=9)
    inverse = inverse_fisher(blocks, DAMPING)
    for i, block in enumerate(blocks):
        np.testing.assert_allclose(inverse.times(x)[i], np.linalg.solve(fisher(block), x[i]), **CLOSE)
        np.testing.assert_allclose(inverse.diagonal[i], np.diag(np.linalg.inv(fisher(block))), **CLOSE)


def split(vector):
    return {"kernel": jnp.reshape(vector[..., :8], (*vector.shape[:-1], 2, 4)), "bias": vector[..., 8:]}


def joined(tree):
    return np.concatenate([np.ravel(tree["kernel"]), tree["bias"]])


def test_the_window_holds_the_last_gradients_also_after_it_has_wrapped_around():
    m, g = 4, gradients(11)
    window, step = empty(split(jnp.zeros(10)), m), jax.jit(slide)
    for done, gradient in enumerate(g, start=1):
        window = step(window, split(gradient))
        rows = np.zeros((m, 10))  # those that have not come yet are zero
        rows[: min(done, m)] = g[max(0, done - m) : done]
        expected = recursion(rows, gradient)
        np.testing.assert_allclose(joined(newest_times(window, DAMPING)), expected, **CLOSE)
        np.testing.assert_allclose(inverse_fisher(rows, DAMPING).times(gradient), expected, **CLOSE)
    stored = np.stack([joined(jax.tree.map(lambda rows, i=i: rows[i], window.gradients)) for i in range(m)])
    np.testing.assert_allclose(window.gram, stored @ stored.T, rtol=1e-12)
    assert int(window.count) == 11


@pytest.mark.quick
def test_in_float32_the_product_of_a_gradient_is_right_to_a_percent():
    """Gradients of norm 1 around a common mean, with the published damping. The other form loses it all."""
    damping, noise = 1e-5, gradients(16, 300) / np.sqrt(300)
    g = np.float32(np.sqrt(0.9) * noise[0] / np.linalg.norm(noise[0]) + np.sqrt(0.1) * noise)
    window = empty(jnp.zeros(300, jnp.float32), 16)
    for one in g:
        window = slide(window, jnp.asarray(one))
    expected = np.linalg.solve(fisher(np.float64(g), damping), np.float64(g[-1]))
    ours = newest_times(window, damping)
    assert ours.dtype == jnp.float32
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    other = np.abs(inverse_fisher(jnp.asarray(g), damping).times(g[-1]) - expected).max() / np.abs(expected).max()
    assert error < 0.01 and error < other


@pytest.mark.quick
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_in_float32_equal_gradients_of_any_size_stay_finite(scale):
    """Exactly singular beside a damping that float32 does not resolve."""
    window = empty(jnp.zeros(50, jnp.float32), 16)
    for _ in range(20):
        window = slide(window, jnp.full(50, scale, jnp.float32))
    # H⁻¹ g = g / (λ + |g|²) for equal gradients. Shares of 1/(64 roundings) cancel in it: 1/64, and some roundings.
    np.testing.assert_allclose(newest_times(window, 1e-5), scale / (1e-5 + 50 * scale**2), rtol=0.05)
    diagonal = np.asarray(inverse_fisher(window.gradients, 1e-5).diagonal)
    assert (diagonal > 0).all() and np.isfinite(diagonal).all()
