"""What the Pallas kernels of one call share, on TPUs and GPUs: sizes, heads, products, masks, and numbers by name.

The operands of a kernel are named: "q", "k", "v", "d_out" are matrices, all others one number a query ("q_norm",
"saved", "delta", "q_0" ...) or key ("k_norm", "k_0" ...); "q_0" is the first of a mask's segments of queries.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_tx.kernels.flash_attention import elementwise
from efficient_tx.kernels.flash_attention.block import Block
from efficient_tx.kernels.flash_attention.blocks import Sizes
from efficient_tx.kernels.flash_attention.mask import Mask
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import Score
from efficient_tx.kernels.precision import missing

MATRICES = ("q", "k", "v", "d_out", "out")
LEAST = jnp.finfo(jnp.float32).min / 2  # finite, so that a block without keys adds exp(−inf − LEAST) = 0


def unsupported(platform: str, options: Options, q, k, v, score: Score, mask: Mask | None, pairs) -> str | None:
    """The reason why the kernels for a platform do not support the request, or None."""
    if reason := missing(options.precision, {"tpu": "TPU", "cuda": "GPU"}[platform], high=platform == "cuda"):
        return reason
    if pairs is not None:
        return "it takes key masks [batch, keys] and Masks: one of all pairs is quadratic in the length"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"its heads have at most 256 dims, these {max(q.shape[3], v.shape[3])}"
    return score.unsupported(platform) or elementwise.reason(score, mask, platform)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call; the score's parameters are `[heads]`."""

    options: Options
    sizes: Sizes
    batch: int
    heads: int
    groups: int
    score: Score
    mask: Mask | None
    interpret: Any

    @classmethod
    def of(
        cls, options: Options, query_block: int, key_block: int, q: jax.Array, k: jax.Array, score: Score,
        mask: Mask | None, interpret: Any, **more: Any,
    ) -> "Call":  # fmt: skip
        sizes = Sizes(q.shape[1], k.shape[1], query_block, key_block)
        return cls(options, sizes, q.shape[0], q.shape[2], k.shape[2], score, mask, interpret, **more)

    @property
    def repeats(self) -> int:
        return self.heads // self.groups

    def side(self, name: str) -> tuple[int, int]:
        """Length, and size of a block, of queries ("q") or keys."""
        return (self.sizes.queries, self.sizes.query_block) if name == "q" else (self.sizes.keys, self.sizes.key_block)

    def score_of(self, numbers: list, head: jax.Array) -> Score:
        """The score with the parameters of one head, from references to all."""
        return jax.tree.unflatten(jax.tree.structure(self.score), [x[head] for x in numbers])

    def dot(self, x: jax.Array, y: jax.Array, transposed: bool = False) -> jax.Array:
        """x @ y, or x @ y.T, in float32; x is rounded to the dtype of y, which is that of the inputs."""
        exact = y.dtype == jnp.float32
        return jax.lax.dot_general(
            x.astype(y.dtype), y, (((1,), (1 if transposed else 0,)), ((), ())),
            precision=self.options.precision if exact else None, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def block_of(
        self, product: jax.Array, numbers: dict, row: jax.Array, column: jax.Array, head: jax.Array, test: bool
    ) -> Block:
        """The block of `product` = q·k; `numbers`, rows of queries and columns of keys are broadcast to it."""
        dot = self.options.scale * product
        if self.options.bias:
            dot += self.options.bias
        position, allowed = row + (self.sizes.keys - self.sizes.queries), None
        if test:
            allowed = jnp.broadcast_to((row < self.sizes.queries) & (column < self.sizes.keys), dot.shape)
            if self.mask is not None:
                named = (
                    jax.tree.unflatten(
                        jax.tree.structure(of), [numbers[f"{side}_{n}"] for n in range(len(jax.tree.leaves(of)))]
                    )
                    for side, of in zip("qk", self.mask.segments)
                )
                allowed &= jnp.broadcast_to(self.mask.allowed(position, column, *named), dot.shape)
        return Block(dot, numbers.get("q_norm"), numbers.get("k_norm"), position, column, head, allowed)

    def segments(self, side: str) -> dict[str, jax.Array]:
        """The mask's segments of queries or keys, `[batch or 1, length]`, in the order of their tree."""
        if self.mask is None:
            return {}
        found = jax.tree.leaves(self.mask.segments["qk".index(side)])
        return {f"{side}_{n}": x.astype(jnp.int32) for n, x in enumerate(found)}

    def cost(self, products: int, operands: Any) -> pl.CostEstimate:
        """Of all pairs, with products of so many dims in all."""
        area = self.batch * self.heads * self.sizes.queries * self.sizes.keys
        return pl.CostEstimate(
            flops=2 * area * products,
            transcendentals=area,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(operands)),
        )
