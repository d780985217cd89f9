"""The sizes of a Monarch product, and the layout of its hidden layer that all implementations share."""

from typing import NamedTuple

import jax

# Smallest number of tokens per chunk: the fastest on two AVX-512 cores with 1 MB of cache each. A chunk also has at
# least as many tokens as a block is wide. Otherwise reading the weights and summing their gradients costs more than the
# cache saves.
CHUNK = 128
# Largest block width for which the backward pass recomputes the hidden layer; with 128 it is not faster on CPUs.
NARROW = 64


def chunk_count(tokens: int, width: int) -> int:
    """The number of equal chunks of at least CHUNK and `width` tokens, less than twice as long; 1 if there is none."""
    most = max(1, tokens // max(CHUNK, width))
    return next((count for count in range(most, most // 2, -1) if tokens % count == 0), 1)


class Layout(NamedTuple):
    """x `[tokens, k·p]`, w1 `[k, q, p]`, hidden layer `[chunks, l, r, c]` with chunks of c tokens, w2 `[l, s, r]`."""

    tokens: int
    chunks: int
    k: int
    q: int
    p: int
    l: int
    s: int
    r: int

    @classmethod
    def of(cls, x: jax.Array, w1: jax.Array, w2: jax.Array) -> "Layout":
        tokens = x.shape[0]
        return cls(tokens, chunk_count(tokens, max(w1.shape[1:] + w2.shape[1:])), *w1.shape, *w2.shape)

    @property
    def c(self) -> int:
        return self.tokens // self.chunks

    def saved(self, hidden: jax.Array) -> jax.Array | None:
        """The hidden layer, if the backward pass does not recompute it: with narrow blocks that is faster."""
        return hidden if self.p > NARROW else None

    def flops(self, product: str) -> int:
        """Of the product of this name: those with "hid" or "w1" have the first factor's blocks."""
        of_first = "hid" in product or "w1" in product
        return 2 * self.tokens * (self.k * self.q * self.p if of_first else self.l * self.s * self.r)
