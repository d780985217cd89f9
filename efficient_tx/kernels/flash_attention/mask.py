"""Masks: which keys a query sees, as predicates that say of a whole block whether it is empty or full."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.kernels.flash_attention.fields import ArrayFields
from efficient_tx.tokens.mask import bool_mask


class Bounds(NamedTuple):
    """The least and the largest value in a block, NumPy arrays (known when traced) or jax arrays."""

    low: Any
    high: Any


class Coverage(NamedTuple):
    """Of a block of queries and keys: whether any pair may be allowed, and whether all surely are."""

    any: Any
    full: Any


@dataclasses.dataclass(frozen=True)
class Mask(ArrayFields):
    """A mask of one's own is a frozen dataclass that overrides `allowed`; `&`, `|` and `~` combine masks.

    Its fields are static, except two that it may have: `q_segments` and `k_segments`, numbers of queries `[batch or 1,
    queries]` and keys `[batch or 1, keys]`, which arrive in `allowed`. An array is combined as its `padding`.
    """

    __array_ufunc__ = None  # `array & mask` is a mask, not an array of masks

    def allowed(self, i: jax.Array, j: jax.Array, q_segment: Any, k_segment: Any) -> jax.Array:
        """Whether query i sees key j: bool, elementwise, broadcast to a block of any shape.

        Args:
          i, j: positions of query and key, int32; the last query stands at the last key, so i = index + keys − queries.
          q_segment, k_segment: segments of query and key, None where the mask has none.
        """
        raise NotImplementedError(f"{type(self).__name__} must define allowed")

    def coverage(self, i: Bounds, j: Bounds, q_segment: Any, k_segment: Any) -> Coverage:
        """What is known of blocks from the bounds of the arguments of `allowed`; segments may be None, unknown.

        `any` may be True and `full` False for a block where they need not be: that costs time, never correctness. Here
        `allowed` itself is evaluated; where that cannot be (segments, more than 2²⁸ pairs) nothing is known.
        """
        pairs = (i.high.max() - i.low.min() + 1.0) * (j.high.max() - j.low.min() + 1)
        if any(x is not None for x in self.segments) or pairs > MOST_PAIRS:
            return UNKNOWN
        bounds = (tuple(x.ravel().tolist()) for x in (*i, *j))
        return _evaluated(jax.tree.structure(self), *bounds)

    def check(self) -> None:
        """Raises TypeError, one line, for an array that is no segments and an `allowed` that is not bool of a block."""
        super().check()
        kind, segments = type(self).__name__, ("q_segments", "k_segments")
        for name in self._split()[0]:
            if name not in segments and not isinstance(getattr(self, name), Mask):
                raise TypeError(f"{kind}.{name} is an array: a mask's are q_segments and k_segments, others are tuples")
        i, j = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 1), (1, 2)))
        q_segment, k_segment = (jax.tree.map(lambda _, x=x: x, of) for of, x in zip(self.segments, (i, j)))
        found = jax.eval_shape(lambda *of: jnp.asarray(self.allowed(*of)), i, j, q_segment, k_segment)
        if found.dtype != bool or np.broadcast_shapes(found.shape, (3, 2)) != (3, 2):
            raise TypeError(f"{kind}.allowed gave {found.dtype} {found.shape} for i (3, 1) and j (1, 2): {WANTED}")

    def __bool__(self) -> bool:
        raise TypeError("a Mask is neither true nor false: combine masks by &, | and ~, not by and, or and not")

    def __and__(self, other: "Mask | jax.Array") -> "Mask":
        return And(self, as_mask(other))

    def __or__(self, other: "Mask | jax.Array") -> "Mask":
        return Or(self, as_mask(other))

    def __rand__(self, other: jax.Array) -> "Mask":
        return And(as_mask(other), self)

    def __ror__(self, other: jax.Array) -> "Mask":
        return Or(as_mask(other), self)

    def __invert__(self) -> "Mask":
        return Not(self)

    @property
    def segments(self) -> tuple[Any, Any]:
        """Segments of queries and of keys, in the form that `allowed` takes them."""
        return getattr(self, "q_segments", None), getattr(self, "k_segments", None)

    @property
    def real_keys(self) -> jax.Array | None:
        """bool `[batch or 1, keys]`: the others are seen by no query; None where that is not known."""
        return None


WANTED = "it must be bool, of a shape that broadcasts to (3, 2)"


@functools.lru_cache(maxsize=64)  # every implementation and pass of a program asks, and every layer and batch
def _evaluated(mask: Any, i_low: tuple, i_high: tuple, j_low: tuple, j_high: tuple) -> Coverage:
    """By `allowed` of all pairs of positions within the bounds; `mask` is the structure of one without arrays."""
    mask = jax.tree.unflatten(mask, [])
    keys, starts = np.arange(j_low[0], j_high[-1] + 1, dtype=np.int32), np.array(j_low) - j_low[0]
    any_, full = [], []
    with jax.ensure_compile_time_eval():
        for low, high in zip(i_low, i_high):
            rows = np.arange(low, high + 1, dtype=np.int32)[:, None]
            allowed = np.broadcast_to(mask.allowed(rows, keys[None], None, None), (rows.size, keys.size))
            any_.append(np.logical_or.reduceat(allowed.any(0), starts))
            full.append(np.logical_and.reduceat(allowed.all(0), starts))
    return Coverage(np.stack(any_), np.stack(full))


UNKNOWN = Coverage(True, False)
MOST_PAIRS = 2.0**28


@dataclasses.dataclass(frozen=True)
class Both(Mask):
    """Of two masks, combined elementwise; their segments come in pairs."""

    combine: ClassVar[Callable]
    first: Mask
    second: Mask

    @property
    def segments(self):
        pairs = tuple(zip(self.first.segments, self.second.segments))
        return tuple(None if pair == (None, None) else pair for pair in pairs)

    def _each(self, method, i, j, q_segment, k_segment):
        q_segments, k_segments = ((None, None) if pair is None else pair for pair in (q_segment, k_segment))
        return [getattr(m, method)(i, j, q, k) for m, q, k in zip((self.first, self.second), q_segments, k_segments)]

    def allowed(self, i, j, q_segment, k_segment):
        return self.combine(*self._each("allowed", i, j, q_segment, k_segment))

    def coverage(self, i, j, q_segment, k_segment):
        first, second = self._each("coverage", i, j, q_segment, k_segment)
        return Coverage(self.combine(first.any, second.any), self.combine(first.full, second.full))


class And(Both):
    """What both masks allow."""

    combine = staticmethod(operator.and_)

    @property
    def real_keys(self):
        known = [mask.real_keys for mask in (self.first, self.second) if mask.real_keys is not None]
        return functools.reduce(operator.and_, known) if known else None


class Or(Both):
    """What one of the masks allows."""

    combine = staticmethod(operator.or_)


@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """What a mask does not allow."""

    mask: Mask

    @property
    def segments(self):
        return self.mask.segments

    def allowed(self, i, j, q_segment, k_segment):
        return ~self.mask.allowed(i, j, q_segment, k_segment)

    def coverage(self, i, j, q_segment, k_segment):
        found = self.mask.coverage(i, j, q_segment, k_segment)
        return Coverage(found.full ^ True, found.any ^ True)


class Causal(Mask):
    """j ≤ i."""

    def allowed(self, i, j, q_segment, k_segment):
        return j <= i

    def coverage(self, i, j, q_segment, k_segment):
        return Coverage(j.low <= i.high, j.high <= i.low)


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """|i − j| < size."""

    size: int

    def allowed(self, i, j, q_segment, k_segment):
        return abs(i - j) < self.size

    def coverage(self, i, j, q_segment, k_segment):
        near = (j.low - i.high < self.size) & (i.low - j.high < self.size)
        return Coverage(near, (j.high - i.low < self.size) & (i.high - j.low < self.size))


@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """j < size."""

    size: int

    def allowed(self, i, j, q_segment, k_segment):
        return j < self.size

    def coverage(self, i, j, q_segment, k_segment):
        return Coverage(j.low < self.size, j.high < self.size)


@dataclasses.dataclass(frozen=True)
class Documents(Mask):
    """Query and key have the same number."""

    q_segments: Any
    k_segments: Any

    def allowed(self, i, j, q_segment, k_segment):
        return q_segment == k_segment

    def coverage(self, i, j, q_segment, k_segment):
        if q_segment is None:
            return UNKNOWN
        q, k = q_segment, k_segment
        return Coverage((q.low <= k.high) & (k.low <= q.high), (q.low == k.high) & (k.low == q.high))


@dataclasses.dataclass(frozen=True)
class Padding(Mask):
    """The key's number is not 0."""

    k_segments: Any

    @property
    def real_keys(self):
        return self.k_segments > 0

    def allowed(self, i, j, q_segment, k_segment):
        return k_segment > 0

    def coverage(self, i, j, q_segment, k_segment):
        return UNKNOWN if k_segment is None else Coverage(k_segment.high > 0, k_segment.low > 0)


def as_mask(other: Mask | jax.Array) -> Mask:
    """What a mask is combined with. Raises TypeError for anything but a mask or a key mask."""
    if isinstance(other, Mask):
        return other
    if not hasattr(other, "dtype"):
        raise TypeError(f"a Mask is combined with Masks and key masks, not with a {type(other).__name__}")
    return padding(other)


def causal() -> Mask:
    """Query i sees keys j ≤ i; the last query stands at the last key."""
    return Causal()


def window(size: int) -> Mask:
    """Query i sees keys with |i − j| < size.

    Raises:
      OptionError: a size below 1.
    """
    at_least(1, size=size)
    return Window(size)


def prefix(size: int) -> Mask:
    """Every query sees the first `size` keys: `causal() | prefix(n)` is a prefix language model.

    Raises:
      OptionError: a negative size.
    """
    at_least(0, size=size)
    return Prefix(size)


def documents(q_segments: jax.Array, k_segments: jax.Array | None = None) -> Mask:
    """Query and key see each other within a document: integers `[batch or 1, queries]` and `[batch or 1, keys]`.

    `k_segments` None: the keys are the queries' tokens. Blocks are skipped where the numbers' ranges do not meet, so
    documents that lie one after another cost what each costs alone.
    """
    q_segments = jnp.asarray(q_segments)
    return Documents(q_segments, q_segments if k_segments is None else jnp.asarray(k_segments))


def padding(mask: jax.Array) -> Mask:
    """Queries see the real keys: bool `[batch or 1, keys]`, True = real.

    Raises:
      ValueError: a mask of numbers other than 0 and 1.
    """
    return Padding(bool_mask(jnp.asarray(mask)).astype(jnp.int32))
