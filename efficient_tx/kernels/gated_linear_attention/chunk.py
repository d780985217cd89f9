"""One chunk of one head of gated linear attention, in the operations that Pallas kernels have on TPU and GPU.

The formulas are those of `xla`, with transposed states `[v_dim, head_dim]`, so that a decay per channel multiplies
along rows. A level of the tree is a turn of a loop, which keeps few tiles alive. All sums of decays are direct ones, as
products with matrices of 0 and 1 (`sums`).

The scale is left to the callers: here out = q_t S_t.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.decay import finite


class Products(NamedTuple):
    """Matrix products with float32 results; factors are rounded to `dtype`: bfloat16 or float32."""

    dtype: jnp.dtype
    precision: jax.lax.PrecisionLike

    def __call__(self, x: jax.Array, y: jax.Array, contract: str = "10") -> jax.Array:
        """x y; `contract` has the contracted axis of x and of y: "11" is x yᵀ, "00" xᵀ y."""
        dimensions = ((int(contract[0]),), (int(contract[1]),)), ((), ())
        return jax.lax.dot_general(
            x.astype(self.dtype), y.astype(self.dtype), dimensions,
            precision=self.precision if self.dtype == jnp.float32 else None, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def rounded(self, x: jax.Array) -> jax.Array:
        return x.astype(self.dtype).astype(jnp.float32)

    @classmethod
    def of(cls, precision: jax.lax.PrecisionLike, *factors: jax.Array) -> "Products":
        """bfloat16 if all the operands of the call are."""
        half = all(x.dtype == jnp.bfloat16 for x in factors)
        return cls(jnp.dtype(jnp.bfloat16 if half else jnp.float32), precision)


def positions(size: int) -> tuple[jax.Array, jax.Array]:
    """Indices of the rows `[tokens, 1]` and of the columns `[1, tokens]` of a square of tokens."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, n) for n, shape in enumerate(((size, 1), (1, size))))


def levels(size: int) -> int:
    """Number of levels of the tree over `size` tokens."""
    return size.bit_length() - 1


def half_block(row: jax.Array, column: jax.Array, level: jax.Array) -> jax.Array:
    """Whether token t (column) is between token i (row) and the middle of i's block of 2^(level + 1) tokens.

    The middle is the first token of the second half and is included. So t is in the same half as i, up to i in a second
    half and after i in a first half.
    """
    upto = jnp.where(column <= row, 1, 0)
    return ((row ^ column) >> level == 0) & (upto == row >> level & 1)


def sums(spans: jax.Array, x: jax.Array) -> jax.Array:
    """The sums of the rows of x in each span: Σ_t spans_it x_t, spans bool `[tokens, tokens]`, x `[tokens, dim]`.

    Three parts of 8 bits, each exact in bfloat16, make a float32, so that fast products lose nothing.
    """
    ones, total = jnp.where(spans, 1.0, 0.0).astype(jnp.bfloat16), 0
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        total += jax.lax.dot(ones, part.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
        x -= part
    return total


class NoDecay:
    """The decays of a chunk without decay, and with them the weights of its pairs of tokens.

    Attributes:
      from_start: decay of the start of the chunk up to each token, it included: `[tokens, head_dim or 1]`.
      to_end: decay over the tokens after each token, the same shape.
      whole: decay over the chunk, `[1, head_dim or 1]`.
    """

    from_start = to_end = whole = 1.0

    def __init__(self, dot: Products, size: int):
        self.dot = dot
        self.row, self.column = positions(size)

    def weights(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """Σ_c q_ic k_jc exp(D_ijc), `[tokens, tokens]`; zero for j > i."""
        return jnp.where(self.row >= self.column, self.dot(q, k, "11"), 0)

    def pull(self, q: jax.Array, k: jax.Array, d_weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Cotangents of q and k from that of the weights, and what `d_log_decay` needs of it."""
        d_weights = jnp.where(self.row >= self.column, d_weights, 0)
        return self.dot(d_weights, k), self.dot(d_weights, q, "00"), None


class HeadDecay(NoDecay):
    """The decays of a chunk from `log_decay` `[tokens, 1]`."""

    def __init__(self, dot: Products, log_decay: jax.Array):
        super().__init__(dot, log_decay.shape[0])
        row, column = self.row, self.column
        log_decay = bounded(log_decay)
        # Also above the diagonal no exponent is positive.
        self.between = jnp.exp(sums(row >= column, jnp.where(row > column, log_decay, 0)))
        log_decay = self.to_row(log_decay)
        self.from_start = jnp.exp(jnp.where(column <= row, log_decay, 0).sum(1, keepdims=True))
        self.to_end = jnp.exp(jnp.where(column > row, log_decay, 0).sum(1, keepdims=True))
        self.whole = jnp.exp(log_decay.sum(1, keepdims=True))

    def weights(self, q, k):
        return super().weights(q, k) * self.between

    def pull(self, q, k, d_weights):
        d_q, d_k, _ = super().pull(q, k, d_weights * self.between)
        return d_q, d_k, self.weights(q, k) * d_weights

    def d_log_decay(self, pairs: jax.Array, starts: jax.Array, ends: jax.Array, through: jax.Array) -> jax.Array:
        """The cotangent `[tokens, 1]`: D_ij has the decays of the tokens t, j < t ≤ i.

        Args:
          pairs: from `pull`.
          starts: cotangent of the log decay from the start to each token, `[tokens, head_dim]`.
          ends: that of the log decay from each token to the end.
          through: that of the log decay over the whole chunk, `[1, head_dim]`.
        """
        row, column = self.row, self.column
        starts, ends = (self.to_row(x.sum(1, keepdims=True)) for x in (starts, ends))
        outside = jnp.where(column >= row, starts, ends)
        by_pairs = jnp.where(column < row, sums(column >= row, pairs), 0)
        return (outside + by_pairs).sum(1, keepdims=True) + through.sum(1, keepdims=True)

    def to_row(self, x: jax.Array) -> jax.Array:
        return jnp.where(self.row == self.column, x, 0).sum(0, keepdims=True)


class ChannelDecay(NoDecay):
    """The decays of a chunk from `log_decay` `[tokens, head_dim]`."""

    def __init__(self, dot: Products, log_decay: jax.Array):
        super().__init__(dot, log_decay.shape[0])
        self.log_decay = bounded(log_decay)
        self.whole = jnp.exp(self.log_decay.sum(0, keepdims=True))

    # These two when they are asked for, as registers are few.

    @cached_property
    def from_start(self) -> jax.Array:
        return jnp.exp(sums(self.row >= self.column, self.log_decay))

    @cached_property
    def to_end(self) -> jax.Array:
        return jnp.exp(sums(self.row < self.column, self.log_decay))

    def for_levels(self, body: Callable, carry: Any) -> Any:
        """Runs `body(separated, between, carry)` for half blocks of 1, 2, 4, ... tokens.

        `separated` tells whether query i (row) is in the second half of a block and key j (column) in its first, and
        `between` is the decay between each token and the middle of its block, the first token of the second half
        included.
        """
        row, column = self.row, self.column

        def level(n, carry):
            between = jnp.exp(sums(half_block(row, column, n), self.log_decay))
            return body((row > column) & ((row ^ column) >> n == 1), between, carry)

        return jax.lax.fori_loop(0, levels(row.shape[0]), level, carry)

    def weights(self, q, k):
        def level(separated, between, weights):
            return jnp.where(separated, self.dot(q * between, k * between, "11"), weights)

        own = jnp.where(self.row == self.column, (q * k).sum(1, keepdims=True), 0)
        return self.for_levels(level, own)

    def pull(self, q, k, d_weights):
        def level(separated, between, sums):
            d_q, d_k, pairs = sums
            d_level = jnp.where(separated, d_weights, 0)
            q_level, k_level = self.dot.rounded(q * between), self.dot.rounded(k * between)
            to_q, to_k = self.dot(d_level, k_level), self.dot(d_level, q_level, "00")
            # Of the same rounded factors: what a pair adds at its query and takes away at its key is the same.
            return d_q + to_q * between, d_k + to_k * between, pairs + q_level * to_q - k_level * to_k

        own = jnp.where(self.row == self.column, d_weights, 0).sum(1, keepdims=True)
        return self.for_levels(level, (own * k, own * q, jnp.zeros_like(q)))

    def d_log_decay(self, pairs: jax.Array, starts: jax.Array, ends: jax.Array, through: jax.Array) -> jax.Array:
        """The cotangent `[tokens, head_dim]`; see `HeadDecay.d_log_decay`."""
        return sums(self.column >= self.row, pairs + starts) + sums(self.column < self.row, ends) + through


def bounded(log_decay: jax.Array) -> jax.Array:
    """In float32, with finite sums over a chunk."""
    return finite(log_decay.astype(jnp.float32), log_decay.shape[0])
