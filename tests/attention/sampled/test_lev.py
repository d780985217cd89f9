"""LevAttention against dense attention over sets chosen in NumPy; its guarantees; the stream token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import lev as uncompiled
from efficient_tx.attention import lev_init, lev_step
from efficient_tx.attention.sampled.lev import Lev, universal_set

OPTIONS = ("causal", "budget", "p", "attention", "recent", "ridge", "rescore")
lev = jax.jit(uncompiled, static_argnames=OPTIONS)
RIDGE = 0.7


def inputs(seed, queries, keys, *, heads=4, groups=2, dim=6, v_dim=5, batch=2):
    r = np.random.default_rng(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def scattered(keys):
    """Two masks: one of any pattern, one padded on the right."""
    return np.stack([np.random.default_rng(7).random(keys) < 0.7, np.arange(keys) < keys - 9])


def leverage(a, p=2.0):
    """Leverage scores, or Lewis weights by their plain iteration (p < 4)."""
    w = np.ones(len(a))
    for _ in range(1 if p == 2 else 60):
        gram = a.T @ (w[:, None] ** (1 - 2 / p) * a)
        w = np.einsum("ij,ij->i", a, np.linalg.solve(gram, a.T).T) ** (p / 2)
    return w


def ridge_score(row, prefix):
    return row @ np.linalg.solve(prefix.T @ prefix + RIDGE * np.eye(len(row)), row)


def best(scores, count):
    """The indices of the `count` largest, the earlier one on ties, in order."""
    return np.sort(np.argsort(-np.asarray(scores), kind="stable")[:count])


def sets(k, mask, budget, p):
    """The pairs that see each other, `[batch, groups, 1, keys]`."""
    pairs = np.zeros((k.shape[0], k.shape[2], 1, k.shape[1]), bool)
    for b, g in np.ndindex(*pairs.shape[:2]):
        real = np.flatnonzero(mask[b])
        pairs[b, g, 0, real[best(leverage(k[b, real, g], p), budget)]] = True
    return pairs


def streamed_sets(k, mask, budget, recent, rescore):
    """As the docstring of lev_stream has it, token by token: `[batch, groups, keys, keys]`."""
    batch, keys, groups, _ = k.shape
    pairs = np.zeros((batch, groups, keys, keys), bool)
    for b, g in np.ndindex(batch, groups):
        real = np.flatnonzero(mask[b])
        rows, held = k[b, real, g], np.array([], int)
        arrival = [ridge_score(rows[i], rows[: i + 1]) for i in range(len(rows))]
        for i, place in enumerate(real):
            if i and i % recent == 0:
                held = np.concatenate([held, np.arange(i - recent, i)])
                scores = [ridge_score(rows[j], rows[:i]) if rescore else arrival[j] for j in held]
                held = held[best(scores, budget - recent)]
            pairs[b, g, place, real[held]] = True
            pairs[b, g, place, real[i - i % recent : i + 1]] = True
    return pairs


@partial(jax.jit, static_argnames=("attention", "p"))
def dense(q, k, v, w, pairs, everything, *, attention, p):
    """(out, gradients of Σ out · w) of attention over `pairs`; `everything` counts in the normaliser for p = 2."""

    def loss(q, k, v):
        repeats = q.shape[2] // k.shape[2]
        k, v = (jnp.repeat(x, repeats, axis=2) for x in (k, v))
        seen, counted = (jnp.repeat(x, repeats, axis=1) for x in (pairs, everything))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        if attention == "softmax":
            scores = jnp.where(seen, scores / q.shape[-1] ** 0.5, -jnp.inf)
            peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
            weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0))
            total = weights.sum(-1, keepdims=True)
        else:
            weights = jnp.abs(scores) ** p
            total = jnp.where(counted if p == 2 else seen, weights, 0).sum(-1, keepdims=True)
            weights = jnp.where(seen, weights, 0)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights / jnp.where(total > 0, total, 1), v)
        return jnp.vdot(out, w), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


@partial(jax.jit, static_argnames=OPTIONS)
def ours(q, k, v, w, mask, **options):
    def loss(q, k, v):
        out = uncompiled(q, k, v, mask=mask, **options)
        return jnp.vdot(out, w), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def check(q, k, v, mask, pairs, everything, **options):
    """Forward and gradients in float64, to 1e-10: rounding, times the condition of 6 columns."""
    w = np.random.default_rng(9).normal(size=(*q.shape[:3], v.shape[-1]))
    if q.shape[1] == k.shape[1]:
        w *= mask[:, :, None, None]  # the mask marks queries too
    attention, p = options.get("attention", "softmax"), options.get("p", 2.0)
    with jax.enable_x64(True):
        expected = dense(q, k, v, w, pairs, everything, attention=attention, p=p)
        got = ours(q, k, v, w, mask, **options)
    for x, y, name in zip(got, expected, ("out", "q", "k", "v")):
        x, y = np.asarray(x), np.asarray(y)
        if name == "out" and q.shape[1] == k.shape[1]:
            x, y = x[mask], y[mask]
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.parametrize(
    ("attention", "p", "budget"),
    [
        ("softmax", 2.0, 7),
        ("softmax", 2.0, 40),
        ("polynomial", 2.0, 7),
        ("polynomial", 2.0, 40),
        ("polynomial", 3.0, 7),
    ],
)
@pytest.mark.first(1)
def test_it_is_dense_attention_over_the_best_keys(attention, p, budget):
    """With gradients; all keys are the exact limit. Queries and keys of other numbers, grouped heads, any mask."""
    q, k, v = inputs(0, 11, 31)
    mask = scattered(31)
    everything = np.broadcast_to(mask[:, None, None], (2, 2, 1, 31))
    pairs = everything if budget > 31 else sets(k, mask, budget, p)
    check(q, k, v, mask, pairs, everything, attention=attention, p=p, budget=budget)


def causal_options(attention, rescore, budget=9, recent=4):
    options = {"attention": attention, "rescore": rescore, "budget": budget, "recent": recent}
    return options | {"ridge": RIDGE, "causal": True}


@pytest.mark.parametrize(
    ("attention", "rescore", "budget"),
    [("softmax", True, 9), ("polynomial", False, 9), ("softmax", True, 35)],
    ids=["softmax", "polynomial, arrival", "all"],
)
@pytest.mark.slow
def test_the_causal_form_is_dense_attention_over_the_streamed_sets(attention, rescore, budget):
    """In the last case `budget − recent` is the number of keys: exact causal attention."""
    q, k, v = inputs(1, 31, 31)
    mask = scattered(31)
    everything = np.tril(np.ones((31, 31), bool)) & mask[:, None, None, :] & mask[:, None, :, None]
    everything = np.broadcast_to(everything, (2, 2, 31, 31))
    pairs = everything if budget > 31 else streamed_sets(k, mask, budget, 4, rescore)
    assert pairs.sum(-1).max() <= budget
    check(q, k, v, mask, pairs, everything, **causal_options(attention, rescore, budget))


@partial(jax.jit, static_argnames=("options",))
def decode(state, tokens, options):
    def step(state, token):
        q, k, v, mask = token
        out, state = lev_step(q, k, v, state, mask=mask, **dict(options))
        return state, (out, state.slots.position)

    _, (out, position) = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(out, 0, 1), position


@pytest.mark.slow
def test_causally_any_length_is_fine_without_a_mask():
    """Ten tokens in blocks of four: the last block is not full."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in inputs(0, 10, 10)]
        whole = lev(*arrays, mask=jnp.ones((2, 10), bool), causal=True, budget=8)
        np.testing.assert_allclose(lev(*arrays, causal=True, budget=8), whole, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize(("attention", "rescore"), [("softmax", True), ("polynomial", False)])
@pytest.mark.first(1)
def test_decoding_gives_the_same_as_training(attention, rescore):
    """Also where padding comes between: the state waits. It holds `budget` keys, and its shapes never change."""
    q, k, v = inputs(2, 31, 31)
    mask = scattered(31)
    options = {"recent": 4, "ridge": RIDGE, "rescore": rescore, "attention": attention}
    with jax.enable_x64(True):
        w = np.zeros((2, 31, 4, 5))
        together = np.asarray(ours(q, k, v, w, mask, **causal_options(attention, rescore))[0])
        state = lev_init(2, 2, 6, 5, budget=9, dtype=jnp.float64)
        stepwise, position = (np.asarray(x) for x in decode(state, (q, k, v, mask), tuple(options.items())))
    # The same sums in another order; a condition number of the prefixes' Gram matrices of some hundreds.
    np.testing.assert_allclose(stepwise, together, rtol=0, atol=1e-11)
    assert (together[~mask] == 0).all()
    assert position.shape == (31, 2, 2, 9)
    assert ((position >= 0).sum(-1) <= np.minimum(mask.cumsum(1).T, 9)[:, :, None]).all()


def streams(length, dim, seed=3):
    r = np.random.default_rng(seed)
    centres = 2 * r.normal(size=(8, dim))
    few = np.concatenate([centres[:1] + 0.1 * r.normal(size=(length - 8, dim)), 3 * r.normal(size=(8, dim))])
    return np.stack([
        r.normal(size=(length, dim)),
        centres[r.integers(0, 8, length)] + 0.3 * r.normal(size=(length, dim)),
        few[r.permutation(length)],
        r.normal(size=(length, dim)) * np.geomspace(0.1, 10, length)[:, None],
    ])  # fmt: skip


@pytest.mark.parametrize("rescore", [True, False])
@pytest.mark.slow
def test_every_key_above_the_threshold_is_held(rescore):
    """The guarantee of lev_stream, at every token of four streams, from scores computed in NumPy."""
    length, dim, budget, recent = 96, 4, 40, 8
    k = streams(length, dim)[:, :, None]
    tokens = (k, k, k, np.ones(k.shape[:2], bool))
    options = {"recent": recent, "ridge": RIDGE, "rescore": rescore}
    with jax.enable_x64(True):
        state = lev_init(len(k), 1, dim, budget=budget, dtype=jnp.float64)
        position = np.asarray(decode(state, tokens, tuple(options.items()))[1])[:, :, 0]
    promised = 0
    for b, rows in enumerate(k[:, :, 0]):
        arrival = np.array([ridge_score(rows[j], rows[: j + 1]) for j in range(length)])
        total = dim if rescore else dim * np.log1p(np.square(rows).sum() / (dim * RIDGE))
        threshold = total / (budget - recent + 1)
        for i in range(length):
            now = [ridge_score(rows[j], rows[: i + 1]) for j in range(i + 1)] if rescore else arrival[: i + 1]
            above = np.flatnonzero(np.array(now) > threshold)
            assert set(above) <= set(position[i, b])
            assert i in position[i, b]
            promised += (above < i - i % recent).sum()
    assert promised > 500  # keys of earlier blocks, over all tokens: the promise is not about nothing


@pytest.mark.parametrize("p", [2.0, 4.0])
def test_the_set_holds_every_large_weight_of_any_query(p):
    """Above ε = rank^max(1, p/2) / (budget + 1), of random queries, and of those that serve one key best."""
    k = streams(96, 4)[:, :, None]
    with jax.enable_x64(True):
        position = np.asarray(universal_set(jnp.asarray(k), None, 40, p))[..., 0]
    for rows, chosen in zip(k[:, :, 0], position):
        y = np.concatenate([np.random.default_rng(4).normal(size=(2000, 4)), np.linalg.solve(rows.T @ rows, rows.T).T])
        weights = np.abs(y @ rows.T) ** p
        weights /= weights.sum(1, keepdims=True)
        heavy = np.flatnonzero(weights.max(0) > 4 ** max(1, p / 2) / 41)
        assert set(heavy) <= set(chosen)
        if p == 2:  # at p = 4 the bound exceeds 1 unless a key stands nearly alone
            assert weights.max() > 4 / 41


@pytest.mark.quick
def test_ties_go_to_the_earlier_key():
    k = np.zeros((1, 12, 1, 2))
    k[0, ::2, 0, 0] = k[0, 1::2, 0, 1] = 1
    with jax.enable_x64(True):
        assert np.asarray(universal_set(jnp.asarray(k), None, 5, 2.0))[0, :, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_error_falls_with_the_budget():
    """Mean relative error of five draws of random, clustered and imbalanced keys.

    At equal budgets: on imbalanced keys below three quarters of that of uniform ones, which miss what is rare; and with
    the exact sum of the polynomial weights below that with their sum over the set.
    """
    q, k, v, w = (np.zeros((15, 128, 1, 8), np.float32) for _ in range(4))
    r = np.random.default_rng(5)
    k[...] = np.concatenate([streams(128, 8, seed)[:3] for seed in range(5)])[:, :, None]
    q[...] = [x[r.permutation(128)] for x in k] + 0.1 * r.normal(size=k.shape)
    v[...] = r.normal(size=v.shape)
    everything = np.ones((15, 1, 128, 128), bool)
    uniform = np.broadcast_to(np.arange(128) < 32, everything.shape)  # the first 32 of tokens in random order
    chosen = np.broadcast_to(sets(k, everything[:, 0, 0], 32, 2.0), everything.shape)

    def error(out, exact):
        squares = [np.square(x).sum((1, 2, 3)).reshape(5, 3) for x in (np.asarray(out) - exact, exact)]
        return np.sqrt(squares[0] / squares[1]).mean(0)

    for causal, attention in ((False, "softmax"), (False, "polynomial"), (True, "softmax")):
        oracle = partial(dense, q, k, v, w, attention=attention, p=2.0)
        pairs = np.tril(everything) if causal else everything
        exact = np.asarray(oracle(pairs, pairs)[0])
        few, more = (
            error(lev(q, k, v, budget=budget, attention=attention, causal=causal), exact) for budget in (8, 32)
        )
        assert (more < few).all(), (few, more)
        if not causal:
            assert more[2] < error(oracle(uniform, uniform)[0], exact)[2] * 0.75
        if attention == "polynomial":
            assert (more < error(oracle(chosen, chosen)[0], exact)).all()


def test_queries_at_the_end_of_the_keys():
    """Causal with fewer queries than keys: the last query stands at the last real key, as in flax's decoding."""
    q, k, v = inputs(3, 31, 31)
    mask = scattered(31)
    options = causal_options("softmax", True)
    with jax.enable_x64(True):
        whole = np.asarray(ours(q, k, v, np.zeros((2, 31, 4, 5)), mask, **options)[0])
        ends = [np.flatnonzero(row)[-3:] for row in mask]
        last = np.stack([x[end] for x, end in zip(q, ends)])
        few = np.asarray(lev(last, k, v, mask=mask, **options))
        np.testing.assert_allclose(few, np.stack([x[end] for x, end in zip(whole, ends)]), atol=1e-12)
        none = np.asarray(lev(last, k, v, mask=np.zeros_like(mask), **options))
    assert (none == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget is 0"),
        ({"budget": 1, "causal": True}, "budget is 1: it must be at least 1, and 2 for a causal form"),
        ({"p": 0.5}, r"p is 0\.5: it must be at least 1"),
        ({"p": 3.0, "causal": True}, "p is 3.0: .* set p=2"),
        ({"attention": "cubic"}, "attention is 'cubic': choose one of softmax, polynomial"),
        ({"recent": 128}, "recent is 128: .* below the budget, 128"),
        ({"ridge": 0.0}, "ridge is 0.0: it must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    x = jnp.ones((1, 3, 1, 2))
    for make in (lambda: Lev(16, heads=2, rngs=nnx.Rngs(0), **options), lambda: uncompiled(x, x, x, **options)):
        with pytest.raises(ValueError, match=message) as raised:
            make()
        assert "\n" not in str(raised.value)
