"""The whole layers of HGRN, HGRN2 and MLGRU, against loops over tokens in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, hgrn
from efficient_tx.attention.recurrent.mlgru import BitLinear
from efficient_tx.linear import Dense, Monarch
from tests.support.mixers import assert_same, tokens

FEATURES, HEADS, LENGTH = 12, 2, 70


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def normed(x, norm, epsilon):
    return np.asarray(norm.scale[...], np.float64) * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)


def applied(layer, x):
    """A linear layer's formula: of BitLinear, Wang et al.'s with rounded weights and inputs."""
    if not isinstance(layer, BitLinear):
        return x @ np.asarray(layer.kernel[...], np.float64)
    x = normed(x, layer.norm, 1e-8)
    kernel = np.asarray(layer.levels.kernel[...], np.float64)
    scale = np.abs(kernel).mean()
    peak = np.abs(x).max(-1, keepdims=True)
    levels = np.clip(np.round(kernel / scale), -1, 1)
    assert set(np.unique(levels)) <= {-1, 0, 1}
    return np.round(127 * x / peak) @ levels * scale * peak / 127


def loop(mixer, x):
    """One direction of one sequence, `[length, heads · head_dim]`."""
    forget, v = applied(mixer.forget, x), applied(mixer.v, x)
    f = mixer.lower_bound + (1 - mixer.lower_bound) * sigmoid(forget)
    out = np.zeros_like(v)
    if mixer.states is None:
        state = np.zeros(v.shape[1])
        for t in range(len(x)):
            state = f[t] * state + (1 - f[t]) * silu(v[t])
            out[t] = state
        return out
    q = silu(applied(mixer.q, x))
    for h in range(HEADS):
        keys = slice(h * mixer.states, (h + 1) * mixer.states)
        values = slice(h * mixer.head_dim, (h + 1) * mixer.head_dim)
        state = np.zeros((mixer.states, mixer.head_dim))
        for t in range(len(x)):
            state = f[t, keys, None] * state + np.outer(1 - f[t, keys], v[t, values])
            out[t, values] = q[t, keys] @ state
    return out


def layer(mixer, x, causal):
    out = loop(mixer, x) if causal else (loop(mixer, x) + loop(mixer, x[::-1])[::-1]) / 2
    out = normed(out, mixer.norm, 1e-5)
    return applied(mixer.out, out if mixer.gate is None else out * silu(applied(mixer.gate, x)))


@pytest.mark.parametrize(
    ("name", "causal", "options"),
    [
        ("hgrn", True, {}),
        ("hgrn", False, {"states": 5}),
        ("mlgru", True, {}),
        ("hgrn", False, {"lower_bound": 0.7}),
        ("hgrn", True, {"states": 5, "lower_bound": 0.7}),
        ("mlgru", False, {}),
    ],
)
@pytest.mark.first(2)
def test_equals_the_loop_of_its_paper(name, causal, options):
    mixer = ATTENTION[name](FEATURES, heads=HEADS, causal=causal, rngs=nnx.Rngs(1), **options)
    x = tokens(0, 2, LENGTH, FEATURES)
    out = np.asarray(nnx.jit(lambda mixer, x: mixer(x))(mixer, x))
    expected = np.stack([layer(mixer, one.astype(np.float64), causal) for one in x])
    if name == "hgrn":
        # float32, divided by norms of heads that are a tenth of their inputs.
        assert_same(out, expected, 1e-4)
    else:
        # Where an input lies on the edge of two of its 255 steps, float32 may round it to the other one.
        away = np.abs(out - expected) / np.abs(expected).max()
        assert np.median(away) < 1e-5 and away.max() < 1 / 127


@pytest.mark.slow
def test_a_state_that_is_never_forgotten_is_a_sum_and_one_that_is_forgotten_at_once_the_token():
    """Logits of 1,000, of which the naive 1 − f is 0 or f overflows; and the derivatives of both are finite."""
    v = tokens(1, 1, LENGTH, 1, 3)
    first = np.arange(LENGTH)[None, :, None, None] == 0
    kept = np.where(first, -1000.0, 1000.0) * np.ones_like(v)
    np.testing.assert_array_equal(hgrn(kept, v, causal=True), np.broadcast_to(v[:, :1], v.shape))
    np.testing.assert_array_equal(hgrn(np.full_like(v, -1000.0), v, causal=True), v)
    for bound in (0.0, 0.5):
        run = jax.grad(lambda forget, v, bound=bound: hgrn(forget, v, causal=True, lower_bound=bound).sum(), (0, 1))
        assert all(np.isfinite(part).all() for part in run(kept, v))


def test_the_ternary_projections_have_straight_through_gradients_and_at_most_three_levels():
    linear = BitLinear(6, 4, rngs=nnx.Rngs(0), use_bias=False)
    x = tokens(0, 5, 6)
    assert len(np.unique(np.round(linear.levels.to_dense(), 6))) <= 3
    by_kernel = nnx.grad(lambda linear: linear(x).sum())(linear).levels.kernel[...]
    scaled = np.round(127 * normed(x, linear.norm, 1e-8) / np.abs(normed(x, linear.norm, 1e-8)).max(-1, keepdims=True))
    peak = np.abs(normed(x, linear.norm, 1e-8)).max(-1, keepdims=True) / 127
    # As if the levels were kernel / mean |kernel|, unrounded, and the mean a constant.
    assert_same(by_kernel, np.broadcast_to((scaled * peak).sum(0)[:, None], (6, 4)), 1e-5)


@pytest.mark.parametrize("linear", [nnx.Linear, Dense, partial(Monarch, blocks=2)])
def test_mlgru_is_ternary_whatever_the_factory_is_and_says_so(linear):
    given = {"heads": HEADS, "linear": linear, "rngs": nnx.Rngs(0)}
    if isinstance(linear, partial):
        with pytest.warns(UserWarning, match="mlgru: its projections are ternary, and not of Monarch"):
            mixer = ATTENTION["mlgru"](FEATURES, **given)
    else:
        mixer = ATTENTION["mlgru"](FEATURES, **given)
    names = ("forget", "v", "gate", "out")
    assert all(isinstance(getattr(mixer, name), BitLinear) for name in names)
    assert all(getattr(mixer, name).levels.bias is None for name in names[:3])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower_bound": 1.0}, "lower_bound is 1.0: the least share that is kept must be at least 0 and below 1"),
        ({"states": 0}, "states is 0: it must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ATTENTION["hgrn"](FEATURES, heads=HEADS, rngs=nnx.Rngs(0), **options)


@pytest.mark.quick
def test_logits_of_another_shape_are_refused():
    shaped = [jax.ShapeDtypeStruct((1, 4, 2, width), jnp.float32) for width in (3, 5)]
    with pytest.raises(ValueError, match=r"forget has shape \(1, 4, 2, 3\): .* it must be \(1, 4, 2, 5\)"):
        jax.eval_shape(hgrn, *shaped)
