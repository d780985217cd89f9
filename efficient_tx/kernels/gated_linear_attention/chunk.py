"""One chunk of one head of gated linear attention, in the operations that Pallas kernels have on TPU and GPU.

The formulas are those of `xla`, with transposed states `[v_dim, head_dim]`, so that a decay per channel multiplies
along rows. The sums of log decays between each token and the middle of its block are found by a butterfly, level by
level: with the sums before and after each token within its block of 2^level tokens, the next level needs only what the
neighbouring block has as a whole. No difference is taken, so no digits are lost.

The scale is left to the callers: here out = q_t S_t.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp


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


# (x `[tokens, dim]`, distance) -> x with the rows of neighbouring blocks of `distance` rows, a power of two, exchanged.
Exchange = Callable[[jax.Array, int], jax.Array]


def positions(size: int) -> tuple[jax.Array, jax.Array]:
    """Index of the row and of the column in a square of tokens."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))


def widened(before: jax.Array, after: jax.Array, whole: jax.Array, distance: int, exchange: Exchange) -> tuple:
    """Sums before and after each row within blocks of 2 · `distance` rows, from those of half as long blocks."""
    other, second = exchange(whole, distance), second_half(whole, distance)
    return before + jnp.where(second, other, 0), after + jnp.where(second, 0, other)


def second_half(x: jax.Array, distance: int) -> jax.Array:
    """Whether a row of the tile is in the second half of its block of 2 · `distance` rows."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) & distance > 0


def sums(x: jax.Array, exchange: Exchange) -> tuple[jax.Array, jax.Array]:
    """The sums of the rows before and after each row."""
    before, after = jnp.zeros_like(x), jnp.zeros_like(x)
    for level in range(x.shape[0].bit_length() - 1):
        before, after = widened(before, after, before + x + after, 1 << level, exchange)
    return before, after


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

    def __init__(self, dot: Products, log_decay: jax.Array, exchange: Exchange):
        super().__init__(dot, log_decay.shape[0])
        self.exchange, row, column = exchange, self.row, self.column
        log_decay = finite(log_decay)
        after = jnp.where(row > column, log_decay, 0)
        before, _ = sums(after, exchange)
        # Also above the diagonal no exponent is positive.
        self.between = jnp.exp(before + after)
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
        _, after = sums(pairs, self.exchange)
        starts, ends = (self.to_row(x.sum(1, keepdims=True)) for x in (starts, ends))
        outside = jnp.where(column >= row, starts, ends)
        by_pairs = jnp.where(column < row, after + pairs, 0)
        return (outside + by_pairs).sum(1, keepdims=True) + through.sum(1, keepdims=True)

    def to_row(self, x: jax.Array) -> jax.Array:
        return jnp.where(self.row == self.column, x, 0).sum(0, keepdims=True)


class ChannelDecay(NoDecay):
    """The decays of a chunk from `log_decay` `[tokens, head_dim]`."""

    def __init__(self, dot: Products, log_decay: jax.Array, exchange: Exchange):
        super().__init__(dot, log_decay.shape[0])
        self.exchange = exchange
        log_decay = finite(log_decay)
        self.whole = jnp.exp(log_decay.sum(0, keepdims=True))
        self.found: list[jax.Array] = []
        # Sums up to each token and after it, in its block of the next level.
        self.sums = log_decay, jnp.zeros_like(log_decay)

    def between(self) -> Iterator[jax.Array]:
        """Level by level, the decay between each token and the middle of its block.

        Each is computed when it is asked for: a tile of registers less for every level.
        """
        for level in range(self.row.shape[0].bit_length() - 1):
            if level == len(self.found):
                (upto, after), distance = self.sums, 1 << level
                self.found.append(jnp.exp(jnp.where(second_half(upto, distance), upto, after)))
                self.sums = widened(upto, after, upto + after, distance, self.exchange)
            yield self.found[level]

    @property
    def from_start(self) -> jax.Array:
        *_, _ = self.between()
        return jnp.exp(self.sums[0])

    @property
    def to_end(self) -> jax.Array:
        *_, _ = self.between()
        return jnp.exp(self.sums[1])

    def separated(self, level: int) -> jax.Array:
        """Whether query i (row) is in the second half of a block of 2^(level + 1) tokens and key j in the first."""
        return (self.row > self.column) & ((self.row ^ self.column) >> level == 1)

    def weights(self, q, k):
        weights = jnp.where(self.row == self.column, (q * k).sum(1, keepdims=True), 0)
        for level, between in enumerate(self.between()):
            weights = jnp.where(self.separated(level), self.dot(q * between, k * between, "11"), weights)
        return weights

    def pull(self, q, k, d_weights):
        own = jnp.where(self.row == self.column, d_weights, 0).sum(1, keepdims=True)
        d_q, d_k, pairs = own * k, own * q, jnp.zeros_like(q)
        for level, between in enumerate(self.between()):
            d_level = jnp.where(self.separated(level), d_weights, 0)
            q_level, k_level = self.dot.rounded(q * between), self.dot.rounded(k * between)
            to_q, to_k = self.dot(d_level, k_level), self.dot(d_level, q_level, "00")
            d_q, d_k = d_q + to_q * between, d_k + to_k * between
            # Of the same rounded factors: what a pair adds at its query and takes away at its key is the same.
            pairs += q_level * to_q - k_level * to_k
        return d_q, d_k, pairs

    def d_log_decay(self, pairs: jax.Array, starts: jax.Array, ends: jax.Array, through: jax.Array) -> jax.Array:
        """The cotangent `[tokens, head_dim]`; see `HeadDecay.d_log_decay`."""
        up = pairs + starts
        _, after = sums(up, self.exchange)
        before, _ = sums(ends, self.exchange)
        return after + up + before + through


def finite(log_decay: jax.Array) -> jax.Array:
    """In float32, with finite sums over a chunk, so that −inf (forget everything) does not give NaN."""
    return jnp.maximum(log_decay.astype(jnp.float32), jnp.finfo(jnp.float32).min / (2 * log_decay.shape[0]))
