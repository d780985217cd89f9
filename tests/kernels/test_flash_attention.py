"""flash_attention against plain NumPy, its gradients, its limits and its errors."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.flash_attention import as_score, padding
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.heads import at_once, in_turn

xla = importlib.import_module("efficient_tx.kernels.flash_attention.xla")

SCORES = ("softmax", "sigmoid", "gaussian")
IMPLEMENTATIONS = ("reference", "xla")
BIAS = -0.3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16 × 16 and 32 × 16 weights, so that short sequences have several, the last one ragged."""
    monkeypatch.setattr(xla, "SQUARE", (16, 16))
    monkeypatch.setattr(xla, "TALL", (32, 16))


def arrays(seed, queries, keys, *, heads=4, groups=2, dim=6, v_dim=3, batch=2):
    r = np.random.default_rng(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def formula(q, k, v, *, score, mask=None, causal=False, scale=None, bias=0.0):
    """One query at a time, in float64: the output and the logarithm of the sum of softmax weights."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, queries, heads, v.shape[-1])), np.full((batch, queries, heads), -np.inf)
    for b, i, h in np.ndindex(batch, queries, heads):
        g = h // (heads // k.shape[2])
        seen = np.ones(keys, bool) if mask is None else mask[b].copy()
        if causal:
            seen &= np.arange(keys) <= i + keys - queries
        if not seen.any():
            continue
        logits = scale * k[b, seen, g] @ q[b, i, h] + bias
        if score == "softmax":
            lse[b, i, h] = np.logaddexp.reduce(logits)
            weights = np.exp(logits - lse[b, i, h])
        elif score == "sigmoid":
            weights = 1 / (1 + np.exp(-logits))
        else:
            weights = np.exp(bias - scale * np.square(q[b, i, h] - k[b, seen, g]).sum(-1) / 2)
        out[b, i, h] = weights @ v[b, seen, g]
    return out, lse


def random_mask(seed, batch, keys):
    """Keys missing anywhere; the last example has none at all."""
    mask = np.random.default_rng(seed).random((batch, keys)) < 0.6
    mask[-1] = False
    return mask


@pytest.mark.parametrize(
    ("queries", "keys", "masked", "causal"),
    [(50, 21, True, True), (37, 37, False, False), (21, 50, False, True), (21, 50, True, False)],
    ids=("masked causal", "full", "causal", "masked"),
)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.first(2)
def test_equals_the_formula_and_its_gradients(score, queries, keys, masked, causal):
    """Values against NumPy, gradients against automatic differentiation of the plain formula, both in float64."""
    inputs = arrays(queries, queries, keys)
    mask = random_mask(0, 2, keys) if masked else None
    options = {"score": score, "mask": mask, "causal": causal, "bias": BIAS}
    expected, expected_lse = formula(*inputs, **options)
    r = np.random.default_rng(1)
    w, w_lse = r.normal(size=expected.shape), np.where(np.isfinite(expected_lse), r.normal(size=expected_lse.shape), 0)

    def loss(q, k, v, implementation):
        kind = {"return_lse": True} if score == "softmax" else {}
        results = flash_attention(q, k, v, implementation=implementation, **kind, **options)
        out, lse = results if score == "softmax" else (results, jnp.zeros(w_lse.shape))
        return jnp.vdot(out, w) + jnp.vdot(jnp.where(w_lse == 0, 0, lse), w_lse), (out, lse)

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        (_, (out, lse)), gradients = run(*inputs, "xla")
        (_, (plain, _)), plain_gradients = run(*inputs, "reference")
    # Sums of at most 50 terms of order 1 in float64.
    np.testing.assert_allclose(out, expected, atol=1e-12)
    np.testing.assert_allclose(plain, expected, atol=1e-12)
    if score == "softmax":
        np.testing.assert_allclose(lse, expected_lse, atol=1e-12)
    for ours, theirs in zip(gradients, plain_gradients):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.slow
def test_default_blocks_in_float32(monkeypatch):
    """At the real block size, with two blocks a side; the error is that of float32 sums of 700 weights."""
    monkeypatch.undo()
    q, k, v = (x.astype(np.float32) for x in arrays(0, 600, 700, heads=1, groups=1, batch=1))
    for score in SCORES:
        out = flash_attention(q, k, v, score=score)
        assert out.dtype == jnp.float32
        expected, _ = formula(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), score=score)
        np.testing.assert_allclose(out, expected, atol=3e-6 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.slow
def test_bfloat16_inputs_are_computed_in_float32(score):
    """Against the formula on the same rounded inputs: what is left is the rounding of the result, 2⁻⁹ relative."""
    rounded = [np.asarray(x, jnp.bfloat16) for x in arrays(0, 40, 64)]
    out = flash_attention(*rounded, score=score)
    assert out.dtype == jnp.bfloat16
    expected, _ = formula(*(x.astype(np.float64) for x in rounded), score=score)
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2**-8, atol=1e-5)


def test_of_several_dtypes_none_is_rounded_to_a_narrower_one():
    """Values that are sums, float32, with bfloat16 queries: only the result has the queries' dtype."""
    q, k, v = (x.astype(np.float32) for x in arrays(0, 9, 17))
    narrow = q.astype(jnp.bfloat16)
    out = flash_attention(narrow, k, 1000 * v, score="gaussian")
    assert out.dtype == jnp.bfloat16
    exact = flash_attention(narrow.astype(np.float32), k, 1000 * v, score="gaussian")
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits_neither_overflow_nor_vanish(implementation):
    q, k, v = arrays(0, 20, 40)
    q = 1000 * q
    out, lse = flash_attention(
        *(x.astype(np.float32) for x in (q, k, v)), return_lse=True, implementation=implementation
    )
    expected, expected_lse = formula(q, k, v, score="softmax")
    # Logits of order 1000 have float32 rounding errors of order 1e-4, which are relative errors of the weights.
    np.testing.assert_allclose(out, expected, atol=2e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.first(2)
def test_padding_may_hold_anything(score, implementation):
    q, k, v = (x.astype(np.float32) for x in arrays(0, 20, 40))
    mask = np.arange(40) < np.array([[25], [3]])
    clean = flash_attention(q, k, v, score=score, mask=mask, implementation=implementation)
    dirty = [np.where(mask[..., None, None], x, fill) for x, fill in ((k, np.nan), (v, np.inf))]
    np.testing.assert_array_equal(
        clean, flash_attention(q, *dirty, score=score, mask=mask, implementation=implementation)
    )


def test_a_mask_of_all_pairs_goes_to_the_reference():
    q, k, v = (x.astype(np.float32) for x in arrays(0, 9, 9, groups=4))
    pairs = np.random.default_rng(0).random((2, 1, 9, 9)) < 0.5
    out = flash_attention(q, k, v, mask=pairs)
    for i in range(9):
        expected, _ = formula(q[:, i : i + 1], k, v, score="softmax", mask=pairs[:, 0, i])
        np.testing.assert_allclose(out[:, i : i + 1], expected, atol=1e-5)
    with pytest.raises(ValueError, match="'xla': it takes key masks"):
        flash_attention(q, k, v, mask=pairs, implementation="xla")


@pytest.mark.slow
def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.undo()

    def temporaries(length, score):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        grad = jax.grad(lambda q, k, v: flash_attention(q, k, v, score=score, causal=True).sum(), argnums=(0, 1, 2))
        return jax.jit(grad).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    for score in ("softmax", "gaussian"):
        short, long = temporaries(4096, score), temporaries(16384, score)
        assert long < 4.2 * short
        assert long < 16384**2 * 4 / 50


@pytest.mark.slow
def test_works_under_vmap():
    q, k, v = (np.stack([x, 2 * x]).astype(np.float32) for x in arrays(0, 20, 33))
    grad = jax.grad(lambda q, k, v: flash_attention(q, k, v, causal=True).sum())
    ours, single = jax.vmap(grad)(q, k, v), jax.jit(grad)
    for i in range(2):
        np.testing.assert_allclose(ours[i], single(q[i], k[i], v[i]), atol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.first(1)
def test_the_reference_has_forward_mode(score):
    inputs = arrays(0, 5, 7)
    tangents = [np.random.default_rng(1).normal(size=x.shape) for x in inputs]

    def plain(*inputs):
        return flash_attention(*inputs, score=score, implementation="reference")

    with jax.enable_x64(True):
        _, tangent = jax.jvp(plain, inputs, tangents)
        step = 1e-6
        after, before = (plain(*(x + s * t for x, t in zip(inputs, tangents))) for s in (step, -step))
        # Central differences: error step² from the third derivative, 1e-16 / step from rounding.
        np.testing.assert_allclose(tangent, (after - before) / (2 * step), atol=1e-8)


@pytest.mark.quick
def test_forward_mode_is_refused_elsewhere_by_a_line_that_names_the_reference():
    q, k, v = (x.astype(np.float32) for x in arrays(0, 5, 7))

    def blockwise(q):
        return flash_attention(q, k, v)

    def tangent(f):
        return lambda: jax.jvp(f, (q,), (q,))

    for run in (
        tangent(blockwise),
        jax.jit(tangent(blockwise)),
        tangent(jax.jit(blockwise)),
        lambda: jax.jacfwd(blockwise)(q),
    ):
        with pytest.raises(
            NotImplementedError, match=r"flash_attention: forward-mode.* implementation='reference' only"
        ):
            run()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "relu"}, "score is 'relu': choose one of softmax, sigmoid, gaussian"),
        (
            {"score": "gaussian", "return_lse": True},
            "return_lse needs a score normalised like softmax, Gaussian is not",
        ),
        (
            {"implementation": "pallas"},
            "no implementation 'pallas': choose one of pallas_tpu, pallas_gpu, xla, reference",
        ),
        ({"interpret": True}, "interpret=True is for Pallas kernels"),
        ({"mask": np.ones((2, 8), bool)}, r"mask has shape \(2, 8\).*\(2, 7\)"),
        ({"score": "gaussian", "scale": -0.3}, "scale is -0.3: Gaussian looks at norms: pass at least 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        flash_attention(*arrays(0, 5, 7), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.quick
@pytest.mark.parametrize(("batch", "queries", "keys"), [(2, 5, 0), (2, 0, 7), (0, 5, 7)])
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_without_keys_or_queries_it_is_zero(implementation, batch, queries, keys):
    q, k, v = arrays(0, queries, keys, batch=batch)
    given = {"causal": True, "mask": np.ones((batch, keys), bool), "implementation": implementation}
    out, lse = flash_attention(q, k, v, return_lse=True, **given)
    np.testing.assert_array_equal(out, np.zeros((batch, queries, 4, 3)))
    np.testing.assert_array_equal(lse, np.full((batch, queries, 4), -np.inf))
    gradient = jax.grad(lambda q: flash_attention(q, k, v, **given).sum())(q)
    np.testing.assert_array_equal(gradient, np.zeros_like(q))


def test_on_accelerators_all_heads_at_once_are_one_after_another():
    """The XLA form of a GPU and a TPU, which this machine would not choose."""
    q, k, v = (x.astype(np.float32) for x in arrays(0, 21, 50))
    real = padding(random_mask(0, 2, 50))
    options = Options(scale=0.4, bias=BIAS, precision=jax.lax.Precision.HIGHEST)
    sizes = xla.Sizes(21, 50, 16, 16)
    for name in SCORES:
        score = as_score(name, heads=4, bias=BIAS, dtype=np.float32)
        results = []
        for each_head in (in_turn, at_once):
            inputs = (q, k, v, score, real, None)
            outputs, total = jax.jit(partial(xla._forward, each_head, options, sizes))(*inputs)
            backward = jax.jit(partial(xla._backward, each_head, options, sizes))
            results.append((outputs, backward(inputs, outputs, total, jax.tree.map(jnp.cos, outputs))[:3]))
        # Sums of at most 50 float32 terms in another order.
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


@pytest.mark.quick
def test_shapes_that_do_not_fit_are_named():
    q, k, v = arrays(0, 5, 7)
    for wrong in ((q[:, :, :3], k, v), (q[..., :4], k, v), (q, k, v[:, :6]), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match="shape"):
            flash_attention(*wrong)
