"""Attention to a block and to samples by the plain formula: all weights at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes, rows_of

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported(sizes: Sizes, *operands: jax.Array) -> None:
    """The plain formula supports everything."""


def forward(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, choice: Choice) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp; see `sampled_block_attention`."""

    def sequence(q, k, v, choice):
        q = rows_of(q, choice.q_order)
        k, v = (rows_of(x, choice.k_order) for x in (k, v))
        own = choice.block[:, None]
        key_block = jnp.arange(len(k)) // sizes.block
        inside = (choice.k_order < choice.k_place.size) & (key_block == own)
        logits = jnp.where(inside, jnp.einsum("id,jd->ij", q, k, precision=HIGHEST), -jnp.inf)

        group = jnp.repeat(choice.group, sizes.tile)
        sample = choice.sample[group]
        drawn = jnp.einsum("id,isd->is", q, k[sample], precision=HIGHEST) + choice.offset[group]
        drawn = jnp.where(sample // sizes.block != own, drawn, -jnp.inf)

        peak = jax.lax.stop_gradient(jnp.maximum(logits.max(1), drawn.max(1)))[:, None]
        peak = jnp.where(jnp.isfinite(peak), peak, 0)
        weights, more = jnp.exp(logits - peak), jnp.exp(drawn - peak)
        total = (weights.sum(1) + more.sum(1))[:, None]
        seen = total > 0
        sums = jnp.einsum("ij,jc->ic", weights, v, precision=HIGHEST)
        sums += jnp.einsum("is,isc->ic", more, v[sample], precision=HIGHEST)
        out = jnp.where(seen, sums / jnp.where(seen, total, 1), 0)
        lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1)) + peak, -jnp.inf)[:, 0]
        return rows_of(out, choice.q_place), rows_of(lse, choice.q_place, -jnp.inf)

    return jax.vmap(sequence)(q, k, v, choice)
