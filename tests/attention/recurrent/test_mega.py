"""The whole layer of Mega, against its formulas in float64: averages token by token, attention as a dense matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from efficient_tx.attention import Mega, mega
from tests.attention.test_decoding import check
from tests.support.mixers import LONG, assert_same, make, tokens

FEATURES, KEYS, LENGTH, REAL = 6, 4, 33, 29


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def array(parameter):
    return np.asarray(parameter[...], np.float64)


def applied(layer, x):
    return x @ array(layer.kernel) + array(layer.bias)


def averages(mixer, x, direction):
    """Ma et al.'s equations (5) with N numbers a channel, of one sequence."""
    share, decay = sigmoid(array(mixer.damping)[direction]), sigmoid(array(mixer.decay)[direction])
    entering, leaving = array(mixer.entering)[direction], array(mixer.leaving)[direction]
    state, out = np.zeros(share.shape), np.zeros_like(x)
    for t in range(len(x)):
        state = share * entering * x[t][:, None] + (1 - share * decay) * state
        out[t] = (leaving * state).sum(1) / np.sqrt(share.shape[1])
    return out


def turned(vector, positions):
    half = len(vector) // 2
    angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    first, second = vector[:half], vector[half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), first * np.sin(angle) + second * np.cos(angle)], axis=1
    )


def layer(mixer, x, causal):
    """One sequence without padding."""
    n, place = len(x), np.arange(len(x))
    moved = averages(mixer, x, 0)
    if not causal:
        moved = moved + averages(mixer, x[::-1], 1)[::-1]
    moved = silu(moved + array(mixer.skip) * x)
    base = applied(mixer.base, moved)
    update, z, read, inner = np.split(base, np.cumsum([FEATURES, KEYS, mixer.head_dim]), axis=1)
    z = silu(z)
    q, k = (z * scale + shift for scale, shift in zip(array(mixer.affine), array(mixer.shift)))
    v = silu(applied(mixer.v, x))
    size = mixer.chunk or n
    sees = place[:, None] // size == place // size
    if causal:
        sees &= place <= place[:, None]
    alpha, beta = array(mixer.turning)
    bias = turned(alpha, place) @ turned(beta, place).T
    if mixer.weighting == "softmax":
        logits = np.where(sees, q @ k.T / np.sqrt(KEYS) + bias, -np.inf)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
    else:
        logits = q @ k.T / sees.sum(1, keepdims=True) + bias
        weights = sees * (1 + erf((logits - 0.707107) / (0.282095 * np.sqrt(2)))) / 2  # the authors' constants
    out = weights @ v * silu(read)
    return sigmoid(update) * (silu(inner + applied(mixer.out, out)) - x)


OPTIONS = [
    {"causal": False, "chunk": 8},
    {"causal": True, "chunk": 8, "weighting": "laplace"},
    {"causal": True},
    {"causal": False, "weighting": "laplace"},
]


def varied(mixer):
    """Initial scales of 0.02 would leave queries, keys and bias without weight."""
    for parameter in (mixer.affine, mixer.turning):
        parameter[...] = 50 * parameter[...]
    mixer.shift[...] = jnp.asarray(tokens(5, 2, KEYS))
    return mixer


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.first(2)
def test_equals_its_formulas(options):
    mixer = varied(Mega(FEATURES, key_dim=KEYS, averages=3, rngs=nnx.Rngs(0), **options))
    x = tokens(0, 2, LENGTH, FEATURES)
    mask = np.arange(LENGTH) < np.array([[LENGTH], [REAL]])
    out = nnx.jit(lambda mixer, x: mixer(x, mask=mask))(mixer, x)
    for got, one, n in zip(out, x, (LENGTH, REAL)):
        assert_same(got[:n], layer(mixer, one[:n].astype(np.float64), options["causal"]), 2e-5)  # float32


@pytest.mark.parametrize("weighting", ["softmax", "laplace"])
@pytest.mark.slow
def test_decodes_without_chunks_and_with_either_weighting(weighting):
    mixer = make(Mega, causal=True, chunk=None, weighting=weighting, max_len=LONG, key_dim=KEYS)
    check(varied(mixer))


@pytest.mark.slow
def test_decodes_the_laplace_weights_of_chunks():
    check(varied(make(Mega, causal=True, weighting="laplace", key_dim=KEYS)))


@pytest.mark.slow
def test_wide_values_are_those_of_their_parts():
    """Two heads of queries for one of keys, values in two slices."""
    q, k, v = tokens(0, 1, 9, 2, 4), tokens(1, 1, 9, 1, 4), tokens(2, 1, 9, 1, 320)
    whole = mega(q, k, v, causal=True)
    assert_same(whole[..., :200], mega(q, k, v[..., :200], causal=True))
    assert_same(whole[..., 200:], mega(q, k, v[..., 200:], causal=True))


@pytest.mark.quick
def test_initial_values_are_those_of_the_authors():
    mixer = Mega(256, rngs=nnx.Rngs(0))
    assert mixer.affine.shape == mixer.turning.shape == (2, 64) and mixer.v.kernel.shape == (256, 512)
    sign = np.where(np.arange(16) % 2, -1, 1)
    for parameter, mean, deviation in (
        (mixer.damping, 0, 0.2), (mixer.decay, 0, 0.2), (mixer.entering, sign, 0.02), (mixer.leaving, 0, 1.0)
    ):  # fmt: skip
        assert parameter.shape == (2, 256, 16)
        assert np.std(parameter[...] - mean) == pytest.approx(deviation, rel=0.05)  # 8,192 draws


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_dim": 5}, "key_dim is 5: pairs of channels turn: an even number, at least 2"),
        ({"expand": 0.1}, "expand is 0.1: with 6 features it must be at least 0.166667"),
        ({"averages": 0}, "averages is 0: it must be at least 1"),
        ({"chunk": 0}, "chunk is 0: it must be at least 1"),
        ({"weighting": "relu"}, "weighting is 'relu': choose one of softmax, laplace"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Mega(FEATURES, rngs=nnx.Rngs(0), **options)


@pytest.mark.quick
def test_other_numbers_of_queries_need_positions():
    q, k = jnp.ones((1, 2, 1, 4)), jnp.ones((1, 5, 1, 4))
    with pytest.raises(ValueError, match="mega has 2 queries and 5 keys: it needs positions, so use causal=True"):
        jax.eval_shape(mega, q, k, k)


def test_averages_that_keep_nothing_or_all_have_gradients():
    """Shares and decays of 0 and 1 in floating point, by logits of 100."""
    mixer = make(Mega, causal=True)
    mixer.damping[...] = jnp.where(jnp.arange(mixer.damping.shape[-1]) % 2, 100.0, -100.0) + 0 * mixer.damping[...]
    mixer.decay[...] = 100 * jnp.sign(mixer.decay[...])
    x = tokens(0, 2, 70, mixer.features)
    run = nnx.jit(nnx.value_and_grad(lambda mixer: (jnp.square(mixer(x)).sum(), mixer(x)), has_aux=True))
    (_, y), gradients = run(mixer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((y, gradients)))
    decoded = nnx.jit(lambda mixer, x: mixer.step(x[:, 69], mixer.prefill(x[:, :69])[1])[0])
    assert_same(decoded(mixer, x), y[:, 69])
