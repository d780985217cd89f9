"""Sparse: W has a fixed pattern of nonzero entries.

The nearest such matrix to a dense one keeps its largest entries (magnitude pruning). For inference it is stored as
Flash-LLM (Xia et al. 2023, arXiv 2309.10285) does on a GPU: loaded as sparse, multiplied as dense.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from efficient_tx.linear.bit_planes import from_planes, to_planes
from efficient_tx.linear.packed import Packed
from efficient_tx.linear.sparsity import count_kept, nonzero_only, sparse_draw, sparsify
from efficient_tx.linear.structured import Factor, Structured


class Sparse(Structured):
    """y = x S, with a sparse matrix S.

    The pattern of S is fixed and has no array of its own: an entry that is exactly zero is not a parameter and gets no
    gradient. It stays zero with any optimizer that does not change zeros without gradient (Adam, Lion, Muon and SGD).
    XLA has no sparse product, so S is stored for training and multiplied as a dense matrix: `parameters` and
    `multiplies` count the kept entries, but time and memory of training are those of a dense layer. `pack` stores the
    kept entries only.

    `from_dense` keeps the largest entries, which is exactly the nearest matrix.

    Args:
      density: fraction of the entries that "top" keeps, in (0, 1]; None is a half. Must be None for "2:4".
      pattern: pattern of S, "top" (the largest entries of the whole matrix) or "2:4" (two of each four entries along
        the input axis).

    Raises:
      ValueError: an unknown pattern, a density outside (0, 1] or with "2:4".
    """

    paper = "Han et al. 2015, arXiv 1506.02626; Mishra et al. 2021, arXiv 2104.08378"
    computes = "S, a fixed pattern of nonzero entries"
    size = "density·n², stored as n², packed for inference with a bit per entry"
    nearest = "its largest entries"
    of_one_size: ClassVar = {"pattern": "2:4"}

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[float]]:
        steps = min(100, n * m)
        return "density", [step / steps for step in range(1, steps + 1)]

    def __init__(
        self, in_features: int, out_features: int, *,
        density: float | None = None, pattern: str = "top", **common: Any,
    ):  # fmt: skip
        self.pattern = pattern
        self.kept = count_kept(in_features, out_features, pattern=pattern, density=density, default=0.5)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        return {"sparse": Factor((self.in_features, self.out_features), fan_in=self.kept / self.out_features)}

    def draw(self, key: jax.Array, name: str, factor: Factor) -> jax.Array:
        drawn = super().draw(key, name, factor)
        drawn = sparse_draw(drawn, pattern=self.pattern, kept=self.kept, variance=1 / factor.fan_in)
        return drawn.astype(self.param_dtype)

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        return {"sparse": nonzero_only(self.sparse[...]).astype(dtype)}

    def multiply(self, x: jax.Array, *, sparse: jax.Array) -> jax.Array:
        return x @ sparse

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        return {"sparse": sparsify(kernel, pattern=self.pattern, kept=self.kept)}

    @property
    def parameters(self) -> int:
        """Number of trained parameters; of S only the kept entries count."""
        return super().parameters - self.in_features * self.out_features + self.kept

    @property
    def multiplies(self) -> int:
        """Multiplications that a sparse product needs, one for each kept entry; XLA makes one for every entry."""
        return self.kept

    def pack(self) -> "PackedSparse":
        """The layer for inference, without its zeros.

        Raises:
          ValueError: S has more nonzero entries than its pattern keeps. Not noticed under jit, where the first ones
            are packed.
        """
        return PackedSparse(self)


def places(there: jax.Array) -> jax.Array:
    """The place of each kept entry among all of them, row after row, int32; `there` is bool `[n, m]`."""
    along = jnp.cumsum(there, axis=1, dtype=jnp.int32)
    above = jnp.cumsum(along[:, -1], dtype=jnp.int32) - along[:, -1]
    return above[:, None] + along - 1


@partial(jax.jit, static_argnames="kept")
def kept_values(sparse: jax.Array, kept: int) -> jax.Array:
    """The `values` of `PackedSparse`, from a matrix `[n, m]`."""
    there = sparse != 0
    return jnp.zeros(kept, sparse.dtype).at[jnp.where(there, places(there), kept)].set(sparse, mode="drop")


class PackedSparse(Packed):
    """The kept entries, and a bit for every entry that says whether it is kept; multiplied as a dense matrix.

    Args:
      layer: a layer with a matrix `sparse`, of which `kept` entries are kept.
      **arrays: what is stored besides, by name.

    Attributes:
      values: `[kept]`, the kept entries of the weight `[in_features, out_features]`, row after row; zeros fill the end
        if an entry that could be kept is zero.
      bitmask: uint8 `[⌈in_features / 8⌉, out_features]`; with n such rows, bit p of row i is that of input i + p n.

    Raises:
      ValueError: as in `Sparse.pack`.
    """

    multiply = Sparse.multiply

    def __init__(self, layer: Structured, **arrays: jax.Array):
        sparse = layer.sparse[...]
        if not isinstance(sparse, jax.core.Tracer) and (count := int(jnp.count_nonzero(sparse))) > layer.kept:
            raise ValueError(f"the weight has {count} nonzero entries, and its pattern keeps {layer.kept}: project it")
        (bitmask,) = to_planes((sparse != 0).astype(jnp.uint8), 1)
        super().__init__(layer, values=kept_values(sparse, layer.kept), bitmask=bitmask, **arrays)

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        there = from_planes(self.bitmask[...][None], self.in_features) == 1
        return {"sparse": jnp.where(there, self.values[...][places(there)], 0).astype(dtype)}
