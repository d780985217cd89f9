"""LowRankPlusSparse: W = D U + S, a low-rank matrix plus a sparse matrix.

The decomposition is that of Candès et al. 2011, arXiv 0912.3599 (robust principal component analysis). Here it is
fitted with given rank and number of entries by alternating best approximations, as in GoDec (Zhou and Tao 2011). Two of
four entries along the input axis is the pattern of Mishra et al. 2021, arXiv 2104.08378.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least
from efficient_tx.linear.sparse import PackedSparse
from efficient_tx.linear.sparsity import chosen, count_kept, nonzero_only, sparse_draw, sparsify
from efficient_tx.linear.structured import Factor, Structured, scale_array
from efficient_tx.numerics.factorisations import qr, svd

ITERATIONS = 100
SOFT_ITERATIONS = 400
# The softness of S at the start and at the end of the soft iterations, relative to the root mean square of W.
SOFTEST, HARDEST = 0.3, 0.01


def soften(matrix: jax.Array, softness: jax.Array, *, pattern: str, kept: int) -> jax.Array:
    """`sparsify` in the limit of no softness: each entry times σ((its square − threshold) / softness²).

    The threshold is the middle between the smallest square of a chosen entry and the largest one of the others, of each
    four entries or of the whole matrix.
    """
    n, m = matrix.shape
    square, there = jnp.square(matrix), chosen(matrix, pattern=pattern, kept=kept)
    groups = (1, n * m, 1) if pattern == "top" else (-1, 4, m)

    def grouped(x, fill):
        pads = ((0, 0 if pattern == "top" else -n % 4), (0, 0))
        return jnp.pad(x, pads, constant_values=fill).reshape(groups)

    least = grouped(jnp.where(there, square, jnp.inf), jnp.inf).min(1, keepdims=True)
    most = grouped(jnp.where(there, 0, square), 0).max(1, keepdims=True)
    weights = jax.nn.sigmoid((grouped(square, 0) - (least + most) / 2) / softness**2)
    return matrix * weights.reshape(-1, m)[:n]


@partial(jax.jit, static_argnames=("rank", "pattern", "kept"))
def decompose(kernel: jax.Array, *, rank: int, pattern: str, kept: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """down `[n, rank]`, up `[rank, m]` and sparse `[n, m]` that fit `kernel` `[n, m]`: see `LowRankPlusSparse`."""

    def improve(_, state):
        _, up, sparse = state
        down, _ = qr((kernel - sparse) @ up.T)
        up = down.T @ (kernel - sparse)
        return down, up, sparsify(kernel - down @ up, pattern=pattern, kept=kept)

    def descend(sparse):
        u, s, v = svd(kernel - sparse)
        down, up = u[:, :rank], s[:rank, None] * v[:rank]
        first = down, up, sparsify(kernel - down @ up, pattern=pattern, kept=kept)
        down, up, sparse = jax.lax.fori_loop(0, ITERATIONS, improve, first)
        return (down, up, sparse), jnp.linalg.norm(kernel - down @ up - sparse)

    def harden(i, state):
        """Like `improve`, but every entry is in both parts, less and less so."""
        _, up, sparse = state
        down, _ = qr((kernel - sparse) @ up.T)
        up = down.T @ (kernel - sparse)
        softness = scale * SOFTEST * (HARDEST / SOFTEST) ** (i / (SOFT_ITERATIONS - 1))
        return down, up, soften(kernel - down @ up, softness, pattern=pattern, kept=kept)

    scale = jnp.sqrt(jnp.mean(jnp.square(kernel)))
    scale = jnp.where(scale > 0, scale, 1)
    u, s, v = svd(kernel)
    soft = u[:, :rank], s[:rank, None] * v[:rank], jnp.zeros_like(kernel)
    down, up, _ = jax.lax.fori_loop(0, SOFT_ITERATIONS, harden, soft)
    hardened = sparsify(kernel - down @ up, pattern=pattern, kept=kept)
    starts = jnp.stack([sparsify(kernel, pattern=pattern, kept=kept), jnp.zeros_like(kernel), hardened])
    found, errors = jax.lax.map(descend, starts)
    down, up, sparse = jax.tree.map(lambda both: both[jnp.argmin(errors)], found)
    u, s, v = svd(up)
    root = jnp.sqrt(s)
    return down @ u * root, root[:, None] * v, sparse


class LowRankPlusSparse(Structured):
    """y = x D U + x S, with D `[in_features, rank]`, U `[rank, out_features]` and a sparse matrix S.

    The pattern of S is fixed and has no array of its own: an entry that is exactly zero is not a parameter and gets no
    gradient. It stays zero with any optimizer that does not change zeros without gradient (Adam, Lion, Muon and SGD).
    XLA has no sparse product, so S is stored for training and multiplied as a dense matrix: `parameters` and
    `multiplies` count its kept entries, but time and memory of training are those of a dense S. `pack` stores the kept
    entries only.

    `from_dense` has three starts: the entries of W that S would keep; S = 0; and the end of 400 soft iterations, in
    which every entry is first in both parts and its share is then decided more and more sharply. From each of them it
    repeats 100 times: the column space of D from W − S and the previous rows, the best U for it, the best S for
    W − D U. Each is the best one given the other two, so the error never increases, and the best result is at least as
    good as the best low-rank or the best sparse matrix alone. Finding the global optimum is hard. A matrix that is such
    a sum, with the default rank, is found if S has a tenth of the entries (22 of 24 draws from 13 × 7 to 128 × 96, up
    to rounding). If S has half of them (2:4), it is found in some draws from 24 × 36 on; else the result is another
    local optimum, 1 to 7 % of its norm away.

    Args:
      rank: rank of D U, at most the smaller side; None is an eighth of the smaller side.
      pattern: pattern of S, "2:4" (two of each four entries along the input axis) or "top" (the largest entries of the
        whole matrix).
      density: fraction of the entries that "top" keeps, in (0, 1]; None is a quarter. Must be None for "2:4".

    Raises:
      ValueError: a rank below 1, an unknown pattern, a density outside (0, 1] or with "2:4".
    """

    paper = "Candès et al. 2011, arXiv 0912.3599"
    computes = "D U + S"
    size = "2·n·rank + n²/2 with 2:4, stored as n², packed for inference with a bit per entry"
    nearest = "alternating between the parts, a local optimum"

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "rank", range(1, min(n, m) + 1)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int | None = None,
        pattern: str = "2:4",
        density: float | None = None,
        **common: Any,
    ):
        side = min(in_features, out_features)
        at_least(1, rank=rank)
        self.rank = min(side, -(-side // 8) if rank is None else rank)
        self.pattern = pattern
        self.kept = count_kept(in_features, out_features, pattern=pattern, density=density, default=0.25)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        # Each of the two parts contributes half of the variance.
        kept = self.kept / self.out_features
        return {
            "down": Factor((self.in_features, self.rank), fan_in=self.in_features),
            "up": Factor((self.rank, self.out_features), fan_in=self.rank, variance=0.5 / self.rank),
            "sparse": Factor((self.in_features, self.out_features), fan_in=kept, variance=0.5 / kept),
        }

    def draw(self, key: jax.Array, name: str, factor: Factor) -> jax.Array:
        drawn = super().draw(key, name, factor)
        if name != "sparse":
            return drawn
        drawn = sparse_draw(drawn, pattern=self.pattern, kept=self.kept, variance=factor.variance)
        return drawn.astype(self.param_dtype)

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        return super().weights(dtype) | {"sparse": nonzero_only(self.sparse[...]).astype(dtype)}

    def multiply(self, x: jax.Array, *, down: jax.Array, up: jax.Array, sparse: jax.Array) -> jax.Array:
        return x @ down @ up + x @ sparse

    def rescale(self, factor: float) -> None:
        scale_array(self.up, factor)
        scale_array(self.sparse, factor)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        down, up, sparse = decompose(kernel, rank=self.rank, pattern=self.pattern, kept=self.kept)
        return {"down": down, "up": up, "sparse": sparse}

    @property
    def parameters(self) -> int:
        """Number of trained parameters; of S only the kept entries count."""
        return super().parameters - self.in_features * self.out_features + self.kept

    @property
    def multiplies(self) -> int:
        """Multiplications; those of S that a sparse product needs, as of `Sparse`. XLA makes one for every entry."""
        return super().multiplies - self.in_features * self.out_features + self.kept

    def pack(self) -> "PackedLowRankPlusSparse":
        """The layer for inference, without the zeros of S.

        Raises:
          ValueError: S has more nonzero entries than its pattern keeps. Not noticed under jit, where the first ones
            are packed.
        """
        return PackedLowRankPlusSparse(self)


class PackedLowRankPlusSparse(PackedSparse):
    """S as in `PackedSparse`; D and U as they are.

    Attributes:
      down: D, `[in_features, rank]`.
      up: U, `[rank, out_features]`.
    """

    multiply = LowRankPlusSparse.multiply

    def __init__(self, layer: LowRankPlusSparse):
        super().__init__(layer, down=layer.down[...], up=layer.up[...])

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        return {"down": self.down[...].astype(dtype), "up": self.up[...].astype(dtype)} | super().weights(dtype)
