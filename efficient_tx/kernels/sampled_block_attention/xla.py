"""Softmax attention of every query to one block of keys and a shared sample: the core of HyperAttention.

Memory is linear in the length, and the backward pass recomputes the weights. It processes one sequence at a time, a
tile of queries with the blocks that its rows see; rows are sorted by block, so these are few. As in
`kernels/flash_attention/xla.py`, no block of weights is the transposed left factor of a product, which XLA's CPU
backend runs at a quarter of the speed. So the cotangents of keys and values are summed as `[dim, keys]`.

That is the form for CPUs; on GPUs and TPUs all sequences are computed at once, as in regrouped.py.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention import xla as batched
from efficient_tx.kernels.platform import by_platform
from efficient_tx.kernels.sampled_block_attention import regrouped
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes, rows_of
from efficient_tx.numerics.flops import counting


def unsupported(options: Sizes, *operands: jax.Array) -> None:
    """It supports everything."""


def sizes(options: Sizes, *operands: jax.Array) -> None:
    """Its blocks are those of the arguments."""


def forward(options: Sizes, sizes: None, *operands) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Output and log-sum-exp; see `sampled_block_attention`."""
    alternatives = {"cpu": partial(serial_forward, options), "default": partial(regrouped.forward, batched, options)}
    return by_platform(alternatives, *operands), None


def backward(options: Sizes, sizes: None, operands: tuple, outputs: tuple, saved: None, cotangents: tuple) -> tuple:
    """Cotangents of q, k and v, and None for the choice."""
    alternatives = {"cpu": partial(serial_backward, options), "default": partial(regrouped.backward, batched, options)}
    d_arrays = by_platform(alternatives, operands, outputs, cotangents)
    return *d_arrays, None


def serial_forward(sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, choice: Choice) -> tuple:
    def sequence(operands):
        q, k, v, choice = operands
        q, k, v = rows_of(q, choice.q_order), *(rows_of(x, choice.k_order) for x in (k, v))
        real_rows = choice.k_order < choice.k_place.size
        samples = Sampled.of(k, v, choice, sizes)

        def tile(operands):
            q, own, group = operands
            sampled = samples.of_group(group)

            def see(carry, logits, v):
                out, total, peak = carry
                new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
                weights, fade = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
                return out * fade + dot(weights, v), total * fade + weights.sum(-1, keepdims=True), new_peak

            def see_block(j, carry):
                k_j, v_j, real = (block_of(x, j, sizes) for x in (k, v, real_rows))
                return see(carry, block_logits(q, k_j, real, own, j), v_j)

            column = jnp.zeros((sizes.tile, 1), q.dtype)
            # Finite, so that a row without keys so far adds exp(−inf − peak) = 0, not exp(−inf + inf).
            nothing = jnp.zeros((sizes.tile, v.shape[1]), q.dtype), column, column + jnp.finfo(q.dtype).min / 2
            carry = see(nothing, sampled.logits(q, own), sampled.v)
            out, total, peak = jax.lax.fori_loop(*span(own, sizes), see_block, carry)
            seen = total > 0
            total = jnp.where(seen, total, 1)
            return out / total, jnp.where(seen, jnp.log(total) + peak, -jnp.inf)[:, 0]

        out, lse = jax.lax.map(tile, (tiles(q, sizes), tiles(choice.block, sizes), choice.group))
        out, lse = out.reshape(-1, v.shape[1]), lse.reshape(-1)
        return rows_of(out, choice.q_place), rows_of(lse, choice.q_place, -jnp.inf)

    return jax.lax.map(sequence, (q, k, v, choice))


def serial_backward(sizes: Sizes, operands: tuple, outputs: tuple, cotangents: tuple) -> tuple:
    (q, k, v, choice), (out, lse), (d_out, d_lse) = operands, outputs, cotangents
    # With the weights w of a row, d_logits = w ⊙ (d_out vᵀ − delta).
    delta = jnp.sum(out * d_out, axis=-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0)  # a query without keys has only logits of −inf

    def sequence(operands):
        q, k, v, choice, *by_query = operands
        q, lse, d_out, delta = (rows_of(x, choice.q_order) for x in (q, *by_query))
        k, v = (rows_of(x, choice.k_order) for x in (k, v))
        real_rows = choice.k_order < choice.k_place.size
        samples = Sampled.of(k, v, choice, sizes)

        def tile(carry, operands):
            q, lse, d_out, delta, own, group = operands
            lse, delta = lse[:, None], delta[:, None]
            sampled = samples.of_group(group)

            def pull_back(logits, k, v):
                weights = jnp.exp(logits - lse)
                d_logits = weights * (dot(d_out, v.T) - delta)
                return dot(d_logits, k), dot(q.T, d_logits), dot(d_out.T, weights)

            def see_block(j, carry):
                d_q, d_k, d_v = carry
                k_j, v_j, real = (block_of(x, j, sizes) for x in (k, v, real_rows))
                more_q, more_k, more_v = pull_back(block_logits(q, k_j, real, own, j), k_j, v_j)
                return d_q + more_q, add_block(d_k, j, more_k, sizes), add_block(d_v, j, more_v, sizes)

            d_k, d_v, d_k_sampled, d_v_sampled = carry
            d_q, more_k, more_v = pull_back(sampled.logits(q, own), sampled.k, sampled.v)
            d_q, d_k, d_v = jax.lax.fori_loop(*span(own, sizes), see_block, (d_q, d_k, d_v))
            return (d_k, d_v, d_k_sampled.at[group].add(more_k), d_v_sampled.at[group].add(more_v)), d_q

        carry = tuple(jnp.zeros_like(x.mT) for x in (k, v, samples.k, samples.v))
        rows = *(tiles(x, sizes) for x in (q, lse, d_out, delta, choice.block)), choice.group
        carry, d_q = jax.lax.scan(tile, carry, rows)
        # The barrier keeps XLA from folding the transposition into the slow product.
        d_k, d_v, d_k_sampled, d_v_sampled = (x.mT for x in jax.lax.optimization_barrier(carry))
        d_k, d_v = (x.at[choice.sample].add(y) for x, y in ((d_k, d_k_sampled), (d_v, d_v_sampled)))
        d_q = rows_of(d_q.reshape(q.shape), choice.q_place)
        return d_q, *(rows_of(x, choice.k_place) for x in (d_k, d_v))

    return jax.lax.map(sequence, (q, k, v, choice, lse, d_out, delta))


class Sampled(NamedTuple):
    """The samples of one sequence: keys, values and terms of the logits; `[groups, samples, ...]` or of one group."""

    k: jax.Array
    v: jax.Array
    offset: jax.Array
    block: jax.Array

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, choice: Choice, sizes: Sizes) -> "Sampled":
        return cls(k[choice.sample], v[choice.sample], choice.offset, choice.sample // sizes.block)

    def of_group(self, group: jax.Array) -> "Sampled":
        return Sampled(*(x[group] for x in self))

    def logits(self, q: jax.Array, own: jax.Array) -> jax.Array:
        """Logits of a tile of queries; −inf for samples in a query's own block, which it sees completely."""
        return jnp.where(self.block != own[:, None], dot(q, self.k.T) + self.offset, -jnp.inf)


def block_logits(q, k, real, own, j):
    """Logits of a tile of queries with block `j`; −inf for queries of another block."""
    return jnp.where(real & (own[:, None] == j), dot(q, k.T), -jnp.inf)


def span(own: jax.Array, sizes: Sizes) -> tuple[jax.Array | int, jax.Array | int]:
    """The range of blocks that a tile sees: the first one, and the last one plus 1; empty if there is none."""
    if counting.value:  # as many as have its rows
        return 0, max(1, sizes.tile // sizes.block)
    return jnp.min(jnp.where(own < 0, jnp.iinfo(own.dtype).max, own)), own.max() + 1


def tiles(x: jax.Array, sizes: Sizes) -> jax.Array:
    return x.reshape(-1, sizes.tile, *x.shape[1:])


def block_of(x: jax.Array, j: jax.Array, sizes: Sizes) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, j * sizes.block, sizes.block)


def add_block(x: jax.Array, j: jax.Array, update: jax.Array, sizes: Sizes) -> jax.Array:
    """`x` `[dim, keys]` with `update` added to its block `j`."""
    start = j * sizes.block
    old = jax.lax.dynamic_slice_in_dim(x, start, sizes.block, 1)
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, start, 1)


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
