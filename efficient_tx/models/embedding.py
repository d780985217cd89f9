"""Token embeddings with absolute positions and, as in BERT, segments and a norm."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.checks import OptionError, at_least
from efficient_tx.tokens.flat import token_wise
from efficient_tx.tokens.mask import bool_mask, token_ranks

POSITIONS = ("learned", "sinusoidal", "rope", "rope2d", "none")


def sinusoids(length: int, features: int) -> np.ndarray:
    """Sines, then cosines of the position (Vaswani et al. 2017, arXiv 1706.03762), float32 `[length, features]`."""
    half = -(-features // 2)
    angle = np.arange(length)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :features].astype(np.float32)


class TokenEmbedding(nnx.Module):
    """Token ids to vectors, plus absolute positions (rotary positions belong to the mixers).

    A token's position is given or is its rank among the real tokens, so padding at any place changes nothing.

    Args:
      vocab_size: token ids are in [0, vocab_size).
      features: width of the vectors.
      max_len: the largest sequence length; longer input raises with "learned" and "sinusoidal" positions.
      positions: position encoding: "learned", "sinusoidal", or one that adds nothing here ("rope", "rope2d", "none").
      segments: number of segments (BERT's token types), each with a vector that is added; 0 adds none.
      norm: the norm of the sum, a module of `[..., features]`; None is none.
      dtype: dtype of the computation; parameters are float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        max_len: int,
        positions: str = "learned",
        segments: int = 0,
        norm: nnx.Module | None = None,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
    ):
        at_least(0, segments=segments)
        if positions not in POSITIONS:
            raise OptionError("positions", positions, f"choose one of {', '.join(POSITIONS)}")
        self.tokens = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, features), jnp.float32) * 1.0)
        self.learned = (
            nnx.Param(jax.random.normal(rngs.params(), (max_len, features), jnp.float32) * 1.0)
            if positions == "learned"
            else None
        )
        self.segments = (
            nnx.Param(jax.random.normal(rngs.params(), (segments, features), jnp.float32)) if segments else None
        )
        self.norm = norm
        self.positions = positions
        self.max_len = max_len
        self.dtype = dtype

    def __call__(
        self,
        inputs: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """`inputs` int `[batch, length]` -> `[batch, length, features]`.

        Args:
          mask: bool `[batch, length]`, True for real tokens; None means all are.
          positions: position of each token, int `[batch, length]`; None means its rank among the real tokens.
          segments: segment of each token, int `[batch, length]`; None means the first one.

        A real token whose id is not in [0, vocab_size), whose position is not in [0, max_len), or whose segment is none
        is NaN, which stops training. Ids, positions and segments of padding mean nothing.

        Raises:
          ValueError: ids that are no integers; input longer than max_len with "learned" or "sinusoidal" positions;
            positions given with "rope" or "rope2d", whose mixers use the ranks of the real tokens; segments given to a
            model without.
        """
        if segments is not None and self.segments is None:
            raise ValueError("segments are given, and this model has none: build it with segments=2")
        if positions is not None and self.positions.startswith("rope"):
            raise ValueError(
                f"positions is {self.positions!r}, which counts real tokens only, but the task masks some between them "
                "and keeps their places (legacy_mask): use 'learned', 'sinusoidal' or 'none'"
            )
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"inputs have dtype {inputs.dtype}: a model of tokens takes their ids, integers")
        mask = bool_mask(mask)
        dtype = self.dtype or self.tokens[...].dtype
        x = self._placed(rows(self.tokens[...].astype(dtype), inputs, mask), mask, positions)
        if self.segments is not None:
            table = self.segments[...].astype(dtype)
            x = x + (table[0] if segments is None else rows(table, segments, mask))
        return x if self.norm is None else token_wise(self.norm, x)

    def _placed(self, x: jax.Array, mask: jax.Array | None, positions: jax.Array | None) -> jax.Array:
        """Vectors `[batch, length, features]` plus those of their positions."""
        if self.positions not in ("learned", "sinusoidal"):
            return x
        batch, length, _ = x.shape
        if length > self.max_len:
            raise ValueError(
                f"length is {length}, but {self.positions} positions were built for max_len={self.max_len}"
            )
        table = self.learned[...] if self.positions == "learned" else sinusoids(self.max_len, x.shape[-1])
        table = jnp.asarray(table, x.dtype)
        if positions is None and mask is None:
            return x + table[:length]
        ranks = token_ranks(mask, batch, length) if positions is None else positions
        return x + rows(table, ranks, mask)


def rows(table: jax.Array, index: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`table[index]`; NaN where `table` `[size, features]` has no such row. Where `mask` is False the first row."""
    index = index.astype(jnp.int32)
    index = index if mask is None else jnp.where(mask, index, 0)
    # jnp.take counts negative indices from the end.
    return jnp.take(table, jnp.where(index < 0, len(table), index), axis=0, mode="fill", fill_value=jnp.nan)
