"""Form: what a linear layer is, without its values: structure, sizes and options."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.linear.structured import Weight


class Form(NamedTuple):
    """The form of a linear layer.

    Attributes:
      structure: class of the layer.
      in_features, out_features: widths of input and output.
      use_bias: whether it has a bias.
      options: (name, value) of the structure's options, sorted by name.
    """

    structure: type[Weight]
    in_features: int
    out_features: int
    use_bias: bool
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, structure: type[Weight], like: nnx.Module, **options: Any) -> "Form":
        """The form of a layer of this structure with the sizes of another layer."""
        return cls(
            structure, like.in_features, like.out_features, like.bias is not None, tuple(sorted(options.items()))
        )

    def make(self, *, dtype: jnp.dtype | None = None, param_dtype: jnp.dtype = jnp.float32) -> Weight:
        """A layer of this form, whose values are drawn from a fixed seed.

        Raises:
          ValueError: the structure does not allow the sizes or options.
        """
        return self.structure(
            self.in_features,
            self.out_features,
            use_bias=self.use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
            **dict(self.options),
        )

    def blank(self, like: nnx.Module) -> Weight:
        """A layer of this form, with the dtypes of another one, whose values are all zero."""
        shapes = nnx.eval_shape(lambda: self.make(dtype=like.dtype, param_dtype=like.param_dtype))
        graphdef, state = nnx.split(shapes)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state))
