"""GLA against the recurrence in NumPy, module and function, both directions; decoding; its options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.recurrent.gla import GLA
from efficient_tx.attention.recurrent.gla import gla as uncompiled
from tests.support.samples import attention_inputs, check_equal

gla = jax.jit(uncompiled, static_argnames="causal")
FEATURES, HEADS = 12, 2


def arrays(seed, length, *, heads=4, groups=2, dim=6, v_dim=3):
    """q, k, v and the logarithms of the decay."""
    q, k, v = attention_inputs(seed, length, length, heads=heads, groups=groups, dim=dim, v_dim=v_dim)
    return q, k, v, -np.random.default_rng(seed + 100).exponential(0.1, q.shape)


def dense(q, k, v, log_decay, mask, causal):
    """All pairs at once: what is between j and i decays, i itself forwards, j itself backwards as the scan meets it."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    real = mask[:, :, None, None]
    forth = jnp.cumsum(jnp.where(real, log_decay, 0), axis=1)
    back = jnp.cumsum(jnp.where(real, log_decay, 0)[:, ::-1], axis=1)[:, ::-1]
    later = np.tri(q.shape[1], dtype=bool)[None, :, :, None, None]

    def weights(sums, allowed):
        decay = jnp.exp(jnp.where(allowed, sums[:, :, None] - sums[:, None], -jnp.inf))
        return jnp.einsum("bihc,bjhc,bijhc->bhij", q, k, decay) / q.shape[-1] ** 0.5

    both = weights(forth, later)
    if not causal:
        both = (both + weights(back, later.swapaxes(1, 2))) / 2
    return jnp.einsum("bhij,bjhv->bihv", jnp.where(mask[:, None, None, :], both, 0), v)


@pytest.mark.parametrize("causal", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equals_the_dense_formula_and_its_gradients(causal):
    """Padding anywhere, grouped heads, values of another width; in float64."""
    mask = np.random.default_rng(1).random((2, 75)) < 0.7
    check_equal(
        lambda q, k, v, g: uncompiled(q, k, v, log_decay=g, mask=mask, causal=causal),
        lambda *tokens: dense(*tokens, mask, causal),
        arrays(0, 75),
        mask,
        gradient_atol=1e-11,
    )


def module(**options):
    return GLA(FEATURES, heads=HEADS, rngs=nnx.Rngs(0), **{"gate_rank": 3, "gate_normalizer": 4.0} | options)


def layer(mixer, x, *, key_dim, normalizer, clamp=-np.inf, causal=False):
    """The layer for one sequence `[length, features]` of real tokens, token by token in float64."""
    weights = {
        name: np.asarray(getattr(mixer, name).kernel[...], np.float64) for name in ("q", "k", "v", "gate", "out")
    }
    down, up = mixer.decay_down.kernel[...], mixer.decay_up
    logits = x @ np.asarray(down, np.float64) @ np.asarray(up.kernel[...], np.float64) + np.asarray(up.bias[...])
    decay = np.exp(np.maximum(-np.log1p(np.exp(-logits)) / normalizer, clamp)).reshape(len(x), HEADS, key_dim)
    q, k, v, gate = ((x @ weights[name]).reshape(len(x), HEADS, -1) for name in ("q", "k", "v", "gate"))

    def run(order):
        out, state = np.zeros_like(v), np.zeros((HEADS, key_dim, v.shape[-1]))
        for t in order:
            state = decay[t][..., None] * state + k[t][..., None] * v[t][:, None]
            out[t] = np.einsum("hk,hkv->hv", q[t], state) / key_dim**0.5
        return out

    out = run(range(len(x)))
    if not causal:
        out = (out + run(reversed(range(len(x))))) / 2
    out *= np.asarray(mixer.norm.scale[...]) / np.sqrt(np.square(out).mean(-1, keepdims=True) + 1e-5)
    return (out * gate / (1 + np.exp(-gate))).reshape(len(x), -1) @ weights["out"]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({}, {"key_dim": 3, "normalizer": 4.0}),
        ({"expand_k": 1.5, "clamp_min": -0.15}, {"key_dim": 9, "normalizer": 4.0, "clamp": -0.15}),
        ({"causal": True, "gate_normalizer": 1.0}, {"key_dim": 3, "normalizer": 1.0, "causal": True}),
    ],
    ids=("defaults", "wide and clamped", "causal"),
)
@pytest.mark.first(1)
def test_the_layer_is_the_recurrence(options, sizes):
    mixer, x = module(**options), np.random.default_rng(0).normal(size=(2, 40, FEATURES))
    mixer.decay_up.bias[...] = jnp.linspace(-1, 1, HEADS * sizes["key_dim"])
    mask = np.arange(40) % 4 > 0
    mask = np.stack([mask, ~mask])
    out = np.asarray(nnx.jit(lambda mixer, x, mask: mixer(x, mask=mask))(mixer, x.astype(np.float32), mask))
    for b in range(2):
        expected = layer(mixer, x[b][mask[b]], **sizes)
        np.testing.assert_allclose(out[b][mask[b]], expected, atol=2e-5)  # float32; the norm divides by small numbers


def test_has_the_parameters_of_the_published_layer():
    """Three projections of d², two of d²/2, and the gate of rank 16."""
    mixer = GLA(64, heads=2, rngs=nnx.Rngs(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(mixer)))
    assert count == 4 * 64**2 + 64 * 16 + 16 * 32 + 32 + 32


def test_the_last_query_stands_at_the_last_real_key():
    """Decoding with a cache of 20 places of which some are real, in any pattern."""
    q, k, v, log_decay = arrays(0, 20)
    mask = np.random.default_rng(1).random((2, 20)) < 0.5
    real = np.stack([np.flatnonzero(row)[-3:] for row in mask])
    rows = np.arange(2)[:, None]
    with jax.enable_x64(True):
        whole = np.asarray(gla(q, k, v, log_decay=log_decay, mask=mask, causal=True))
        ours = gla(q[rows, real], k, v, log_decay=log_decay, mask=mask, causal=True)
    np.testing.assert_allclose(ours, whole[rows, real], atol=1e-13)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand_k": 0.1}, "expand_k is 0.1: with head_dim 6 it must be at least 0.166667"),
        ({"gate_rank": 0}, "gate_rank is 0: it must be at least 1"),
        ({"gate_normalizer": 0.0}, "gate_normalizer is 0.0: it must be above 0"),
        ({"clamp_min": 0.0}, "clamp_min is 0.0: the least logarithm of a decay must be below 0, or None"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


def test_what_has_no_meaning_is_refused():
    q, k, v, _ = arrays(0, 20)
    with pytest.raises(ValueError, match="gla has 5 queries and 20 keys: it needs positions, so use causal=True"):
        uncompiled(q[:, :5], k, v)
