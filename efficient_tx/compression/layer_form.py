"""LayerForm: what a linear layer is, without its values: structure with options, sizes, dtypes."""

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
      dtype: of the computation; None promotes input and parameters.
      param_dtype: of the parameters.
    """

    form: Form
    in_features: int
    out_features: int
    use_bias: bool
    dtype: jnp.dtype | None = None
    param_dtype: jnp.dtype = jnp.float32

    @classmethod
    def of(cls, structure: type[Weight], like: nnx.Module, **options: Any) -> "LayerForm":
        """The form of a layer of this structure with the sizes and dtypes of another layer."""
        form, bias = Form(structure, **options), like.bias is not None
        return cls(form, like.in_features, like.out_features, bias, like.dtype, like.param_dtype)

    def make(self) -> Weight:
        """A layer of this form, whose values are drawn from a fixed seed.

        Raises:
          ValueError: the structure does not allow the sizes or options.
        """
        common = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return self.form(self.in_features, self.out_features, **common, rngs=nnx.Rngs(0))

    def blank(self) -> Weight:
        """A layer of this form, whose values are all zero."""
        graphdef, state = nnx.split(nnx.eval_shape(self.make))
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), state))
