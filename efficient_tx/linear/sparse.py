"""Sparse: W has a fixed pattern of nonzero entries.

The nearest such matrix to a dense one keeps its largest entries (magnitude pruning). For inference it is stored as
Flash-LLM (Xia et al. 2023, arXiv 2309.10285) does on a GPU: loaded as sparse, multiplied as dense.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.linear.sparsity import count_kept, nonzero_only, sparse_draw, sparsify
from efficient_tx.linear.structured import Factor, Structured, Weight


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
        return PackedSparse.of(self)


def places(there: jax.Array) -> jax.Array:
    """The place of each kept entry among all of them, row after row, int32; `there` is bool `[n, m]`."""
    along = jnp.cumsum(there, axis=1, dtype=jnp.int32)
    above = jnp.cumsum(along[:, -1], dtype=jnp.int32) - along[:, -1]
    return above[:, None] + along - 1


@partial(jax.jit, static_argnames="kept")
def packed(sparse: jax.Array, kept: int) -> tuple[jax.Array, jax.Array]:
    """The `values` and the `bitmask` of `PackedSparse`, from a matrix `[n, m]`."""
    n, m = sparse.shape
    there = sparse != 0
    planes = jnp.pad(there, [(0, -n % 8), (0, 0)]).reshape(8, -1, m)
    bits = jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8)[:, None, None]
    bitmask = jnp.sum(jnp.where(planes, bits, 0), axis=0, dtype=jnp.uint8)
    values = jnp.zeros(kept, sparse.dtype).at[jnp.where(there, places(there), kept)].set(sparse, mode="drop")
    return values, bitmask


class PackedSparse(nnx.Module):
    """A sparse layer for inference: the kept entries, and a bit for every entry that says whether it is kept.

    Its output equals that of the original layer. The matrix is unpacked for each call and multiplied as a dense one.
    Its variables are no parameters: it cannot be trained.

    Args:
      values: `[kept]`, the kept entries of the weight `[in_features, out_features]`, row after row; zeros fill the end
        if an entry that could be kept is zero.
      bitmask: uint8 `[⌈in_features / 8⌉, out_features]`; with n such rows, bit p of row i is that of input i + p n.
      bias: `[out_features]` or None.
      in_features: width of the input.
      dtype: dtype of the computation; None promotes input, values and bias.
    """

    def __init__(
        self, values: jax.Array, bitmask: jax.Array, bias: jax.Array | None, *,
        in_features: int, dtype: jnp.dtype | None,
    ):  # fmt: skip
        self.in_features = in_features
        self.out_features = bitmask.shape[1]
        self.dtype = dtype
        self.param_dtype = values.dtype
        self.values = nnx.Variable(values)
        self.bitmask = nnx.Variable(bitmask)
        self.bias = None if bias is None else nnx.Variable(bias)

    @classmethod
    def of(cls, layer: Sparse) -> Self:
        """The packed form of a layer; raises ValueError as `Sparse.pack`."""
        sparse = layer.sparse[...]
        if not isinstance(sparse, jax.core.Tracer) and (count := int(jnp.count_nonzero(sparse))) > layer.kept:
            raise ValueError(f"the weight has {count} nonzero entries, and its pattern keeps {layer.kept}: project it")
        bias = None if layer.bias is None else layer.bias[...]
        values, bitmask = packed(sparse, layer.kept)
        return cls(values, bitmask, bias, in_features=layer.in_features, dtype=layer.dtype)

    def to_dense(self) -> jax.Array:
        """The weight, `[in_features, out_features]`, in the dtype of the layer that was packed."""
        planes = jnp.stack([self.bitmask[...] >> bit & 1 for bit in range(8)])
        there = planes.reshape(-1, self.out_features)[: self.in_features] == 1
        return jnp.where(there, self.values[...][places(there)], 0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`; raises ValueError for an input of another width."""
        self.check_width(x)
        arrays = [variable[...] for variable in (self.values, self.bias) if variable is not None]
        dtype = self.dtype or jnp.result_type(x, *arrays)
        out = x.astype(dtype) @ self.to_dense().astype(dtype)
        return out if self.bias is None else out + self.bias[...].astype(dtype)

    bytes_stored = Weight.bytes_stored
    check_width = Weight.check_width
