"""What every implementation does with a block of inner products: its weights, and the cotangents of what made them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention.score import Score


class Block(NamedTuple):
    """A block of inner products, queries × keys or keys × queries, and what is broadcast to it.

    Attributes:
      dot: scale · q·k + bias.
      q_norm, k_norm: half the scaled squared norms, or None.
      i, j: positions.
      head: index of the query's head.
      allowed: bool, or None if every pair is.
    """

    dot: jax.Array
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    i: jax.Array
    j: jax.Array
    head: jax.Array
    allowed: jax.Array | None = None

    def where(self, x: jax.Array, otherwise: float) -> jax.Array:
        return x if self.allowed is None else jnp.where(self.allowed, x, otherwise)


def logits(score: Score, block: Block) -> jax.Array:
    """−inf for pairs that are not allowed."""
    dot, q_norm, k_norm, i, j, head, _ = block
    return block.where(score.logits(dot, q_norm, k_norm, i, j, head), -jnp.inf)


def weights(score: Score, block: Block) -> jax.Array:
    """The weights of a score that is not normalised like softmax; 0 for pairs that are not allowed."""
    dot, q_norm, k_norm, i, j, head, _ = block
    return block.where(score.weights(score.logits(dot, q_norm, k_norm, i, j, head)), 0)


def cotangents(
    score: Score, block: Block, d_out: jax.Array, saved: jax.Array | None, delta: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None, Score]:
    """The weights of a block, and the cotangents of its inner products, of the norms and of the score's parameters.

    Nothing is summed: the cotangent of what is broadcast to the block is as large as the block, one number for each
    pair. Only a parameter of more than one number a head has the cotangent of its own shape.

    Args:
      score: the score, with the parameters of one head.
      block: the block.
      d_out: the inner products of values and cotangents of outputs.
      saved: the log-sum-exp of every query, finite; or for normalise="sum" the sum of its weights, inf for
        0: then output and gradient are 0.
      delta: the inner product of output and its cotangent, less the cotangent of the log-sum-exp; None where not
        normalised.
    """
    softmax = score.normalise == "softmax"
    leaves, tree = jax.tree.flatten(score)
    norms = [None if x is None else spread(x, block) for x in (block.q_norm, block.k_norm)]
    numbers = [spread(x, block) if jnp.ndim(x) == 0 else x for x in leaves]

    def of(dot, norms, numbers):
        one = jax.tree.unflatten(tree, [y if x is None else x for x, y in zip(numbers, leaves)])
        values = one.logits(dot, *norms, block.i, block.j, block.head)
        return values if softmax else one.weights(values)

    floating = [x if jnp.issubdtype(x.dtype, jnp.floating) else None for x in numbers]
    values, pull = jax.vjp(of, block.dot, norms, floating)
    if softmax:
        kept = jnp.exp(block.where(values, -jnp.inf) - saved)
        d_values = kept * (d_out - delta)
    elif score.normalise == "sum":
        kept, d_values = values / saved, (d_out - delta) / saved
    else:
        kept, d_values = values, d_out
    found = pull(block.where(d_values, 0))
    # Also after pulling back: the derivative of a masked pair may be infinite.
    d_dot, d_norms, d_numbers = jax.tree.map(lambda x: block.where(x, 0) if x.shape == d_out.shape else x, found)
    return block.where(kept, 0), d_dot, *d_norms, jax.tree.unflatten(tree, d_numbers)


def spread(x: jax.Array, block: Block) -> jax.Array:
    return jnp.broadcast_to(x, block.dot.shape)


def saved_and_delta(
    score: Score, outputs: tuple, total: jax.Array | None, cotangents: tuple, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array] | None:
    """`saved` and `delta` of `cotangents` above, `[batch, queries, heads]`; None for a score that is not normalised."""
    if score.normalise is None:
        return None
    (out, lse), (d_out, d_lse) = outputs, cotangents
    # A query without keys has lse −inf and logits −inf, so any finite number gives zero weights.
    saved = total if lse is None else jnp.where(jnp.isfinite(lse), lse, 0)
    delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1)
    return saved, delta if d_lse is None else delta - d_lse


def parameters(score: Score) -> list[jax.Array]:
    """The arrays of a score that have cotangents."""
    return [x for x in jax.tree.leaves(score) if jnp.issubdtype(x.dtype, jnp.floating)]


def with_parameters(score: Score, found: list[jax.Array]) -> Score:
    """The score with these in place of its `parameters`, and None for its other arrays."""
    leaves, tree = jax.tree.flatten(score)
    rest = iter(found)
    return jax.tree.unflatten(tree, [next(rest) if jnp.issubdtype(x.dtype, jnp.floating) else None for x in leaves])
