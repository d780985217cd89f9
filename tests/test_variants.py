"""Linformer and Fourier against plain formulas, and the variants inside flax's own attention modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from efficient_tx.attention import ATTENTION, as_attention_fn, fourier, linformer
from efficient_tx.attention.fourier import Fourier, chirp_phase


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_linformer_is_its_formula_and_exact_with_the_identity():
    with jax.enable_x64(True):
        q, k, v = (normal(seed, 2, 9, 3, 4) for seed in range(3))
        e, f = normal(3, 5, 12), normal(4, 5, 12)
        lengths, expected = (9, 4), np.zeros_like(v)
        for b, n in enumerate(lengths):
            for h in range(3):
                keys, values = e[:, :n] @ k[b, :n, h], f[:, :n] @ v[b, :n, h]
                expected[b, :, h] = softmax(q[b, :, h] @ keys.T / 2) @ values
        mask = np.arange(9) < np.array(lengths)[:, None]
        attend = jax.jit(linformer)
        ours = attend(*map(jnp.asarray, (q, k, v)), e=jnp.asarray(e), f=jnp.asarray(f), mask=jnp.asarray(mask))
        np.testing.assert_allclose(ours, expected, atol=1e-12)  # float64 rounding

        ours = attend(*map(jnp.asarray, (q, k, v)), e=jnp.eye(9), f=jnp.eye(9))
        exact = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / 2) @ v.swapaxes(1, 2)
        np.testing.assert_allclose(ours, exact.swapaxes(1, 2), atol=1e-12)


def test_linformer_takes_grouped_heads_other_queries_and_other_values():
    with jax.enable_x64(True):
        q, k, v = normal(0, 2, 5, 4, 6), normal(1, 2, 9, 2, 6), normal(2, 2, 9, 2, 3)
        e, f = jnp.asarray(normal(3, 7, 9)), jnp.asarray(normal(4, 7, 9))
        grouped = linformer(*map(jnp.asarray, (q, k, v)), e=e, f=f)
        repeated = linformer(jnp.asarray(q), *(jnp.repeat(x, 2, axis=2) for x in (k, v)), e=e, f=f)
        assert grouped.shape == (2, 5, 4, 3)
        np.testing.assert_allclose(grouped, repeated, atol=1e-12)
        with pytest.raises(ValueError, match="max_len=9"):
            linformer(*(jnp.zeros((1, 10, 1, 2)),) * 3, e=e, f=f)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 37])
def test_fourier_is_numpys_transform_of_the_real_tokens(n):
    x = normal(0, 2, 37, 6)
    mask = np.zeros((2, 37), bool)
    mask[0, :n] = mask[1, 37 - n :] = True
    expected = [np.fft.fft2(x[b][mask[b]]).real for b in range(2)]
    with jax.enable_x64(True):
        ours = np.asarray(jax.jit(fourier)(jnp.asarray(x), mask=jnp.asarray(mask)))
    for b in range(2):
        np.testing.assert_allclose(ours[b][mask[b]], expected[b], atol=1e-10)
        assert (ours[b][~mask[b]] == 0).all()
    single = np.asarray(jax.jit(fourier)(jnp.asarray(x, jnp.float32), mask=jnp.asarray(mask)))
    scale = max(1.0, np.abs(expected[0]).max())
    np.testing.assert_allclose(single[0][mask[0]] / scale, expected[0] / scale, atol=2e-6)  # float32, three FFTs


def test_fourier_module_is_orthonormal_on_the_real_tokens():
    x = normal(0, 1, 8, 4).astype(np.float32)
    mixed = Fourier(4, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(mixed[0], np.fft.fft2(x[0], norm="ortho").real, atol=1e-5)  # float32


def test_chirp_phases_stay_exact_where_the_square_overflows():
    n = 70001
    ours = np.asarray(jax.jit(chirp_phase, static_argnums=0)(n, jnp.int32(n)))
    np.testing.assert_array_equal(ours, np.arange(n, dtype=np.int64) ** 2 % (2 * n))


def flax_modules(attention_fn, **nnx_options):
    """(x, mask) -> out of both flax modules with the same kind of weights."""
    dense = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn)
    params = dense.init(jax.random.key(0), jnp.zeros((1, 6, 8)))
    module = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0), **nnx_options
    )
    return (lambda x, mask: dense.apply(params, x, mask=mask)), (lambda x, mask: module(x, mask=mask))


@pytest.mark.parametrize("name", [name for name in ATTENTION if ATTENTION[name].function])
def test_inside_flax_modules_padding_changes_nothing(name):
    given = {"linformer": {"e": jnp.ones((3, 6)), "f": jnp.ones((3, 6))}, "sigmoid": {"bias": -2.0}}
    options = given.get(name, {})
    x = normal(0, 2, 6, 8).astype(np.float32)
    mask = np.arange(6) < np.array([6, 4])[:, None]
    other = np.where(mask[..., None], x, 9.0)
    for module in flax_modules(as_attention_fn(name, **options)):
        out, out_other = (np.asarray(module(z, mask[:, None, None, :])) for z in (x, other))
        np.testing.assert_allclose(out[mask], out_other[mask], atol=1e-5)  # float32 rounding
        assert np.abs(out - np.asarray(module(x, None))).max() > 1e-4  # the mask arrived


@pytest.mark.parametrize("place", [0, 1], ids=["linen", "nnx"])
def test_softmax_inside_flax_modules_is_their_own_attention(place):
    x = normal(0, 2, 6, 8).astype(np.float32)
    mask = np.arange(6) < np.array([6, 4])[:, None]
    full = np.tril(np.ones((6, 6), bool)) & mask[:, None, None, :] & mask[:, None, :, None]
    own = [linen.dot_product_attention, nnx.dot_product_attention][place]
    ours, theirs = (flax_modules(function)[place] for function in (as_attention_fn("softmax"), own))
    for given in (None, mask[:, None, None, :], full):
        np.testing.assert_allclose(ours(x, given)[mask], theirs(x, given)[mask], atol=1e-5)  # float32 rounding


def test_attention_fn_refuses_what_it_cannot_do():
    q = jnp.ones((1, 4, 2, 8))
    full = jnp.ones((1, 1, 4, 4), bool)
    with pytest.raises(ValueError, match="instead of make_attention_mask"):
        as_attention_fn("skyformer")(q, q, q, mask=full)
    with pytest.raises(ValueError, match="no causal form"):
        as_attention_fn("skyformer")(q, q, q, is_causal=True)
    with pytest.raises(ValueError, match="dropout_rate=0"):
        as_attention_fn("softmax")(q, q, q, dropout_rate=0.1, deterministic=False)
    with pytest.raises(ValueError, match="takes no bias"):
        as_attention_fn("softmax")(q, q, q, bias=full)
    with pytest.raises(ValueError, match="nearest: 'skyformer'"):
        as_attention_fn("skyfromer")
    with pytest.raises(ValueError, match="no option 'landmark'"):
        as_attention_fn("skyformer", landmark=3)
    with pytest.raises(ValueError, match=r"parameters of its own \(e, f\)"):
        as_attention_fn("linformer")
    with pytest.raises(ValueError, match="use the module Fourier"):
        as_attention_fn("fourier")


def test_causal_reaches_the_variant():
    q, k, v = (jnp.asarray(normal(seed, 1, 5, 2, 8), jnp.float32) for seed in range(3))
    ours = as_attention_fn("softmax")(q, k, v, is_causal=True)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=1e-6)
