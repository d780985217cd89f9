"""The sizes of sampled_block_attention that are verified: HyperAttention's, in both directions and causal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.sampled_block_attention import sampled_block_attention
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes

AXES = {
    "length": (1024, 4096, 65536),
    "sequences": (2, 16),
    "dim": (64, 128),
    "sizes": ("128/128", "128/256"),
    "samples": (64, 256),
    "pieces": (1, 4),
}
SMALL = {
    "length": (1, 75, 96),
    "sequences": (2,),
    "dim": (16,),
    "sizes": ("16/16", "16/32"),
    "samples": (20,),
    "pieces": (1, 3),
}
NOWHERE = 1 << 30  # the row of a query or key that is in none
# Around the kernel, queries and outputs are copies in whole tiles of one block, of at most twice as many rows, and keys
# and values in the order of their blocks. XLA moves rows of less than 128 numbers padded to as many on a TPU, and lays
# them out anew before and after.
MOST_TEMPORARIES, MOST_OF_SHORT_ROWS = 2.0, 2.75


def case(length: int, sequences: int, dim: int, sizes: str, samples: int, pieces: int) -> Case | None:
    """`sizes`: rows per tile / per block; `pieces`: parts of a sequence, whose queries see the keys of their own."""
    tile, block = map(int, sizes.split("/"))
    if pieces > 1 and (length % (pieces * block) or length <= pieces * samples):
        return None  # pieces are whole blocks, and have more keys than are sampled
    x, place = shape("float32", sequences, length, dim), shape("int32", sequences, length)
    arrays = x, x, x, place, place, place, shape("int32", sequences, pieces, samples)
    draws = {3: placed, 4: keys_placed, 5: partial(standing, pieces), 6: partial(rows_of_pieces, length // pieces)}
    temporaries = MOST_TEMPORARIES if dim >= 128 else MOST_OF_SHORT_ROWS
    return Case(partial(attend, Sizes(tile, block)), arrays, draws, temporaries=temporaries)


def attend(sizes, q, k, v, q_place, k_place, before, sample, **keywords):
    """`before`: the key row at which each query row stands, in its own piece; `sample`: key rows."""
    sequences, length, dim = q.shape
    q_rows, k_rows = (-(-length // size) * size for size in sizes)
    q_order, k_order = jax.vmap(partial(order, q_rows))(q_place), jax.vmap(partial(order, k_rows))(k_place)
    block = jnp.pad(before // sizes.block, ((0, 0), (0, q_rows - length)))
    tiles, pieces = q_rows // sizes.tile, sample.shape[1]
    sampled = jax.vmap(lambda order, sample: order[sample])(k_order, sample)
    choice = Choice(
        q_order=q_order,
        q_place=q_place,
        k_order=k_order,
        k_place=k_place,
        block=jnp.where(q_order < length, block, -1),
        group=jnp.broadcast_to(np.arange(tiles) * pieces // tiles, (sequences, tiles)),
        sample=sample,
        offset=jnp.where(sampled < length, np.log(length / sample[0].size), -jnp.inf).astype(q.dtype),
    )
    return sampled_block_attention(q * dim**-0.5, k, v, choice, sizes=sizes, **keywords)


def order(rows: int, place: jax.Array) -> jax.Array:
    """The query or key in each row, their number where there is none."""
    return jnp.full(rows, place.size).at[place].set(jnp.arange(place.size), mode="drop", unique_indices=True)


def placed(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """In any order; one in ten is in no row."""
    place = r.permuted(np.broadcast_to(np.arange(sizes[1]), sizes), axis=1)
    return np.where(r.random(sizes) < 0.1, NOWHERE, place)


def keys_placed(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """The same; the last sequence has no keys."""
    place = placed(r, sizes)
    place[-1] = NOWHERE
    return place


def rows_of_pieces(length: int, r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Rows of each piece of this length, `[sequences, pieces, n]`."""
    return r.integers(0, length, sizes) + length * np.arange(sizes[1])[:, None]


def standing(pieces: int, r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """As many as there are rows, sorted."""
    length = sizes[1] // pieces
    return np.sort(rows_of_pieces(length, r, (sizes[0], pieces, length))).reshape(sizes)
