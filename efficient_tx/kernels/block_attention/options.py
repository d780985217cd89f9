"""The static options of an implementation of block_attention."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Primitives that Pallas kernels have on blocks of integers and bools on all platforms. Not `sign`, a part of the
# operator `//`: jax asks the default device what a TPU has for it, also if the program is for another one.
ELEMENTWISE = {
    "abs", "add", "and", "broadcast_in_dim", "convert_element_type", "copy", "div", "eq", "ge", "gt", "le",
    "lt", "max", "min", "mul", "ne", "neg", "not", "or", "rem", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "square", "sub", "xor",
}  # fmt: skip


class Options(NamedTuple):
    """Static and hashable; see `block_attention`.

    Every implementation takes the operands q `[batch, padded queries, heads, head_dim]`, k `[batch, padded keys,
    groups, head_dim]`, v `[batch, padded keys, groups, v_dim]`, a mask bool `[batch, padded keys]` or None, blocks
    int32 `[batch or 1, heads or 1, query blocks, n]`, and the bias `[batch, heads or 1, query blocks, n, 1 or
    block_size]` or None. Lengths are padded to whole blocks, masked keys and values are zero. It returns the output
    `[batch, padded queries, heads, v_dim]` in the dtype of q and the log-sum-exp `[batch, padded queries, heads]` in
    float32 at least. Nothing is saved for the backward pass but these.

    Attributes:
      queries, keys: the numbers without padding.
      trained_bias: whether the backward pass computes the cotangent of the bias; else it is None.
    """

    block_size: int
    queries: int
    keys: int
    causal: bool
    visible: Callable[[jax.Array, jax.Array], jax.Array] | None
    scale: float
    precision: jax.lax.Precision
    trained_bias: bool = True

    def seen(self, query: jax.Array, key: jax.Array) -> jax.Array | None:
        """Whether the queries see the keys at these positions, bool of their common shape; None if all do."""
        seen = None
        if self.causal:
            seen = key <= query + (self.keys - self.queries)
        if self.visible is not None:
            visible = self.visible(query, key)
            seen = visible if seen is None else seen & visible
        return seen

    def foreign_to_kernels(self) -> str | None:
        """The reason why no Pallas kernel can have `visible` in it, or None."""
        if self.visible is None:
            return None
        position = jax.ShapeDtypeStruct((8, 8), jnp.int32)
        traced = jax.make_jaxpr(self.visible)(position, position)
        if any(jnp.ndim(x) for x in traced.consts):
            return "visible looks up an array"
        foreign = sorted(primitives(traced.jaxpr) - ELEMENTWISE)
        return (
            f"visible has the operation {foreign[0]}, kernels have none but {', '.join(sorted(ELEMENTWISE))}"
            if foreign
            else None
        )


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays in one dtype, as the factors of a kernel's products must be."""
    return [x.astype(jnp.result_type(*arrays)) for x in arrays]


def primitives(jaxpr: Any) -> set[str]:
    """The names of the primitives in it."""
    inner = [
        x.jaxpr if hasattr(x, "jaxpr") else x
        for equation in jaxpr.eqns
        for x in equation.params.values()
        if hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ]
    names = {equation.primitive.name for equation in jaxpr.eqns} - {"pjit", "jit"}
    return names.union(*map(primitives, inner))
