"""The short convolution of queries, keys and values: its formula in NumPy, and what it is inside of a mixer.

That every mixer keeps its promises with one is tested in tests/test_attention.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention import ATTENTION, GLA, Softmax
from efficient_tx.tokens.short_conv import ShortConv, short_conv

LENGTHS = (9, 5, 0)


def inputs(size, length=9, channels=3):
    generator = np.random.default_rng(size)
    mask = np.arange(length) < np.array(LENGTHS)[:, None]
    return generator.normal(size=(3, length, channels)), generator.normal(size=(size, channels)), mask


def plain(x, weight, mask, causal):
    """One token, one tap at a time."""
    size = len(weight)
    before = size - 1 if causal else size // 2
    out = np.zeros_like(x)
    for b, example in enumerate(x):
        n = int(mask[b].sum())
        for t in range(n):
            for i in range(size):
                if 0 <= t + i - before < n:
                    out[b, t] += weight[i] * example[t + i - before]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1, 3, 4, 12])
def test_the_formula(size, causal):
    with jax.enable_x64(True):
        x, weight, mask = inputs(size)
        hostile = np.where(mask[..., None], x, np.nan)
        out = short_conv(hostile, weight, mask, causal=causal)
        assert out.dtype == jnp.float64
        np.testing.assert_allclose(np.asarray(out)[mask], plain(x, weight, mask, causal)[mask], atol=1e-12)
        everything = np.ones_like(mask)
        np.testing.assert_allclose(
            short_conv(x, weight, causal=causal), plain(x, weight, everything, causal), atol=1e-12
        )


def test_an_even_size_sees_one_token_more_behind_than_ahead():
    """And a causal one none ahead, by the Jacobian."""
    x = np.zeros((1, 9, 1))
    for causal, seen in ((False, [2, 3, 4, 5]), (True, [1, 2, 3, 4])):
        by_x = jax.grad(lambda x, causal=causal: short_conv(x, jnp.ones((4, 1)), causal=causal)[0, 4, 0])(x)
        np.testing.assert_array_equal(np.flatnonzero(by_x), seen)


@pytest.mark.quick
def test_bfloat16_sums_in_float32():
    """1 + 2⁻⁷ − 1 is 2⁻⁷ in float32; of bfloat16's 8 bits nothing would be left after 256 + 2⁻⁷."""
    x = jnp.array([[[2.0**-7], [256.0], [-256.0]]], jnp.bfloat16)
    out = short_conv(x, jnp.ones((3, 1)), causal=True)
    assert out.dtype == jnp.bfloat16
    assert float(out[0, 2, 0]) == 2.0**-7


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.slow
def test_a_softmax_mixer_is_attention_of_convolved_projections(causal):
    """With an irregular mask and rotations, which come after the convolution, against a dense softmax in NumPy."""
    with jax.enable_x64(True):
        mixer = nnx.jit(lambda: Softmax(8, heads=2, causal=causal, positions="rope", conv=4, rngs=nnx.Rngs(0)))()
        graphdef, params = nnx.split(mixer)
        mixer = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float64), params))
        mask = np.array([[1, 0, 1, 1, 0, 1, 1]], bool)
        x = np.random.default_rng(0).normal(size=(1, 7, 8))
        tokens, n = x[mask], mask.sum()
        heads = {}
        for name in "qkv":
            projected = tokens @ np.asarray(getattr(mixer, name).kernel) + np.asarray(getattr(mixer, name).bias)
            weight = np.asarray(mixer.short_conv[name].weight)
            heads[name] = plain(projected[None], weight, np.ones((1, n), bool), causal)[0].reshape(n, 2, 4)
        angle = np.arange(n)[:, None, None] * 10000.0 ** (-np.arange(2) / 2)
        turned = {}
        for name in "qk":
            pairs = (heads[name][..., :2] + 1j * heads[name][..., 2:]) * np.exp(1j * angle)
            turned[name] = np.concatenate([pairs.real, pairs.imag], -1)
        logits = np.einsum("ihc,jhc->hij", turned["q"], turned["k"]) / 2
        logits = np.where(np.tri(n, dtype=bool) | (not causal), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hij,jhc->ihc", weights, heads["v"]).reshape(n, 8)
        out = out @ np.asarray(mixer.out.kernel) + np.asarray(mixer.out.bias)
        ours = jax.jit(lambda x: mixer(x, mask=mask))(x)
        np.testing.assert_allclose(np.asarray(ours)[mask], out, atol=1e-10)


# The projections of MultiHead, those of GLA, and a mixer whose tokens stood side by side already.
@pytest.mark.parametrize(("name", "causal"), [("softmax", True), ("gla", True), ("s3", False)])
@pytest.mark.slow
def test_gradients_of_a_mixer(name, causal):
    """Zero at padding, whatever stands there, and beyond the token if causal; float64 stays float64."""
    with jax.enable_x64(True):
        sizes = {"heads": 2, "causal": causal, "max_len": 9, "rngs": nnx.Rngs(0)}
        graphdef, params = nnx.split(ATTENTION[name](8, conv=4, **sizes))

        @jax.jit
        def gradients(params, x, w):
            def loss(params, x):
                out = nnx.merge(graphdef, params)(x, mask=mask)
                assert out.dtype == jnp.float64
                return jnp.vdot(out, w)

            return jax.grad(loss, argnums=(0, 1))(params, x)

        x, _, mask = inputs(4, channels=8)
        at = np.zeros_like(x)
        at[:, 4] = 1 + x[:, 0]
        by_params, by_x = gradients(params, x, at)
        assert all(np.abs(conv.weight[...]).max() > 1e-6 for conv in by_params["short_conv"].values())
        assert (np.asarray(by_x)[~mask] == 0).all()
        assert (np.abs(np.asarray(by_x)[0, :5]).max(axis=1) > 0).all()
        assert (np.asarray(by_x)[:, 5:] == 0).all() == causal
        hostile = gradients(params, np.where(mask[..., None], x, np.nan), at)
        for ours, theirs in zip(jax.tree.leaves(hostile), jax.tree.leaves((by_params, by_x))):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "gla"])
def test_a_mixer_in_bfloat16_stays_near_float32(name):
    x, _, mask = inputs(4, channels=8)

    def output(dtype):
        return ATTENTION[name](8, heads=2, conv=4, dtype=dtype, rngs=nnx.Rngs(0))(jnp.asarray(x, dtype), mask=mask)

    full, half = (jax.jit(output, static_argnums=0)(dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(half, np.float32) - full) / np.linalg.norm(full)
    assert error < 0.03  # 8 bits of mantissa, 0.4 % an operation, a handful of operations


def test_gla_convolves_what_takes_part_in_attention():
    mixer = GLA(8, heads=2, conv=4, rngs=nnx.Rngs(0))
    assert {name: conv.weight.shape for name, conv in mixer.short_conv.items()} == {
        "q": (4, 4),
        "k": (4, 4),
        "v": (4, 8),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.slow
def test_gla_is_the_recurrence_of_convolved_projections_behind_a_silu(causal):
    """In plain Python: one state a head and direction, one token at a time."""
    mixer = GLA(8, heads=2, conv=4, causal=causal, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)
    q, k, v, log_decay = (np.asarray(part, np.float64) for part in mixer.project(jnp.asarray(x[0])).values())

    def convolved(part, conv):
        weight, before = np.asarray(conv.weight[...], np.float64), 3 if causal else 2
        padded = np.pad(part.reshape(7, -1), ((before, 3 - before), (0, 0)))
        out = sum(weight[i] * padded[i : i + 7] for i in range(4))
        return (out / (1 + np.exp(-out))).reshape(part.shape)

    q, k, v = (convolved(part, mixer.short_conv[name]) for part, name in ((q, "q"), (k, "k"), (v, "v")))
    directions = []
    for order in [range(7)] if causal else [range(7), range(6, -1, -1)]:
        state, out = np.zeros((2, q.shape[-1], v.shape[-1])), np.zeros(v.shape)
        for t in order:
            state = np.exp(log_decay[t])[..., None] * state + k[t][..., None] * v[t][:, None]
            out[t] = np.einsum("hk,hkv->hv", q[t], state) * q.shape[-1] ** -0.5
        directions.append(out)
    expected = mixer.finish(jnp.asarray(np.mean(directions, axis=0), jnp.float32), jnp.asarray(x[0]))
    np.testing.assert_allclose(mixer(jnp.asarray(x))[0], expected, atol=1e-5)  # float32


@pytest.mark.quick
@pytest.mark.parametrize("name", ["fourier", "pool"])
def test_what_has_no_projections_has_no_convolution(name):
    with pytest.raises(TypeError, match="conv"):
        ATTENTION[name](8, heads=2, conv=4, rngs=nnx.Rngs(0))


@pytest.mark.quick
def test_a_size_below_zero_is_refused():
    with pytest.raises(ValueError, match="conv is -1: it must be at least 0"):
        Softmax(8, heads=2, conv=-1, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("causal", [False, True])
def test_it_starts_around_the_identity(causal):
    """The own tap is uniform in 1 ± size^-½, the others in ± size^-½: 1000 draws cover 99 % of the range."""
    weight = np.array(ShortConv(1000, 4, causal=causal, rngs=nnx.Rngs(0)).weight[...])
    weight[3 if causal else 2] -= 1
    assert np.abs(weight).max() <= 0.5
    assert (np.abs(weight).max(axis=1) > 0.49).all()
