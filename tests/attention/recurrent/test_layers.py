"""The whole layers of retnet, mamba2, delta, gated_delta and kda, against loops over tokens in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, delta
from tests.support.mixers import assert_same, tokens

FEATURES, HEADS, WIDTH = 12, 2, 6
LENGTH = 70  # of the kernels' chunks more than one, and none is whole


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def kernel(layer):
    return np.asarray(layer.kernel[...], np.float64)


def convolved(x, conv):
    """Of `[length, channels]`, tap by tap; the token's own is the last one, or the one in the middle."""
    taps = np.asarray(conv.weight[...], np.float64)
    before = len(taps) - 1 if conv.causal else len(taps) // 2
    padded = np.pad(x, ((before, len(taps)), (0, 0)))
    return sum(tap * padded[i : i + len(x)] for i, tap in enumerate(taps))


def turned(x):
    """Rotary positions, `[length, heads, dim]`."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.concatenate([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def projected(name, mixer, x):
    """q, k, v, β and decays of one sequence, `[length, heads, ...]`, by the formulas of the papers."""
    q, k, v = (x @ kernel(getattr(mixer, part)) for part in "qkv")
    if mixer.short_conv:
        q, k, v = (silu(convolved(part, mixer.short_conv[n])) for n, part in zip("qkv", (q, k, v)))
    elif name != "retnet":
        q, k, v = silu(q), silu(k), silu(v)
    q, k, v = (part.reshape(len(x), HEADS, -1) for part in (q, k, v))
    if name == "retnet":
        gamma = 1 - 2.0 ** (-5 - np.arange(HEADS))
        return turned(q), turned(k), v, np.zeros((len(x), HEADS)), np.broadcast_to(gamma[:, None], k.shape)
    q, k = (part / np.linalg.norm(part, axis=-1, keepdims=True) for part in (q, k))
    beta, decay = sigmoid(x @ kernel(mixer.beta)) * (2 if mixer.negative else 1), np.ones_like(k)
    if name == "gated_delta":
        rate, bias = np.exp(np.asarray(mixer.decay_rate[...])), np.asarray(mixer.decay_bias[...])
        decay = np.broadcast_to(np.exp(-rate * softplus(x @ kernel(mixer.decay) + bias))[..., None], k.shape)
    if name == "kda":
        rate, bias = np.exp(np.asarray(mixer.decay_rate[...])), np.asarray(mixer.decay_bias[...])
        logits = (x @ kernel(mixer.decay_down) @ kernel(mixer.decay_up)).reshape(k.shape)
        decay = np.exp(-rate * softplus(logits + bias))
    return q, k, v, beta, decay


def recurrence(name, q, k, v, beta, decay):
    """Token by token: `[length, heads, v_dim]`."""
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for h in range(HEADS):
        state = np.zeros((k.shape[-1], v.shape[-1]))
        for t in range(len(q)):
            state = decay[t, h][:, None] * state
            held = 0 if name == "retnet" else k[t, h] @ state
            state = state + np.outer(k[t, h], (v[t, h] - held) * (1 if name == "retnet" else beta[t, h]))
            out[t, h] = q[t, h] @ state / np.sqrt(q.shape[-1])
    return out


def mamba2(mixer, x, causal):
    """Dao and Gu's recurrence, of one sequence."""
    names = ("q", "k", "v")
    q, k, v = (x @ kernel(getattr(mixer, n)) for n in names)
    if mixer.short_conv:
        q, k, v = (convolved(part, mixer.short_conv[n]) for n, part in zip(names, (q, k, v)))
    q, k, v = silu(q), silu(k), silu(v)
    step = softplus(x @ kernel(mixer.time) + np.asarray(mixer.time_bias[...]))
    rate = np.exp(np.asarray(mixer.log_rate[...], np.float64))
    v = v.reshape(len(x), HEADS, -1)

    def scan(q, k, v, step):
        out = np.zeros_like(v)
        for h in range(HEADS):
            state = np.zeros((k.shape[-1], v.shape[-1]))
            for t in range(len(v)):
                state = np.exp(-rate[h] * step[t, h]) * state + step[t, h] * np.outer(k[t], v[t, h])
                out[t, h] = q[t] @ state
        return out

    heads = scan(q, k, v, step)
    if not causal:
        heads = (heads + scan(*(part[::-1] for part in (q, k, v, step)))[::-1]) / 2
    heads = (heads + np.asarray(mixer.skip[...])[:, None] * v).reshape(len(x), -1)
    gated = heads * silu(x @ kernel(mixer.gate))
    scale = np.asarray(mixer.norm.scale[...], np.float64)
    return scale * gated / np.sqrt(np.square(gated).mean(-1, keepdims=True) + 1e-5) @ kernel(mixer.out)


def layer(name, mixer, x, causal):
    if name == "mamba2":
        return mamba2(mixer, x, causal)
    parts = projected(name, mixer, x)
    heads = recurrence(name, *parts)
    if not causal:
        heads = (heads + recurrence(name, *(part[::-1] for part in parts))[::-1]) / 2
    scale = np.asarray(mixer.norm.scale[...], np.float64)
    normed = scale * heads / np.sqrt(np.square(heads).mean(-1, keepdims=True) + 1e-5)
    normed = normed.reshape(len(x), -1)
    if name in ("retnet", "gated_delta"):
        normed = normed * silu(x @ kernel(mixer.gate))
    if name == "kda":
        gate = x @ kernel(mixer.gate_down) @ kernel(mixer.gate_up) + np.asarray(mixer.gate_up.bias[...])
        normed = normed * sigmoid(gate)
    return normed @ kernel(mixer.out)


# What differs from the defaults.
ROWS = [
    ("gated_delta", {}), ("mamba2", {}), ("retnet", {"conv": 3, "positions": "rope"}), ("delta", {"negative": True}),
    ("kda", {}), ("delta", {"conv": 0, "expand_k": 0.5}), ("mamba2", {"conv": 0}), ("retnet", {"positions": "rope"}),
    ("kda", {"conv": 0, "expand_k": 2.0}), ("gated_delta", {"conv": 0, "expand_v": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("name", "options"), ROWS, ids=lambda part: part if isinstance(part, str) else "")
@pytest.mark.first(2)
def test_equals_the_loop_of_its_paper(name, options, causal):
    mixer = ATTENTION[name](FEATURES, heads=HEADS, causal=causal, rngs=nnx.Rngs(1), **options)
    x = tokens(0, 2, LENGTH, FEATURES)
    out = nnx.jit(lambda mixer, x: mixer(x))(mixer, x)
    for got, one in zip(out, x):
        # float32, divided by norms of heads that are a tenth of their inputs.
        assert_same(got, layer(name, mixer, one.astype(np.float64), causal), 1e-4)


def test_with_orthonormal_keys_and_whole_corrections_the_state_recalls():
    """Whatever was stored under a key before."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]
    k = np.concatenate([basis, basis])[None, :, None]
    v = tokens(1, 1, 2 * WIDTH, 1, 4)
    with jax.enable_x64(True):
        out = delta(k, k, v.astype(np.float64), beta=jnp.ones((1, 2 * WIDTH, 1)), causal=True)
    # The key's length is 1 but for the millionth that keeps a zero from a division by it.
    np.testing.assert_allclose(np.asarray(out) * WIDTH**0.5, v, atol=1e-5)


@pytest.mark.parametrize("name", ["gated_delta", "kda", "mamba2"])
@pytest.mark.first(1)
def test_initial_decays_are_those_of_the_published_layers(name):
    mixer = ATTENTION[name](256, heads=64, rngs=nnx.Rngs(0))
    names = ("log_rate", "time_bias") if name == "mamba2" else ("decay_rate", "decay_bias")
    rate, bias = (np.asarray(getattr(mixer, name)[...]) for name in names)
    rate, step = np.exp(rate), softplus(bias)
    low = 0 if name == "gated_delta" else 1
    assert low <= rate.min() < 2 and 14 < rate.max() <= 16
    assert 0.001 <= step.min() * 1.001 < 0.002 and 0.08 < step.max() <= 0.1001
    assert np.median(step) == pytest.approx(0.01, rel=0.5)  # 64 draws or more, log-uniform over two decades


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand_k": 0.1}, "expand_k is 0.1: with head_dim 6 it must be at least 0.166667"),
        ({"expand_v": 0.0}, "expand_v is 0.0: with head_dim 6 it must be at least 0.166667"),
        ({"heads": 5}, "12 features do not divide into 5 heads: give head_dim, or other sizes"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ATTENTION["delta"](FEATURES, rngs=nnx.Rngs(0), **{"heads": HEADS} | options)
