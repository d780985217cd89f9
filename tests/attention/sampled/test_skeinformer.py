"""Skeinformer against NumPy: Algorithm 1 row by row, its exact limit, its draws, the published algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.sampled.skeinformer import Skeinformer
from efficient_tx.attention.sampled.skeinformer import skeinformer as uncompiled
from efficient_tx.numerics.random import evaluation_keys, fold, sample_tokens
from tests.support.samples import attention_inputs, clusters, scattered

skeinformer = jax.jit(uncompiled, static_argnames=("columns", "pilots"))


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def exact(q, k, v):
    """Softmax attention of one head, `[length, dim]`."""
    return softmax(q @ k.T * q.shape[-1] ** -0.5) @ v


def algorithm(q, k, v, pilots, columns):
    """Algorithm 1 for one head, `[length, dim]`, given what was drawn; plain exponentials, one row at a time."""
    out = np.zeros((len(q), v.shape[-1]))
    rest = np.setdiff1d(np.arange(len(k)), columns)
    for i in range(len(q)):
        weights = np.exp(k[columns] @ q[i] * q.shape[-1] ** -0.5)
        mean = np.prod(weights ** (1 / len(columns)))
        total = weights.sum() + len(rest) * mean
        out[i] = (weights @ v[columns] + mean * v[rest].sum(0)) / total
    out[pilots] = exact(q[pilots], k, v)
    return out


def probabilities(q, k, v, pilots):
    b = softmax(q[pilots] @ k.T * q.shape[-1] ** -0.5)
    p = np.sqrt(np.square(b).sum(0)) * np.linalg.norm(v, axis=-1)
    return p / p.sum()


def published(q, k, v, budget, rng):
    """pkuzengqi/Skeinformer: pilots with replacement, columns without."""
    pilots = rng.integers(0, len(q), budget)
    columns = rng.choice(len(k), budget, replace=False, p=probabilities(q, k, v, pilots))
    return algorithm(q, k, v, pilots, columns)


@pytest.mark.parametrize(("queries", "groups"), [(21, 2), (21, 1), (9, 2)], ids=("plain", "grouped", "cross"))
@pytest.mark.first(1)
def test_it_is_algorithm_1_for_what_it_draws(queries, groups):
    """The draws are repeated here from the paper's probabilities and the documented noise."""
    keys, budget, lengths = 21, 6, (21, 13)
    q, k, v = attention_inputs(0, queries, keys, groups=groups)
    mask, draws = scattered(lengths, keys), evaluation_keys(2)
    with jax.enable_x64(True):
        out = np.asarray(skeinformer(q, k, v, mask=mask, columns=budget, pilots=4))
        real_queries = mask if queries == keys else np.ones((2, queries), bool)
        pilots = np.asarray(sample_tokens(fold(draws, 0), real_queries, 4)[0])
        noise = np.asarray(jax.random.gumbel(fold(draws, 1)[0], (keys, 2), jnp.float32))
    for b, h in np.ndindex(2, 2):
        rows, k_b, v_b = q[b, real_queries[b], h], k[b, mask[b], h * groups // 2], v[b, mask[b], h * groups // 2]
        drawn = np.searchsorted(np.flatnonzero(real_queries[b]), pilots[b])
        score = np.log(probabilities(rows, k_b, v_b, drawn)) + noise[: len(k_b), h]
        expected = algorithm(rows, k_b, v_b, drawn, np.argsort(-score)[:budget])
        np.testing.assert_allclose(out[b, real_queries[b], h], expected, rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("pilots", [3, 32])
@pytest.mark.slow
def test_all_columns_are_exact_softmax_and_so_are_the_pilots(pilots):
    q, k, v = attention_inputs(0, 24, 24)
    mask = scattered((24, 11), 24)
    with jax.enable_x64(True):
        everything = np.asarray(skeinformer(q, k, v, mask=mask, columns=24, pilots=pilots))
        few = np.asarray(skeinformer(q, k, v, mask=mask, columns=4, pilots=pilots))
        drawn = np.asarray(sample_tokens(fold(evaluation_keys(2), 0), mask, pilots)[0])
    for b, h in np.ndindex(2, 2):
        expected = exact(q[b, mask[b], h], k[b, mask[b], h], v[b, mask[b], h])
        np.testing.assert_allclose(everything[b, mask[b], h], expected, rtol=0, atol=1e-12)
        error = np.zeros(24)
        error[mask[b]] = np.abs(few[b, mask[b], h] - expected).max(-1)
        pilot = np.isin(np.arange(24), drawn[b])
        assert error[pilot].max() < 1e-12
        assert error[mask[b] & ~pilot].min(initial=1.0) > 1e-3


@pytest.mark.slow
def test_rows_sum_to_one_whatever_the_logits():
    """A constant value comes out as it went in, with logits far beyond what an exponential holds."""
    q, k, _ = attention_inputs(0, 24, 24)
    v = np.broadcast_to(np.arange(1.0, 6.0), (2, 24, 2, 5)).astype(np.float32)
    out = skeinformer((100 * q).astype(np.float32), (100 * k).astype(np.float32), v, columns=4, pilots=2)
    np.testing.assert_allclose(out, v, rtol=1e-5)  # float32 rounding


KINDS = {
    "random": lambda r, n: [r.normal(size=(n, 32)) for _ in range(2)],
    "clustered": lambda r, n: np.split(clusters(r, (2 * n, 32), [1 / 8] * 8, 0.3, scale=1.5), 2),
    "imbalanced": lambda r, n: np.split(clusters(r, (2 * n, 32), [0.96] + [0.01] * 4, 0.3, scale=1.5), 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_with_the_budget_and_is_at_most_the_published_one(kind):
    """Mean over 48 draws of the relative error of the output, length 256."""
    r, rng = np.random.default_rng(0), np.random.default_rng(1)
    (q, k), v = KINDS[kind](r, 256), r.normal(size=(256, 8))
    expected = exact(q, k, v)

    def errors_of(outs):
        return np.array([np.linalg.norm(out - expected) / np.linalg.norm(expected) for out in outs])

    batch = [np.broadcast_to(x.astype(np.float32), (48, *x.shape))[:, :, None] for x in (q, k, v)]
    ours = {}
    for budget in (16, 64, 192):
        outs = skeinformer(*batch, key=jax.random.key(0), columns=budget, pilots=budget)
        ours[budget] = errors_of(np.asarray(outs)[:, :, 0])
    theirs = errors_of([published(q, k, v, 64, rng) for _ in range(48)])
    assert 0 < ours[192].mean() < ours[64].mean() < ours[16].mean()
    # Two standard deviations of the difference of the means: the pilots, of which they repeat some, are few.
    noise = 2 * np.sqrt((ours[64].var() + theirs.var()) / 48)
    assert ours[64].mean() <= theirs.mean() + noise


@pytest.mark.slow
def test_gradients_equal_those_of_the_formula_for_what_it_draws():
    """Against automatic differentiation of Algorithm 1 with the drawn sets held fixed, in float64."""
    q, k, v = (x[:, :, :1] for x in attention_inputs(0, 8, 8, batch=1))
    w = np.random.default_rng(2).normal(size=(8, 5))
    with jax.enable_x64(True):
        draws = evaluation_keys(1)
        pilots = np.asarray(sample_tokens(fold(draws, 0), np.ones((1, 8), bool), 2)[0])[0]
        noise = np.asarray(jax.random.gumbel(fold(draws, 1)[0], (8, 1), jnp.float32))[:, 0]
        p = probabilities(q[0, :, 0], k[0, :, 0], v[0, :, 0], pilots)
        columns = np.argsort(-(np.log(p) + noise))[:3]
        rest, is_pilot = np.setdiff1d(np.arange(8), columns), np.isin(np.arange(8), pilots)[:, None]

        def plain(q, k, v):
            logits = q @ k.T * 8**-0.5
            weights = jnp.exp(logits[:, columns])
            mean = jnp.exp(logits[:, columns].mean(1, keepdims=True))
            rows = (weights @ v[columns] + mean * v[rest].sum(0)) / (weights.sum(1, keepdims=True) + 5 * mean)
            return jnp.vdot(jnp.where(is_pilot, jax.nn.softmax(logits) @ v, rows), w)

        def ours(q, k, v):
            return jnp.vdot(uncompiled(*(x[None, :, None] for x in (q, k, v)), columns=3, pilots=2)[0, :, 0], w)

        arguments = [jnp.asarray(x[0, :, 0]) for x in (q, k, v)]
        pairs = zip(*(jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (ours, plain)))
        for got, want in pairs:
            np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_bfloat16_inputs_are_computed_in_float32():
    rounded = [np.asarray(x, jnp.bfloat16) for x in attention_inputs(0, 24, 24)]
    out = skeinformer(*rounded, columns=8, pilots=2)
    assert out.dtype == jnp.bfloat16
    full = np.asarray(skeinformer(*(x.astype(np.float32) for x in rounded), columns=8, pilots=2))
    np.testing.assert_allclose(out.astype(np.float32), full, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 0}, "columns is 0"),
        ({"pilots": 0}, "pilots is 0"),
        ({"causal": True}, "Skeinformer has no causal form"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Skeinformer(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)
