"""Convolutions with sums of exponentials: as products of matrices within chunks, and a state from chunk to chunk.

    y_t = Re Σ_n w_n s_{n,t},    s_{n,t} = z_n s_{n,t−1} + x_t,    z_n = exp(log_decay_n),    n = 1 ... modes

in every channel, which is the convolution of x with Re Σ_n w_n z_n^t: a diagonal state space, a damped moving average.
The published codes convolve by Fourier transforms. In floating point a transform lets every token reach every other one
by its rounding, the later ones included; here a causal output is exactly one, and no slower: the work is that of
matrix products. Cost length · (chunk + modes) for each channel.
"""

import jax
import jax.numpy as jnp

from efficient_tx.kernels import linear_scan
from efficient_tx.kernels.decay import finite

CHUNK = 64
EXACT = jax.lax.Precision.HIGHEST  # float32 sums on accelerators too


def convolve(
    x: jax.Array, log_decay: jax.Array, weight: jax.Array, *,
    state: jax.Array | None = None, count: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The outputs of all tokens, and the state after the last one.

    Args:
      x: `[batch, length, channels]`, float32 or float64.
      log_decay: `[channels, modes]`, real or complex, real part at most 0.
      weight: `[channels, modes]`, real or complex.
      state: s before the first token, `[batch, channels, modes]`; None means zeros.
      count: number of tokens after which the state is wanted, int32 `[batch]`, at most length; None: all.

    Returns:
      `[batch, length, channels]`, real; and `[batch, channels, modes]` in the dtype of the decays.
    """
    batch, length, channels = x.shape
    size = min(CHUNK, max(1, length))
    log_decay = finite(log_decay.astype(jnp.result_type(log_decay, x)), size)
    shape = (batch, channels, log_decay.shape[1])
    state = jnp.zeros(shape, log_decay.dtype) if state is None else state.astype(log_decay.dtype)
    if not x.size:
        return x, state
    if length == 1 and count is None:
        state = jnp.exp(log_decay) * state + x[:, 0, :, None]
        return (weight * state).sum(-1).real[:, None], state
    powers = jnp.exp(log_decay[..., None] * jnp.arange(size + 1))  # [channels, modes, size + 1]
    chunks = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0))).reshape(batch, -1, size, channels)

    added = entering(chunks, powers)
    flat = added.reshape(batch, added.shape[1], -1)
    after, _ = linear_scan(flat, size * log_decay.reshape(-1), initial_state=state.reshape(batch, -1))
    states = jnp.concatenate([state[:, None], after.reshape(added.shape)], axis=1)  # before each chunk, and at the end

    kernel = jnp.einsum("dn,dnt->dt", weight, powers[..., :-1], precision=EXACT).real
    within = jnp.einsum("bacd,dtc->batd", chunks, lower(kernel), precision=EXACT)
    leaving = weight[..., None] * powers[..., 1:]
    across = jnp.einsum("badn,dnt->batd", halves(states[:, :-1], -1), halves(leaving.conj(), 1), precision=EXACT)
    y = (within + across).reshape(batch, -1, channels)[:, :length]
    count = jnp.full(batch, length) if count is None else count
    return y, state_after(count, states, chunks, log_decay, powers)


def halves(x: jax.Array, axis: int) -> jax.Array:
    """Real and imaginary parts one after the other along an axis; a real array as it is."""
    return jnp.concatenate([x.real, x.imag], axis) if jnp.iscomplexobj(x) else x


def entering(chunks: jax.Array, powers: jax.Array) -> jax.Array:
    """What the tokens of each chunk add to the state at its end, `[batch, chunks, channels, modes]`."""
    added = jnp.einsum("bacd,dnc->badn", chunks, halves(powers[..., -2::-1], 1), precision=EXACT)
    return jax.lax.complex(*jnp.split(added, 2, axis=-1)) if jnp.iscomplexobj(powers) else added


def lower(kernel: jax.Array) -> jax.Array:
    """The matrices of the convolutions within a chunk, `[channels, size, size]`, of kernels `[channels, size]`."""
    lag = jnp.arange(kernel.shape[1])[:, None] - jnp.arange(kernel.shape[1])
    return jnp.where(lag >= 0, kernel[:, jnp.maximum(lag, 0)], 0)


def state_after(
    count: jax.Array, states: jax.Array, chunks: jax.Array, log_decay: jax.Array, powers: jax.Array
) -> jax.Array:  # fmt: skip
    """The state after `count` tokens: that before their last chunk, and what of this chunk is counted."""
    size, rows = chunks.shape[2], jnp.arange(len(count))
    whole, rest = count // size, count % size
    # The counted tokens of the chunk moved to its end, zeros before them.
    place = jnp.arange(size) - (size - rest[:, None])
    last = chunks[rows, jnp.minimum(whole, chunks.shape[1] - 1)]
    last = jnp.where(place[..., None] >= 0, jnp.take_along_axis(last, place[..., None] % size, axis=1), 0)
    decayed = jnp.exp(log_decay * rest[:, None, None]) * states[rows, whole]
    return decayed + entering(last[:, None], powers)[:, 0]
