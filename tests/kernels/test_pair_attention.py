"""pair_attention, "reference" and "xla", against loops over all pairs in NumPy; gradients, limits, errors."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import pair_attention
from efficient_tx.kernels.pair_attention.options import Options

xla = importlib.import_module("efficient_tx.kernels.pair_attention.xla")
KEYS = 13


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that short sequences have several of queries and of second tokens, the last ones ragged."""
    monkeypatch.setattr(xla, "AREA", 128)
    monkeypatch.setattr(xla, "SECOND_TOKENS", 3)


def pair(q, k2):
    """Nothing in it is symmetric."""
    return q * k2 + 0.5 * q - k2, 0.3 * (q * k2).sum(-1)


def inputs(queries):
    """q, k, v, k2, v2: three heads of queries, one of first tokens, three of second tokens."""
    r = np.random.default_rng(queries)
    shapes = (queries, 3, 4), (KEYS, 1, 4), (KEYS, 1, 2), (KEYS, 3, 4), (KEYS, 3, 2)
    return [r.normal(size=(2, *shape)) for shape in shapes]


def window(position, count, width, causal):
    """The tokens of `count` that a query at this position sees, by the docstring."""
    width = count if width is None else width
    if causal:
        return [j for j in range(count) if position - width < j <= position]
    start = min(max(position - width // 2, 0), max(count - width, 0))
    return [j for j in range(count) if start <= j < start + width]


def formula(q, k, v, k2, v2, *, mask, causal, windows):
    """One pair at a time."""
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(len(q)):
        real = np.flatnonzero(mask[b])
        queries = real if q.shape[1] == KEYS else np.arange(q.shape[1])
        first = 0 if q.shape[1] == KEYS else len(real) - q.shape[1]
        for (rank, i), h in [(at, h) for at in enumerate(queries) for h in range(q.shape[2])]:
            seen = [window(first + rank, len(real), width, causal) for width in windows]
            total = 0
            for j, s in [(real[j], real[s]) for j in seen[0] for s in seen[1]]:
                a, c = q[b, i, h] * k2[b, s, h] + 0.5 * q[b, i, h] - k2[b, s, h], 0.3 * q[b, i, h] @ k2[b, s, h]
                weight = np.exp(a @ k[b, j, 0] + c)
                out[b, i, h] += weight * v[b, j, 0] * v2[b, s, h]
                total += weight
            out[b, i, h] /= total or 1
    return out


@pytest.mark.parametrize(
    ("queries", "causal", "windows"),
    [
        (13, False, (5, 4)),
        (13, True, (4, None)),
        (13, True, (2, 7)),
        (6, False, (40, 13)),
        (3, True, (5, None)),
    ],
)
@pytest.mark.first(1)
def test_equals_the_sum_over_pairs_and_both_have_one_gradient(queries, causal, windows):
    """In float64, padding scattered; one example has two real tokens only, so that causal queries may see nothing."""
    operands, options = inputs(queries), {"causal": causal, "windows": windows}
    mask = np.random.default_rng(0).random((2, KEYS)) < 0.8
    mask[1] = np.arange(KEYS) % 9 == 3
    expected = formula(*operands, mask=mask, **options)
    w = np.random.default_rng(1).normal(size=expected.shape)

    def loss(operands, implementation):
        out = pair_attention(*operands, pair=pair, mask=mask, implementation=implementation, **options)
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        run = jax.jit(lambda x: [jax.value_and_grad(loss, has_aux=True)(x, i) for i in ("reference", "xla")])
        ((_, plain), by_plain), ((_, tiled), by_tiled) = run(operands)
    for out in (plain, tiled):
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)  # float64 rounding
    for ours, theirs in zip(by_tiled, by_plain):
        assert np.abs(theirs).max() > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("causal", "windows"), [(False, (5, 4)), pytest.param(True, (5, 7), marks=pytest.mark.slow)])
def test_all_heads_at_once_as_on_accelerators_equal_one_after_another(causal, windows):
    r, options = np.random.default_rng(0), Options(pair, causal, windows)
    shapes = (KEYS, 4), (KEYS, 4), (KEYS, 2), (KEYS, 4), (KEYS, 2)
    with jax.enable_x64(True):
        operands = *(jnp.asarray(r.normal(size=(3, *s))) for s in shapes), jnp.array([13, 7, 0]), jnp.array([0, 0, -2])
        sizes = xla.sizes(options, *(jnp.zeros((1, *s)) for s in shapes))
        found = []
        for each, tiling in ((xla.in_turn, sizes), (xla.at_once, sizes._replace(together=True))):
            out, lse = xla._forward(each, pair, tiling, *operands)
            found.append((out, lse, *xla._backward(each, pair, tiling, operands, out, lse, jnp.cos(out))))
    for ours, theirs in zip(*found):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)  # float64 rounding


@pytest.mark.slow
def test_the_reference_goes_forward_the_others_say_so():
    """A derivative in one direction: the reference's is that of its own gradient."""
    operands = inputs(6)
    ones = [np.ones_like(x) for x in operands]

    def total(implementation, *operands):
        return pair_attention(*operands, pair=pair, implementation=implementation).sum()

    with jax.enable_x64(True):
        slope = jax.jit(lambda x, t: jax.jvp(lambda *x: total("reference", *x), x, t)[1])(tuple(operands), tuple(ones))
        by = jax.jit(jax.grad(lambda x: total("reference", *x)))(operands)
        assert float(slope) == pytest.approx(sum(float(x.sum()) for x in by), rel=1e-10)
        with pytest.raises(NotImplementedError, match="pair_attention") as raised:
            jax.jvp(lambda *x: total("xla", *x), tuple(operands), tuple(ones))
    assert "\n" not in str(raised.value)


@pytest.mark.quick
def test_what_it_cannot_do_is_one_line():
    q, k, v, k2, v2 = inputs(6)
    for implementation in ("xla", "reference"):
        with pytest.raises(ValueError, match="interpret=True is for Pallas kernels"):
            pair_attention(q, k, v, k2, v2, pair=pair, implementation=implementation, interpret=True)
    with pytest.raises(ValueError, match="choose one of xla, reference"):
        pair_attention(q, k, v, k2, v2, pair=pair, implementation="pallas")
    with pytest.raises(ValueError, match=r"k2 has shape \(2, 12, 3, 4\), k \(2, 13, 1, 4\)"):
        pair_attention(q, k, v, k2[:, 1:], v2, pair=pair)
    with pytest.raises(ValueError, match=r"q, k, v have shapes .*: batch, keys and head_dim must agree"):
        pair_attention(q[..., :3], k, v, k2, v2, pair=pair)
