"""Nyströmformer against NumPy: its formula, the exact limit, the published algorithm, and its convolution of values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.low_rank.nystromformer import Nystromformer
from efficient_tx.attention.low_rank.nystromformer import nystromformer as uncompiled
from efficient_tx.numerics.spd import newton_inverse
from efficient_tx.tokens.depthwise import depthwise
from tests.support.samples import attention_inputs, clusters, scattered

nystromformer = jax.jit(uncompiled, static_argnames=("landmarks", "iterations"))


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def iterate(core, start, iterations):
    x, eye = start, np.eye(len(core))
    for _ in range(iterations):
        a = core @ x
        x = x @ (13 * eye - a @ (15 * eye - a @ (7 * eye - a))) / 4
    return x


def means(x, count):
    """Means of the tokens i with the same ⌊i · count / n⌋; with fewer tokens than `count`, the tokens."""
    segment = np.arange(len(x)) * count // len(x)
    return np.stack([x[segment == s].mean(0) for s in np.unique(segment)])


def formula(q, k, v, landmarks, iterations):
    """One head of one example without padding, `[length, dim]`."""
    scale = q.shape[-1] ** -0.5
    q_means, k_means = means(q, landmarks), means(k, landmarks)
    core = softmax(q_means @ k_means.T * scale)
    inverse = iterate(core, core.T / (core.sum(0).max() * core.sum(1).max()), iterations)
    return softmax(q @ k_means.T * scale) @ inverse @ softmax(q_means @ k.T * scale) @ v


def convolution(v, weight):
    """Σ_t weight_t v_{i + t − size // 2} for one head, `[length, dim]`."""
    size, out = len(weight), np.zeros_like(v)
    for i in range(len(v)):
        for t in range(size):
            j = i + t - size // 2
            if 0 <= j < len(v):
                out[i] += weight[t] * v[j]
    return out


@pytest.mark.parametrize(
    ("queries", "keys", "groups", "lengths"),
    [(21, 21, 2, (21, 13)), (21, 21, 1, (3, 0)), (9, 21, 2, (21, 13)), (1, 21, 1, (21, 3))],
    ids=("masked", "grouped, fewer tokens than landmarks", "cross", "one query"),
)
@pytest.mark.first(1)
def test_it_is_its_formula_with_a_convolution_on_the_real_tokens(queries, keys, groups, lengths):
    q, k, v = attention_inputs(0, queries, keys, groups=groups)
    mask, weight = scattered(lengths, keys), np.random.default_rng(1).normal(size=(5, 2))
    conv = weight if queries == keys else None
    with jax.enable_x64(True):
        out = np.asarray(nystromformer(q, k, v, mask=mask, conv=conv, landmarks=6, iterations=6))
    for b, h in np.ndindex(2, 2):
        g = h * groups // 2
        real = mask[b] if queries == keys else np.ones(queries, bool)
        if not mask[b].any():
            assert (out[b] == 0).all()
            continue
        expected = formula(q[b, real, h], k[b, mask[b], g], v[b, mask[b], g], 6, 6)
        if conv is not None:
            expected += convolution(v[b, mask[b], g], weight[:, h])
        np.testing.assert_allclose(out[b, real, h], expected, rtol=0, atol=1e-12)  # float64 rounding


def test_one_query_sees_exact_softmax():
    """Its core is one row a with a A⁺ = 1; six steps leave an error of E₀^729 and less. So decoding is exact."""
    q, k, v = attention_inputs(0, 1, 12)
    with jax.enable_x64(True):
        out = np.asarray(nystromformer(q, k, v, landmarks=12))
    exact = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5) @ v.swapaxes(1, 2)
    np.testing.assert_allclose(out, exact.swapaxes(1, 2), atol=1e-12)


@pytest.mark.slow
def test_all_points_and_enough_steps_are_exact_softmax():
    """The exact limit, on queries that prefer their own key: the core is then well conditioned."""
    r = np.random.default_rng(0)
    k, _ = np.linalg.qr(r.normal(size=(2, 2, 16, 16)))
    k, v = k.swapaxes(1, 2), r.normal(size=(2, 16, 2, 5))
    q = 10 * k + r.normal(size=k.shape)
    core = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 4)
    exact = (core @ v.swapaxes(1, 2)).swapaxes(1, 2)
    with jax.enable_x64(True):
        for iterations, worst in ((2, 1.0), (4, 0.1), (6, 1e-10)):
            residual = float(newton_inverse(jnp.asarray(core), iterations)[1].max())
            out = np.asarray(nystromformer(q, k, v, landmarks=16, iterations=iterations))
            error = np.abs(out - exact).max()
            # With A X = I − E, A X A V = A V − E A V, and the rows of A sum to one.
            assert error <= min(worst, residual * np.abs(v).max() + 1e-12)


KINDS = {
    "random": lambda r, n: r.normal(size=(2, n, 32)),
    "clustered": lambda r, n: clusters(r, (2, n, 32), [1 / 8] * 8, 0.3, scale=0.7),
    "imbalanced": lambda r, n: clusters(r, (2, n, 32), [0.96] + [0.01] * 4, 0.3, scale=0.7),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_falls_with_landmarks_and_is_at_most_the_published_one(kind):
    r = np.random.default_rng(0)
    length, padded = 250, 256
    heads = [(*KINDS[kind](r, length), r.normal(size=(length, 8))) for _ in range(8)]
    exact = np.stack([softmax(q @ k.T * 32**-0.5) @ v for q, k, v in heads])

    def error(out):
        return np.mean(np.linalg.norm(out - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2)))

    batch = [np.stack([head[i] for head in heads], 1)[None].astype(np.float32) for i in range(3)]
    errors = {m: error(np.asarray(nystromformer(*batch, landmarks=m))[0].swapaxes(0, 1)) for m in (8, 32, 128)}
    assert 0 < errors[128] < errors[32] < errors[8]
    # The same method up to padding and the start, whose effect after six steps is up to 2 % either way.
    for landmarks in (32, 128):
        assert errors[landmarks] <= 1.02 * error(published(heads, padded, landmarks))


def published(heads, padded, landmarks):
    """mlpen/Nystromformer: zeros in the segments, one start for all heads; padding to a multiple of `landmarks`."""
    scale, length = 32**-0.5, len(heads[0][0])
    cores, sides = [], []
    for q, k, v in heads:
        q, k, v = (np.pad(x, ((0, padded - length), (0, 0))) for x in (q, k, v))
        q_means, k_means = (x.reshape(landmarks, -1, 32).mean(1) for x in (q, k))
        seen = np.where(np.arange(padded) < length, 0, -1e9)
        cores.append(softmax(q_means @ k_means.T * scale))
        sides.append((softmax(q @ k_means.T * scale), softmax(q_means @ k.T * scale + seen) @ v))
    largest = max(core.sum(0).max() for core in cores)
    return [(a @ iterate(c, c.T / largest, 6) @ b)[:length] for c, (a, b) in zip(cores, sides)]


@pytest.mark.slow
def test_gradients_equal_those_of_the_formula():
    """Against automatic differentiation of the plain formula, unrolled, in float64."""
    q, k, v = (x[:, :, :1] for x in attention_inputs(0, 8, 8, batch=1))
    weight, w = np.random.default_rng(1).normal(size=(3, 1)), np.random.default_rng(2).normal(size=(8, 5))

    def plain(q, k, v, weight):
        scale, segment = 8**-0.5, np.eye(4).repeat(2, axis=1) / 2
        q_means, k_means = segment @ q, segment @ k
        core = jax.nn.softmax(q_means @ k_means.T * scale)
        x, eye = core.T / (core.sum(0).max() * core.sum(1).max()), np.eye(4)
        for _ in range(6):
            a = core @ x
            x = x @ (13 * eye - a @ (15 * eye - a @ (7 * eye - a))) / 4
        out = jax.nn.softmax(q @ k_means.T * scale) @ x @ jax.nn.softmax(q_means @ k.T * scale) @ v
        rows = np.pad(np.eye(8), ((1, 1), (0, 0)))
        return jnp.vdot(out + sum(weight[t] * (rows[t : t + 8] @ v) for t in range(3)), w)

    def ours(q, k, v, weight):
        x = (y[None, :, None] for y in (q, k, v))
        return jnp.vdot(nystromformer(*x, conv=weight, landmarks=4)[0, :, 0], w)

    with jax.enable_x64(True):
        arguments = [jnp.asarray(x) for x in (q[0, :, 0], k[0, :, 0], v[0, :, 0], weight)]
        expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(*arguments)
        for got, want in zip(jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*arguments), expected):
            np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_an_example_ignores_the_others():
    """The published iteration starts from one maximum over the batch; here an example is what it is alone."""
    q, k, v = (x.astype(np.float32) for x in attention_inputs(0, 24, 24))
    q[0], k[0] = 9 * q[0], k[0, :1]  # a core whose column sums are 8 times the other's
    k[0, 0] *= 9
    together, alone = (np.asarray(nystromformer(q[s], k[s], v[s], landmarks=8)) for s in (slice(2), slice(1, 2)))
    np.testing.assert_allclose(together[1:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 71, 201])
def test_depthwise_is_a_centred_convolution_of_the_real_tokens(size):
    r = np.random.default_rng(0)
    x, weight, mask = r.normal(size=(2, 150, 2, 3)), r.normal(size=(size, 4)), scattered((150, 90), 150)
    x[~mask] = np.nan
    with jax.enable_x64(True):
        out = np.asarray(jax.jit(depthwise)(x, weight, mask))
    for b, h in np.ndindex(2, 4):
        expected = convolution(x[b, mask[b], h // 2], weight[:, h])
        np.testing.assert_allclose(out[b, mask[b], h], expected, rtol=0, atol=1e-11)  # float64, up to 150 terms
    assert (out[~mask] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"landmarks": 0}, "landmarks is 0"),
        ({"iterations": 0}, "iterations is 0"),
        ({"value_conv": 4}, "size is 4: it must be odd"),
        ({"causal": True}, "Nystromformer has no causal form"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        Nystromformer(16, heads=2, rngs=nnx.Rngs(0), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.quick
def test_a_convolution_needs_a_value_for_each_query():
    q, k, v = attention_inputs(0, 5, 9)
    with pytest.raises(ValueError, match="5 queries and 9 keys"):
        uncompiled(q, k, v, conv=np.ones((3, 2)))
