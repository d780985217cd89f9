"""Dense: `nnx.Linear` with the two methods that every structured weight has."""

from typing import Self

import jax
from flax import nnx


class Dense(nnx.Linear):
    """The plain linear layer, `W` `[in_features, out_features]`: what the structures are compared with."""

    def to_dense(self) -> jax.Array:
        """The weight, `[in_features, out_features]`."""
        return self.kernel[...]

    @classmethod
    def from_dense(cls, kernel: jax.Array, bias: jax.Array | None = None, **options) -> Self:
        """The layer with this `kernel` `[in_features, out_features]` and this `bias` `[out_features]` or none.

        Raises:
          ValueError: kernel is no matrix.
        """
        if kernel.ndim != 2:
            raise ValueError(f"kernel has shape {kernel.shape}: from_dense takes a matrix [in_features, out_features]")
        options = {"param_dtype": kernel.dtype} | options
        layer = cls(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0), **options)
        layer.kernel[...] = kernel.astype(layer.param_dtype)
        if bias is not None:
            layer.bias[...] = bias.astype(layer.param_dtype)
        return layer
