"""HyperAttention (Han et al. 2023, arXiv 2310.05869): softmax over similar keys and a sample of the other keys.

Keys are sorted by a locality-sensitive hash and split into blocks. A query attends exactly to the block B that contains
its own hash. The other keys are approximated by a sample S of m keys, each weighted by the number n_j ≈ n/m of keys
that it represents:

    out_i = (Σ_{j ∈ B} e^{s_ij} v_j + Σ_{j ∈ S∖B} n_j e^{s_ij} v_j) / (the same without v),     s_ij = q_i·k_j / √d

Causal form: each chunk attends exactly within itself. Then, for pieces of one chunk, two, four ... chunks, the second
piece of every pair of neighbouring pieces attends to the first piece as above.

Unlike the published code: sampled keys in the query's own block are always left out; gradients flow through the weights
of the merged parts; padding is in no block and no sample. Unlike the paper, which draws S uniformly, S has one key from
each of m equal segments of the sorted keys: both sums stay unbiased and have a lower variance. Unlike the paper, which
also splits the sorted queries into blocks and pairs the blocks by rank, a query here attends to the block of keys that
contains its own hash. This choice does not depend on other queries, so a causal model stays causal, and there may be
fewer queries than keys. If queries and keys have different distributions over the buckets, the error is almost halved.
"""

from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels import flash_attention, sampled_block_attention
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes, rows_of
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.lsh import hamming_buckets, hash_directions, sort_by_bucket
from efficient_tx.numerics.random import evaluation_keys, example_keys
from efficient_tx.tokens.mask import key_mask, repeat_heads
from efficient_tx.tokens.segments import segment_starts

LARGEST_TILE = 128  # query rows per step; every block costs one tile more than its own queries


def check_options(*, block, samples, bits, chunk):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, block=block, samples=samples, bits=bits, chunk=chunk)
    if bits > 16:
        raise OptionError("bits", bits, "it must be at most 16, which makes 65536 buckets")


@checked_by(check_options)
def hyper(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    block: int = 256, samples: int = 256, bits: int = 7, chunk: int = 1024,
) -> jax.Array:  # fmt: skip
    """Approximates `softmax`: time and memory are linear in the length n, n log n with `causal`.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: draws the hash and the samples: one key per example `[batch]`, or a single key, folded per example; None
        (evaluation) means the same fixed key for every example. All heads share the hash.
      causal: token i sees tokens j ≤ i only. A single query (decoding) sees all real keys, exactly.
      block: number of keys with similar hash that a query attends to exactly; the result is exact if block is at least
        the number of real keys.
      samples: number of sampled keys that represent the keys outside the block; the result is exact if samples is at
        least the number of real keys.
      bits: number of signs in the hash, which has 2^bits buckets.
      chunk: causal only: number of tokens that attend exactly to each other, rounded up to whole blocks.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. Statistics are float32 at
      least. The output at masked queries is undefined.

    Raises:
      ValueError: an option out of its range, shapes that do not fit, or `causal` with several queries whose number is
        not that of the keys.
    """
    check_shapes(q, k, v)
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    mask = key_mask(mask, batch, keys)
    if causal and queries not in (1, keys):
        raise ValueError(f"there are {queries} queries for {keys} keys: causal hyper takes as many, or a single query")
    if (2**bits + 1) * (queries + keys) >= 2**32:
        raise OptionError("bits", bits, f"2^{bits} buckets for {queries} queries and {keys} keys need fewer of either")
    chunk = -(-chunk // block) * block
    if 0 in (batch, queries) or keys <= (chunk if causal else block) or (causal and queries == 1):
        return softmax(q, k, v, mask=mask, causal=causal and queries > 1)

    draws = numbered(evaluation_keys(batch) if key is None else example_keys(key, batch), np.arange(heads + 1))
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    wide = jnp.promote_types(q.dtype, jnp.float32)
    arrays = (x.astype(wide) for x in (q, repeat_heads(k, heads, "k"), repeat_heads(v, heads, "v")))
    directions = hash_directions(draws[:, 0], dim, bits)
    attend = partial(with_the_past, chunk=chunk) if causal else everywhere
    return attend(*arrays, real, directions, draws[:, 1:].reshape(-1, 1), Budget(block, samples)).astype(q.dtype)


class Budget(NamedTuple):
    """The options of `hyper` that set the number of keys per query."""

    block: int
    samples: int

    @property
    def tile(self) -> int:
        """Query rows per step: at most LARGEST_TILE if such a number divides the block, else the block."""
        count = -(-self.block // LARGEST_TILE)
        return self.block if self.block % count else self.block // count


class Pieces(NamedTuple):
    """Queries that attend to the keys of their own piece; the pieces of a sequence are concatenated.

    Attributes:
      q, k, v: `[sequences, length, dim]`, one sequence for each example and head.
      q_bucket, k_bucket: hash buckets of queries and keys, int32 `[sequences, length]`.
      q_real, k_real: bool `[sequences, length]`, False for padding.
      sizes: numbers of queries and keys of each piece. With several pieces, both numbers are equal and multiples of the
        block size, and all keys are real.
      draws: one key per piece, `[sequences, pieces]`.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_bucket: jax.Array
    k_bucket: jax.Array
    q_real: jax.Array
    k_real: jax.Array
    sizes: np.ndarray
    draws: jax.Array


def everywhere(q, k, v, real, directions, draws, budget):
    """Bidirectional and cross-attention of `[batch, length, heads, dim]`: every sequence is one piece."""
    batch, queries, heads, _ = q.shape
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    keys = k.shape[2]
    q_real = real if queries == keys else jnp.ones((batch, queries), bool)
    arrays = q, k, v, *(hamming_buckets(x, directions) for x in (q, k))
    arrays = (x.reshape(-1, *x.shape[2:]) for x in arrays)
    real = (jnp.repeat(x, heads, axis=0) for x in (q_real, real))
    out, _ = attend_within(Pieces(*arrays, *real, np.array([[queries, keys]]), draws), budget, directions.shape[-1])
    return out.reshape(*q.shape[:3], -1).swapaxes(1, 2)


def with_the_past(q, k, v, real, directions, draws, budget, *, chunk):
    """Causal attention of `[batch, length, heads, dim]`: exact within chunks, then second to first halves by level.

    Pieces begin at fixed ranks of the real tokens, so more padding only adds pieces of padding.
    """
    batch, length, heads, _ = q.shape
    levels = (-(-length // chunk) - 1).bit_length()
    size = chunk << levels
    place = jnp.where(real, jnp.cumsum(real, axis=-1) - 1, size)
    order = invert(place, size)
    q, k, v = (permute(x, order, place).swapaxes(1, 2) for x in (q, k, v))
    halves = [chunk << level for level in range(levels)]
    counts = [-(-(length - half) // (2 * half)) for half in halves]

    def cut(x, which):
        """The first or second halves of the pieces of all levels, `[batch · heads, rows, ...]`."""
        parts = [
            x[:, :, : 2 * count * half].reshape(batch * heads, count, 2, half, *x.shape[3:])[:, :, which]
            for half, count in zip(halves, counts)
        ]
        return jnp.concatenate([x.reshape(batch * heads, -1, *x.shape[3:]) for x in parts], axis=1)

    q_real = jnp.broadcast_to(jnp.arange(size) < real.sum(-1)[:, None, None], (batch, heads, size))
    q_bucket, k_bucket = (hamming_buckets(x, directions) for x in (q, k))
    later, earlier = [cut(x, 1) for x in (q, q_bucket, q_real)], [cut(x, 0) for x in (k, v, k_bucket)]
    number = np.concatenate([(level << 24) + np.arange(count) for level, count in enumerate(counts)])
    pieces = Pieces(
        later[0], *earlier[:2], later[1], earlier[2], later[2], jnp.ones_like(later[2]),
        np.repeat(halves, counts)[:, None].repeat(2, axis=1), numbered(draws[:, 0], number),
    )  # fmt: skip
    chunks = (x.reshape(-1, chunk, 1, x.shape[-1]) for x in (q, k, v))
    own = flash_attention(*chunks, causal=True, return_lse=True)
    past = attend_within(pieces, budget, directions.shape[-1])

    def by_level(own, past, fill):
        """`[levels + 1, batch, heads, size, ...]`: results of second halves at their positions, `fill` elsewhere."""
        parts, start = [own.reshape(batch, heads, size, *past.shape[2:])], 0
        for half, count in zip(halves, counts):
            rows = past[:, start : start + count * half].reshape(batch, heads, count, half, *past.shape[2:])
            rows = jnp.stack([jnp.full_like(rows, fill), rows], axis=3).reshape(batch, heads, -1, *past.shape[2:])
            missing = (size - rows.shape[2], *past.shape[2:])
            parts.append(jnp.concatenate([rows, jnp.full((batch, heads, *missing), fill, rows.dtype)], axis=2))
            start += count * half
        return jnp.stack(parts)

    outs, lses = (by_level(*parts, fill) for *parts, fill in zip(own, past, (0, -jnp.inf)))
    merged = (jax.nn.softmax(lses, axis=0)[..., None] * outs).sum(0)
    return permute(merged.swapaxes(1, 2), place, order)


def attend_within(pieces: Pieces, budget: Budget, bits: int) -> tuple[jax.Array, jax.Array]:
    """Output `[sequences, length, v_dim]` and log-sum-exp `[sequences, length]`; zero and −inf at padded queries."""
    _, queries, dim = pieces.q.shape
    keys = pieces.k.shape[1]
    q_rows, k_rows = (-(-length // size) * size for length, size in ((queries, budget.tile), (keys, budget.block)))
    of_query, of_tile = (
        np.repeat(np.arange(len(pieces.sizes)), -(-pieces.sizes[:, 0] // size)) for size in (1, budget.tile)
    )
    start = np.cumsum(pieces.sizes[:, 1]) - pieces.sizes[:, 1]
    count = pieces.k_real.sum(-1, keepdims=True) if len(start) == 1 else pieces.sizes[None, :, 1]

    q_place, k_place, before = sort_together(pieces, 2**bits)
    last = (start + jnp.maximum(count, 1) - 1)[:, of_query]
    own = jnp.minimum(before, last) // budget.block
    q_place, k_place = jnp.where(pieces.q_real, q_place, q_rows), jnp.where(pieces.k_real, k_place, k_rows)
    q_order, k_order = invert(q_place, q_rows), invert(k_place, k_rows)
    sample, offset = sample_rows(pieces.draws, count, budget.samples)
    choice = Choice(
        q_order=q_order,
        q_place=q_place,
        k_order=k_order,
        k_place=k_place,
        block=jax.vmap(rows_of, (0, 0, None))(own, q_order, -1),
        group=jnp.broadcast_to(of_tile, (len(own), len(of_tile))),
        sample=sample + start[:, None],
        offset=offset.astype(pieces.q.dtype),
    )
    sizes = Sizes(budget.tile, budget.block)
    return sampled_block_attention(pieces.q * dim**-0.5, pieces.k, pieces.v, choice, sizes=sizes)


def sort_together(pieces: Pieces, buckets: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts queries and keys of each piece together, by bucket and then position; padding comes last.

    Returns:
      The rank of each query among all queries, of each key among all keys, and the number of keys before each query;
      int32 `[sequences, length]` each.
    """
    sequences, queries = pieces.q_bucket.shape
    keys = pieces.k_bucket.shape[1]

    def together(q, k):
        """Alternates queries and keys of one position; if their numbers differ, all queries come first."""
        return jnp.stack([q, k], axis=-1).reshape(-1, 2 * keys) if queries == keys else jnp.concatenate([q, k], axis=-1)

    def apart(x):
        return (x[:, ::2], x[:, 1::2]) if queries == keys else (x[:, :queries], x[:, queries:])

    bucket, real = together(pieces.q_bucket, pieces.k_bucket), together(pieces.q_real, pieces.k_real)
    orders, start = [], 0
    for size, count in zip(*np.unique(pieces.sizes.sum(1), return_counts=True)):  # pieces of equal size together
        end = start + int(size * count)
        piece = (x[:, start:end].reshape(-1, int(size)) for x in (bucket, real))
        begin = start + int(size) * jnp.arange(int(count))[:, None]
        orders.append(
            (sort_by_bucket(*piece, buckets).reshape(sequences, int(count), -1) + begin).reshape(sequences, -1)
        )
        start = end
    order = jnp.concatenate(orders, axis=-1)
    place = invert(order, queries + keys)
    is_key = together(jnp.zeros((1, queries), bool), jnp.ones((1, keys), bool))[0]
    q_before, k_upto = apart(jnp.take_along_axis(jnp.cumsum(is_key[order], axis=-1), place, axis=-1))
    return apart(place)[0] - q_before, k_upto - 1, q_before


def sample_rows(keys: jax.Array, count: jax.Array, samples: int) -> tuple[jax.Array, jax.Array]:
    """Draws one row from each of `samples` almost equal segments of `count` rows; also the log of the segment sizes.

    A row is drawn with probability 1/size, so its weight is 1 in expectation.

    Args:
      keys: one PRNG key per piece, `[sequences, pieces]`.
      count: rows of each piece, int `[sequences or 1, pieces]`.
      samples: number of rows to draw; with fewer rows some segments are empty, with log-size −inf.

    Returns:
      int32 and float32 `[sequences, pieces, samples]`.
    """

    def one(key, count):
        starts = segment_starts(count, samples)
        size = jnp.diff(starts)
        row = (jax.random.uniform(key, (samples,), jnp.float32) * size).astype(jnp.int32)
        return starts[:-1] + jnp.clip(row, 0, jnp.maximum(size - 1, 0)), jnp.log(size)

    count = jnp.broadcast_to(count, keys.shape)
    found = jax.vmap(one)(keys.reshape(-1), count.reshape(-1))
    return tuple(x.reshape(*keys.shape, samples) for x in found)


def sampled_keys(
    q: jax.Array, k: jax.Array, *, mask: jax.Array | None = None, causal: bool = False,
    block: int = 256, samples: int = 256, bits: int = 7,
) -> jax.Array:  # fmt: skip
    """The sample of all queries, see `Mixer.chosen`; arguments as in `hyper`. Blocks are chosen by each query."""
    k = repeat_heads(k, q.shape[2], "k")
    batch, keys, heads, dim = k.shape
    if causal or keys <= block:
        return k[:, :0]
    mask = key_mask(mask, batch, keys)
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    draws = numbered(evaluation_keys(batch), np.arange(heads + 1))
    bucket = hamming_buckets(k.swapaxes(1, 2), hash_directions(draws[:, 0], dim, bits))
    order = sort_by_bucket(bucket, jnp.broadcast_to(real[:, None], bucket.shape), 2**bits)
    sample, size = sample_rows(draws[:, 1:], real.sum(1, keepdims=True), samples)
    position = jnp.take_along_axis(order, sample, axis=2).swapaxes(1, 2)[..., None]
    return jnp.where(size.swapaxes(1, 2)[..., None] >= 0, jnp.take_along_axis(k, position, axis=1), 0)


def numbered(keys: jax.Array, numbers: np.ndarray) -> jax.Array:
    """New keys `[n, numbers]`: each of `keys` `[n]` folded with each number."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, numbers.astype(np.uint32))


def invert(place: jax.Array, rows: int) -> jax.Array:
    """The element in each of `rows` rows, int32 `[n, rows]`, from `place`, the row of each element, `[n, length]`.

    Elements whose row is `rows` are dropped; rows without an element get `length`.
    """
    length = place.shape[1]

    def one(place):
        return jnp.full(rows, length).at[place].set(jnp.arange(length), mode="drop", unique_indices=True)

    return jax.vmap(one)(place)


@jax.custom_vjp
def permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows `index` `[n, rows]` of `x` `[n, length, ...]`, zero where the index is `length`.

    `inverse` is the inverse index from `invert`, so the backward pass is also a gather.
    """
    return jax.vmap(rows_of)(x, index)


permute.defvjp(
    lambda x, index, inverse: (permute(x, index, inverse), inverse),
    lambda inverse, d_out: (jax.vmap(rows_of)(d_out, inverse), None, None),
)


class Hyper(MultiHead):
    """Multi-head HyperAttention; options as in `hyper`, other arguments as in `MultiHead`.

    Raises:
      ValueError: an option out of its range.
    """

    paper = "Han et al. 2023, arXiv 2310.05869"
    computes = "`softmax` over a block of keys of similar hash and m sampled keys"
    cost = "n·(b + m), causal n·(b + m)·log n"
    function = staticmethod(hyper)
    exact = staticmethod(softmax)
    chosen = staticmethod(sampled_keys)
    near_on = ("clustered", "imbalanced")
    refuses: ClassVar = {"rows": "a single query sees all keys exactly, not a sample"}
    windowed = True
    draws = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        half = max(budget // 2, 1)
        return {"block": half, "samples": half, "chunk": 2 * budget}  # a token sees half of its chunk on average
