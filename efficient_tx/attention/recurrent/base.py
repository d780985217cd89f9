"""What the recurrent mixers share: both directions, a matrix for each head as state, and the layer around it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead, width_of_head
from efficient_tx.checks import OptionError
from efficient_tx.tokens.mask import as_last, key_mask


class Run(Protocol):
    """A recurrence over all keys with queries at the same tokens."""

    def __call__(self, q: jax.Array, *, mask: jax.Array | None, reverse: bool) -> tuple[jax.Array, jax.Array]: ...


def both_ways(
    run: Run, q: jax.Array, k: jax.Array, *, mask: jax.Array | None, causal: bool, name: str
) -> jax.Array:  # fmt: skip
    """The recurrence from the first token on, or without `causal` the mean of both directions.

    Args:
      run: the recurrence; returns the outputs and the last state.
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]` or None.
      causal: only then the numbers of queries and keys may differ: the last query is at the last real key.
      name: of the function, for its errors.

    Raises:
      ValueError: different numbers of queries and keys without `causal`.
    """
    (batch, keys), queries = k.shape[:2], q.shape[1]
    mask = key_mask(mask, batch, keys)
    if queries != keys:
        return at_last(lambda q: run(q, mask=mask, reverse=False)[0], q, k, mask=mask, causal=causal, name=name)
    out, _ = run(q, mask=mask, reverse=False)
    return out if causal else (out + run(q, mask=mask, reverse=True)[0]) / 2


def at_last(
    attend: Callable[[jax.Array], jax.Array], q: jax.Array, k: jax.Array, *,
    mask: jax.Array | None, causal: bool, name: str,
) -> jax.Array:  # fmt: skip
    """Attends with other numbers of queries than keys: the last query is at the last real key.

    Args:
      attend: the attention of as many queries as keys.
      q, k, causal, name: as in `both_ways`.
      mask: bool `[batch, keys]` or None.

    Raises:
      ValueError: not `causal`.
    """
    (batch, keys), queries = k.shape[:2], q.shape[1]
    if not causal:
        raise ValueError(f"{name} has {queries} queries and {keys} keys: it needs positions, so use causal=True")
    return as_last(attend, q, jnp.ones((batch, keys), bool) if mask is None else mask)


def unit(x: jax.Array) -> jax.Array:
    """`x` `[..., dim]` of length 1, by sums in float32 at least; a zero stays zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.square(wide).sum(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class Recurrent(MultiHead):
    """A mixer whose heads carry a matrix `[key_dim, head_dim]` from token to token.

    A variant writes `project`, whose "q", "k" and "v" may be convolved, and `recurrence`.

    Args:
      head_dim: the width that `expand_k` and `expand_v` multiply; None means features // heads.
      expand_k: width of queries and keys.
      expand_v: width of values.
      conv: size of the depthwise convolutions of queries, keys and values, each followed by a SiLU; 0 means none, and
        the SiLU stays.

    Attributes:
      key_dim: width of a head's queries and keys; `head_dim` is that of its values.
    """

    width_by = "expand_k"

    def __init__(
        self, features: int, *,
        heads: int, head_dim: int | None = None, expand_k: float = 1.0, expand_v: float = 1.0, conv: int = 4,
        linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        width = width_of_head(features, heads, head_dim)
        for name, factor in (("expand_k", expand_k), ("expand_v", expand_v)):
            if not width * factor >= 1:
                raise OptionError(name, factor, f"with head_dim {width} it must be at least {1 / width:g}")
        self.expand_k, self.key_dim = expand_k, round(expand_k * width)
        own = {"linear": partial(linear, use_bias=False), "dtype": dtype, "rngs": rngs}
        super().__init__(features, heads=heads, head_dim=round(expand_v * width), conv=conv, **own, **common)
        self.norm = nnx.RMSNorm(self.head_dim, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def widths(self) -> dict[str, int]:
        return {"q": self.heads * self.key_dim, "k": self.heads * self.key_dim, "v": self.heads * self.head_dim}

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Queries, keys and values; a variant adds what else its recurrence takes, `[tokens, heads, ...]` each."""
        parts = super().project(tokens)
        return parts if self.short_conv else {name: self.activate(x) for name, x in parts.items()}

    def activate(self, convolved: jax.Array) -> jax.Array:
        return jax.nn.silu(convolved)

    def recurrence(
        self, parts: dict[str, jax.Array], memory: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """The outputs from the first token on, after a state, and the next state."""
        raise NotImplementedError(f"{type(self).__name__} writes no `recurrence`")

    def state_numbers(self, length: int) -> int:
        return self.heads * self.key_dim * self.head_dim

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> jax.Array:
        """`[batch, heads, key_dim, head_dim]`."""
        return jnp.zeros((batch, self.heads, self.key_dim, self.head_dim), jnp.promote_types(dtype, jnp.float32))

    def remember(
        self, projected: dict[str, jax.Array], memory: jax.Array, *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        return self.recurrence(projected, memory, mask)

    def finish(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        """Norm of every head, the gate of a variant that has one, and output projection."""
        heads = self.norm(heads).reshape(len(tokens), -1)
        return self.out(self.gated(heads, tokens))

    def gated(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        """`heads` `[tokens, heads · head_dim]` times a gate of `tokens`. By default: no gate."""
        return heads


def log_time_steps(shape: tuple[int, ...], rngs: nnx.Rngs) -> jax.Array:
    """What softplus maps to time steps, log-uniform in [0.001, 0.1], as Mamba's code draws them."""
    step = jnp.exp(log_uniform_steps(shape, rngs))
    return step + jnp.log(-jnp.expm1(-step))


def log_uniform_steps(shape: tuple[int, ...], rngs: nnx.Rngs) -> jax.Array:
    """Logarithms of time steps in [0.001, 0.1], uniform."""
    return jax.random.uniform(rngs.params(), shape, jnp.float32, jnp.log(1e-3), jnp.log(1e-1))
