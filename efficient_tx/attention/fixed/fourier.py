"""Fourier mixing: the token mixer of FNet, without parameters (Lee-Thorp et al. 2021, arXiv 2105.03824).

    out = Re(F_length(F_features(X)))        F_m the discrete Fourier transform of size m, unnormalised

The transform along the sequence has the number n of real tokens as its size. n differs between the examples of a batch,
so the transform is computed as a convolution with a chirp of traced length (Bluestein 1970). Cost n log n · d; not
causal.
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.tokens.mask import compact, key_mask, spread


def chirp_phase(length: int, n: jax.Array) -> jax.Array:
    """t² mod 2n for t = 0 … length−1, int32 `[length]`: exact, although t² would overflow.

    `n` is a scalar, at least 1. The squares are running sums of odd numbers, reduced at every step.
    """
    odd = jnp.where(jnp.arange(length) == 0, 0, 2 * jnp.arange(length) - 1) % (2 * n)
    return jax.lax.associative_scan(lambda a, b: (a + b) % (2 * n), odd)


def fourier_length(x: jax.Array, n: jax.Array) -> jax.Array:
    """The DFT of size `n` along the first axis of one example.

    Args:
      x: complex `[length, features]`, zero from row n on.
      n: int32 scalar, 1 ≤ n ≤ length, may be traced.

    Returns:
      Complex `[length, features]`; rows from n on are undefined.
    """
    length = x.shape[0]
    size = 1 << (2 * length - 1).bit_length()
    # −kt = ((k − t)² − k² − t²) / 2 turns the DFT into a convolution with exp(iπt²/n).
    angle = jnp.pi * chirp_phase(length, n).astype(x.real.dtype) / n
    chirp = jax.lax.complex(jnp.cos(angle), jnp.sin(angle))[:, None]
    kernel = jnp.zeros((size, 1), chirp.dtype).at[:length].set(chirp).at[size - length + 1 :].set(chirp[:0:-1])
    spectrum = jnp.fft.fft(x * chirp.conj(), size, axis=0) * jnp.fft.fft(kernel, axis=0)
    return jnp.fft.ifft(spectrum, axis=0)[:length] * chirp.conj()


def fourier(x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
    """The real part of the two-dimensional DFT over the real tokens and the features, unnormalised.

    Args:
      x: `[batch, length, features]`.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens. The transform along the sequence
        uses only the real tokens.

    Returns:
      `[batch, length, features]` in the dtype of x, zero at masked positions; computed in float32 at least.
    """
    check_rank("batch, length, features", x=x)
    batch, length, _ = x.shape
    mask = key_mask(mask, batch, length)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return jnp.fft.fft2(wide, axes=(1, 2)).real.astype(x.dtype)
    channels = jnp.fft.fft(compact(wide, mask), axis=-1)
    out = jax.vmap(fourier_length)(channels, jnp.maximum(mask.sum(axis=1), 1)).real
    return spread(out, mask).astype(x.dtype)


class Fourier(Mixer):
    """FNet's mixer. Its output is divided by √(n · features), which makes the DFT orthonormal.

    FNet normalises after the residual sum, so there the scale does not matter. In our pre-norm blocks the unnormalised
    transform would dominate the residual. There are no projections: heads, head_dim, linear and dtype are ignored.
    """

    paper = "Lee-Thorp et al. 2021, arXiv 2105.03824"
    computes = "the Fourier transform of the real tokens, no parameters"
    cost = "n log n"
    function = staticmethod(fourier)
    has_positions = False

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        _, length, features = x.shape
        count = length if mask is None else jnp.maximum(mask.sum(axis=1), 1)[:, None, None]
        scale = jax.lax.rsqrt(jnp.asarray(count * features, jnp.promote_types(x.dtype, jnp.float32)))
        return (super().mix(x, mask=mask, key=key) * scale).astype(x.dtype)
