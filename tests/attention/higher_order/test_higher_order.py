"""Attention to pairs of tokens, tensor and strassen, against sums over all triples; limits, windows, errors."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.higher_order.strassen import strassen
from efficient_tx.attention.higher_order.tensor import Tensor, tensor, tensor_exact

triples = importlib.import_module("efficient_tx.kernels.pair_attention.xla")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that short sequences have several of queries and of second tokens, the last ones ragged."""
    monkeypatch.setattr(triples, "AREA", 128)
    monkeypatch.setattr(triples, "SECOND_TOKENS", 3)


def inputs(seed, queries, keys, *, heads=2, groups=(1, 2), dim=4, v_dim=3, batch=2):
    """q, k, v, k2, v2; `groups` those of the first and of the second token."""
    r = np.random.default_rng(seed)
    one, two = groups
    shapes = (queries, heads, dim), (keys, one, dim), (keys, one, v_dim), (keys, two, dim), (keys, two, v_dim)
    return [r.normal(size=(batch, *shape)) for shape in shapes]


# The constants of tensor are those of Meta's kernels.
SCORES = {
    "tensor": lambda q, k, k2: jnp.einsum("ic,jc,kc->ijk", q, k, k2 + 1 / q.shape[-1]),
    "strassen": lambda q, k, k2: (q @ k.T)[:, :, None] + (k @ k2.T)[None] + (q @ k2.T)[:, None],
}


def all_triples(name, q, k, v, k2, v2, seen=None):
    """One head `[length, dim]`: the softmax over all pairs at once."""
    scores = SCORES[name](q, k, k2) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    weights = jax.nn.softmax(scores.reshape(len(q), -1)).reshape(scores.shape)
    return jnp.einsum("ijk,jc,kc->ic", weights, v, v2 + (name == "tensor"))


def window_of(i, n, width, causal):
    """The tokens that query i of n sees, by their definition."""
    if causal:
        return [j for j in range(n) if 0 <= i - j < width]
    first = min(max(i - width // 2, 0), max(n - width, 0))
    return list(range(first, min(first + width, n)))


def seen_by(queries, keys, windows, causal):
    seen = np.zeros((queries, keys, keys), bool)
    for i in range(queries):
        place = i + keys - queries if causal else i
        seen[np.ix_([i], *(window_of(place, keys, width, causal) for width in windows))] = True
    return seen


def run(name, windows=None, **options):
    """(q, k, v, k2, v2) -> out, compiled."""
    function = {"tensor": tensor if windows else tensor_exact, "strassen": strassen}[name]
    if windows:
        options |= {"window": windows[0], "window2": windows[1]}
    return jax.jit(lambda q, k, v, k2, v2: function(q, k, v, k2=k2, v2=v2, **options))


@pytest.mark.parametrize(
    ("name", "windows", "queries", "causal"),
    [
        pytest.param("tensor", (5, 4), 13, False, marks=pytest.mark.slow),
        ("tensor", (5, 4), 13, True),
        pytest.param("tensor", (2, 7), 1, True, marks=pytest.mark.slow),
        pytest.param("tensor", (13, 40), 6, False, marks=pytest.mark.slow),
        pytest.param("strassen", None, 13, True, marks=pytest.mark.slow),
        pytest.param("strassen", None, 6, False, marks=pytest.mark.slow),
    ],
)
def test_equals_the_sum_over_triples_and_its_gradient(name, windows, queries, causal):
    """In float64, padding scattered, grouped heads; one example has two real tokens only."""
    keys = 13
    operands = inputs(queries, queries, keys)
    mask = np.random.default_rng(0).random((2, keys)) < 0.8
    mask[1] = np.arange(keys) % 9 == 3
    rows = [mask[b] if queries == keys else np.ones(queries, bool) for b in range(2)]
    w = np.random.default_rng(1).normal(size=(2, queries, 2, 3))

    def formula(*operands):
        out = jnp.zeros(w.shape)
        for b, h in np.ndindex(2, 2):
            n = mask[b].sum()
            seen = seen_by(rows[b].sum(), n, windows or (n, n), causal)
            q = operands[0][b, rows[b], h]
            others = (x[b, mask[b], h * x.shape[2] // 2] for x in operands[1:])
            kept = np.flatnonzero(seen.any((1, 2)))  # causal queries before the first token see nothing
            found = all_triples(name, q[kept], *others, seen[kept])
            out = out.at[b, np.flatnonzero(rows[b])[kept], h].set(found)
        return jnp.vdot(out, w), out

    def ours(*operands):
        out = run(name, windows, mask=mask, causal=causal)(*operands)
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        results = []
        for function in (formula, ours):
            (_, out), gradients = jax.jit(jax.value_and_grad(function, argnums=range(5), has_aux=True))(*operands)
            results.append([out, *gradients])
    for want, got in zip(*results):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)  # float64 rounding


@pytest.mark.quick
def test_strassen_is_its_products_of_matrices():
    """num_c = ((X diag(v_c) Y) ⊙ Z) v2_c and den without values, for scores that do not underflow."""
    q, k, v, k2, v2 = inputs(0, 11, 11, groups=(2, 2))
    with jax.enable_x64(True):
        ours = np.asarray(run("strassen")(q, k, v, k2, v2))
    for b, h in np.ndindex(2, 2):
        f, g, v_j, hh, v_k = (x[b, :, h] for x in (q, k, v, k2, v2))
        x, y, z = (np.exp(one @ two.T / 2) for one, two in ((f, g), (g, hh), (f, hh)))
        total = ((x @ y) * z).sum(1)
        for c in range(3):
            sums = ((x @ (v_j[:, c, None] * y)) * z) @ v_k[:, c]
            np.testing.assert_allclose(ours[b, :, h, c], sums / total, rtol=1e-12)


@pytest.mark.quick
def test_strassen_holds_where_the_largest_factors_do_not_meet():
    """Scores up to 200: in float32 X and Y, each divided by its largest entry, have a product of zeros."""
    q, k, v, k2, v2 = inputs(0, 4, 4, groups=(1, 1), heads=1, batch=1)
    q, k, k2 = (np.zeros((1, 4, 1, 4)) for _ in range(3))
    q[..., 0], k2[..., 1] = 20, 20
    k[0, :, 0] = 20 * np.array([[1, -1, 0, 0], [-1, 1, 0, 0], [1, -1, 0, 0], [-1, 1, 0, 0]])
    x, y = (
        np.exp((s - s.max()).astype(np.float32))
        for s in (q[0, :, 0] @ k[0, :, 0].T / 2, k[0, :, 0] @ k2[0, :, 0].T / 2)
    )
    assert ((x @ y) == 0).all()
    arrays = [x.astype(np.float32) for x in (q, k, v, k2, v2)]
    expected = all_triples("strassen", *(x[0, :, 0] for x in (q, k, v, k2, v2)))
    ours = np.asarray(run("strassen")(*arrays))[0, :, 0]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)  # float32 rounding


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.slow
def test_windows_of_all_tokens_are_the_exact_limit(causal):
    """Of all real tokens: the sequence is longer than the windows."""
    operands = inputs(0, 16, 16)
    mask = np.arange(16) % 4 != 1
    mask = np.stack([mask, ~mask])
    with jax.enable_x64(True):
        exact, windowed = (run("tensor", windows, mask=mask, causal=causal)(*operands) for windows in (None, (12, 12)))
    np.testing.assert_allclose(windowed, exact, rtol=0, atol=1e-12)


def test_a_constant_second_token_leaves_softmax():
    q, k, v, _, _ = inputs(0, 9, 9, groups=(2, 2))
    logits = np.einsum("bihc,bjhc->bhij", q, k) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum("bhij,bjhc->bihc", weights, v)
    with jax.enable_x64(True):
        none = {"k2_bias": 0.0, "v2_bias": 0.0}
        for name, constant, options in (("tensor", 1.0, none), ("strassen", 0.0, {})):
            out = run(name, **options)(q, k, v, np.full_like(k, constant), np.ones_like(v))
            np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("windows", [None, (40, 40)], ids=["exact", "windows"])
@pytest.mark.first(1)
@pytest.mark.slow
def test_tensor_starts_as_attention_to_the_first_token(windows):
    """k2 = v2 = 0 leaves Meta's constants, 1/d and 1: one softmax, whose logits are q·k / d^1.5."""
    q, k, v, k2, v2 = inputs(0, 9, 9, groups=(2, 2))
    logits = np.einsum("bihc,bjhc->bhij", q, k) / 4**1.5
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    with jax.enable_x64(True):
        out = run("tensor", windows)(q, k, v, 0 * k2, 0 * v2)
    np.testing.assert_allclose(out, np.einsum("bhij,bjhc->bihc", weights, v), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_two_tokens_of_a_pair_may_change_places():
    q, k, v, k2, v2 = inputs(0, 9, 9)
    with jax.enable_x64(True):
        for name, windows in (("tensor", (5, 2)), ("strassen", None)):
            options = {"causal": True} | ({"k2_bias": 0.0, "v2_bias": 0.0} if name == "tensor" else {})
            one = run(name, windows, **options)(q, k, v, k2, v2)
            two = run(name, windows and windows[::-1], **options)(q, k2, v2, k, v)
            np.testing.assert_allclose(one, two, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_the_error_falls_as_the_windows_grow():
    """On random, clustered and imbalanced tokens, one example each; to zero with all of them."""
    r, n, dim = np.random.default_rng(0), 48, 8
    batch = []
    for shares in (None, [1 / 8] * 8, [0.96] + [0.01] * 4):
        if shares is None:
            batch.append(r.normal(size=(5, n, 1, dim)))
        else:
            centres, label = r.normal(size=(5, len(shares), 1, dim)), r.choice(len(shares), n, p=shares)
            batch.append(centres[:, label] + 0.3 * r.normal(size=(5, n, 1, dim)))
    operands = np.stack(batch, axis=1).astype(np.float32)
    exact = np.asarray(run("tensor")(*operands))

    def error(windows):
        difference = run("tensor", windows)(*operands) - exact
        return np.sqrt(np.square(difference).sum((1, 2, 3)) / np.square(exact).sum((1, 2, 3)))

    small, large, all_ = (error((width, width)) for width in (6, 24, 48))
    assert (small > 1.5 * large).all()
    assert (large > 0.01).all()
    assert (all_ < 1e-5).all()  # float32 rounding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0: it must be at least 1"),
        ({"window2": 0}, "window2 is 0: it must be at least 1"),
        ({"positions": "rope"}, "Tensor's trilinear score would not be relative under 'rope'"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Tensor(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, k2, v2 = (jnp.asarray(x, jnp.float32) for x in inputs(0, 9, 9))
    with pytest.raises(ValueError, match="6 queries for 9 keys, without common positions: tensor needs windows of 9"):
        tensor(q[:, :6], k, v, k2=k2, v2=v2, window=8)
    with pytest.raises(ValueError, match=r"k2 has shape \(2, 8, 2, 4\)"):
        tensor(q, k, v, k2=k2[:, :8], v2=v2)
    with pytest.raises(ValueError, match=r"v2 has shape \(2, 9, 2, 2\)"):
        strassen(q, k, v, k2=k2, v2=v2[..., :2])
    with pytest.raises(ValueError, match="k2 has 2 heads: the 3 query heads are no multiple of it"):
        strassen(q[:, :, jnp.array([0, 1, 0])], k, v, k2=k2, v2=v2)
