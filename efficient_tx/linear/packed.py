"""Packed: the base class of layers for inference, stored in fewer bytes than the trained ones they are made of."""

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.linear.structured import Weight


class Packed(nnx.Module):
    """A layer for inference, made by `pack` of a trained one. Its variables are no parameters: it cannot be trained.

    Its output equals that of the trained layer, up to the rounding of one addition (the bias, which XLA may fuse with
    a product). What is packed is unpacked in each call. A packed form implements `weights` and `multiply`, as the
    structure does, or has the structure's `multiply`.

    Args:
      layer: the trained layer, which gives the widths, dtypes and bias.
      **arrays: what is stored of the weight; each becomes a variable of this name.
    """

    def __init__(self, layer: Weight, **arrays: jax.Array):
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.dtype = layer.dtype
        self.param_dtype = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, nnx.Param))))
        self.bias = None if layer.bias is None else nnx.Variable(layer.bias[...])
        for name, array in arrays.items():
            setattr(self, name, nnx.Variable(array))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`; raises ValueError for an input of another width."""
        self.check_width(x)
        dtype = self.dtype or jnp.result_type(x, self.param_dtype)
        out = self.multiply(x.astype(dtype), **self.weights(dtype))
        return out if self.bias is None else out + self.bias[...].astype(dtype)

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """The arguments of `multiply`, from what is stored."""
        raise NotImplementedError

    def multiply(self, x: jax.Array, **weights: jax.Array) -> jax.Array:
        """x · W, without the bias: `[..., in_features]` -> `[..., out_features]`."""
        raise NotImplementedError

    def to_dense(self) -> jax.Array:
        """The weight without the bias, `[in_features, out_features]`, in the dtype of the trained parameters."""
        return self.multiply(jnp.eye(self.in_features, dtype=self.param_dtype), **self.weights(self.param_dtype))

    bytes_stored = Weight.bytes_stored
    check_width = Weight.check_width
