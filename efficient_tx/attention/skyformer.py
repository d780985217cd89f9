"""Skyformer (Chen et al. 2021, arXiv 2111.00035): kernelized attention through the Nyström method, linear in length.

The Gaussian kernel between queries and keys, C = κ(Q, K) with κ(x, y) = exp(−‖x − y‖² / (2√K)), is a block of the
positive semi-definite κ([Q; K], [Q; K]). With landmarks Z among the rows of [Q; K], half from each, Nyström gives

    out = κ(Q, Z) (κ(Z, Z) + ridge·I)⁻¹ κ(Z, K) V.

Unlike the published code: landmarks are drawn without replacement, so that all 2L of them are the exact limit; the
scale follows the real head size; the inverse is a Cholesky solve by default, and the published iteration, where asked
for, starts from the identity instead of the matrix over one maximum of the batch: no example sees another, and the
error of the start is I − P where it was about I − P² / max.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp

from efficient_tx.attention.kernelized import kernelized
from efficient_tx.attention.multihead import MultiHead
from efficient_tx.attention.shapes import key_mask, repeat_heads
from efficient_tx.kernels import flash_attention
from efficient_tx.numerics.random import evaluation_keys, example_keys, fold, sample_tokens
from efficient_tx.numerics.spd import newton_inverse, spd_solve


def skyformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, landmarks: int = 128, ridge: float = 0.1,
    inverse: str = "cholesky", iterations: int = 6,
) -> jax.Array:  # fmt: skip
    """Approximates `kernelized` with `landmarks` tokens: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens. With as many queries as keys it marks
        the queries too; otherwise landmarks come from the keys only.
      key: draws the landmarks: one key per example `[batch]`, or one, folded per example; None (evaluation) draws
        every example's with the same fixed key. All heads share the positions.
      landmarks: how many; an example with fewer real queries and keys uses all of them.
      ridge: added to the diagonal of the landmarks' kernel, above 0.
      inverse: "cholesky", or "iteration": the published Newton-type one on the kernel normalised by its row sums.
      iterations: steps of "iteration".

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for an example without keys. The arithmetic is float32
      at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_options(landmarks, ridge, inverse, iterations)
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    mask = key_mask(mask, batch, keys)
    shared = repeat_heads(k, heads, "k")

    draws = evaluation_keys(batch) if key is None else example_keys(key, batch)
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    from_q = landmarks // 2 if queries == keys else 0
    drawn = [draw(shared, real, fold(draws, 1), landmarks - from_q)]
    if from_q:
        drawn.append(draw(q, real, fold(draws, 0), from_q))
    z, valid = (jnp.concatenate(parts, axis=1) for parts in zip(*drawn))

    sums = flash_attention(z.astype(dtype), k.astype(dtype), v.astype(dtype), score="gaussian", mask=mask)
    valid = valid[:, None, :, None]
    eye = jnp.eye(z.shape[1], dtype=dtype)
    # A landmark that does not exist is a row of the identity with nothing on its right side: it adds zero.
    core = jnp.where(valid & valid.mT, gaussian(z.astype(dtype)), eye) + ridge * eye
    weights = core_solve(core, jnp.where(valid, sums.swapaxes(1, 2), 0), inverse, iterations)
    return flash_attention(q, z, weights.swapaxes(1, 2), score="gaussian")


def draw(x: jax.Array, real: jax.Array, keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`count` real tokens of each example of `x` `[batch, length, heads, dim]`, and which of them exist (else zero)."""
    position, valid = sample_tokens(keys, real, count)
    drawn = jax.vmap(lambda x, position: x.at[position].get(unique_indices=True))(x, position)
    return jnp.where(valid[:, :, None, None], drawn, 0), valid


def gaussian(z: jax.Array) -> jax.Array:
    """exp(−‖z_i − z_j‖² / (2√K)), `[batch, heads, count, count]`, from `[batch, count, heads, K]`."""
    norm = jnp.square(z).sum(-1).mT
    dot = jnp.einsum("bnhd,bmhd->bhnm", z, z, precision=jax.lax.Precision.HIGHEST)
    return jnp.exp((dot - norm[..., :, None] / 2 - norm[..., None, :] / 2) * z.shape[-1] ** -0.5)


def core_solve(core: jax.Array, sums: jax.Array, inverse: str, iterations: int) -> jax.Array:
    """core⁻¹ sums, `[batch, heads, landmarks, v_dim]`."""
    if inverse == "cholesky":
        return spd_solve(core, sums)
    # Normalised by its row sums the core has its spectrum in (0, 1], with 1 in it (their Lemma 3).
    d = jax.lax.rsqrt(core.sum(-1, keepdims=True))
    eye = jnp.broadcast_to(jnp.eye(core.shape[-1], dtype=core.dtype), core.shape)
    inverse, _ = newton_inverse(d * core * d.mT, iterations, start=eye)
    return d * jnp.matmul(inverse, d * sums, precision=jax.lax.Precision.HIGHEST)


def check_options(landmarks: int, ridge: float, inverse: str, iterations: int) -> None:
    """Raises ValueError, one line, for the first option that is out of its range."""
    if landmarks < 2:
        raise ValueError(f"landmarks is {landmarks}: skyformer needs at least 2, one query and one key")
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}: it must be above 0, or landmarks that coincide make the kernel singular")
    if inverse not in ("cholesky", "iteration"):
        raise ValueError(f"inverse is {inverse!r}: it must be 'cholesky' or 'iteration'")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}: it must be at least 1")


class Skyformer(MultiHead):
    """Multi-head Skyformer attention; options as `skyformer`, the other arguments as `MultiHead`.

    Raises:
      ValueError: `causal=True`, or an option out of its range.
    """

    paper = "Chen et al. 2021, arXiv 2111.00035"
    computes = "`kernelized` through the Nyström method with m landmarks"
    cost = "n·m + m³"
    function = staticmethod(skyformer)
    exact = staticmethod(kernelized)
    can_be_causal: ClassVar[bool] = False  # the landmarks see the whole sequence
    samples: ClassVar[bool] = True

    @staticmethod
    def within(budget):
        return {"landmarks": budget}

    def __init__(
        self, features: int, *,
        landmarks: int = 128, ridge: float = 0.1, inverse: str = "cholesky", iterations: int = 6, **common,
    ):  # fmt: skip
        check_options(landmarks, ridge, inverse, iterations)
        super().__init__(features, **common)
        self.landmarks, self.ridge, self.inverse, self.iterations = landmarks, ridge, inverse, iterations

    def attend(self, q, k, v, *, mask, key):
        return skyformer(
            q, k, v, mask=mask, key=key,
            landmarks=self.landmarks, ridge=self.ridge, inverse=self.inverse, iterations=self.iterations,
        )  # fmt: skip
