"""S3Attention (Wang et al. 2024, arXiv 2408.08567): attention to a few tokens and channels of a smoothed sequence.

X̄ holds the means of `groups` groups of channels. A learnt circular convolution smooths it in Fourier space, and a
convolution over neighbours mixes the result with the tokens X. Queries, keys and values are projections of H:

    X_s = irFFT(rFFT(X̄) ⊙ filter),        H = ReLU(LN(conv₃([X_s, X])))
    columns = softmax(Q (P₁ K)ᵀ / √K) P₁ V        P₁ picks `columns` tokens
    rows = (V P₂) softmax((K P₂)ᵀ Q / √n)         P₂ picks `rows` channels, the softmax is over them
    out = LN₁(columns) / 2 + LN₂(rows) / 2        LN over all heads together

Linear in the length, n log n for the convolution. The published code differs from the paper (stem of size 1 with ELU,
groups ignored, a BatchNorm per position). Unlike the published code: padding reaches neither the Fourier transform nor
a softmax, and LayerNorm replaces BatchNorm. P₁ is drawn once, as there, but among the ranks of the real tokens, with
one fixed key: an example of n tokens has the same columns in every layer and batch and with any padding. P₂ takes the
first channels of a head, because the channels of a learnt projection are exchangeable.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.checks import at_least
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.random import evaluation_keys, sample_tokens, take_tokens
from efficient_tx.tokens.flat import token_wise
from efficient_tx.tokens.mask import key_mask, repeat_heads

HIGHEST = jax.lax.Precision.HIGHEST


def check_options(*, columns, rows):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, columns=columns, rows=rows)


@checked_by(check_options)
def s3(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, columns: int = 8, rows: int = 8,
    gain: jax.Array | None = None, shift: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """The mean of column and row attention, each normalised; without the smoothing before them.

    Args:
      q: `[batch, length, heads, head_dim]`.
      k: `[batch, length, groups, head_dim]`; groups divides heads.
      v: as k.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens.
      key: unused, a fixed key draws the tokens.
      columns: number of tokens that column attention uses; an example with fewer tokens uses all.
      rows: number of channels that row attention uses; at most head_dim.
      gain: scales of the two LayerNorms, `[2, heads · head_dim]`; None means 1.
      shift: biases of the two LayerNorms, of the same shape; None means 0.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of q, zero at masked positions. The arithmetic is float32 at
      least.

    Raises:
      ValueError: an option below 1, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    del key
    if q.shape[1] != k.shape[1] or k.shape != v.shape:
        raise ValueError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: rows need equal lengths and widths")
    mask = key_mask(mask, *k.shape[:2])
    given = q.dtype
    q, k, v = (x.astype(jnp.promote_types(given, jnp.float32)) for x in (q, k, v))
    if mask is not None:
        q, k, v = (jnp.where(mask[:, :, None, None], x, 0) for x in (q, k, v))
    k, v = (repeat_heads(x, q.shape[2], name) for x, name in ((k, "k"), (v, "v")))
    parts = column_attention(q, k, v, mask, columns), row_attention(q, k, v, mask, rows)
    out = sum(
        normalise(part, None if gain is None else gain[i], None if shift is None else shift[i]) / 2
        for i, part in enumerate(parts)
    )
    return (out if mask is None else jnp.where(mask[:, :, None, None], out, 0)).astype(given)


def column_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, columns: int) -> jax.Array:
    """Softmax attention to at most `columns` real tokens; shapes as in `s3`, with as many key heads as query heads."""
    position, valid = columns_of(k, mask, columns)
    return flash_attention(q, take_tokens(k, position), take_tokens(v, position), mask=valid)


def columns_of(k: jax.Array, mask: jax.Array | None, columns: int) -> tuple[jax.Array, jax.Array]:
    """Positions of at most `columns` real tokens, int32 `[batch, ≤ columns]`, and which of them exist."""
    batch, length = k.shape[:2]
    real = jnp.ones((batch, length), bool) if mask is None else mask
    return sample_tokens(evaluation_keys(batch), real, columns)


def column_tokens(k: jax.Array, *, mask: jax.Array | None = None, columns: int = 8) -> jax.Array:
    """The keys of column attention, see `Mixer.chosen`; arguments as in `s3`."""
    position, valid = columns_of(k, key_mask(mask, *k.shape[:2]), columns)
    return jnp.where(valid[..., None, None], take_tokens(k, position), 0)


def row_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, rows: int) -> jax.Array:
    """Mixes the first `rows` channels of v into each output channel; shapes as in `s3`, zero at masked tokens."""
    n = k.shape[1] if mask is None else jnp.maximum(mask.sum(axis=1), 1)[:, None, None, None]
    k, v = k[..., :rows], v[..., :rows]
    logits = jnp.einsum("blhc,blhd->bhcd", k, q, precision=HIGHEST) / jnp.sqrt(n).astype(q.dtype)
    weights = jax.nn.softmax(logits, axis=2)
    return jnp.einsum("blhc,bhcd->blhd", v, weights, precision=HIGHEST)


def normalise(x: jax.Array, gain: jax.Array | None, shift: jax.Array | None, epsilon: float = 1e-5) -> jax.Array:
    """LayerNorm of `[batch, length, heads, dim]` over heads and channels, gain and shift `[heads · dim]`."""
    tokens = x.reshape(-1, x.shape[2] * x.shape[3])
    tokens = tokens - tokens.mean(axis=-1, keepdims=True)
    tokens = tokens * jax.lax.rsqrt(jnp.square(tokens).mean(axis=-1, keepdims=True) + epsilon)
    tokens = tokens if gain is None else tokens * gain.astype(x.dtype)
    return (tokens if shift is None else tokens + shift.astype(x.dtype)).reshape(x.shape)


class S3(MultiHead):
    """Multi-head S3Attention with its smoothing; `columns` and `rows` as in `s3`, other arguments as in `MultiHead`.

    Args:
      groups: number of channel groups whose means are smoothed; with groups ≥ features each channel is its own group.

    Raises:
      ValueError: `causal=True` (smoothing and row attention see all tokens), no `max_len`, or an option below 1.
    """

    paper = "Wang et al. 2024, arXiv 2408.08567"
    computes = "m tokens and m channels of a sequence smoothed in Fourier space"
    cost = "n·m + n log n"
    function = staticmethod(s3)
    chosen = staticmethod(column_tokens)
    refuses: ClassVar = {"cross": "rows need equal lengths", "decode": "rows need equal lengths"}
    needs_max_len = True
    side_by_side = True  # the smoothing and the convolution over neighbours count real tokens

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"columns": budget}

    def __init__(self, features: int, *, groups: int = 8, rngs: nnx.Rngs, **common: Any):
        at_least(1, groups=groups)
        super().__init__(features, rngs=rngs, **common)
        self.smoother = Smoother(features, groups, self.max_len, rngs=rngs)
        self.stem = Stem(features, rngs=rngs)
        self.gain = nnx.Param(jnp.ones((2, self.heads * self.head_dim), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((2, self.heads * self.head_dim), jnp.float32))

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        return super().mix(self.stem(self.smoother(x, mask), x), mask=mask, key=key)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        return super().attend(q, k, v, mask=mask, key=key, gain=self.gain[...], shift=self.shift[...])

    def state_numbers(self, length: int) -> int:
        return 2 * self.columns * self.heads * self.head_dim


class Smoother(nnx.Module):
    """A learnt circular convolution of period max_len along the sequence, stored as Fourier coefficients.

    Shorter sequences are extended with zeros to max_len, independent of their padding. So entry j of the filter belongs
    to the frequency j / max_len per token at any length, and the kernel along the tokens stays the same.
    """

    def __init__(self, features: int, groups: int, max_len: int, *, rngs: nnx.Rngs):
        self.max_len = max_len
        self.groups = min(groups, features)
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "uniform", in_axis=1, out_axis=2, batch_axis=0)
        # Real and imaginary parts, each with variance 1 / features, as published.
        self.filter = nnx.Param(init(rngs.params(), (2, features, max_len // 2 + 1), jnp.float32))

    def __call__(self, x: jax.Array, real: jax.Array | None) -> jax.Array:
        """Smooths `x` `[batch, length, features]`; input and output are zero if `real` `[batch, length]` is False."""
        length, features = x.shape[1:]
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        member = jax.nn.one_hot(jnp.arange(features) * self.groups // features, self.groups, dtype=dtype)
        means = jnp.einsum("blf,fg->bgl", x.astype(dtype), member / member.sum(axis=0), precision=HIGHEST)
        spectrum = jnp.fft.rfft(means, self.max_len)
        spectrum = jax.lax.complex(
            *(jnp.einsum("bgw,fg->bfw", part, member, precision=HIGHEST) for part in (spectrum.real, spectrum.imag))
        )
        spectrum *= jax.lax.complex(*self.filter[...].astype(dtype))
        out = jnp.fft.irfft(spectrum, self.max_len)[..., :length].mT
        return (out if real is None else jnp.where(real[..., None], out, 0)).astype(x.dtype)


class Stem(nnx.Module):
    """Mixes the smoothed sequence with the sequence itself, over three tokens: ReLU(LN(conv([smooth, x])))."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1))
        self.kernel = nnx.Param(init(rngs.params(), (3, 2 * features, features), jnp.float32))
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(self, smooth: jax.Array, x: jax.Array) -> jax.Array:
        """`[batch, length, features]` each, zero after the last real token -> the same shape and dtype."""
        batch, length, features = x.shape
        both = jnp.concatenate([smooth, x], axis=-1).reshape(batch * length, -1)
        taps = jnp.moveaxis(self.kernel[...], 0, 1).reshape(2 * features, -1).astype(x.dtype)
        before, here, after = jnp.split((both @ taps).reshape(batch, length, -1), 3, axis=-1)
        ends = (0, 0)
        out = here + jnp.pad(before, (ends, (1, 0), ends))[:, :-1] + jnp.pad(after, (ends, (0, 1), ends))[:, 1:]
        return jax.nn.relu(token_wise(self.norm, out)).astype(x.dtype)
