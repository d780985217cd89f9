"""S4D, the diagonal state space model (Gu et al. 2022, arXiv 2206.11893): a long convolution in every channel.

    s_t = exp(Δ A) s_{t−1} + x_t,    y_t = 2 Re Σ_n c_n (exp(Δ a_n) − 1) / a_n s_{n,t} + d x_t
    out_t = GLU(W GELU(y_t) + b)

with N/2 of the N conjugate states a channel, a_n = −exp(r_n) + i w_n, discretised by a zero-order hold. As in the
authors' code: N = 64, S4D-Lin's a_n = −1/2 + iπn, Δ log-uniform in [0.001, 0.1], c and d normal. Without `causal` a
second readout c takes the states that the later tokens leave, as there. Unlike there, Δ, A and c learn as fast as
all other parameters: their authors advise a learning rate of at most 0.001 for them, without weight decay. The causal
module in state-spaces/s4 @e757cef gives the same numbers, to 4e-7.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.attention.recurrent.base import log_uniform_steps
from efficient_tx.attention.recurrent.modes import convolve
from efficient_tx.checks import OptionError
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.tokens.flat import scaled
from efficient_tx.tokens.mask import compact, key_mask, spread


def s4d(
    x: jax.Array, *,
    rate: jax.Array, step: jax.Array, readout: jax.Array, skip: jax.Array,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """The state space of every channel: time and memory are linear in the length.

    Args:
      x: `[batch, length, features]`.
      rate: a, complex `[features, states]`, real part below 0: one of each conjugate pair.
      step: Δ, above 0, `[features]`.
      readout: c, complex `[directions, features, states]`; the second direction reads only without `causal`.
      skip: d, `[features]`.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens; padding does not count as a step.
      key: unused, nothing is drawn.
      causal: token i sees tokens j ≤ i only. False: the second readout adds what comes from tokens j > i.

    Returns:
      `[batch, length, features]` in the dtype of x; zero at padding. The arithmetic is float32 at least.

    Raises:
      ValueError: shapes that do not fit, or no second readout without `causal`.
    """
    check_rank("batch, length, features", x=x)
    if rate.ndim != 2 or len(rate) != x.shape[2]:
        raise ValueError(f"rate has shape {rate.shape}: pass [features, states], here {x.shape[2]} features")
    directions = 1 if causal else 2
    if readout.ndim != 3 or len(readout) < directions or readout.shape[1:] != rate.shape:
        wanted = f"({directions}, {', '.join(map(str, rate.shape))})"
        raise ValueError(f"readout has shape {readout.shape}: pass [directions, features, states], here {wanted}")
    mask = key_mask(mask, *x.shape[:2])
    tokens = wide(compact(x, mask))
    log_decay, weights = discretised(rate, step, readout)
    y = convolve(tokens, log_decay, weights[0])[0] + scaled(tokens, skip)
    if not causal:
        later = jnp.pad(tokens, ((0, 0), (0, 1), (0, 0)))[:, :0:-1]
        y += convolve(later, log_decay, weights[1])[0][:, ::-1]
    return spread(y, mask).astype(x.dtype)


def wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def discretised(rate: jax.Array, step: jax.Array, readout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Δ a and 2 c (exp(Δ a) − 1) / a: the modes and their weights for each direction."""
    log_decay = rate * step[:, None]
    return log_decay, 2 * readout * jnp.expm1(log_decay) / rate


class Memory(NamedTuple):
    """What a decoder keeps: the number of tokens so far, int32 `[batch]`, and their states."""

    count: jax.Array
    states: jax.Array


class S4D(Mixer):
    """The whole layer of S4D; `linear` is the factory of its one projection. It has no heads: theirs are ignored.

    Args:
      states: number of states of a channel, an even number.

    Raises:
      ValueError: an odd number of states, or none.
    """

    paper = "Gu et al. 2022, arXiv 2206.11893"
    computes = "a diagonal state space model in every channel; both ways if not causal"
    cost = "n"
    function = staticmethod(s4d)
    has_positions = False
    side_by_side = True

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        channels, pairs = q.shape[-2] * q.shape[-1], max(1, budget // 2)
        readout = rng.normal(size=(2, 2, channels, pairs))
        return {
            "rate": np.broadcast_to(-0.5 + 1j * np.pi * np.arange(pairs), (channels, pairs)).astype(np.complex64),
            "step": np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), channels)).astype(np.float32),
            "readout": ((readout[0] + 1j * readout[1]) / 2**0.5).astype(np.complex64),
            "skip": rng.normal(size=channels).astype(np.float32),
        }

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"states": max(2, budget // 2 * 2)}

    def __init__(
        self, features: int, *,
        states: int = 64, heads: int = 1, head_dim: int | None = None, linear: Callable[..., nnx.Module] = nnx.Linear,
        dtype: jnp.dtype | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        super().__init__(features, **common)
        if states < 2 or states % 2:
            raise OptionError("states", states, "they are conjugate pairs: an even number, at least 2")
        pairs, directions = states // 2, 1 if self.causal else 2
        self.states = states
        self.dtype = dtype
        self.log_step = nnx.Param(log_uniform_steps((features,), rngs))
        self.log_rate = nnx.Param(jnp.full((features, pairs), jnp.log(0.5), jnp.float32))
        frequencies = jnp.broadcast_to(jnp.pi * jnp.arange(pairs), (features, pairs))
        self.frequency = nnx.Param(frequencies.astype(jnp.float32))
        drawn = jax.random.normal(rngs.params(), (2, directions, features, pairs), jnp.float32) / 2**0.5
        self.readout_real, self.readout_imag = nnx.Param(drawn[0]), nnx.Param(drawn[1])
        self.skip = nnx.Param(jax.random.normal(rngs.params(), (features,), jnp.float32))
        self.out = linear(features, 2 * features, dtype=dtype, rngs=rngs)

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        given = {"step": jnp.exp(self.log_step[...]), "skip": self.skip[...], **self.spectrum()}
        return self.finish(s4d(x, **given, **self.arguments(mask=mask, key=key)))

    def spectrum(self) -> dict[str, jax.Array]:
        """The rates and readouts."""
        rate = jax.lax.complex(-jnp.exp(self.log_rate[...]), self.frequency[...])
        return {"rate": rate, "readout": jax.lax.complex(self.readout_real[...], self.readout_imag[...])}

    def finish(self, y: jax.Array) -> jax.Array:
        """The gated projection of `[batch, length, features]`."""
        tokens = y.reshape(-1, self.features)
        tokens = tokens if self.dtype is None else tokens.astype(self.dtype)
        return jax.nn.glu(self.out(jax.nn.gelu(tokens, approximate=False))).reshape(y.shape)

    def state_bytes(self, length: int) -> int:
        return 8 * self.features * self.states // 2

    def empty(self, batch: int, max_len: int | None, dtype: jnp.dtype | None) -> Memory:
        widest = jnp.promote_types(jnp.float32 if dtype is None else dtype, jnp.complex64)
        return Memory(jnp.zeros(batch, jnp.int32), jnp.zeros((batch, self.features, self.states // 2), widest))

    def advance(
        self, x: jax.Array, state: Memory, *, mask: jax.Array | None, first: bool
    ) -> tuple[jax.Array, Memory]:  # fmt: skip
        new = None if mask is None else mask.sum(1, dtype=jnp.int32)
        log_decay, weights = discretised(**self.spectrum(), step=jnp.exp(self.log_step[...]))
        tokens = wide(x)
        y, states = convolve(tokens, log_decay, weights[0], state=state.states, count=new)
        out = self.finish((y + self.skip[...] * tokens).astype(x.dtype))
        return out, Memory(state.count + (x.shape[1] if new is None else new), states)
