"""block_attention against plain NumPy, its gradients, its limits and its errors."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels import block_attention, flash_attention

xla = importlib.import_module("efficient_tx.kernels.block_attention.xla")


def arrays(seed, queries, keys, *, heads=4, groups=2, dim=6, v_dim=3, batch=2):
    r = np.random.default_rng(seed)
    shapes = (batch, queries, heads, dim), (batch, keys, groups, dim), (batch, keys, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def lists(seed, queries, keys, size, n, *, batch=2, heads=4):
    """Any blocks of keys, some of them twice, some none; the last block of queries has none at all."""
    r = np.random.default_rng(seed)
    blocks = r.integers(-1, -(-keys // size), (batch, heads, -(-queries // size), n)).astype(np.int32)
    blocks[:, :, -1] = -1
    return blocks


def odd_distance(query, key):
    return (query - key) % 2 == 1


def formula(q, k, v, *, blocks, block_size, mask=None, causal=False, scale=None, bias=None, visible=None):
    """One query at a time, in float64: the output and the logarithm of the sum of weights."""
    (batch, queries, heads, dim), keys = q.shape, k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    out, lse = np.zeros((batch, queries, heads, v.shape[-1])), np.full((batch, queries, heads), -np.inf)
    raised = np.zeros((batch, heads, *blocks.shape[2:])) + (0 if bias is None else bias)
    for b, i, h in np.ndindex(batch, queries, heads):
        g, block_of_i, seen, logits = h // (heads // k.shape[2]), i // block_size, [], []
        for block, more in zip(blocks[b % len(blocks), h % blocks.shape[1], block_of_i], raised[b, h, block_of_i]):
            for j in range(block * block_size, min((block + 1) * block_size, keys)):
                real = block >= 0 and (mask is None or mask[b, j])
                if real and (not causal or j <= i + keys - queries) and (visible is None or visible(i, j)):
                    seen.append(j)
                    logits.append(scale * k[b, j, g] @ q[b, i, h] + more)
        if seen:
            lse[b, i, h] = np.logaddexp.reduce(logits)
            out[b, i, h] = np.exp(logits - lse[b, i, h]) @ v[b, seen, g]
    return out, lse


@pytest.mark.parametrize(
    ("queries", "keys", "chunk", "extras"),
    [
        (21, 50, 5 * 3 * 64, ("mask", "bias")),
        (24, 24, 2 * 3 * 64, ()),
        (30, 27, 10**6, ("mask", "causal", "visible")),
    ],
    ids=("masked and biased", "plain", "masked, causal, sparse"),
)
@pytest.mark.first(1)
def test_equals_the_formula_and_its_gradients(monkeypatch, queries, keys, chunk, extras):
    """Values against NumPy, gradients against automatic differentiation of the plain formula, both in float64.

    The chunks hold two rows, five (of which the last chunk is not full) and all.
    """
    monkeypatch.setattr(xla, "CHUNK_AREA", chunk)
    inputs, blocks = arrays(queries, queries, keys), lists(0, queries, keys, 8, 3)
    blocks = blocks if extras else blocks[:1, :1]  # one list for all, too
    r = np.random.default_rng(1)
    bias = r.normal(size=(2, 4, *blocks.shape[2:]))
    given = {
        "mask": r.random((2, keys)) < np.array([[0.6], [0.0]]),
        "causal": True,
        "visible": odd_distance,
    }
    options = {"blocks": blocks, "block_size": 8, **{name: given[name] for name in extras if name in given}}
    expected, expected_lse = formula(*inputs, bias=bias if "bias" in extras else None, **options)
    assert 0.05 < np.isneginf(expected_lse).mean() < 0.9
    w, w_lse = r.normal(size=expected.shape), np.where(np.isfinite(expected_lse), r.normal(size=expected_lse.shape), 0)

    def loss(q, k, v, bias, implementation):
        bias = bias if "bias" in extras else None
        results = block_attention(q, k, v, bias=bias, return_lse=True, implementation=implementation, **options)
        return jnp.vdot(results[0], w) + jnp.vdot(jnp.where(w_lse == 0, 0, results[1]), w_lse), results

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=4)
        (_, (out, lse)), gradients = run(*inputs, bias, "xla")
        (_, (plain, plain_lse)), plain_gradients = run(*inputs, bias, "reference")
    # Sums of at most 24 terms of order 1 in float64.
    for got in (out, plain):
        np.testing.assert_allclose(got, expected, atol=1e-12)
    for got in (lse, plain_lse):
        np.testing.assert_allclose(got, expected_lse, atol=1e-12)
    assert ("bias" in extras) == (np.abs(gradients[3]).max() > 0)
    for ours, theirs in zip(gradients, plain_gradients):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.slow
def test_all_blocks_are_exact_attention(causal):
    """The exact limit, against another kernel, with one list of blocks for all examples and heads."""
    inputs = arrays(0, 37, 37)
    blocks = np.broadcast_to(np.arange(5, dtype=np.int32), (1, 1, 5, 5))
    with jax.enable_x64(True):
        ours = block_attention(*inputs, blocks=blocks, block_size=8, causal=causal, scale=0.7)
        exact = flash_attention(*inputs, causal=causal, scale=0.7, implementation="reference")
    np.testing.assert_allclose(ours, exact, atol=1e-12)


@pytest.mark.slow
def test_a_number_or_one_of_each_head_is_a_bias_too():
    inputs, blocks = arrays(0, 21, 21), lists(0, 21, 21, 8, 3)
    for bias in (-0.5, np.arange(4.0)[:, None, None]):
        with jax.enable_x64(True):
            out, lse = block_attention(*inputs, blocks=blocks, block_size=8, bias=bias, return_lse=True)
        expected, expected_lse = formula(*inputs, blocks=blocks, block_size=8, bias=bias)
        np.testing.assert_allclose(out, expected, atol=1e-12)
        np.testing.assert_allclose(lse, expected_lse, atol=1e-12)


@pytest.mark.parametrize("implementation", ("reference", "xla"))
@pytest.mark.slow
def test_large_logits_neither_overflow_nor_vanish_and_padding_may_hold_anything(implementation):
    q, k, v = arrays(0, 24, 40)
    q *= 1000
    mask = np.arange(40) < np.array([[25], [3]])
    options = {"blocks": lists(1, 24, 40, 8, 4), "block_size": 8, "mask": mask}
    expected, expected_lse = formula(q, k, v, **options)
    dirty = [np.where(mask[..., None, None], x, fill) for x, fill in ((k, np.nan), (v, np.inf))]
    inputs = [x.astype(np.float32) for x in (q, *dirty)]
    out, lse = block_attention(*inputs, return_lse=True, implementation=implementation, **options)
    # Logits of order 1000 have float32 rounding errors of order 1e-4, which are relative errors of the weights.
    np.testing.assert_allclose(out, expected, atol=2e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-3)


def test_bfloat16_inputs_are_computed_in_float32():
    """Against the formula on the same rounded inputs: what is left is the rounding of the result, 2⁻⁹ relative."""
    rounded = [np.asarray(x, jnp.bfloat16) for x in arrays(0, 40, 40)]
    options = {"blocks": lists(0, 40, 40, 16, 2), "block_size": 16}
    out = block_attention(*rounded, **options)
    assert out.dtype == jnp.bfloat16
    expected, _ = formula(*(x.astype(np.float64) for x in rounded), **options)
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)
        blocks = jax.ShapeDtypeStruct((1, 1, length // 64, 3), jnp.int32)

        def loss(q, k, v, blocks):
            return block_attention(q, k, v, blocks=blocks, block_size=64).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, blocks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(4096), temporaries(16384)
    assert long < 4.2 * short
    assert long < 16384**2 * 4 / 50


@pytest.mark.slow
def test_works_under_vmap():
    q, k, v = (np.stack([x, 2 * x]).astype(np.float32) for x in arrays(0, 20, 33))
    blocks = np.stack([lists(seed, 20, 33, 8, 2) for seed in (0, 1)])

    def grad(q, k, v, blocks):
        return jax.grad(lambda q: block_attention(q, k, v, blocks=blocks, block_size=8).sum())(q)

    ours, single = jax.jit(jax.vmap(grad))(q, k, v, blocks), jax.jit(grad)
    for i in range(2):
        np.testing.assert_allclose(ours[i], single(q[i], k[i], v[i], blocks[i]), atol=1e-5)


def test_forward_mode_works_in_the_reference_and_is_refused_elsewhere():
    inputs, blocks = arrays(0, 9, 9), lists(0, 9, 9, 4, 3)
    tangents = [np.random.default_rng(1).normal(size=x.shape) for x in inputs]

    def attend(*inputs, implementation="reference"):
        return block_attention(*inputs, blocks=blocks, block_size=4, implementation=implementation)

    with jax.enable_x64(True):
        attend_jit = jax.jit(attend)
        _, tangent = jax.jvp(attend_jit, inputs, tangents)
        step = 1e-6
        after, before = (attend_jit(*(x + s * t for x, t in zip(inputs, tangents))) for s in (step, -step))
        # Central differences: error step² from the third derivative, 1e-16 / step from rounding.
        np.testing.assert_allclose(tangent, (after - before) / (2 * step), atol=1e-8)
        with pytest.raises(NotImplementedError, match="block_attention: forward-mode"):
            jax.jvp(lambda *inputs: attend(*inputs, implementation="xla"), inputs, tangents)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "pallas"}, "no implementation 'pallas': choose one of pallas_tpu, pallas_gpu, xla"),
        ({"interpret": True}, "interpret=True is for Pallas kernels"),
        ({"mask": np.ones((2, 8), bool)}, r"mask has shape \(2, 8\).*\(2, 7\)"),
        ({"block_size": 0}, "block_size is 0"),
        ({"block_size": 4}, r"blocks is int32 \(2, 4, 3, 2\): pass integers \[2 or 1, 4 or 1, 2, n\], for 5 queries"),
        ({"blocks": np.zeros((2, 4, 3, 2))}, "blocks is float64"),
        ({"bias": np.zeros(3)}, r"bias has shape \(3,\)|Incompatible shapes"),
    ],
)
def test_what_cannot_be_done_is_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        block_attention(*arrays(0, 5, 7), **{"blocks": lists(0, 5, 7, 2, 2), "block_size": 2} | options)
    assert "\n" not in str(raised.value)


def test_shapes_that_do_not_fit_are_named():
    q, k, v = arrays(0, 5, 7)
    for wrong in ((q[:, :, :3], k, v), (q[..., :4], k, v), (q, k, v[:, :6]), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match="shape"):
            block_attention(*wrong, blocks=lists(0, 5, 7, 2, 2), block_size=2)
