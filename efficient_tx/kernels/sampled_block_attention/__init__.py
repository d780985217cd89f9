"""sampled_block_attention: softmax attention of a query to one block of keys and a sample of the other keys."""

from functools import partial

import jax

from efficient_tx.kernels.forward_mode import reverse_only
from efficient_tx.kernels.implementations import choose
from efficient_tx.kernels.sampled_block_attention import reference, xla
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes

# Best first. Each module has `unsupported` and `forward`; all except the reference have `backward`.
IMPLEMENTATIONS = {"xla": xla, "reference": reference}


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
      implementation: "reference" (the plain formula, memory queries × keys, differentiable in both modes), "xla"
        (memory linear in the lengths, reverse mode only), or None: the best one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.

    Returns:
      Output `[sequences, queries, v_dim]` and log-sum-exp `[sequences, queries]`; zero and −inf for a query that is in
      no row or has no keys.

    Raises:
      ValueError: an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    implementation = choose("sampled_block_attention", IMPLEMENTATIONS, implementation, interpret=interpret)
    if implementation == "reference":
        return reference.forward(sizes, q, k, v, choice)
    q, k, v = (reverse_only(x, "sampled_block_attention") for x in (q, k, v))
    return tiled(implementation, sizes, q, k, v, choice)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def tiled(implementation, sizes, q, k, v, choice):
    """Output and log-sum-exp of a tiled implementation; the gradient is its own backward pass."""
    return IMPLEMENTATIONS[implementation].forward(sizes, q, k, v, choice)


def tiled_forward(implementation, sizes, q, k, v, choice):
    out, lse = tiled(implementation, sizes, q, k, v, choice)
    return (out, lse), (q, k, v, choice, out, lse)


def tiled_backward(implementation, sizes, residuals, cotangents):
    return *IMPLEMENTATIONS[implementation].backward(sizes, *residuals, *cotangents), None


tiled.defvjp(tiled_forward, tiled_backward)
