"""V-mean against a loop over tokens in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention import vmean

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


@pytest.mark.quick
def test_vmeans_running_mean_keeps_float32_precision():
    """65,536 values around 1: a plain running sum in float32 would lose up to 2⁻⁷ of the last means."""
    v = (1 + 1e-3 * normal(0, 1, 65536, 1, 1)).astype(np.float32)
    exact = np.cumsum(v.astype(np.float64), axis=1) / np.arange(1, 65537)[:, None, None]
    np.testing.assert_allclose(vmean(v, v, v, causal=True), exact, rtol=2e-6)  # 16 roundings deep
