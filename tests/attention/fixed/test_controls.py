"""The controls, V-mean and pooling, against loops over tokens in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Pool, pool, vmean

MASKS = {"all": np.ones(11, bool), "right": np.arange(11) < 7, "scattered": np.arange(11) % 3 > 0}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def mean_by_loops(q, v, mask, causal):
    """`[queries, heads, v_dim]` of one example; the last query stands at the last key, or at the last real one."""
    queries, heads, _ = q.shape
    keys, groups, _ = v.shape
    real = np.flatnonzero(mask)
    out = np.zeros((queries, heads, v.shape[-1]))
    for i, h in np.ndindex(queries, heads):
        seen = real
        if causal:
            seen = real[real <= i] if queries == keys else real[: max(len(real) - queries + 1 + i, 0)]
        if len(seen):
            out[i, h] = v[seen, h * groups // heads].mean(axis=0)
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries", [11, 9, 1])
def test_vmean_is_the_mean_of_the_values(queries, causal):
    """Grouped heads, values of another width, padding anywhere, other numbers of queries, an example without keys."""
    q, k, v = normal(0, 4, queries, 4, 3), normal(1, 4, 11, 2, 3), normal(2, 4, 11, 2, 5)
    mask = np.stack([*MASKS.values(), np.zeros(11, bool)])
    expected = [mean_by_loops(q[b], v[b], mask[b], causal) for b in range(4)]
    with jax.enable_x64(True):
        ours = jax.jit(vmean, static_argnames="causal")(q, k, v, mask=mask, causal=causal)
        np.testing.assert_allclose(ours, expected, atol=1e-14)  # float64 rounding
    if not causal:  # the gradient of Σ out·w is Σ_i w_i / n at every real key of the group
        w = normal(3, 4, queries, 4, 5)
        with jax.enable_x64(True):
            by_v = jax.grad(lambda v: jnp.vdot(vmean(q, k, v, mask=mask), w))(v)
        share = w.sum(axis=1).reshape(4, 2, 2, 5).sum(axis=2) / np.maximum(mask.sum(1), 1)[:, None, None]
        np.testing.assert_allclose(by_v, mask[:, :, None, None] * share[:, None], atol=1e-13)


def test_vmeans_running_mean_keeps_float32_precision():
    """65,536 values around 1: a plain running sum in float32 would lose up to 2⁻⁷ of the last means."""
    v = (1 + 1e-3 * normal(0, 1, 65536, 1, 1)).astype(np.float32)
    exact = np.cumsum(v.astype(np.float64), axis=1) / np.arange(1, 65537)[:, None, None]
    np.testing.assert_allclose(vmean(v, v, v, causal=True), exact, rtol=2e-6)  # 16 roundings deep


def pool_by_loops(x, mask, kind, size, grid, causal):
    """One example `[length, features]`."""
    real = np.flatnonzero(mask)
    side = int(np.ceil(np.sqrt(len(real))))
    reduce = {"average": np.mean, "max": np.max}[kind]
    out = np.zeros_like(x)
    for i, token in enumerate(real):
        if grid:
            near = [
                j for j in range(len(real)) if max(abs(i // side - j // side), abs(i % side - j % side)) <= size // 2
            ]
        elif causal:
            near = range(max(i - size + 1, 0), i + 1)
        else:
            near = range(max(i - size // 2, 0), min(i + size // 2 + 1, len(real)))
        out[token] = reduce(x[real[list(near)]], axis=0) - x[token]
    return out


@pytest.mark.parametrize(
    "options",
    [{"size": 3}, {"size": 5, "grid": True}, {"size": 4, "causal": True}],
    ids=["line", "grid", "causal"],
)
@pytest.mark.parametrize("kind", ["average", "max"])
def test_pool_is_a_loop_over_the_neighbours(kind, options):
    """Padding anywhere is no neighbour; NaN there changes nothing; a grid may have an incomplete last row."""
    options = {"kind": kind, "grid": False, "causal": False} | options
    x = normal(0, 4, 11, 3)
    mask = np.stack([*MASKS.values(), np.zeros(11, bool)])
    expected = np.stack([pool_by_loops(x[b], mask[b], **options) for b in range(4)])
    hostile = np.where(mask[..., None], x, np.nan)
    w = normal(1, *x.shape)
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(lambda x: jnp.vdot(pool(x, mask=mask, **options), w), has_aux=False))
        np.testing.assert_allclose(pool(jnp.asarray(hostile), mask=mask, **options), expected, atol=1e-14)
        slope = run(jnp.asarray(hostile))[1]
        assert (np.asarray(slope)[~mask] == 0).all()
        step = np.where(mask[..., None], normal(2, *x.shape), 0)
        ahead, behind = (run(jnp.asarray(x + sign * 1e-6 * step))[0] for sign in (1, -1))
        # Central differences of a piecewise linear function: rounding alone, 1e-16 / 1e-6.
        np.testing.assert_allclose(np.vdot(slope, step), (ahead - behind) / 2e-6, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["average", "max"])
def test_pool_of_an_image_is_flaxs_pooling(kind):
    x = normal(0, 2, 36, 3).astype(np.float32)
    image = x.reshape(2, 6, 6, 3)
    if kind == "average":
        theirs = nnx.avg_pool(image, (3, 3), padding="SAME", count_include_pad=False)
    else:
        theirs = nnx.max_pool(image, (3, 3), padding="SAME")
    expected = np.asarray(theirs - image).reshape(x.shape)
    for mask in (None, np.ones((2, 36), bool)):
        np.testing.assert_allclose(pool(x, mask=mask, kind=kind, grid=True), expected, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "median"}, "kind is 'median': choose one of average, max"),
        ({"size": 0}, "size is 0"),
        ({"size": 4}, "size is 4: a centred window has an odd number"),
        ({"grid": True, "causal": True}, "a causal window is one-dimensional"),
    ],
)
def test_what_pool_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Pool(4, **options)
    with pytest.raises(ValueError, match=message):
        pool(jnp.zeros((1, 9, 4)), **options)


def test_a_grid_without_mask_is_square():
    with pytest.raises(ValueError, match="length is 10: a grid needs a square number"):
        pool(jnp.zeros((1, 10, 4)), grid=True)
