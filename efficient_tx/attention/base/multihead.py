"""MultiHead: a token mixer with projections, heads and one attention function."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base import cache
from efficient_tx.attention.base.cache import Needed
from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.checks import at_least, at_most
from efficient_tx.tokens.rotary import check_width, rotate
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
      width_by: the option that sets the width of what is rotated.
      asking: names of the projections that no later token needs: a decoder does not store them.
      heads_alike: whether a head computes the same whatever its index and the number of heads, but for what it draws;
        False in a mixer with constants for each head, whose heads no compression cuts.
    """

    projections: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    rotated: ClassVar[tuple[str, ...]] = ("q", "k")
    width_by: ClassVar[str] = "head_dim"
    asking: ClassVar[tuple[str, ...]] = ("q",)
    heads_alike: bool = True

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
        self.heads = heads
        self.dtype = dtype
        self.head_dim = width_of_head(features, heads, head_dim)
        for name in self.rotated if self.positions else ():
            check_width(self.widths()[name] // heads, self.positions, self.width_by, getattr(self, self.width_by))
        for name, width in self.widths().items():
            setattr(self, name, linear(features, width, dtype=dtype, rngs=rngs))
        self.out = linear(self.heads * self.head_dim, features, dtype=dtype, rngs=rngs)
        self.add_convolutions(self.widths(), conv, rngs=rngs)

    def widths(self) -> dict[str, int]:
        """Outputs of each of the `projections`. By default: heads · head_dim."""
        return dict.fromkeys(self.projections, self.heads * self.head_dim)

    def mix(self, x: jax.Array, *, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        # As [batch · length, features]: XLA's CPU backend is slow with a leading axis of 1.
        tokens = x.reshape(-1, x.shape[-1])
        projected, _ = self.projected(tokens, x.shape[:2], mask)
        heads = self.attend(*projected.values(), mask=mask, key=key)
        wanted = (*x.shape[:2], self.heads, self.head_dim)
        if heads.shape != wanted:
            raise ValueError(f"{type(self).__name__}.attend gave the shape {heads.shape}: here it must be {wanted}")
        return self.finish(heads.reshape(len(tokens), *heads.shape[2:]), tokens).reshape(x.shape)

    def projected(
        self, tokens: jax.Array, shape: tuple[int, int], mask: jax.Array | None, state: "State | None" = None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What `attend` is given, `[batch, length, heads, dim]`, of `tokens` `[batch · length, features]`.

        Also returns, after a state, what the convolutions need of these tokens for the next ones.
        """
        parts = {name: x.reshape(*shape, *x.shape[1:]) for name, x in self.project(tokens).items()}
        return self.placed(parts, mask, state)

    def placed(
        self, parts: dict[str, jax.Array], mask: jax.Array | None, state: "State | None" = None
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Projections `[batch, length, heads, dim]` after convolutions and rotation; and as `projected`."""
        parts, kept = self.convolve(parts, mask, state.convolved if state else {})
        if self.positions:
            before = state.count if state else None
            for name in self.rotated:
                parts[name] = rotate(parts[name], mask, layout=self.positions, before=before)
        return parts, kept

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """What `attend` takes, in its order, `[tokens, heads, dim]` by name, of `tokens` `[tokens, features]`."""
        return {name: getattr(self, name)(tokens).reshape(len(tokens), self.heads, -1) for name in self.projections}

    def finish(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        """The output `[tokens, features]`, of `heads` `[tokens, heads, head_dim]` and `tokens` `[tokens, features]`."""
        return self.out(heads.reshape(len(tokens), -1))

    def add_convolutions(self, channels: dict[str, int], size: int, *, rngs: nnx.Rngs) -> None:
        """Adds the convolutions that `convolve` applies; `channels` maps the name of a projection to its width."""
        at_least(0, conv=size)
        at_most(256, conv=size)  # every tap is an operation of its own in the program
        make = partial(ShortConv, size=size, causal=self.causal, rngs=rngs)
        self.short_conv = nnx.Dict({name: make(count) for name, count in channels.items()} if size else {})
        self.side_by_side = self.side_by_side or size > 0  # neighbours are real tokens

    def convolve(
        self, projected: dict[str, jax.Array], mask: jax.Array | None, before: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The arrays `[batch, length, heads, dim]` after the short convolutions of their names, where there are any.

        Args:
          projected: by name.
          mask: bool `[batch, length]` or None.
          before: the last tokens before these, `[batch, conv − 1, channels]` by name; empty: zeros, and nothing is
            returned for the next ones.

        Returns:
          The arrays, and what `before` is for the tokens after these.
        """
        kept = {}
        for name, conv in self.short_conv.items():
            x = projected[name]
            flat = x.reshape(*x.shape[:2], -1)
            if before:
                flat, kept[name] = conv.after(before[name], flat, mask)
            else:
                flat = conv(flat, mask)
            projected[name] = self.activate(flat).reshape(x.shape)
        return projected, kept

    def activate(self, convolved: jax.Array) -> jax.Array:
        """What follows a convolution. By default: nothing."""
        return convolved

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
        """Numbers in the state of all heads, without convolutions. By default: those of the cache."""
        widths = self.stored_widths()
        return sum(needed.slots(length) * self.heads * widths[name] for name, needed in self.stored().items())

    def stored(self) -> dict[str, Needed]:
        """Which tokens of which projections a later query needs. By default: all that are not `asking`."""
        return {name: Needed() for name in self.projections if name not in self.asking}

    def stored_widths(self) -> dict[str, int]:
        """Width of a head of each of these projections."""
        return dict.fromkeys(self.stored(), self.head_dim)

    def empty(self, batch: int, max_len: int | None, dtype: jnp.dtype | None) -> "State":
        dtype = self.dtype or jnp.float32 if dtype is None else dtype
        convolved = {
            name: jnp.zeros((batch, conv.weight.shape[0] - 1, conv.weight.shape[1]), dtype)
            for name, conv in self.short_conv.items()
        }
        return State(jnp.zeros(batch, jnp.int32), convolved, self.empty_memory(batch, max_len, dtype))

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> Any:
        """What is remembered of the tokens before the first one. By default: the slots of the cache."""
        stored, widths = self.stored(), self.stored_widths()
        if max_len is None and any(needed.last is None for needed in stored.values()):
            raise ValueError(f"{type(self).__name__} stores all tokens to decode: give max_len")
        return {
            name: jnp.zeros((batch, needed.slots(max_len), self.heads, widths[name]), dtype)
            for name, needed in stored.items()
        }

    def advance(
        self, x: jax.Array, state: "State", *, mask: jax.Array | None, first: bool
    ) -> tuple[jax.Array, "State"]:  # fmt: skip
        tokens = x.reshape(-1, x.shape[-1])
        projected, convolved = self.projected(tokens, x.shape[:2], mask, state)
        heads, memory = self.remember(projected, state.memory, mask=mask, count=state.count, first=first)
        new = x.shape[1] if mask is None else mask.sum(1, dtype=jnp.int32)
        out = self.finish(heads.reshape(len(tokens), *heads.shape[2:]), tokens).reshape(x.shape)
        return out, State(state.count + new, convolved, memory)

    def remember(
        self, projected: dict[str, jax.Array], memory: Any, *, mask: jax.Array | None, count: jax.Array, first: bool
    ) -> tuple[jax.Array, Any]:
        """Attends to the tokens in the memory and, causally, to these, and remembers these. By default: by a cache.

        Args:
          projected: what `attend` takes, `[batch, length, heads, dim]` by name, the real tokens first.
          memory: that after the tokens before.
          mask: bool `[batch, length]`, or None: all are real.
          count: number of tokens before, int32 `[batch]`.
          first: whether there are none.

        Returns:
          `[batch, length, heads, head_dim]` and the next memory.
        """
        new = None if mask is None else mask.sum(1, dtype=jnp.int32)
        length = next(iter(projected.values())).shape[1]
        stored, room = self.stored(), cache.room(self.stored(), memory)
        if first and room is not None and length > room and mask is None:
            raise ValueError(f"{type(self).__name__} has room for {room} tokens and gets {length}: give max_len")
        after = {name: cache.append(stored[name], memory[name], projected[name], count, new) for name in stored}
        if first:
            heads = self.attend(*projected.values(), mask=mask, key=None)
        else:
            heads = self.attend_on(projected, memory, after, mask, count)
        if room is not None:
            at = count[:, None] + jnp.arange(length)
            heads = jnp.where((at < room)[:, :, None, None], heads, jnp.nan)
        return heads, after

    def attend_on(
        self, projected: dict[str, jax.Array], memory: dict[str, jax.Array], after: dict[str, jax.Array],
        mask: jax.Array | None, count: jax.Array,
    ) -> jax.Array:  # fmt: skip
        """Attends causally to the tokens of a cache and to these; `memory` and `after` are before and with these."""
        stored, length = self.stored(), next(iter(projected.values())).shape[1]
        if length == 1 and mask is None:
            seen, real = cache.views(stored, after, count + 1)
            return self.attend(*(seen.get(name, x) for name, x in projected.items()), mask=real, key=None)
        seen, real = cache.views(stored, memory, count)
        own = jnp.ones((len(count), length), bool) if mask is None else mask
        # The functions align the last query with the last key, or the last real one.
        back = None if mask is None else length - mask.sum(1)
        new = {name: cache.moved(x, back) for name, x in projected.items()}
        joined = {name: jnp.concatenate([x, new[name].astype(x.dtype)], axis=1) for name, x in seen.items()}
        real = jnp.concatenate([real, cache.moved(own, back)], axis=1)
        heads = self.attend(*(new | joined).values(), mask=real, key=None)
        return cache.moved(heads, None if back is None else -back)


def width_of_head(features: int, heads: int, head_dim: int | None) -> int:
    """`head_dim`, or features // heads.

    Raises:
      ValueError: it is not at least 1, or the features do not divide.
    """
    if heads < 1 or (head_dim is not None and head_dim < 1):
        raise ValueError(f"heads is {heads} and head_dim {head_dim}: both must be at least 1")
    if head_dim is None and features % heads:
        raise ValueError(f"{features} features do not divide into {heads} heads: give head_dim, or other sizes")
    return features // heads if head_dim is None else head_dim


class State(NamedTuple):
    """The state of a decoder.

    Attributes:
      count: number of tokens so far, int32 `[batch]`.
      convolved: what the short convolutions need of them, `[batch, conv − 1, channels]` by the projection's name.
      memory: what the variant remembers of them.
    """

    count: jax.Array
    convolved: dict[str, jax.Array]
    memory: Any
