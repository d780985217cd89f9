"""Which blocks a kernel visits: for each block of rows the blocks of columns that its mask does not empty."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels.flash_attention.mask import Bounds, Coverage, Mask


class Visits(NamedTuple):
    """NumPy arrays where they depend on shapes only, else jax arrays, one list an example.

    Attributes:
      order: int32 `[batch or 1, row blocks, n]`, column blocks: the full ones, then those in which the mask is tested.
      full: int32 `[batch or 1, row blocks]`, number of the full ones.
      some: int32 `[batch or 1, row blocks]`, number of both.
    """

    order: Any
    full: Any
    some: Any

    @property
    def tests(self) -> bool:
        """Whether a block may have to be tested, as far as is known when the program is made."""
        return not isinstance(self.full, np.ndarray) or bool((self.full < self.some).any())

    @property
    def fills(self) -> bool:
        """Whether a block may be full, as far as is known when the program is made."""
        return not isinstance(self.full, np.ndarray) or bool(self.full.any())

    @property
    def in_order(self) -> bool:
        """Whether every row visits the first blocks one by one, as far as is known when the program is made."""
        if not isinstance(self.order, np.ndarray):
            return False
        numbers = np.arange(self.order.shape[-1])
        return bool(((self.order == numbers) | (numbers >= self.some[..., None])).all())

    @property
    def listed(self) -> Any:
        """`order`, of which nothing need be known where every row visits the first blocks."""
        return np.zeros(1, np.int32) if self.in_order else self.order


def same(counts: Any) -> int | None:
    """The number that all rows have, where it is known when the program is made."""
    found = set(counts.flat) if isinstance(counts, np.ndarray) else ()
    return int(found.pop()) if len(found) == 1 else None


def entry(counts: Any, ref: Any, at: tuple) -> Any:
    """The number at a row, which a kernel reads only where it must: loads would wait for it."""
    return ref[at] if (known := same(counts)) is None else known


class Sizes(NamedTuple):
    """Numbers of queries and keys, and of those in a block."""

    queries: int
    keys: int
    query_block: int
    key_block: int


def visits(mask: Mask | None, sizes: Sizes) -> tuple[Visits, Visits]:
    """The key blocks of every query block, and the query blocks of every key block."""
    i, j = (_positions(*of) for of in ((sizes.queries, sizes.query_block), (sizes.keys, sizes.key_block)))
    # Rows and columns that stand for nothing are tested for, so that a block of them is never full.
    real = _whole(sizes.queries, sizes.query_block)[:, None] & _whole(sizes.keys, sizes.key_block)
    shape = real.shape
    i = Bounds(*(x[:, None] + sizes.keys - sizes.queries for x in i))
    j = Bounds(*(x[None] for x in j))
    if mask is None:
        coverage = possible = Coverage(True, True)
    else:
        segments = [
            jax.tree.map(lambda x, size=size, axis=axis: _bounds(x, size, axis), of)
            for of, size, axis in zip(mask.segments, (sizes.query_block, sizes.key_block), (2, 1))
        ]
        coverage, possible = mask.coverage(i, j, *segments), mask.coverage(i, j, None, None)
    some, full = coverage.any, coverage.full & real
    xp = np if all(isinstance(x, np.ndarray | np.bool | bool) for x in (some, full)) else jnp
    some, full = (xp.broadcast_to(x, (x.shape[0] if xp.ndim(x) == 3 else 1, *shape)) for x in (some, full))
    possible = np.broadcast_to(possible.any, shape)
    return _listed(some, full, possible, xp), _listed(some.mT, full.mT, possible.T, xp)


def most_listed(mask: Mask | None, sizes: Sizes, enough: int) -> int:
    """How many numbers the longer of the two lists has, or `enough` if it cannot have more."""
    arrays = jax.tree.leaves(mask)
    pairs = -(-sizes.queries // sizes.query_block) * -(-sizes.keys // sizes.key_block)
    if mask is None:
        return 0
    if max([1, *map(len, arrays)]) * pairs <= enough:
        return enough
    # Of a mask that depends on arrays the shapes are known, and nothing else.
    both = jax.eval_shape(partial(visits, sizes=sizes), mask) if arrays else visits(mask, sizes)
    return max(seen.listed.size for seen in both)


def _positions(length: int, block: int) -> Bounds:
    low = np.arange(0, length, block)
    return Bounds(low, np.minimum(low + block, length) - 1)


def _whole(length: int, block: int) -> np.ndarray:
    return np.arange(0, length, block) + block <= length


def _bounds(x: jax.Array, block: int, axis: int) -> Bounds:
    """Bounds of segments `[batch or 1, length]` in every block: `[batch or 1, blocks]` with one more `axis`."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge").reshape(x.shape[0], -1, block)
    return Bounds(*(jnp.expand_dims(y, axis) for y in (x.min(-1), x.max(-1))))


def _listed(some: Any, full: Any, possible: np.ndarray, xp: Any) -> Visits:
    """Lists of columns, as long as the longest that is possible."""
    length = max(1, int(possible.sum(-1).max()))
    full = full & some
    rank = xp.where(full, 0, xp.where(some, 1, 2))
    order = xp.argsort(rank, axis=-1, stable=True)[..., :length]
    return Visits(*(x.astype(np.int32) for x in (order, full.sum(-1), some.sum(-1))))
