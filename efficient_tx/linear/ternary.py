"""Ternary: W = α T with entries −1, 0 and 1 in T, and 8-bit inputs.

BitLinear of Wang et al. 2023, arXiv 2310.11453, with the ternary levels of Ma et al. 2024, arXiv 2402.17764:

    α = mean |w|,   T = clip(round(w / α), −1, 1),   n = round(127 x / max |x|) for each token,
    y = (n T) · α max |x| / 127

with a latent dense weight w. Straight-through gradients ignore the rounding and the clip.
"""

import math

import jax
import jax.numpy as jnp

from efficient_tx.linear.packed import Packed
from efficient_tx.linear.straight_through import straight_through
from efficient_tx.linear.structured import Factor, Structured

STEPS = 127
# α² times the fraction of nonzero levels, for a normal latent weight of variance 1: (E|w|)² P(|w| > E|w| / 2).
NORMAL = 2 / math.pi * math.erfc(0.5 / math.sqrt(math.pi))


def eight_bits(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds the inputs of each token to integer steps: x ≈ steps · unit.

    Args:
      x: `[..., features]`, floating.

    Returns:
      steps `[..., features]`, integers from −127 to 127 in the dtype of x, with the gradient of x / unit; and unit
      `[..., 1]`, float32 at least, without gradient.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
    steps = wide / jnp.where(peak == 0, 1, peak) * STEPS
    return straight_through(steps, jnp.round(steps)).astype(x.dtype), peak / STEPS


def ternary_levels(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Levels −1, 0 and 1 of a latent weight, and their scale, float32 at least; only the levels have a gradient."""
    kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    scale = jax.lax.stop_gradient(jnp.mean(jnp.abs(kernel)))
    levels = kernel / jnp.where(scale == 0, 1, scale)
    return straight_through(levels, jnp.clip(jnp.round(levels), -1, 1)), scale


@jax.jit
def nearest_latent(kernel: jax.Array) -> jax.Array:
    """The latent weight whose ternary weight is nearest to `kernel` `[n, m]`: see `Ternary`."""
    size = jnp.abs(kernel)
    sums = jnp.cumsum(jnp.sort(size, axis=None, descending=True))
    count = jnp.arange(1, size.size + 1, dtype=size.dtype)
    best = jnp.argmax(sums**2 / count)  # the squared error is ‖W‖² minus this
    scale = sums[best] / count[best]
    half = scale / 2
    over = jnp.maximum(size - half, 0)
    stretch = (size.size * scale - jnp.sum(size - over)) / jnp.sum(over)
    return jnp.sign(kernel) * jnp.where(over > 0, half + stretch * over, size)


class Ternary(Structured):
    """A linear layer with ternary weights, trained through a dense latent weight `kernel`; without a norm inside.

    Integers up to 127 and three levels are exact in any dtype, and they are summed in float32 at least. So on every
    backend the product before scaling is exact for up to 2²⁴ / 127 inputs.

    `from_dense` finds the nearest α T exactly: T must be the signs of the k largest entries and α their mean absolute
    value, and all k are tried on the sorted entries. The latent weight keeps the small entries and stretches the others
    away from the threshold α / 2 until its mean absolute value is α. So T is its rounding, and the order of the entries
    is kept.
    """

    paper = "Wang et al. 2023, arXiv 2310.11453; Ma et al. 2024, arXiv 2402.17764"
    computes = "α T, T of −1, 0 and 1; x in 8 bits"
    size = "n², packed for inference in 2 bits each"
    nearest = "sorting"
    latent = True
    input_step = 1 / STEPS

    def factors(self) -> dict[str, Factor]:
        shape = (self.in_features, self.out_features)
        return {"kernel": Factor(shape, fan_in=self.in_features, variance=1 / (NORMAL * self.in_features))}

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        levels, scale = ternary_levels(self.kernel[...])
        return {"levels": levels.astype(dtype), "scale": scale}

    def multiply(self, x: jax.Array, *, levels: jax.Array, scale: jax.Array) -> jax.Array:
        steps, unit = eight_bits(x)
        return (jnp.matmul(steps, levels, preferred_element_type=unit.dtype) * (unit * scale)).astype(x.dtype)

    @property
    def multiplies(self) -> int:
        """Products with the levels, one per input and per output with their scales, and one of the two scales."""
        return (self.in_features + 1) * (self.out_features + 1)

    def to_dense(self) -> jax.Array:
        levels, scale = ternary_levels(self.kernel[...])
        return (levels * scale).astype(self.param_dtype)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        return {"kernel": nearest_latent(kernel)}

    def pack(self) -> "PackedTernary":
        """The layer for inference, with four weights per byte."""
        return PackedTernary(self)


class PackedTernary(Packed):
    """2 bits per weight, products of 8-bit integers summed in 32 bits.

    Attributes:
      codes: uint8 `[⌈in_features / 4⌉, out_features]`; with n such rows, bits 2p and 2p + 1 of row i hold the level of
        input i + p n plus 1.
      scale: scale of the levels, a scalar, float32 at least.
    """

    def __init__(self, layer: Ternary):
        levels, scale = ternary_levels(layer.kernel[...])
        codes = jnp.pad(levels.astype(jnp.int8) + 1, [(0, -layer.in_features % 4), (0, 0)], constant_values=1)
        planes = codes.astype(jnp.uint8).reshape(4, -1, layer.out_features)
        codes = planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6
        super().__init__(layer, codes=codes, scale=scale)

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        del dtype
        planes = jnp.stack([self.codes[...] >> shift & 3 for shift in (0, 2, 4, 6)])
        levels = planes.reshape(-1, self.out_features)[: self.in_features].astype(jnp.int8) - 1
        return {"levels": levels, "scale": self.scale[...]}

    def multiply(self, x: jax.Array, *, levels: jax.Array, scale: jax.Array) -> jax.Array:
        steps, unit = eight_bits(x)
        product = jnp.matmul(steps.astype(jnp.int8), levels, preferred_element_type=jnp.int32)
        return (product.astype(unit.dtype) * (unit * scale)).astype(x.dtype)

    def to_dense(self) -> jax.Array:
        weights = self.weights(self.param_dtype)
        return (weights["levels"] * weights["scale"]).astype(self.param_dtype)
