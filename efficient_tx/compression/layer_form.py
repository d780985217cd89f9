"""LayerForm: what a linear layer is, without its values: structure with options, and sizes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.linear import Form
from efficient_tx.linear.structured import Weight


class LayerForm(NamedTuple):
    """The form of a linear layer.

    Attributes:
      form: structure and options.
      in_features, out_features: widths of input and output.
      use_bias: whether it has a bias.
    """

    form: Form
    in_features: int
    out_features: int
    use_bias: bool

    @classmethod
    def of(cls, structure: type[Weight], like: nnx.Module, **options: Any) -> "LayerForm":
        """The form of a layer of this structure with the sizes of another layer."""
        return cls(Form(structure, **options), like.in_features, like.out_features, like.bias is not None)

    def make(self, *, dtype: jnp.dtype | None = None, param_dtype: jnp.dtype = jnp.float32) -> Weight:
        """A layer of this form, whose values are drawn from a fixed seed.

        Raises:
          ValueError: the structure does not allow the sizes or options.
        """
        common = {"use_bias": self.use_bias, "dtype": dtype, "param_dtype": param_dtype}
        return self.form(self.in_features, self.out_features, **common, rngs=nnx.Rngs(0))

    def blank(self, like: nnx.Module, param_dtype: jnp.dtype | None = None) -> Weight:
        """A layer of this form, with the dtypes of another one unless given, whose values are all zero."""
        param_dtype = like.param_dtype if param_dtype is None else param_dtype
        shapes = nnx.eval_shape(lambda: self.make(dtype=like.dtype, param_dtype=param_dtype))
        graphdef, state = nnx.split(shapes)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state))
