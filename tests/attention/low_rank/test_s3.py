"""S3Attention against NumPy: column and row attention, the smoothing, the whole module, and what padding may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import S3, s3, softmax
from efficient_tx.attention.low_rank.s3 import Smoother, column_attention, row_attention
from efficient_tx.numerics.random import evaluation_keys, sample_tokens


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def softmax_of(logits, axis):
    weights = np.exp(logits - logits.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def picked(n, columns):
    """The ranks of the columns of n real tokens."""
    with jax.enable_x64(True):  # uniform draws of float64 are others than those of float32
        position, valid = sample_tokens(evaluation_keys(1), jnp.ones((1, n), bool), columns)
    return np.asarray(position)[np.asarray(valid)]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def column_and_row(q, k, v, columns, rows):
    """Both attentions of one example `[n, heads, dim]` without padding."""
    column, row, at = np.zeros_like(q), np.zeros_like(q), picked(len(q), columns)
    for h in range(q.shape[1]):
        column[:, h] = softmax_of(q[:, h] @ k[at, h].T / q.shape[2] ** 0.5, 1) @ v[at, h]
        row[:, h] = v[:, h, :rows] @ softmax_of(k[:, h, :rows].T @ q[:, h] / len(q) ** 0.5, 0)
    return column, row


def formula(q, k, v, columns, rows):
    """One example `[n, heads, dim]` without padding, gain 1 and shift 0."""
    return sum(layer_norm(x.reshape(len(q), -1)) / 2 for x in column_and_row(q, k, v, columns, rows)).reshape(q.shape)


MASK = np.stack([np.ones(12, bool), np.random.default_rng(5).random(12) < 0.6, np.zeros(12, bool)])


@pytest.fixture(scope="module")
def attend():
    return jax.jit(lambda q, k, v: s3(q, k, v, mask=MASK, columns=4, rows=3))


def test_it_is_its_formula_and_padding_gets_nothing(attend):
    """The published code zeroes padded keys, which leaves them their share of a softmax: exp(0) = 1."""
    q, k, v = normal(0, 3, 12, 4, 6), normal(1, 3, 12, 2, 6), normal(2, 3, 12, 2, 6)
    hostile = [np.where(MASK[..., None, None], x, np.nan) for x in (q, k, v)]
    with jax.enable_x64(True):
        out = np.asarray(attend(*hostile))
    for b in range(2):
        repeated = (x[b, MASK[b]].repeat(x_repeats, axis=1) for x, x_repeats in ((q, 1), (k, 2), (v, 2)))
        np.testing.assert_allclose(out[b, MASK[b]], formula(*repeated, 4, 3), atol=1e-12)  # float64 rounding
    assert (out[~MASK] == 0).all()


@pytest.mark.slow
def test_bfloat16_inputs_are_computed_in_float32(attend):
    rounded = [normal(i, 3, 12, 2, 6).astype(jnp.bfloat16) for i in range(3)]
    out = attend(*rounded)
    assert out.dtype == jnp.bfloat16
    full = attend(*(x.astype(np.float32) for x in rounded))
    np.testing.assert_allclose(out.astype(np.float32), full, rtol=2**-8, atol=1e-6)  # one rounding to 8 bits


@pytest.mark.slow
def test_gradients_equal_finite_differences(attend):
    arrays, w = [normal(i, 3, 12, 2, 6) for i in range(3)], normal(3, 3, 12, 2, 6)
    with jax.enable_x64(True):
        grads = jax.jit(jax.grad(lambda *x: jnp.vdot(attend(*x), w), argnums=(0, 1, 2)))(*arrays)

    def loss(arrays):
        return sum(np.vdot(formula(*(x[b, MASK[b]] for x in arrays), 4, 3), w[b, MASK[b]]) for b in range(2))

    for i, grad in enumerate(grads):
        along, step = normal(7, *grad.shape), 1e-6
        up, down = (loss([x + s * step * along if i == j else x for j, x in enumerate(arrays)]) for s in (1, -1))
        # Central differences: step² from the third derivative, 1e-16 / step from rounding.
        np.testing.assert_allclose(np.vdot(grad, along), (up - down) / (2 * step), rtol=1e-6)
        assert np.isfinite(grad).all()


@pytest.mark.quick
def test_all_tokens_as_columns_are_exact_softmax():
    q, k, v = (normal(i, 3, 12, 2, 6) for i in range(3))
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(lambda q, k, v: column_attention(q, k, v, MASK, 12))(q, k, v))
        exact = np.asarray(jax.jit(lambda q, k, v: softmax(q, k, v, mask=MASK))(q, k, v))
    np.testing.assert_allclose(ours, exact, atol=1e-13)  # float64 rounding: the sums run in another order


def clusters(r, shape, sizes, spread):
    centres = 2 * r.normal(size=(shape[0], len(sizes), shape[2]))
    label = r.choice(len(sizes), shape[:2], p=sizes)
    return np.take_along_axis(centres, label[..., None], axis=1) + spread * r.normal(size=shape)


# The relative error of column attention at length 256, heads of 16, mean of 16 examples, at 8, 64 and 256 columns.
KINDS = {
    "random": lambda r, shape: r.normal(size=shape),  # 1.49, 0.78, 0
    "clustered": lambda r, shape: clusters(r, shape, [1 / 8] * 8, 0.3),  # 0.75, 0.19, 0
    "imbalanced": lambda r, shape: clusters(r, shape, [0.96] + [0.01] * 4, 0.2),  # 0.36, 0.20, 0
}


@pytest.mark.slow
def test_the_error_of_the_columns_falls_with_their_number():
    """Queries near the keys in another order. Columns drawn uniformly are what the published code has at any budget."""
    r, shape = np.random.default_rng(0), (16, 256, 16)
    keys = np.stack([make(r, shape) for make in KINDS.values()])
    queries = keys[:, :, r.permutation(256)] + 0.1 * r.normal(size=keys.shape)
    values = keys + r.normal(size=keys.shape)
    arrays = [x.reshape(-1, 256, 1, 16).astype(np.float32) for x in (queries, keys, values)]
    exact = jax.jit(softmax)(*arrays)
    errors = []
    for columns in (8, 64, 256):
        off = np.asarray(jax.jit(lambda *x: column_attention(*x, None, columns))(*arrays) - exact)  # noqa: B023
        sizes = [np.linalg.norm(x.reshape(len(KINDS), -1), axis=1) for x in (off, np.asarray(exact))]
        errors.append(sizes[0] / sizes[1])
    assert (np.diff(errors, axis=0) < -0.1).all()
    assert errors[-1].max() < 1e-5  # float32 rounding


def test_the_weights_of_the_rows_sum_to_one():
    """So channels that agree stay what they are; more rows than channels are all of them."""
    q, k, v = normal(0, 2, 12, 2, 6), normal(1, 2, 12, 2, 6), normal(2, 2, 12, 2, 1).repeat(6, axis=3)
    with jax.enable_x64(True):
        for rows in (3, 9):
            np.testing.assert_allclose(row_attention(*map(jnp.asarray, (q, k, v)), None, rows), v, atol=1e-14)


@pytest.mark.slow
def test_a_filter_of_ones_is_the_mean_of_each_group():
    """And with as many groups as features the identity, at any length and padding."""
    x = np.where(MASK[:, :, None], normal(0, 3, 12, 6), 0)
    with jax.enable_x64(True):
        for groups in (9, 4):
            smoother = Smoother(6, groups, 15, rngs=nnx.Rngs(0))
            assert 0.2 < float(jnp.var(smoother.filter[...])) * 6 < 5  # published: 1 / features
            smoother.filter[...] = np.stack([np.ones((6, 8), np.float32), np.zeros((6, 8), np.float32)])
            label = np.arange(6) * min(groups, 6) // 6
            expected = np.stack([x[..., label == g].mean(-1) for g in label], axis=-1)
            np.testing.assert_allclose(smoother(jnp.asarray(x), MASK), expected, atol=1e-14)  # float64 rounding


@pytest.mark.parametrize("max_len", (12, 15))
def test_the_smoother_is_a_circular_convolution(max_len):
    """By its kernel in tokens: period max_len, at any length. At full length it is the paper's formula."""
    x = normal(0, 1, 12, 4)
    with jax.enable_x64(True):
        smoother = Smoother(4, 2, max_len, rngs=nnx.Rngs(0))
        out = np.asarray(smoother(jnp.asarray(x), None))[0]
        coefficients = np.asarray(smoother.filter[0] + 1j * smoother.filter[1], np.complex128)
    means = x[0].reshape(12, 2, 2).mean(-1)
    kernel = np.fft.irfft(coefficients, max_len)
    for t, c in np.ndindex(12, 4):
        expected = sum(kernel[c, (t - u) % max_len] * means[u, c // 2] for u in range(12))
        assert out[t, c] == pytest.approx(expected, abs=1e-12)
    if max_len == 12:
        paper = np.fft.irfft(np.fft.rfft(means[:, [0, 0, 1, 1]], axis=0) * coefficients.T, 12, axis=0)
        np.testing.assert_allclose(out, paper, atol=1e-12)


def test_the_module_is_its_parts_on_the_real_tokens():
    """Smoothing, stem, projections, attention: with real tokens scattered, as if they stood alone."""
    with jax.enable_x64(True):
        mixer = S3(8, heads=2, columns=4, rows=3, groups=4, max_len=15, rngs=nnx.Rngs(0))
        mixer.gain[...], mixer.shift[...] = (normal(i, 2, 8).astype(np.float32) for i in (8, 9))
        x = np.where(MASK[..., None], normal(0, 3, 12, 8), np.nan)
        out = np.asarray(jax.jit(lambda x: mixer(x, mask=MASK))(x))
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), nnx.to_pure_dict(nnx.state(mixer)))

    def linear(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    for b in range(2):
        real = x[b, MASK[b]]
        n = len(real)
        means = real.reshape(n, 4, 2).mean(-1).repeat(2, axis=1)
        coefficients = (params["smoother"]["filter"][0] + 1j * params["smoother"]["filter"][1]).T
        smooth = np.fft.irfft(np.fft.rfft(means, 15, axis=0) * coefficients, 15, axis=0)[:n]
        both = np.pad(np.concatenate([smooth, real], axis=1), ((1, 1), (0, 0)))
        h = np.stack([sum(both[t + i] @ params["stem"]["kernel"][i] for i in range(3)) for t in range(n)])
        h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + mixer.stem.norm.epsilon)
        q, k, v = (linear(name, np.maximum(h, 0)).reshape(n, 2, 4) for name in "qkv")
        parts = column_and_row(q, k, v, 4, 3)
        mixed = sum(
            layer_norm(part.reshape(n, 8)) * params["gain"][i] + params["shift"][i] for i, part in enumerate(parts)
        )
        np.testing.assert_allclose(out[b, MASK[b]], linear("out", mixed / 2), rtol=0, atol=1e-10)
    assert (out[~MASK] == 0).all()


@pytest.mark.quick
@pytest.mark.parametrize("option", ("columns", "rows", "groups"))
def test_what_cannot_be_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} is 0: it must be at least 1"):
        S3(8, heads=2, max_len=9, rngs=nnx.Rngs(0), **{option: 0})
    if option != "groups":
        q = jnp.zeros((1, 4, 2, 8))
        with pytest.raises(ValueError, match=f"{option} is 0"):
            s3(q, q, q, **{option: 0})
        with pytest.raises(ValueError, match="rows need equal lengths"):
            s3(q, q[:, :3], q[:, :3])
