"""sampled_block_attention: softmax attention of a query to one block of keys and a sample of the other keys."""

import jax

from efficient_tx.kernels.op import Op
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes

OP = Op("sampled_block_attention", ("pallas_tpu", "pallas_gpu", "xla", "reference"))


def sampled_block_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, choice: Choice, *,
    sizes: Sizes, implementation: str | None = None, interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Softmax over the block of each query and the sampled keys outside this block.

    Args:
      q: `[sequences, queries, dim]`, already scaled; one sequence for each example and head.
      k: `[sequences, keys, dim]`.
      v: `[sequences, keys, v_dim]`; all three have one dtype, float32 or float64.
      choice: the keys that each query sees.
      sizes: rows per tile of queries and per block of keys; they divide the numbers of query and key rows.
      implementation: "reference" (the plain formula, memory queries × keys, differentiable in both modes), "xla",
        "pallas_tpu", "pallas_gpu" (memory linear in the lengths, reverse mode only), or None: on each platform the best
        one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.

    Returns:
      Output `[sequences, queries, v_dim]` and log-sum-exp `[sequences, queries]`; zero and −inf for a query that is in
      no row or has no keys.

    Raises:
      ValueError: an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    return OP(implementation, sizes, q, k, v, choice, interpret=interpret)
