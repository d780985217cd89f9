"""DenseShift: W = ±γ 2^s, signed powers of two without zero (Li et al. 2022, arXiv 2208.09708).

A product with ±2^s is a change of sign and an addition to the exponent. Sign and shift have one latent parameter each
(sign–scale decomposition), so a weight can change its sign without passing through small values:

    sign = ±1, the sign of u,   s = clip(round(√in · v), 0, 2^(bits − 1) − 1),   W = γ / unit · sign · 2^s

The fixed `unit` gives the output the variance of a dense layer's output at initialisation, where γ is 1. Unlike in the
paper, which builds s from one latent parameter per step, one latent parameter is rounded, which needs less memory.
Unlike in the authors' code, whose backward pass is that of sign · √(s + 1) in place of sign · 2^s, the gradients here
are those of the forward pass: larger for large shifts.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.linear.bit_planes import from_planes, to_planes
from efficient_tx.linear.packed import Packed
from efficient_tx.linear.straight_through import straight_through
from efficient_tx.linear.structured import Factor, Structured, scale_array

SPREAD = 0.5  # standard deviation of the initial shifts, before rounding


def decode(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes of any shape (sign bit, then bits − 1 bits of shift) to ±2^shift, float32 (exact)."""
    magnitude = jnp.int32(1) << (codes & (2 ** (bits - 1) - 1)).astype(jnp.int32)
    return jnp.where(codes >> (bits - 1) == 1, -magnitude, magnitude).astype(jnp.float32)


@partial(jax.jit, static_argnums=1)
def nearest_shifts(size: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """The scale and shifts of the best approximation scale · 2^shift.

    The nearest level of a size is 2^s if size / scale is between 1.5 · 2^(s − 1) and 1.5 · 2^s. For given levels 2^s
    the best scale is ⟨size, 2^s⟩ / ⟨2^s, 2^s⟩; the squared error is then ‖size‖² − ⟨size, 2^s⟩² / ⟨2^s, 2^s⟩.

    Args:
      size: absolute values of the weights, `[n, m]`.
      bits: bits of a weight, as in `DenseShift`.

    Returns:
      The scale, a scalar, and shifts before rounding, `[n, m]`.
    """
    most = 2 ** (bits - 1) - 1
    powers = 2.0 ** jnp.arange(most, dtype=size.dtype)[:, None]
    passed = (size.ravel() / (1.5 * powers)).ravel()  # below this scale a size is nearer to level s + 1 than to s
    squares = jnp.broadcast_to(3 * powers**2, (most, size.size)).ravel()  # 4^(s + 1) − 4^s
    passed, squares = jax.lax.sort((-passed, squares), num_keys=1)
    square = jnp.append(0, jnp.cumsum(squares)) + size.size
    inner = jnp.append(0, jnp.cumsum(-passed * squares / 2)) + jnp.sum(size)
    best = jnp.argmax(inner**2 / square)
    ratio = size * square[best] / jnp.where(inner[best] == 0, 1, inner[best])  # size / scale
    shift = jnp.clip(jnp.log2(ratio) + 0.5 - math.log2(1.5), -0.5, most + 0.5)
    levels = decode(jnp.clip(jnp.round(shift), 0, most).astype(jnp.uint8), bits).astype(size.dtype)
    return jnp.vdot(size, levels) / jnp.vdot(levels, levels), shift


class DenseShift(Structured):
    """A linear layer whose weights are signed powers of two times one trained number.

    The scale γ is one real number per matrix and costs one product per output. Rounded to a power of two, it could
    double the whole layer in one training step. Latent parameters are in units of a dense layer's weights, 1 / √in, so
    learning rates have the same meaning as in a dense layer. The shifts start near the middle of their range with a
    small deviation. Straight-through gradients ignore both roundings and the clip: u gets the gradient of |W| · sign, v
    that of 2^s.

    `from_dense` finds exactly the best scale, with every entry at its nearest level. An entry changes its level at
    certain scales, and between two such scales the error is a parabola. All intervals are tried in sorted order
    (shifts · in · out numbers are sorted). Within a level the latent shift follows log₂ |w|. A zero weight has no
    nearest one; it gives γ = 0.

    Args:
      bits: bits per weight, from 2 to 5: one for the sign, the others for a shift of at most 2^(bits − 1) − 1.

    Raises:
      ValueError: `bits` is not from 2 to 5.
    """

    paper = "Li et al. 2022, arXiv 2208.09708"
    computes = "γ · ±2^s"
    size = "2·n² + 1, packed for inference in 3 bits a weight"
    nearest = "sorting"

    def __init__(self, in_features: int, out_features: int, *, bits: int = 3, **common: Any):
        if not 2 <= bits <= 5:
            raise OptionError("bits", bits, "it must be from 2 to 5, one of them for the sign")
        self.bits = bits
        self.most = 2 ** (bits - 1) - 1
        self.unit = math.sqrt(in_features * self._mean_square())
        super().__init__(in_features, out_features, **common)
        self.gain = nnx.Param(jnp.ones((), self.param_dtype))  # no factor: has the base learning rate, as norms

    def _mean_square(self) -> float:
        """E 4^s of the initial shifts, which are normal around the middle of their range, rounded and clipped."""

        def below(shift):
            return 0.5 * math.erfc((self.most / 2 - shift) / (SPREAD * math.sqrt(2)))

        edges = [0.0, *(below(shift + 0.5) for shift in range(self.most)), 1.0]
        return sum(4**shift * (edges[shift + 1] - edges[shift]) for shift in range(self.most + 1))

    def factors(self) -> dict[str, Factor]:
        shape, width = (self.in_features, self.out_features), self.in_features
        return {
            "sign": Factor(shape, fan_in=width),
            "shift": Factor(shape, fan_in=width, variance=SPREAD**2 / width),
        }

    def draw(self, key: jax.Array, name: str, factor: Factor) -> jax.Array:
        middle = 0.5 * self.most / math.sqrt(self.in_features) if name == "shift" else 0.0
        return super().draw(key, name, factor) + jnp.asarray(middle, self.param_dtype)

    def codes(self) -> jax.Array:
        """The weight without its scale, uint8 `[in_features, out_features]` with `bits` bits: sign, then shift."""
        latent = self.shift[...].astype(jnp.promote_types(self.param_dtype, jnp.float32))
        steps = jnp.clip(jnp.round(latent * math.sqrt(self.in_features)), 0, self.most).astype(jnp.uint8)
        return steps | (self.sign[...] < 0).astype(jnp.uint8) << (self.bits - 1)

    def scale(self) -> jax.Array:
        """What the levels ±2^s are multiplied with, γ / unit, a scalar, float32 at least."""
        return self.gain[...].astype(jnp.promote_types(self.param_dtype, jnp.float32)) / self.unit

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        levels = decode(self.codes(), self.bits)
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        # To first order: d sign = √in du, d 2^s = ln 2 · 2^s √in dv.
        latent = jnp.abs(levels) * self.sign[...].astype(wide) + math.log(2) * levels * self.shift[...].astype(wide)
        levels = straight_through(math.sqrt(self.in_features) * latent, levels)
        return {"levels": levels.astype(dtype), "scale": self.scale()}

    def multiply(self, x: jax.Array, *, levels: jax.Array, scale: jax.Array) -> jax.Array:
        return (x @ levels * scale).astype(x.dtype)

    @property
    def multiplies(self) -> int:
        """Products with the levels, which XLA computes like all others, and one per output with the scale."""
        return self.in_features * self.out_features + self.out_features

    def to_dense(self) -> jax.Array:
        weights = self.weights(jnp.promote_types(self.param_dtype, jnp.float32))
        return (weights["levels"] * weights["scale"]).astype(self.param_dtype)

    def rescale(self, factor: float) -> None:
        scale_array(self.gain, factor)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        scale, shift = nearest_shifts(jnp.abs(kernel), self.bits)
        return {"sign": kernel, "shift": shift / math.sqrt(self.in_features), "gain": scale * self.unit}

    def pack(self) -> "PackedDenseShift":
        """The layer for inference, with `bits` bits per weight."""
        return PackedDenseShift(self)


class PackedDenseShift(Packed):
    """The codes of the weights in planes of one bit, and their scale; multiplied as floating-point numbers.

    Attributes:
      planes: uint8 `[bits, ⌈in_features / 8⌉, out_features]`: see `to_planes`; the last plane is the sign.
      scale: what the levels are multiplied with, a scalar, float32 at least.
    """

    multiply = DenseShift.multiply

    def __init__(self, layer: DenseShift):
        super().__init__(layer, planes=to_planes(layer.codes(), layer.bits), scale=layer.scale())

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        planes = self.planes[...]
        levels = decode(from_planes(planes, self.in_features), len(planes))
        return {"levels": levels.astype(dtype), "scale": self.scale[...]}
