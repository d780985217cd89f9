"""The Monarch product in XLA, as fast as the products of its blocks; written for CPUs.

The products of the blocks run almost as fast as a dense product. The plain formula loses time between them: XLA
permutes the whole hidden layer element by element and writes every step to newly allocated memory.

So tokens are processed in chunks that stay in cache. The hidden layer of a chunk has the token axis last, so the
permutation between `[k, q]` and `[l, r]` moves whole rows. The remaining permutations are those of the input (rows of
p) and of the output, whose l must be innermost. The backward pass orders the products so that all of them have this
layout. For narrow blocks it recomputes the hidden layer, which is faster than reading it from memory and saves only the
input.

Devices other than CPUs run the same program on all chunks at once.
"""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.kernels.monarch.layout import Layout
from efficient_tx.kernels.platform import by_platform

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def unsupported(options: None, *arrays: jax.Array) -> None:
    """It supports everything."""


def sizes(options: None, *arrays: jax.Array) -> None:
    """Its chunks are a part of the layout of the hidden layer."""


def forward(
    options: None, sizes: None, x: jax.Array, w1: jax.Array, w2: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """The product `[tokens, s·l]` of x `[tokens, k·p]`, w1 `[k, q, p]` and w2 `[l, s, r]`, all of one dtype.

    Also returns the hidden layer by chunks of c tokens, `[chunks, l, r, c]`, if the backward pass does not recompute
    it.
    """

    def in_turn(chunks, *weights):
        return jax.lax.map(lambda chunk: ahead(chunk, *weights), chunks)

    at_once = jax.vmap(ahead, (0, None, None))
    out, hidden = by_platform({"cpu": in_turn, "default": at_once}, in_chunks(x, w1, w2), w1, w2.mT)
    return out.reshape(x.shape[0], w2.shape[0] * w2.shape[1]), Layout.of(x, w1, w2).saved(hidden)


def backward(
    options: None, sizes: None, arrays: tuple, out: jax.Array, hidden: jax.Array | None, d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of x, w1 and w2."""
    x, w1, w2 = arrays
    l, s, _ = w2.shape
    chunked = in_chunks(x, w1, w2)
    chunks = chunked, hidden, d_out.reshape(*chunked.shape[:2], s, l)

    def one_by_one(chunks, w1, w2):
        wide = jnp.promote_types(w1.dtype, jnp.float32)
        zeros = [jnp.zeros_like(w, wide) for w in (w1, w2)]

        def step(sums, chunk):
            d_x, *found = back(*chunk, w1, w2)
            return [total + part for total, part in zip(sums, found)], d_x

        sums, d_x = jax.lax.scan(step, zeros, chunks)
        return d_x, *sums

    def at_once(chunks, w1, w2):
        d_x, d_w1, d_w2 = jax.vmap(back, (0, 0, 0, None, None))(*chunks, w1, w2)
        return d_x, d_w1.sum(0), d_w2.sum(0)

    d_x, d_w1, d_w2 = by_platform({"cpu": one_by_one, "default": at_once}, chunks, w1, w2.mT)
    return d_x.reshape(x.shape), d_w1.astype(w1.dtype), d_w2.mT.astype(w2.dtype)


def in_chunks(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """x as `[chunks, c, k, p]`."""
    k, _, p = w1.shape
    return x.reshape(Layout.of(x, w1, w2).chunks, -1, k, p)


def ahead(x: jax.Array, w1: jax.Array, w2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output `[c, s, l]` and hidden layer `[l, r, c]` of a chunk x `[c, k, p]`, with w1 `[k, q, p]`, w2 `[l, r, s]`."""
    hidden = hide(x, w1, w2)
    return einsum("lrc,lrs->lcs", hidden, w2).transpose(1, 2, 0), hidden


def hide(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """The hidden layer `[l, r, c]`."""
    l, r, _ = w2.shape
    return einsum("kqp,kcp->kqc", w1, x.swapaxes(0, 1)).reshape(r, l, -1).swapaxes(0, 1)


def back(
    x: jax.Array, hidden: jax.Array | None, d_out: jax.Array, w1: jax.Array, w2: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of a chunk x and of the weights; the latter are float32 at least, because they are summed."""
    k, q, _ = w1.shape
    wide = jnp.promote_types(w1.dtype, jnp.float32)
    hidden = hide(x, w1, w2) if hidden is None else hidden
    d_out = d_out.transpose(2, 0, 1)
    d_hidden = einsum("lrs,lcs->lrc", w2, d_out).swapaxes(0, 1).reshape(k, q, -1)
    d_w1 = einsum("kqc,kcp->kqp", d_hidden, x.swapaxes(0, 1), preferred_element_type=wide)
    d_w2 = einsum("lrc,lcs->lrs", hidden, d_out, preferred_element_type=wide)
    return einsum("kqc,kqp->kcp", d_hidden, w1).swapaxes(0, 1), d_w1, d_w2
