"""SOFT (Lu et al. 2021, arXiv 2110.11945): Gaussian self-attention with a few bottleneck tokens, linear in length.

One projection is both query and key, so the Gaussian kernel κ(x, y) = exp(−‖x − y‖² / (2√K)) of all pairs of tokens is
positive semi-definite. With bottleneck tokens Z pooled or convolved from Q, and a depthwise convolution of the values,

    out = κ(Q, Z) A⁻¹ κ(Z, Q) V + conv(V),        A = κ(Z, Z) + ridge · I

SOFT++ (Lu et al. 2022, arXiv 2207.03341) replaces A⁻¹ by D^-½ A⁻¹ D^-½, with D the row sums of κ(Z, Z).

Unlike the published code: masks and any length are supported; the default solve is Cholesky, and the published
iteration is an option. SOFT++ uses the ridge and the inverse of SOFT; there, the start and the number of halvings of
its iteration depend on the whole batch (and the released class cannot be constructed).
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.kernelized import kernelized
from efficient_tx.attention.low_rank.skyformer import check_inverse, gaussian_gram
from efficient_tx.checks import OptionError, above_zero, one_of
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.numerics.spd import newton_raphson_inverse, spd_solve
from efficient_tx.tokens.depthwise import depthwise, depthwise_grid, initial_weights
from efficient_tx.tokens.grid import check_square, lay_out
from efficient_tx.tokens.mask import compact, key_mask, repeat_heads
from efficient_tx.tokens.segments import grid_means, segment_means

BOTTLENECKS = ("mean", "convolution")


def check_options(*, landmarks, ridge, inverse, iterations):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if landmarks < 1:
        raise OptionError("landmarks", landmarks, "soft needs at least 1")
    if not ridge > 0:
        raise OptionError("ridge", ridge, "it must be above 0, or tokens that coincide make the kernel singular")
    check_inverse(inverse, iterations)


@checked_by(check_options)
def soft(
    q: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None,
    z: jax.Array | None = None, z_mask: jax.Array | None = None, conv: jax.Array | None = None,
    landmarks: int = 128, grid: bool = False, ridge: float = 0.01,
    inverse: str = "cholesky", iterations: int = 20, symmetric_norm: bool = False,
) -> jax.Array:  # fmt: skip
    """Approximates `gaussian_self_attention` with `landmarks` bottleneck tokens: linear in the length.

    Args:
      q: queries, which are the keys too, `[batch, length, heads, head_dim]`.
      v: `[batch, length, groups, v_dim]`; groups divides heads.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens.
      key: unused, nothing is drawn.
      z: bottleneck tokens `[batch, m, heads, head_dim]`; None takes means of q over segments of the real tokens, or
        over cells of their image.
      z_mask: bool `[batch, m]`, True for valid tokens of z; None means all are valid.
      conv: weights of the depthwise convolution of the values, `[size, heads]`, or on a grid `[size, size, heads]`,
        size odd; None means none.
      landmarks: number of means, used if z is None; with fewer tokens each token is its own mean. On a grid it is
        rounded down to a square number.
      grid: whether the n real tokens are a square image in row-major order, of side ⌈√n⌉, else a sequence.
      ridge: number above 0, added to the diagonal of the bottleneck tokens' kernel matrix.
      inverse: method to solve with the kernel matrix: "cholesky", or "iteration", the published Newton-Raphson
        iteration.
      iterations: steps of the method "iteration".
      symmetric_norm: whether to normalise as in SOFT++, D^-½ A⁻¹ D^-½ instead of A⁻¹.

    Returns:
      `[batch, length, heads, v_dim]` in the dtype of q; zero for an example without tokens. The arithmetic is float32
      at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_rank(q=q, v=v)
    del key
    batch, length, heads, _ = q.shape
    if v.shape[:2] != (batch, length):
        raise ValueError(f"q has shape {q.shape}, v {v.shape}: soft is self-attention, batch and length must agree")
    if grid:
        check_square(length, mask)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    mask = key_mask(mask, batch, length)
    q = q if mask is None else jnp.where(mask[:, :, None, None], q, 0)
    v = repeat_heads(v, heads, "v")
    if z is None:
        z, z_mask = pool(q, mask, landmarks, grid)
    elif z_mask is None:
        z_mask = jnp.ones(z.shape[:2], bool)
    z, real = z.astype(dtype), z_mask[:, None, :, None]

    sums = flash_attention(z, q.astype(dtype), v.astype(dtype), score="gaussian", mask=mask)
    eye = jnp.eye(z.shape[1], dtype=dtype)
    # A missing token is a row of the identity with a zero right-hand side, so it adds zero.
    core = jnp.where(real & real.mT, gaussian_gram(z.swapaxes(1, 2)), eye)
    sums = jnp.where(real, sums.swapaxes(1, 2), 0)
    scale = jax.lax.rsqrt(core.sum(-1, keepdims=True)) if symmetric_norm else 1
    core += ridge * eye
    if inverse == "cholesky":
        weights = scale * spd_solve(core, scale * sums)
    else:
        approximate, _ = newton_raphson_inverse(core, iterations)
        weights = scale * jnp.matmul(approximate, scale * sums, precision=jax.lax.Precision.HIGHEST)
    out = flash_attention(q, z, weights.swapaxes(1, 2), score="gaussian")
    if conv is None:
        return out
    return out + (depthwise_grid if grid else depthwise)(v, conv, mask).astype(out.dtype)


def gaussian_self_attention(
    q: jax.Array, v: jax.Array, *, mask: jax.Array | None = None, key: jax.Array | None = None
) -> jax.Array:
    """The exact form of `soft`: `kernelized` attention with q as queries and keys; arguments as in `soft`."""
    check_rank(q=q, v=v)
    return kernelized(q, q, repeat_heads(v, q.shape[2], "v"), mask=mask, key=key)


def pool(q: jax.Array, mask: jax.Array | None, landmarks: int, grid: bool) -> tuple[jax.Array, jax.Array]:
    """Means of q, `[batch, landmarks or fewer, heads, head_dim]`, and their mask."""
    if grid:
        return grid_means(q, mask, min(math.isqrt(landmarks), math.isqrt(max(q.shape[1] - 1, 0)) + 1))
    return segment_means(q, mask, min(landmarks, q.shape[1]))


def bottleneck_tokens(
    q: jax.Array, *, mask: jax.Array | None = None, z: jax.Array | None = None, landmarks: int = 128, grid: bool = False
) -> jax.Array:
    """The means that are bottleneck tokens, see `Mixer.chosen`; arguments as in `soft`, of which `z` is no mean."""
    mask = key_mask(mask, *q.shape[:2])
    return pool(q, mask, landmarks, grid)[0] if z is None else z[:, :0]


class Soft(MultiHead):
    """Multi-head SOFT attention; options as in `soft`, other arguments as in `MultiHead`.

    Args:
      bottleneck: method that makes the bottleneck tokens: "mean" (no parameters, any length) or "convolution", see
        `Bottleneck`.
      value_conv: size of the depthwise convolution of the values, odd; 0 means none, −1 means 2 ⌊s/2⌋ + 1 with s the
        stride of the convolution bottleneck. On a grid it is the size in both directions. The stages of the paper's
        image models have 9, 5 and 3, which −1 gives.
      norm_epsilon: number added to the variance in the LayerNorm of the convolution bottleneck; None means
        1e-5 √head_dim. The paper's code adds 1e-5 to the variance of queries that it has scaled by head_dim^-¼.
      conv: size of the depthwise convolution of each projection, see `MultiHead`; 0 means none.

    Raises:
      ValueError: `causal=True` (the bottleneck tokens see the whole sequence), an option out of its range, or
        "convolution" without `max_len`.
    """

    paper = "Lu et al. 2021, arXiv 2110.11945"
    computes = "`kernelized` with shared queries and keys through m bottleneck tokens"
    cost = "n·m + m³"
    function = staticmethod(soft)
    exact = staticmethod(gaussian_self_attention)
    chosen = staticmethod(bottleneck_tokens)
    near_on = ("imbalanced",)
    projections = ("q", "v")
    rotated = ("q",)
    formerly: ClassVar = {"norm_epsilon": 1e-6}

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"landmarks": budget}

    def __init__(
        self, features: int, *,
        bottleneck: str = "mean", value_conv: int = 0, norm_epsilon: float | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        one_of(BOTTLENECKS, bottleneck=bottleneck)
        above_zero(norm_epsilon=norm_epsilon)
        super().__init__(features, rngs=rngs, **common)
        convolved = bottleneck == "convolution"
        if convolved and self.max_len is None:
            raise ValueError("bottleneck is 'convolution', whose stride comes from the length: give max_len")
        self.bottleneck = (
            Bottleneck(
                self.head_dim, self.landmarks, self.max_len, grid=self.grid, norm_epsilon=norm_epsilon, rngs=rngs
            )
            if convolved
            else None
        )
        if value_conv == -1:
            if not convolved:
                raise ValueError("value_conv is -1, the stride of the bottleneck: that needs bottleneck='convolution'")
            value_conv = self.bottleneck.stride // 2 * 2 + 1
        sizes = (value_conv,) * (2 if self.grid else 1)
        self.conv = nnx.Param(initial_weights(sizes, self.heads, rngs)) if value_conv else None

    def attend(
        self, q: jax.Array, v: jax.Array, *, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        z, z_mask = (None, None) if self.bottleneck is None else self.bottleneck(q, mask)
        conv = None if self.conv is None else self.conv[...]
        return super().attend(q, v, mask=mask, key=key, z=z, z_mask=z_mask, conv=conv)

    def state_numbers(self, length: int) -> int:
        return 2 * self.landmarks * self.heads * self.head_dim


class Bottleneck(nnx.Module):
    """Bottleneck tokens from a convolution of equal size and stride, LayerNorm and GELU, shared by all heads.

    The stride is such that `max_len` tokens give at most `landmarks` bottleneck tokens; another length gives one per
    window. In a sequence the windows are segments of the real tokens, on a grid squares of their image. Incomplete
    windows are filled with zeros.
    """

    def __init__(
        self, head_dim: int, landmarks: int, max_len: int, *,
        grid: bool, norm_epsilon: float | None = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        if grid:
            self.stride = -(-math.ceil(max_len**0.5) // math.isqrt(landmarks))
        else:
            self.stride = -(-max_len // landmarks)
        self.grid = grid
        window = self.stride**2 if grid else self.stride
        init = nnx.initializers.lecun_normal(in_axis=(0, 1))
        self.kernel = nnx.Param(init(rngs.params(), (window, head_dim, head_dim), jnp.float32))
        # The tokens here are not yet scaled by K^-¼, so their variance is √K times that of the published ones.
        epsilon = 1e-5 * head_dim**0.5 if norm_epsilon is None else norm_epsilon
        self.norm = nnx.LayerNorm(head_dim, epsilon=epsilon, rngs=rngs)

    def __call__(self, q: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """`[batch, length, heads, head_dim]` -> tokens `[batch, m, heads, head_dim]` and their mask `[batch, m]`.

        Tokens are at least float32.
        """
        batch, length, _, head_dim = q.shape
        q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
        if self.grid:
            q, real = map(self.squares, lay_out(q, mask))
        else:
            real = jnp.ones((batch, length), bool) if mask is None else compact(mask, mask)
            q, real = self.pieces(compact(q, mask)), self.pieces(real)
        z = jnp.einsum("bmwhk,wkl->bmhl", q, self.kernel[...].astype(q.dtype), precision=jax.lax.Precision.HIGHEST)
        # The paper scales only the queries by K^-¼. The kernel here scales both, so these tokens get the factor K^¼.
        z = jax.nn.gelu(self.norm(z), approximate=False) * head_dim**0.25
        real = real.any(axis=2)
        return jnp.where(real[..., None, None], z, 0), real

    def pieces(self, x: jax.Array) -> jax.Array:
        """`[batch, length, ...]` cut into windows, the last one filled with zeros: `[batch, m, window, ...]`."""
        x = pad(x, 1, -x.shape[1] % self.stride)
        return x.reshape(x.shape[0], -1, self.stride, *x.shape[2:])

    def squares(self, x: jax.Array) -> jax.Array:
        """`[batch, side, side, ...]` cut into square windows, filled with zeros: `[batch, m, window, ...]`."""
        batch, side, _, *rest = x.shape
        x = pad(pad(x, 1, -side % self.stride), 2, -side % self.stride)
        count = x.shape[1] // self.stride
        x = x.reshape(batch, count, self.stride, count, self.stride, *rest).swapaxes(2, 3)
        return x.reshape(batch, count**2, self.stride**2, *rest)


def pad(x: jax.Array, axis: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, after if a == axis else 0) for a in range(x.ndim)])
