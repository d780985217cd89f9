"""MultiHead: a token mixer with projections, heads and one attention function."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.checks import at_least, at_most
from efficient_tx.tokens.rotary import rotate
from efficient_tx.tokens.short_conv import ShortConv


class MultiHead(Mixer):
    """Projects tokens to heads, attends, projects back. A variant sets its `function` and its `projections`.

    Args:
      heads: number of heads.
      head_dim: width of a head; None means features // heads.
      linear: factory of the projections, with the signature of `nnx.Linear`.
      conv: size of the depthwise convolution over the tokens of each projection (`ShortConv`), before rotary positions;
        4 is usual, 0 means none. It is causal if the mixer is, else centred; with an even size a token sees one more
        token before it than after it.
      **common: see `Mixer`.

    Attributes:
      projections: names of the linear layers, each features -> heads · head_dim; `attend` gets their outputs in this
        order.
      rotated: names of the projections that are rotated by their positions with `positions="rope"`.
    """

    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    rotated: ClassVar[tuple[str, ...]] = ("q", "k")

    def __init__(
        self,
        features: int,
        *,
        heads: int,
        head_dim: int | None = None,
        linear: Callable[..., nnx.Module] = nnx.Linear,
        conv: int = 0,
        dtype: jnp.dtype | None = None,
        rngs: nnx.Rngs,
        **common: Any,
    ):
        super().__init__(features, **common)
        if heads < 1 or (head_dim is not None and head_dim < 1):
            raise ValueError(f"heads is {heads} and head_dim {head_dim}: both must be at least 1")
        if head_dim is None and features % heads:
            raise ValueError(f"{features} features do not divide into {heads} heads: give head_dim, or other sizes")
        self.heads = heads
        self.head_dim = features // heads if head_dim is None else head_dim
        inner = self.heads * self.head_dim
        for name in self.projections:
            setattr(self, name, linear(features, inner, dtype=dtype, rngs=rngs))
        self.out = linear(inner, features, dtype=dtype, rngs=rngs)
        self.add_convolutions(dict.fromkeys(self.projections, inner), conv, rngs=rngs)

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        batch, length, features = x.shape
        # As [batch · length, features]: XLA's CPU backend is slow with a leading axis of 1.
        tokens = x.reshape(-1, features)
        split = (batch, length, self.heads, self.head_dim)
        projected = {name: getattr(self, name)(tokens).reshape(split) for name in self.projections}
        projected = self.convolve(projected, mask)
        if self.positions:
            for name in self.rotated:
                projected[name] = rotate(projected[name], mask, layout=self.positions)
        heads = self.attend(*projected.values(), mask=mask, key=key)
        if heads.shape != split:
            raise ValueError(f"{type(self).__name__}.attend gave the shape {heads.shape}: here it must be {split}")
        return self.out(heads.reshape(batch * length, -1)).reshape(x.shape)

    def add_convolutions(self, channels: dict[str, int], size: int, *, rngs: nnx.Rngs) -> None:
        """Adds the convolutions that `convolve` applies; `channels` maps the name of a projection to its width."""
        at_least(0, conv=size)
        at_most(256, conv=size)  # every tap is an operation of its own in the program
        make = partial(ShortConv, size=size, causal=self.causal, rngs=rngs)
        self.short_conv = nnx.Dict({name: make(count) for name, count in channels.items()} if size else {})
        self.side_by_side = self.side_by_side or size > 0  # neighbours are real tokens

    def convolve(self, projected: dict[str, jax.Array], mask: jax.Array | None) -> dict[str, jax.Array]:
        """Each array `[batch, length, heads, dim]` after the short convolution of its name, if there is one."""
        return {name: self.short_conv[name](x, mask) if self.short_conv else x for name, x in projected.items()}

    def attend(
        self, *projected: jax.Array, mask: jax.Array | None, key: jax.Array | None, **others: jax.Array | float | None
    ) -> jax.Array:
        """Applies the variant's `function` to the projections: `[batch, length, heads, head_dim]` each -> this shape.

        Args:
          *projected: in the order of `projections`.
          mask: bool `[batch, length]` or None.
          key: one per example `[batch]`, or None (evaluation).
          **others: further arguments of the function, made from parameters of the class.
        """
        if self.function is None:
            raise NotImplementedError(f"{type(self).__name__} names no `function` and writes no `attend`")
        tokens = dict(zip(self.projections, projected))
        return self.function(**tokens, **self.arguments(mask=mask, key=key), **others)

    def state_bytes(self, length: int) -> int:
        """Bytes, in float32, of a decoder's state after `length` tokens of one sequence.

        The state holds `state_numbers(length)` numbers and, with a short convolution, the last conv − 1 projected
        tokens. For a variant that cannot decode: the bytes that a query reads instead of the tokens.
        """
        convolved = sum((conv.weight.shape[0] - 1) * conv.weight.shape[1] for conv in self.short_conv.values())
        return 4 * (self.state_numbers(length) + convolved)

    def state_numbers(self, length: int) -> int:
        """Numbers in the state of all heads, without convolutions. By default: a key and a value for each token."""
        return 2 * length * self.heads * self.head_dim
