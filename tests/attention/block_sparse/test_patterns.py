"""Block patterns against a dense mask written pair by pair, their exact limits, decoding, and what BigBird draws."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import BigBird, Local, Longformer, Sparse, bigbird, local, longformer, softmax, sparse
from efficient_tx.attention.block_sparse import patterns
from efficient_tx.attention.block_sparse.bigbird import bigbird_blocks
from efficient_tx.attention.block_sparse.patterns import Window
from efficient_tx.numerics.random import evaluation_keys

LENGTH = 21
REAL = np.ones((2, LENGTH), bool)
REAL[1, [0, 3, 4, 9, 15, 19, 20]] = False  # padding anywhere


def near(i, j, window, causal):
    return i - j < window if causal else abs(i - j) <= window // 2


@cache
def drawn_blocks(n, causal, block, window_blocks, global_blocks, random_blocks):
    """What BigBird draws at evaluation for `n` real tokens, `[heads, blocks, random_blocks]`."""
    near, blocks = Window.of(window_blocks, causal), -(-LENGTH // block)
    draw = jax.jit(bigbird_blocks, static_argnums=range(2, 8))
    drawn = draw(evaluation_keys(1)[0], -(-n // block), near, 4, blocks, causal, global_blocks, random_blocks)
    return np.asarray(drawn[..., -random_blocks:])


def sees_bigbird(b, h, i, j, n, causal, **options):
    """By the blocks drawn for this head; what is drawn has a test of its own."""
    i, j = i // options["block"], j // options["block"]
    seen = near(i, j, options["window_blocks"], causal) or min(i, j) < options["global_blocks"]
    return seen or j in drawn_blocks(n, causal, *options.values())[h, i]


CASES = {
    "local": (local, {"window": 6}, lambda b, h, i, j, n, causal: near(i, j, 6, causal)),
    "longformer": (
        longformer,
        {"window": 4, "global_tokens": 3},
        lambda b, h, i, j, n, causal: near(i, j, 4, causal) or i < 3 or j < 3,
    ),
    "bigbird": (
        bigbird,
        options := {"block": 2, "window_blocks": 3, "global_blocks": 1, "random_blocks": 2},
        partial(sees_bigbird, **options),
    ),
    "strided": (
        sparse,
        {"stride": 4},
        lambda b, h, i, j, n, causal: near(i, j, 4, causal) or (i - j) % 4 == 0,
    ),
    "fixed": (
        sparse,
        {"pattern": "fixed", "stride": 5, "summary": 2},
        lambda b, h, i, j, n, causal: i // 5 == j // 5 or j % 5 >= 3,
    ),
}
every = pytest.mark.parametrize("name", CASES)


def inputs(seed, length=LENGTH, *, heads=4, groups=2, dim=6, v_dim=3, batch=2):
    r = np.random.default_rng(seed)
    shapes = (batch, length, heads, dim), (batch, length, groups, dim), (batch, length, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def dense_mask(sees, causal):
    """bool `[batch, heads, queries, keys]` in the places of the tokens, from who sees whom by rank."""
    pairs = np.zeros((2, 4, LENGTH, LENGTH), bool)
    for b, h in np.ndindex(2, 4):
        places = np.flatnonzero(REAL[b])
        for i, j in np.ndindex(len(places), len(places)):
            pairs[b, h, places[i], places[j]] = (j <= i or not causal) and sees(b, h, i, j, len(places), causal)
    return pairs


def dense(q, k, v, pairs):
    """Softmax attention over the pairs, zero for a query without any."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = jnp.where(pairs, jnp.exp(jnp.where(pairs, logits, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.where(total > 0, total, 1), v)


@jax.jit
def dense_gradient(q, k, v, pairs, w):
    """Gradients of Σ out · w, and out."""

    def loss(*arrays):
        out = dense(*arrays, pairs)
        return jnp.vdot(out, w), out

    return jax.grad(loss, (0, 1, 2), True)(q, k, v)


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@every
@pytest.mark.first(2)
def test_equals_a_dense_mask_and_its_gradients(monkeypatch, name, causal):
    """In float64, with padding in between, which holds NaN; grouped heads, values of another width, many blocks."""
    monkeypatch.setattr(patterns, "LARGEST_BLOCK", 4)
    function, options, sees = CASES[name]
    pairs = dense_mask(sees, causal)
    assert pairs.sum() < 0.9 * dense_mask(lambda *_: True, causal).sum()
    q, k, v = inputs(0)
    w = np.random.default_rng(1).normal(size=(2, LENGTH, 4, 3))

    def ours(q, k, v):
        out = function(q, k, v, mask=REAL, causal=causal, **options)
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        theirs, expected = dense_gradient(q, k, v, pairs, w)
        hostile = [np.where(REAL[..., None, None], x, np.nan) for x in (q, k, v)]
        gradients, out = jax.jit(jax.grad(ours, (0, 1, 2), True))(*hostile)
    # Sums of at most 21 terms of order 1 in float64.
    np.testing.assert_allclose(out, expected, atol=1e-12)
    for got, want in zip(gradients, theirs):
        np.testing.assert_allclose(got, want, atol=1e-12)


ALL = {
    "local": (local, {"window": 10**6}),
    "longformer": (longformer, {"window": 1, "global_tokens": LENGTH}),
    "bigbird": (bigbird, {"block": 4, "window_blocks": 1, "global_blocks": 1, "random_blocks": 5}),
    "strided": (sparse, {"stride": 1}),
    "fixed": (sparse, {"pattern": "fixed", "stride": 8, "summary": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("name", ALL)
def test_who_sees_everything_is_softmax(name, causal):
    """The exact limit: a wide window, all tokens global, all blocks drawn, no strides, all of a block its end."""
    function, options = ALL[name]
    q, k, v = inputs(0)
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(partial(function, causal=causal, **options))(q, k, v))
        exact = softmax(q, k, v, causal=causal)
        np.testing.assert_allclose(ours, exact, atol=1e-12)


@every
@pytest.mark.first(2)
def test_decoding_gives_what_the_whole_sequence_gives(name):
    """The last two queries over a cache of which a part is filled; the rest of it holds NaN."""
    function, options, _ = CASES[name]
    q, k, v = inputs(0)
    filled = np.arange(LENGTH) < np.array([[LENGTH], [14]])
    held = [np.where(filled[..., None, None], x, np.nan) for x in (k, v)]
    with jax.enable_x64(True):
        attend, last = (
            partial(function, mask=filled, causal=True, **options),
            np.stack([q[0, LENGTH - 2 :], q[1, 12:14]]),
        )
        whole, steps = jax.jit(lambda q, last, k, v: (attend(q, k, v), attend(last, *held)))(q, last, k, v)
    np.testing.assert_allclose(steps, np.stack([whole[0, LENGTH - 2 :], whole[1, 12:14]]), atol=1e-12)
    with pytest.raises(ValueError, match="got 2 queries and 21 keys"):
        function(last, k, v, mask=filled, **options)


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.slow
def test_global_tokens_may_look_through_their_own_projections(causal):
    arrays, others = inputs(0), inputs(5)
    plain, globals_ = (dense_mask(sees, causal) for sees in (CASES["longformer"][2], lambda *_: True))
    first = (np.cumsum(REAL, axis=1) <= 3)[:, :, None, None]
    with jax.enable_x64(True):
        expected = np.where(first, dense(*others, globals_), dense(*arrays, plain))
        names = dict(zip(("q_global", "k_global", "v_global"), others))
        ours = jax.jit(partial(longformer, mask=REAL, causal=causal, window=4, global_tokens=3))(*arrays, **names)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    with pytest.raises(ValueError, match="got 2 of q_global, k_global and v_global"):
        longformer(*arrays, q_global=others[0], k_global=others[1])


KINDS = {
    "random": lambda r, n: r.normal(size=(n, 16)),
    "clustered": lambda r, n: (2 * r.normal(size=(8, 16)))[r.integers(0, 8, n)] + 0.3 * r.normal(size=(n, 16)),
    "imbalanced": lambda r, n: (
        (2 * r.normal(size=(5, 16)))[r.choice(5, n, p=[0.96] + [0.01] * 4)] + 0.3 * r.normal(size=(n, 16))
    ),
}
BUDGETS = {
    "local": [{"window": size} for size in (16, 128)],
    "longformer": [{"window": size} for size in (16, 128)],
    "bigbird": [{"block": size} for size in (2, 16)],
    "strided": [{"stride": size} for size in (64, 128)],
    "fixed": [{"pattern": "fixed", "stride": 32, "summary": size} for size in (2, 16)],
}


@every
@pytest.mark.slow
def test_the_error_falls_as_the_budget_grows(name):
    """Relative error against softmax at 256 tokens, for keys without any order, on every kind of input."""
    function = CASES[name][0]
    q, k, v = (np.stack([kind(np.random.default_rng(seed), 256) for kind in KINDS.values()]) for seed in range(3))
    q, k, v = (x[:, :, None].astype(np.float32) for x in (q, k, np.random.default_rng(3).normal(size=v.shape)))
    exact = np.asarray(softmax(q, k, v))
    errors = []
    for options in BUDGETS[name]:
        out = np.asarray(jax.jit(partial(function, **options))(q, k, v))
        errors.append(np.linalg.norm((out - exact)[:, :, 0], axis=(1, 2)) / np.linalg.norm(exact[:, :, 0], axis=(1, 2)))
    assert (errors[1] < errors[0]).all()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Local, {"window": 0}, "window is 0: it must be at least 1"),
        (Longformer, {"window": 0}, "window is 0"),
        (Longformer, {"global_tokens": -1}, "global_tokens is -1: it must be at least 0"),
        (BigBird, {"block": 0}, "block is 0"),
        (BigBird, {"window_blocks": 0}, "window_blocks is 0"),
        (BigBird, {"random_blocks": -1}, "random_blocks is -1"),
        (Sparse, {"pattern": "random"}, "pattern is 'random': choose one of strided, fixed"),
        (Sparse, {"stride": 0}, "stride is 0"),
        (Sparse, {"pattern": "fixed", "stride": 4}, "summary is 8: it must be at most the stride, 4"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(cls, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        cls(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)
