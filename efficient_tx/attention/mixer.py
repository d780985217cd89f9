"""Mixer: the contract that every token mixer keeps."""

import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.shapes import compact, spread
from efficient_tx.numerics.random import check_rate, dropout, example_keys, fold


class Mixer(nnx.Module):
    """Mixes the tokens of a sequence: everything between the residual branches of a block.

    A subclass writes `mix` and states what it can do; asking for more is a ValueError at construction. Modules hold
    parameters and nothing else.

    Args:
      features: width of the tokens, in and out.
      dropout: rate of the dropout on the mixer's output.
      causal: token i may depend on tokens j ≤ i only.
      positions: None, "rope" or "rope2d": how queries and keys turn with their position.
      max_len: the longest sequence; variants with parameters tied to the length need it.

    Attributes:
      paper: authors, year and arXiv id, or where else it was published.
      computes: what the variant does, in one line.
      cost: time in the length n and the variant's own sizes.
      function: the variant's pure function of its projected tokens; None where there is none.
      exact: the function of the same arguments that `function` approximates; None where it approximates nothing.
      can_be_causal: whether `causal=True` has a meaning.
      has_positions: whether there are queries and keys to turn.
      needs_max_len: whether parameters or constants are tied to the length.
      samples: whether `function` draws with its `key`.
      side_by_side: whether `mix` gets the real tokens in front, side by side, and zeros behind them.
    """

    paper: ClassVar[str]
    computes: ClassVar[str]
    cost: ClassVar[str]
    function: ClassVar[Callable | None] = None
    exact: ClassVar[Callable | None] = None
    can_be_causal: ClassVar[bool] = True
    has_positions: ClassVar[bool] = True
    needs_max_len: ClassVar[bool] = False
    samples: ClassVar[bool] = False
    side_by_side: bool = False

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        """Options under which a query meets about `budget` keys, landmarks or features; none where that is fixed."""
        return {}

    def __init__(
        self,
        features: int,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        positions: str | None = None,
        max_len: int | None = None,
    ):
        name = type(self).__name__
        check_rate(dropout)
        if positions not in (None, "rope", "rope2d"):
            raise ValueError(f"positions is {positions!r} in a mixer: it must be None, 'rope' or 'rope2d'")
        if causal and not self.can_be_causal:
            raise ValueError(f"{name} has no causal form: use causal=False, or another mixer")
        if positions and not self.has_positions:
            raise ValueError(f"{name} has no queries and keys to turn: use other positions than {positions!r}")
        if positions == "rope2d" and max_len is not None and math.isqrt(max_len) ** 2 != max_len:
            raise ValueError(f"max_len is {max_len}: rope2d needs the tokens of a square image, {max_len} is no square")
        if self.needs_max_len and max_len is None:
            raise ValueError(f"{name} has parameters tied to the length: give max_len")
        self.features = features
        self.dropout = dropout
        self.causal = causal
        self.positions = positions
        self.max_len = max_len

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        """Mixes `x` `[batch, length, features]`.

        Args:
          x: tokens.
          mask: bool `[batch, length]`, True for real tokens; None means all are.
          key: None at evaluation; in training one key per example `[batch]`, or one key, folded per row.

        Returns:
          `[batch, length, features]`, zero at masked positions.

        Raises:
          ValueError: the mask has another shape, or the sequence is longer than `max_len` in a variant tied to it.
        """
        if mask is not None and mask.shape != x.shape[:2]:
            raise ValueError(f"mask has shape {mask.shape}: a mixer takes [batch, length], here {x.shape[:2]}")
        if self.needs_max_len and x.shape[1] > self.max_len:
            raise ValueError(f"length is {x.shape[1]}, but {type(self).__name__} was built for max_len={self.max_len}")
        if not x.size:
            return x
        keys = example_keys(key, x.shape[0])
        # Whatever stands at padded positions, NaN included, reaches neither an output nor a gradient.
        x = x if mask is None else jnp.where(mask[..., None], x, 0)
        gathered = self.side_by_side and mask is not None
        tokens, real = (compact(x, mask), compact(mask, mask)) if gathered else (x, mask)
        out = self.mix(tokens, mask=real, key=fold(keys, 0))
        out = spread(out, mask) if gathered else out
        out = dropout(out, self.dropout, fold(keys, 1))
        return out if mask is None else jnp.where(mask[..., None], out, 0)

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        """The variant itself, before dropout and the final masking; `key` is `[batch]` or None (evaluation)."""
        raise NotImplementedError
