"""HyperAttention: its sum against the dense formula, the choice of keys against plain loops, limits, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.sampled.hyper import Hyper
from efficient_tx.attention.sampled.hyper import hyper as uncompiled
from efficient_tx.numerics.lsh import hash_directions
from tests.support.samples import attention_inputs

hyper = jax.jit(uncompiled, static_argnames=("causal", "block", "samples", "bits", "chunk"))


def dense(q, k, v, weights=1.0):
    """Σ_j w_ij e^{s_ij} v_j / Σ_j w_ij e^{s_ij} and the logarithm of the denominator; one head `[length, dim]`."""
    logits = q @ k.T / q.shape[-1] ** 0.5 + jnp.log(weights)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return jnp.exp(logits - lse[:, None]) @ v, lse


# The choice of keys, by loops over buckets, blocks and pieces: weights w_ij of `dense`.


def gray_place(code, bits):
    """Of a code in the reflected Gray sequence, by walking it."""
    return next(i for i in range(2**bits) if i ^ (i >> 1) == code)


def weights_within(q, k, directions, key, block, samples):
    """`[queries, keys]`: 1 within the block where the query falls; for a sampled key of another, what it stands for."""
    bits = directions.shape[-1]
    codes = ([sum(1 << (bits - 1 - i) for i in np.flatnonzero(row @ directions > 0)) for row in x] for x in (q, k))
    place = [[gray_place(code, bits) for code in one] for one in codes]
    n = len(k)
    order = sorted(range(n), key=lambda j: (place[1][j], j))
    uniform = np.asarray(jax.random.uniform(key, (samples,), np.float32))
    starts = [int(np.ceil(s * n / samples)) for s in range(samples + 1)]
    sampled = {
        start + int(u * (end - start)): end - start for start, end, u in zip(starts, starts[1:], uniform) if start < end
    }
    weights = np.zeros((len(q), n))
    for i in range(len(q)):
        # At equal positions a query comes before the key; without common ones all queries come first.
        when = i if len(q) == n else 0
        before = sum((place[1][j], j) < (place[0][i], when) for j in range(n))
        own = min(before, n - 1) // block
        for row, size in sampled.items():
            if row // block != own:
                weights[i, order[row]] = size
        weights[i, order[own * block : (own + 1) * block]] = 1
    return weights


def weights_of_past(q, k, directions, key, block, samples, chunk):
    """The same, causally: by the definition, the halves of pieces of two chunks, four, eight, and so on."""
    n = len(q)
    weights = np.zeros((n, n))
    for start in range(0, n, chunk):
        here = slice(start, start + chunk)
        weights[here, here] = np.tril(np.ones((chunk, chunk)))[: n - start, : n - start]
    level, half = 0, chunk
    while half < n:
        for piece, start in enumerate(range(0, n, 2 * half)):
            now, past = slice(start + half, start + 2 * half), slice(start, start + half)
            if start + half < n:
                draw = jax.random.fold_in(key, (level << 24) + piece)
                # A second half counts as whole, whatever of it there is yet.
                late = np.concatenate([q[now], np.ones((half - len(q[now]), q.shape[1]))])
                weights[now, past] = weights_within(late, k[past], directions, draw, block, samples)[: len(q[now])]
        level, half = level + 1, 2 * half
    return weights


@pytest.mark.parametrize(
    ("queries", "causal"), [(21, False), (9, False), (21, True)], ids=("bidirectional", "cross", "causal")
)
@pytest.mark.first(1)
def test_equals_the_dense_sum_over_the_chosen_keys(queries, causal):
    """Forward and gradient in float64, padding scattered, grouped heads; the choice made by the loops above."""
    keys, options = 21, {"block": 3, "samples": 4, "bits": 3, "chunk": 6}
    q, k, v = attention_inputs(0, queries, keys, groups=1)
    mask = np.ones((2, keys), bool)
    mask[1, [0, 4, 5, 13, 20]] = False
    if not causal:
        mask[0, 3] = False
    real_q = mask if queries == keys else np.ones((2, queries), bool)
    draws = jax.random.split(jax.random.key(7), 2)
    w = np.where(real_q[..., None, None], np.random.default_rng(1).normal(size=(2, queries, 2, 5)), 0)

    with jax.enable_x64(True):
        chosen = {}
        for b, h in np.ndindex(2, 2):
            hashing, sampling = (jax.random.fold_in(draws[b], i) for i in (0, 1 + h))
            own = q[b, real_q[b], h], k[b, mask[b], 0], np.asarray(hash_directions(hashing[None], 8, 3))[0]
            choose = weights_of_past if causal else weights_within
            sizes = [options[name] for name in ("block", "samples", "chunk")[: 3 if causal else 2]]
            chosen[b, h] = choose(*own, sampling, *sizes)
            assert 0 < (chosen[b, h] == 0).mean() < 1  # something is left out

        def formula(q, k, v):
            out = jnp.zeros(w.shape)
            for (b, h), weights in chosen.items():
                rows, _ = dense(q[b, real_q[b], h], k[b, mask[b], 0], v[b, mask[b], 0], weights)
                out = out.at[b, np.flatnonzero(real_q[b]), h].set(rows)
            return jnp.vdot(out, w), out

        def ours(q, k, v):
            out = hyper(q, k, v, mask=mask, key=draws, causal=causal, **options)
            return jnp.vdot(out, w), out

        results = []
        for function in (formula, ours):
            (_, out), gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True))(q, k, v)
            results.append([np.where(real_q[..., None, None], out, 0), *gradients])
    for want, got in zip(*results):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)  # float64 rounding


@pytest.mark.parametrize(("limit", "causal"), [("block", False), ("samples", True)])
@pytest.mark.slow
def test_is_softmax_with_all_keys_in_the_block_or_in_the_sample(limit, causal):
    """More padding than the block is long, so that nothing is skipped."""
    q, k, v = attention_inputs(3, 37, 37, groups=1)
    mask = np.zeros((2, 37), bool)
    mask[0, 5:32], mask[1, ::2] = True, True
    options = {"block": 3, "samples": 4, "chunk": 6, limit: 28}
    with jax.enable_x64(True):
        ours = np.asarray(hyper(q, k, v, mask=mask, causal=causal, **options))
        for b, h in np.ndindex(2, 2):
            real = mask[b]
            seen = np.tril(np.ones((real.sum(),) * 2)) if causal else np.ones((real.sum(),) * 2)
            expected, _ = dense(q[b, real, h], k[b, real, 0], v[b, real, 0], seen)
            np.testing.assert_allclose(ours[b, real, h], expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_what_comes_later_has_no_say():
    """Not only to first order: other later tokens give the same earlier outputs, to the last bit."""
    q, k, v = (x.astype(np.float32) for x in attention_inputs(0, 24, 24, batch=1))
    run = partial(hyper, causal=True, block=3, samples=4, chunk=6)
    out = np.asarray(run(q, k, v))
    for i in (5, 13, 22):
        other = [np.concatenate([x[:, :i], 5 * y[:, i:]], axis=1) for x, y in zip((q, k, v), (k, q, -v))]
        np.testing.assert_array_equal(run(*other)[:, :i], out[:, :i])


@pytest.mark.quick
def test_a_single_query_of_a_decoder_sees_all_real_keys():
    q, k, v = attention_inputs(0, 1, 40, groups=1)
    mask = np.arange(40) < np.array([[17], [40]])
    with jax.enable_x64(True):
        ours = np.asarray(hyper(q, k, v, mask=mask, causal=True, block=3, samples=4, chunk=4))
        for b, h in np.ndindex(2, 2):
            expected, _ = dense(q[b, :, h], k[b, mask[b], 0], v[b, mask[b], 0])
            np.testing.assert_allclose(ours[b, :, h], expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="there are 3 queries for 40 keys"):
        uncompiled(np.repeat(q, 3, axis=1), k, v, causal=True)


def clusters(r, centres, count, sizes, spread):
    return centres[r.choice(len(sizes), count, p=sizes)] + spread * r.normal(size=(count, centres.shape[1]))


def shifted(r, n, dim):
    """Queries crowd where keys are few."""
    centres, sizes = 2 * r.normal(size=(8, dim)), np.arange(1, 9) / 36
    return clusters(r, centres, n, sizes, 0.3), clusters(r, centres, n, sizes[::-1], 0.3)


def alike(r, n, dim, sizes, spread):
    centres = 2 * r.normal(size=(len(sizes), dim))
    return [clusters(r, centres, n, sizes, spread) for _ in range(2)]


KINDS = {
    "random": lambda r, n, dim: [r.normal(size=(n, dim)) for _ in range(2)],
    "clustered": lambda r, n, dim: alike(r, n, dim, [1 / 8] * 8, 0.3),
    "imbalanced": lambda r, n, dim: alike(r, n, dim, [0.96] + [0.01] * 4, 0.2),
    "shifted": shifted,
}
DRAWS, LENGTH, BUDGETS = 8, 512, (16, 64, 256)


def published(q, k, v, r, budget):
    """One head as insuhan/hyper-attn computes it: blocks paired by rank, samples with replacement."""
    n, dim = q.shape
    directions = r.normal(size=(dim, 7))
    code = [((x @ directions > 0) << np.arange(7)).sum(1) for x in (q, k)]
    place = np.argsort([c ^ (c >> 1) for c in range(128)])
    block = np.empty((2, n), int)
    for one, c in zip(block, code):
        one[np.argsort(place[c], kind="stable")] = np.arange(n) // budget
    same = block[0][:, None] == block[1]
    weights = same + (n / budget) * ~same * np.bincount(r.integers(0, n, budget), minlength=n)
    logits = q @ k.T / dim**0.5
    logits = np.exp(logits - logits.max(1, keepdims=True)) * weights
    return logits / logits.sum(1, keepdims=True) @ v


@pytest.fixture(scope="module")
def errors():
    """{kind: ([error at each budget], the published algorithm's at 64)}: relative, mean over the draws."""
    found = {}
    for kind, make in KINDS.items():
        r = np.random.default_rng(0)
        q, k = make(r, LENGTH, 32)
        v = r.normal(size=(LENGTH, 32))
        exact = np.asarray(dense(q, k, v)[0])

        def error(out, exact=exact):
            return np.linalg.norm(out - exact) / np.linalg.norm(exact)

        batch = [np.broadcast_to(x.astype(np.float32), (DRAWS, *x.shape))[:, :, None] for x in (q, k, v)]
        ours = [
            np.mean([error(out[:, 0]) for out in np.asarray(hyper(*batch, key=jax.random.key(0), block=b, samples=b))])
            for b in BUDGETS
        ]
        found[kind] = ours, np.mean([error(published(q, k, v, r, 64)) for _ in range(DRAWS)])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_with_the_budget(kind, errors):
    """Four times as many keys: at least a quarter less error."""
    (first, second, third), _ = errors[kind]
    assert first > 4 / 3 * second > 16 / 9 * third > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_is_at_most_that_of_the_published_algorithm(kind, errors):
    """At 64 keys in the block and 64 samples; within 5 %, the noise of eight draws, and far below it when shifted."""
    (_, ours, _), theirs = errors[kind]
    assert ours < (0.8 if kind == "shifted" else 1.05) * theirs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "block is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"bits": 0}, "bits is 0"),
        ({"bits": 17}, "bits is 17: it must be at most 16"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Hyper(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)
