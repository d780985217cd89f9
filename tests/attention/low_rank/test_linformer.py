"""Linformer against its plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention import linformer

attend = jax.jit(linformer)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_linformer_is_its_formula_and_exact_with_the_identity():
    with jax.enable_x64(True):
        q, k, v = (normal(seed, 2, 9, 3, 4) for seed in range(3))
        e, f = normal(3, 5, 12), normal(4, 5, 12)
        lengths, expected = (9, 4), np.zeros_like(v)
        for b, n in enumerate(lengths):
            for h in range(3):
                keys, values = e[:, :n] @ k[b, :n, h], f[:, :n] @ v[b, :n, h]
                expected[b, :, h] = softmax(q[b, :, h] @ keys.T / 2) @ values
        mask = np.arange(9) < np.array(lengths)[:, None]
        ours = attend(*map(jnp.asarray, (q, k, v)), e=jnp.asarray(e), f=jnp.asarray(f), mask=jnp.asarray(mask))
        np.testing.assert_allclose(ours, expected, atol=1e-12)  # float64 rounding

        ours = attend(*map(jnp.asarray, (q, k, v)), e=jnp.eye(9), f=jnp.eye(9))
        exact = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 2) @ v.swapaxes(1, 2)
        np.testing.assert_allclose(ours, exact.swapaxes(1, 2), atol=1e-12)


def test_linformer_takes_grouped_heads_other_queries_and_other_values():
    with jax.enable_x64(True):
        q, k, v = normal(0, 2, 5, 4, 6), normal(1, 2, 9, 2, 6), normal(2, 2, 9, 2, 3)
        e, f = jnp.asarray(normal(3, 7, 9)), jnp.asarray(normal(4, 7, 9))
        grouped = attend(*map(jnp.asarray, (q, k, v)), e=e, f=f)
        repeated = attend(jnp.asarray(q), *(jnp.repeat(x, 2, axis=2) for x in (k, v)), e=e, f=f)
        assert grouped.shape == (2, 5, 4, 3)
        np.testing.assert_allclose(grouped, repeated, atol=1e-12)
        with pytest.raises(ValueError, match="max_len=9"):
            linformer(*(jnp.zeros((1, 10, 1, 2)),) * 3, e=e, f=f)
