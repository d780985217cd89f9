"""Dense: `nnx.Linear` with the methods of structured weights."""

import jax
from flax import nnx

from efficient_tx.linear.structured import Weight, scale_array


class Dense(Weight, nnx.Linear):
    """The plain linear layer, `W` `[in_features, out_features]`: the baseline of all structures."""

    computes = "W itself"
    size = "n²"
    nearest = "itself"
    own_projection = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`; raises ValueError for an input of another width."""
        self.check_width(x)
        return super().__call__(x)

    @property
    def multiplies(self) -> int:
        return self.in_features * self.out_features

    def to_dense(self) -> jax.Array:
        return self.kernel[...]

    def rescale(self, factor: float) -> None:
        scale_array(self.kernel, factor)

    def set_dense(self, kernel: jax.Array) -> None:
        self.kernel[...] = kernel.astype(self.param_dtype)
