"""Pooling against a loop over tokens in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import Pool, pool

MASKS = {"all": np.ones(11, bool), "right": np.arange(11) < 7, "scattered": np.arange(11) % 3 > 0}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


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
@pytest.mark.first(3)
def test_pool_is_a_loop_over_the_neighbours(kind, options):
    """Padding anywhere is no neighbour; NaN there changes nothing; a grid may have an incomplete last row."""
    options = {"kind": kind, "grid": False, "causal": False} | options
    x = normal(0, 4, 11, 3)
    mask = np.stack([*MASKS.values(), np.zeros(11, bool)])
    expected = np.stack([pool_by_loops(x[b], mask[b], **options) for b in range(4)])
    hostile = np.where(mask[..., None], x, np.nan)
    w = normal(1, *x.shape)

    def loss(x):
        out = pool(x, mask=mask, **options)
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, out), slope = run(jnp.asarray(hostile))
        np.testing.assert_allclose(out, expected, atol=1e-14)
        assert (np.asarray(slope)[~mask] == 0).all()
        step = np.where(mask[..., None], normal(2, *x.shape), 0)
        ahead, behind = (run(jnp.asarray(x + sign * 1e-6 * step))[0][0] for sign in (1, -1))
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
        ours = jax.jit(partial(pool, kind=kind, grid=True))(x, mask=mask)
        np.testing.assert_allclose(ours, expected, atol=1e-6)  # float32 rounding


@pytest.mark.quick
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


@pytest.mark.quick
def test_a_grid_without_mask_is_square():
    with pytest.raises(ValueError, match="length is 10: a grid needs a square number"):
        pool(jnp.zeros((1, 10, 4)), grid=True)
