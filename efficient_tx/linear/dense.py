"""Dense: `nnx.Linear` with the two methods that every structured weight has."""

from typing import Self

import jax
from flax import nnx

from efficient_tx.linear.structured import like_dense


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
        layer = like_dense(cls, kernel, bias, options)
        layer.kernel[...] = kernel.astype(layer.param_dtype)
        return layer
