"""Skyformer and kernelized attention against NumPy: the exact limit, the published algorithm, masks and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.exact.kernelized import kernelized
from efficient_tx.attention.low_rank.skyformer import Skyformer, draw_sketch, merge
from efficient_tx.attention.low_rank.skyformer import skyformer as uncompiled
from tests.support.samples import attention_inputs, clusters

skyformer = jax.jit(uncompiled, static_argnames=("landmarks", "ridge", "inverse", "iterations", "choice", "accumulate"))
OTHER_LANDMARKS = {
    "segments": {"choice": "segments"},
    "leverage": {"choice": "leverage"},
    "kmeans": {"choice": "kmeans"},
    "sketch": {"accumulate": 2},
}


def gaussian(x, y):
    """exp(−‖x_i − y_j‖² / (2√K)), differences taken one by one."""
    return np.exp(-np.square(x[:, None] - y[None]).sum(-1) / (2 * x.shape[-1] ** 0.5))


def exact(q, k, v, mask=None):
    """Kernelized attention of `[batch, length, heads, dim]`, one head at a time."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        g = h // (q.shape[2] // k.shape[2])
        seen = slice(None) if mask is None else mask[b]
        out[b, :, h] = gaussian(q[b, :, h], k[b, seen, g]) @ v[b, seen, g]
    return out


def published(q, k, v, landmarks, rng):
    """One head `[length, dim]` as pkuzengqi/Skyformer computes it: landmarks with replacement, six iterations."""
    halves = rng.integers(0, len(q), landmarks // 2), rng.integers(0, len(k), landmarks // 2)
    z = np.concatenate([q[halves[0]], k[halves[1]]])
    core = gaussian(z, z) + 0.1 * np.eye(landmarks)
    d = core.sum(1) ** -0.5
    core = d[:, None] * core * d
    inverse, eye = core.T / core.sum(0).max(), np.eye(landmarks)
    for _ in range(6):
        a = core @ inverse
        inverse = inverse @ (13 * eye - a @ (15 * eye - a @ (7 * eye - a))) / 4
    return gaussian(q, z) @ (d[:, None] * inverse * d) @ (gaussian(z, k) @ v)


@pytest.mark.parametrize(
    ("queries", "keys", "groups", "masked", "inverse"),
    [
        pytest.param(20, 20, 2, False, "cholesky", marks=pytest.mark.slow),
        pytest.param(20, 20, 2, False, "iteration", marks=pytest.mark.slow),
        (20, 20, 1, True, "cholesky"),
        pytest.param(20, 20, 1, True, "iteration", marks=pytest.mark.slow),
        pytest.param(7, 20, 2, True, "cholesky", marks=pytest.mark.slow),
        (7, 20, 2, True, "iteration"),
    ],
)
def test_all_points_and_no_ridge_are_kernelized_attention(queries, keys, groups, masked, inverse):
    """The exact limit of Nyström; ridge 1e-12 leaves an error of that order times the condition of the kernel."""
    q, k, v = attention_inputs(0, queries, keys, groups=groups)
    mask = np.arange(keys) < np.array([[keys], [keys - 6]]) if masked else None
    expected = exact(q, k, v, mask)
    landmarks = 2 * keys if queries == keys else keys
    with jax.enable_x64(True):
        ours = np.asarray(
            skyformer(q, k, v, mask=mask, landmarks=landmarks, ridge=1e-12, inverse=inverse, iterations=30)
        )
        plain = np.asarray(kernelized(q, k, v, mask=mask))
    np.testing.assert_allclose(plain, expected, atol=1e-12)
    # With as many queries as keys the mask marks queries too: those are no landmarks.
    real = np.ones((2, queries), bool) if mask is None or queries != keys else mask
    np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=1e-10)


KINDS = {
    "concentrated": lambda r, n, dim: [0.3 * r.normal(size=(n, dim)) for _ in range(2)],
    "random": lambda r, n, dim: [r.normal(size=(n, dim)) for _ in range(2)],
    "clustered": lambda r, n, dim: np.split(clusters(r, (2 * n, dim), [1 / 8] * 8, 0.3), 2),
    "imbalanced": lambda r, n, dim: np.split(clusters(r, (2 * n, dim), [0.96] + [0.01] * 4, 0.2), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_128_landmarks_the_error_is_at_most_the_published_one(kind):
    """Mean over 8 draws of the relative error of the output, length 384, heads of 32."""
    r, rng = np.random.default_rng(0), np.random.default_rng(1)
    q, k = KINDS[kind](r, 384, 32)
    v = r.normal(size=(384, 32))
    expected = gaussian(q, k) @ v

    def error(out):
        return np.linalg.norm(out - expected) / np.linalg.norm(expected)

    theirs = np.mean([error(published(q, k, v, 128, rng)) for _ in range(8)])
    batch = [np.broadcast_to(x.astype(np.float32), (8, *x.shape))[:, :, None] for x in (q, k, v)]
    ours = np.mean([error(out[:, 0]) for out in np.asarray(skyformer(*batch, key=jax.random.key(0)))])
    assert 0 < ours <= theirs


@pytest.mark.slow
def test_the_iteration_converges_to_the_solve():
    q, k, v = attention_inputs(0, 40, 40)
    with jax.enable_x64(True):
        solve, six, twelve = (
            skyformer(q, k, v, landmarks=16, inverse=inverse, iterations=iterations)
            for inverse, iterations in (("cholesky", 1), ("iteration", 3), ("iteration", 14))
        )
        scale = float(jnp.abs(solve).max())
        assert 1e-6 * scale < float(jnp.abs(six - solve).max())
        assert float(jnp.abs(twelve - solve).max()) < 1e-10 * scale


@pytest.mark.slow
def test_an_example_ignores_the_others_and_its_padding():
    """The published iteration starts from one maximum over the batch; here an example is what it is alone."""
    q, k, v = (x.astype(np.float32) for x in attention_inputs(0, 24, 24, batch=3))
    mask = np.arange(24) < np.array([[24], [11], [0]])
    # Example 0 in one point: the largest row sums there can be.
    q[0], k[0] = q[0, :1], k[0, :1]
    together = np.asarray(skyformer(q, k, v, mask=mask, landmarks=16, inverse="iteration"))
    alone = np.asarray(skyformer(q[1:2, :11], k[1:2, :11], v[1:2, :11], landmarks=16, inverse="iteration"))
    np.testing.assert_allclose(together[1:2, :11], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
    assert (together[2] == 0).all()


@pytest.mark.quick
def test_missing_landmarks_drop_out():
    """Five real tokens and 16 landmarks wanted: all ten rows of [Q; K] are used, which is the exact limit."""
    q, k, v = attention_inputs(0, 24, 24, batch=1)
    mask = np.zeros((1, 24), bool)
    mask[0, [2, 3, 9, 17, 20]] = True
    with jax.enable_x64(True):
        ours = np.asarray(skyformer(q, k, v, mask=mask, landmarks=16, ridge=1e-12))
    np.testing.assert_allclose(ours[mask], exact(q, k, v, mask)[mask], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OTHER_LANDMARKS)
@pytest.mark.first(1)
def test_other_landmarks_have_the_same_exact_limit(name):
    """All 2 · 24 points; in the second example all 2 · 11, scattered among padding; the third has none."""
    q, k, v = attention_inputs(0, 24, 24, batch=3, groups=1)
    mask = np.zeros((3, 24), bool)
    mask[0] = True
    mask[1, np.random.default_rng(0).choice(24, 11, replace=False)] = True
    with jax.enable_x64(True):
        ours = np.asarray(skyformer(q, k, v, mask=mask, landmarks=48, ridge=1e-12, **OTHER_LANDMARKS[name]))
    np.testing.assert_allclose(ours[mask], exact(q, k, v, mask)[mask], rtol=0, atol=1e-10)
    assert (ours[2] == 0).all()


@pytest.mark.parametrize("name", ["kmeans", "sketch"])
@pytest.mark.slow
def test_gradients_flow_through_means_and_signed_sums(name):
    """Along one direction, against central differences; the choice itself is constant there. A row of padding too."""
    x, step = attention_inputs(0, 12, 12), 1e-6
    direction, w = attention_inputs(1, 12, 12), np.random.default_rng(2).normal(size=(2, 12, 2, 5))
    mask = np.ones((2, 12), bool) & np.array([[True], [False]])

    def loss(*x):
        return jnp.vdot(uncompiled(*x, mask=mask, landmarks=6, **OTHER_LANDMARKS[name])[0], w[0])

    with jax.enable_x64(True):
        value_and_gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        gradients = value_and_gradients(*x)[1]
        assert all(np.isfinite(g).all() for g in gradients)
        moved = [[a + s * d for a, d in zip(x, direction)] for s in (step, -step)]
        ahead, behind = (float(value_and_gradients(*there)[0]) for there in moved)
        slope = sum(np.vdot(g, d) for g, d in zip(gradients, direction))
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


@pytest.mark.slow
def test_the_sketch_is_an_isometry_in_the_mean():
    """E[S Sᵀ] = I after scaling by √(tokens / landmarks): over 4000 draws of 6 landmarks from 10 tokens, two each."""
    x = np.broadcast_to(np.eye(10, dtype=np.float32), (4000, 10, 10))[:, :, None]
    z, valid, signs = draw_sketch(x, np.ones((4000, 10), bool), jax.random.split(jax.random.key(0), 4000), 6, 2)
    s = np.asarray(merge(np.asarray(z).swapaxes(1, 2), signs))[:, 0]
    assert valid.sum(1).tolist() == [10] * 4000  # 12 wanted: the last two landmarks have one token
    assert (np.abs(s[:, :4]) > 0).sum(-1).tolist() == [[2] * 4] * 4000
    # Each token is in the sketch once, with weight ½, and any two are in the same landmark with a random sign.
    np.testing.assert_allclose(np.mean(s.swapaxes(1, 2) @ s, 0), np.eye(10) / 2, atol=0.02)  # 4 standard deviations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leverage", "kmeans"])
def test_on_imbalanced_inputs_leverage_and_kmeans_beat_uniform(name):
    """One tight cluster of 96 %, four of 1 %: uniform landmarks fall on the large one. Mean of 8 draws."""
    r = np.random.default_rng(0)
    q, k = np.split(clusters(r, (512, 32), [0.96] + [0.01] * 4, 0.05), 2)
    v = r.normal(size=(256, 8))
    expected = gaussian(q, k) @ v
    batch = [np.broadcast_to(x.astype(np.float32), (8, *x.shape))[:, :, None] for x in (q, k, v)]

    def error(landmarks, choice):
        outs = np.asarray(skyformer(*batch, key=jax.random.key(0), landmarks=landmarks, choice=choice))[:, :, 0]
        return np.mean([np.linalg.norm(out - expected) / np.linalg.norm(expected) for out in outs])

    ours, uniform = ([error(landmarks, choice) for landmarks in (16, 64)] for choice in (name, "uniform"))
    assert ours[1] < ours[0]
    assert ours[1] < uniform[1] / 2


def test_gradients_equal_those_of_the_formula():
    """Against automatic differentiation through the Nyström formula with every point a landmark, in float64."""
    q, k, v = attention_inputs(0, 6, 6, batch=1)
    w = np.random.default_rng(1).normal(size=(6, 2, 5))

    def kernel(x, y):
        return jnp.exp(-jnp.square(x[:, None] - y[None]).sum(-1) / (2 * 8**0.5))

    def formula(q, k, v):
        z = jnp.concatenate([q, k])
        return kernel(q, z) @ jnp.linalg.solve(kernel(z, z) + 0.1 * jnp.eye(12), kernel(z, k) @ v)

    def plain(q, k, v):
        return jnp.vdot(jnp.stack([formula(q[0, :, h], k[0, :, h], v[0, :, h]) for h in range(2)], 1), w)

    def ours(inverse, iterations):
        options = {"landmarks": 12, "inverse": inverse, "iterations": iterations}
        return lambda *x: jnp.vdot(skyformer(*x, **options)[0], w)

    with jax.enable_x64(True):
        expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2)))(q, k, v)
        for loss in (ours("cholesky", 1), ours("iteration", 14)):
            for got, want in zip(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v), expected):
                np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-8, atol=1e-9)


def test_a_common_shift_of_queries_and_keys_changes_nothing():
    q, k, v = attention_inputs(0, 24, 24)
    with jax.enable_x64(True):
        shifted = skyformer(q + 1.5, k + 1.5, v, landmarks=8)
        np.testing.assert_allclose(np.asarray(shifted), np.asarray(skyformer(q, k, v, landmarks=8)), rtol=1e-9)


@pytest.mark.slow
def test_keys_draw_the_landmarks():
    """One key per example; the same one gives the same output, evaluation is one fixed draw for every example."""
    q, k, v = (np.broadcast_to(x[:1], x.shape).astype(np.float32) for x in attention_inputs(0, 24, 24))

    def run(key):
        return np.asarray(skyformer(q, k, v, landmarks=8, key=key))

    fixed = run(None)
    np.testing.assert_array_equal(fixed[0], fixed[1])
    np.testing.assert_array_equal(fixed, run(None))
    keys = jax.random.split(jax.random.key(3), 2)
    drawn = run(keys)
    np.testing.assert_array_equal(drawn, run(keys))
    np.testing.assert_array_equal(drawn[0], run(keys[::-1])[1])
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3
    assert np.abs(drawn[0] - fixed[0]).max() > 1e-3


@pytest.mark.slow
def test_every_option_changes_the_result():
    q, k, v = (x.astype(np.float32) for x in attention_inputs(0, 24, 24))
    options = {"landmarks": 8, "ridge": 0.1, "inverse": "iteration", "iterations": 3}
    base = np.asarray(skyformer(q, k, v, **options))
    for change in ({"landmarks": 10}, {"ridge": 0.2}, {"inverse": "cholesky"}, {"iterations": 4}):
        assert np.abs(skyformer(q, k, v, **options | change) - base).max() > 1e-4 * np.abs(base).max()


@pytest.mark.slow
def test_bfloat16_inputs_are_computed_in_float32():
    rounded = [np.asarray(x, jnp.bfloat16) for x in attention_inputs(0, 24, 24)]
    out = skyformer(*rounded, landmarks=8)
    assert out.dtype == jnp.bfloat16
    full = np.asarray(skyformer(*(x.astype(np.float32) for x in rounded), landmarks=8))
    np.testing.assert_allclose(out.astype(np.float32), full, rtol=2**-8, atol=1e-6)


@pytest.mark.slow
def test_no_array_is_quadratic_in_the_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        grad = jax.grad(lambda q, k, v: skyformer(q, k, v, landmarks=16).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(8192), temporaries(32768)
    assert long < 4.2 * short
    assert long < 32768**2 * 4 / 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 1}, "landmarks is 1"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"inverse": "lu"}, "inverse is 'lu': choose one of cholesky, iteration"),
        ({"iterations": 0}, "iterations is 0"),
        ({"choice": "grid"}, "choice is 'grid': choose one of uniform, segments, leverage, kmeans"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"accumulate": 2, "choice": "kmeans"}, "accumulate is 2: it needs choice='uniform', not 'kmeans'"),
        ({"causal": True}, "Skyformer has no causal form"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Skyformer(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)
