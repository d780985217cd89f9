"""Skyformer (Chen et al. 2021, arXiv 2111.00035): kernelized attention by the Nyström method, linear in length.

The Gaussian kernel between queries and keys, C = κ(Q, K) with κ(x, y) = exp(−‖x − y‖² / (2√K)), is a block of the
positive semi-definite κ([Q; K], [Q; K]). With landmarks Z from the rows of [Q; K], half from Q and half from K, the
Nyström method gives

    out = κ(Q, Z) (κ(Z, Z) + ridge·I)⁻¹ κ(Z, K) V.

Unlike the published code: landmarks are drawn without replacement, so using all 2L tokens is the exact limit. The scale
follows the actual head size. The inverse is a Cholesky solve by default. The published iteration is an option; it
starts from the identity instead of the matrix divided by one maximum over the batch, so no example depends on another,
and the initial error is I − P instead of about I − P² / max. Other landmarks are options: see `choice`, and
`accumulate` for signed sums of tokens.
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.kernelized import kernelized
from efficient_tx.checks import OptionError, at_least, one_of
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.landmarks import draw_by_weight, kernel_leverage, lloyd, tokens_at
from efficient_tx.numerics.random import evaluation_keys, example_keys, fold, sample_tokens, take_tokens
from efficient_tx.numerics.spd import newton_inverse, spd_solve
from efficient_tx.tokens.mask import key_mask, repeat_heads
from efficient_tx.tokens.segments import segment_means

CHOICES = ("uniform", "segments", "leverage", "kmeans")
INVERSES = ("cholesky", "iteration")


def check_options(*, landmarks, ridge, inverse, iterations, choice, accumulate):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if landmarks < 2:
        raise OptionError("landmarks", landmarks, "skyformer needs at least 2, one query and one key")
    if not ridge > 0:
        raise OptionError("ridge", ridge, "it must be above 0, or landmarks that coincide make the kernel singular")
    check_inverse(inverse, iterations)
    one_of(CHOICES, choice=choice)
    at_least(1, accumulate=accumulate)
    if accumulate > 1 and choice != "uniform":
        raise OptionError("accumulate", accumulate, f"it needs choice='uniform', not {choice!r}")


def check_inverse(inverse: str, iterations: int) -> None:
    """Raises ValueError, one line, unless `inverse` is a known method and `iterations` is in its range."""
    one_of(INVERSES, inverse=inverse)
    at_least(1, iterations=iterations)


@checked_by(check_options)
def skyformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, landmarks: int = 128, ridge: float = 0.1,
    inverse: str = "cholesky", iterations: int = 6, choice: str = "uniform", accumulate: int = 1,
) -> jax.Array:  # fmt: skip
    """Approximates `kernelized` with `landmarks` landmarks: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens. With as many queries as keys it marks
        the queries too; otherwise landmarks come from the keys only.
      key: draws the landmarks: one key per example `[batch]`, or a single key, folded per example; None (evaluation)
        means the same fixed key for every example.
      landmarks: number of landmarks; an example with fewer real queries and keys uses all of them.
      ridge: number above 0, added to the diagonal of the landmarks' kernel matrix.
      inverse: method to solve with the landmarks' kernel matrix: "cholesky", or "iteration", the published Newton-type
        iteration on the matrix normalised by its row sums.
      iterations: steps of the method "iteration".
      choice: choice of the landmarks: "uniform", "segments", "leverage" or "kmeans". "uniform": uniform samples, half
        from the queries and half from the keys, at the same positions in all heads. "segments": means of consecutive
        tokens, half of the queries and half of the keys, without sampling. "leverage": each head samples queries and
        keys by their ridge leverage scores; for inputs with a few tokens far from the others. "kmeans": the means after
        four steps of Lloyd's algorithm from the landmarks of "leverage".
      accumulate: number of tokens per landmark, drawn uniformly among queries and keys and summed with random signs:
        the sketch of Chen and Yang (2021, arXiv 2103.04031). All time except the solve grows by this factor.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for an example without keys. The arithmetic is float32
      at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    batch, keys = k.shape[:2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    mask = key_mask(mask, batch, keys)
    draws = evaluation_keys(batch) if key is None else example_keys(key, batch)
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    parts = parts_of(q, k)
    if accumulate > 1:
        z, valid, signs = draw_sketch(*stacked(parts, real), draws, landmarks, accumulate)
    else:
        z, valid = choose(parts, real, draws, landmarks, choice, ridge)

    sums = flash_attention(z.astype(dtype), k.astype(dtype), v.astype(dtype), score="gaussian", mask=mask)
    sums, z_heads = sums.swapaxes(1, 2), z.astype(dtype).swapaxes(1, 2)
    core = gaussian_gram(z_heads)
    if accumulate > 1:
        core, sums, valid = merge(merge(core, signs).mT, signs), merge(sums, signs), valid[:, :landmarks]
    valid = valid[:, None, :, None]
    eye = jnp.eye(core.shape[-1], dtype=dtype)
    # A missing landmark is a row of the identity with a zero right-hand side, so it adds zero.
    core = jnp.where(valid & valid.mT, core, eye) + ridge * eye
    weights = core_solve(core, jnp.where(valid, sums, 0), inverse, iterations)
    if accumulate > 1:
        weights = (signs[:, None, :, :, None] * weights[:, :, None]).reshape(*z_heads.shape[:3], -1)
    return flash_attention(q, z, weights.swapaxes(1, 2), score="gaussian")


def landmark_tokens(
    q: jax.Array, k: jax.Array, *,
    mask: jax.Array | None = None, landmarks: int = 128, ridge: float = 0.1, choice: str = "uniform",
    accumulate: int = 1,
) -> jax.Array:  # fmt: skip
    """The landmarks at evaluation, see `Mixer.chosen`; arguments as in `skyformer`."""
    real, draws, parts = key_mask(mask, *k.shape[:2]), evaluation_keys(len(k)), parts_of(q, k)
    real = jnp.ones(k.shape[:2], bool) if real is None else real
    if accumulate > 1:
        z, _, signs = draw_sketch(*stacked(parts, real), draws, landmarks, accumulate)
        return merge(z.swapaxes(1, 2), signs).swapaxes(1, 2)
    return choose(parts, real, draws, landmarks, choice, ridge)[0]


def parts_of(q: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
    """What landmarks are drawn from, queries and keys, or only keys, each `[batch, length, heads, dim]`."""
    shared = repeat_heads(k, q.shape[2], "k")
    return (q, shared) if q.shape[1] == k.shape[1] else (shared,)


def choose(
    parts: tuple[jax.Array, ...], real: jax.Array, draws: jax.Array, count: int, choice: str, ridge: float
) -> tuple[jax.Array, jax.Array]:
    """Landmarks `[batch, ≤ count, heads, dim]`, and bool `[batch, ≤ count]`, which of them exist (the others are zero).

    `parts` are queries and keys, or only keys, each `[batch, length, heads, dim]`; `real` is the mask of each part.
    """
    if choice in ("leverage", "kmeans"):
        x, real = stacked(parts, real)
        score = kernel_leverage(fold(draws, 0), x, real, kernel=gaussian, pilots=count, ridge=ridge)
        position = draw_by_weight(fold(draws, 1), jnp.log(score), real, count)
        valid = jnp.arange(position.shape[1]) < real.sum(1)[:, None]
        z = tokens_at(x, position) if choice == "leverage" else lloyd(x, real, position)
        return jnp.where(valid[..., None, None], z, 0), valid
    # Half of the landmarks come from the queries, if there are any, the others from the keys.
    shares = [(parts[-1], 1, count - (len(parts) - 1) * (count // 2)), (parts[0], 0, count // 2)][: len(parts)]
    if choice == "segments":
        chosen = [segment_means(x, real, share) for x, _, share in shares]
    else:
        chosen = [draw(x, real, fold(draws, number), share) for x, number, share in shares]
    z, valid = (jnp.concatenate(pair, axis=1) for pair in zip(*chosen))
    return z, valid


def stacked(parts: tuple[jax.Array, ...], real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys concatenated to one sequence, and its mask."""
    return jnp.concatenate(parts, axis=1), jnp.concatenate([real] * len(parts), axis=1)


def draw(x: jax.Array, real: jax.Array, keys: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`count` real tokens of each example of `x` `[batch, length, heads, dim]`; missing ones are zero, marked False."""
    position, valid = sample_tokens(keys, real, count)
    return jnp.where(valid[:, :, None, None], take_tokens(x, position), 0), valid


def draw_sketch(
    x: jax.Array, real: jax.Array, draws: jax.Array, landmarks: int, accumulate: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens of an accumulated sketch `[batch, accumulate · landmarks, heads, dim]`, their mask, and their signs.

    Landmark j sums the tokens j, j + landmarks, ... with the signs `[batch, accumulate, landmarks]`. A sign is ±
    accumulate^-½, or zero for a missing token. So every landmark gets one token before any gets two.
    """
    count = accumulate * landmarks
    z, valid = draw(x, real, fold(draws, 0), count)
    missing = count - z.shape[1]
    z, valid = jnp.pad(z, ((0, 0), (0, missing), (0, 0), (0, 0))), jnp.pad(valid, ((0, 0), (0, missing)))
    signs = jax.vmap(lambda key: jax.random.rademacher(key, (count,), z.dtype))(fold(draws, 1))
    return z, valid, (signs * valid * accumulate**-0.5).reshape(-1, accumulate, landmarks)


def merge(x: jax.Array, signs: jax.Array) -> jax.Array:
    """Sums rows of tokens `[batch, heads, accumulate · landmarks, n]`, with signs, to rows of landmarks."""
    rows = x.reshape(*x.shape[:2], *signs.shape[1:], x.shape[-1])
    return (rows * signs[:, None, ..., None].astype(x.dtype)).sum(2)


def gaussian(x: jax.Array, y: jax.Array) -> jax.Array:
    """exp(−‖x_i − y_j‖² / (2√K)), `[..., n, m]`, from `[..., n, K]` and `[..., m, K]`."""
    dot = jnp.matmul(x, y.mT, precision=jax.lax.Precision.HIGHEST)
    x_norm, y_norm = (jnp.square(z).sum(-1) / 2 for z in (x, y))
    # Rounding may make a squared distance negative.
    return jnp.exp(jnp.minimum(dot - x_norm[..., :, None] - y_norm[..., None, :], 0) * x.shape[-1] ** -0.5)


def gaussian_gram(x: jax.Array) -> jax.Array:
    """`gaussian` of all pairs of the rows of `x` `[..., n, K]`, exactly 1 on the diagonal."""
    return jnp.where(jnp.eye(x.shape[-2], dtype=bool), 1, gaussian(x, x))


def core_solve(core: jax.Array, sums: jax.Array, inverse: str, iterations: int) -> jax.Array:
    """core⁻¹ sums, `[batch, heads, landmarks, v_dim]`."""
    if inverse == "cholesky":
        return spd_solve(core, sums)
    # Normalised by its row sums, the core has its spectrum in (0, 1] with largest eigenvalue 1 (Lemma 3 of the paper).
    d = jax.lax.rsqrt(core.sum(-1, keepdims=True))
    eye = jnp.broadcast_to(jnp.eye(core.shape[-1], dtype=core.dtype), core.shape)
    inverse, _ = newton_inverse(d * core * d.mT, iterations, start=eye)
    return d * jnp.matmul(inverse, d * sums, precision=jax.lax.Precision.HIGHEST)


class Skyformer(MultiHead):
    """Multi-head Skyformer attention; options as in `skyformer`, other arguments as in `MultiHead`.

    Raises:
      ValueError: `causal=True` (the landmarks see the whole sequence), or an option out of its range.
    """

    paper = "Chen et al. 2021, arXiv 2111.00035"
    computes = "`kernelized` through the Nyström method with m landmarks"
    cost = "n·m + m³"
    function = staticmethod(skyformer)
    exact = staticmethod(kernelized)
    chosen = staticmethod(landmark_tokens)
    near_on = ("clustered", "imbalanced")
    draws = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"landmarks": budget}

    def state_numbers(self, length: int) -> int:
        return 2 * self.landmarks * self.heads * self.head_dim
