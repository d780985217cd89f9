"""Structured: what all structured weights share: the signature of `nnx.Linear`, the bias, to dense and back."""

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx


def like_dense(cls: type, kernel: jax.Array, bias: jax.Array | None, options: dict[str, Any]) -> nnx.Module:
    """A layer of this class with the sizes and dtype of `kernel` `[in_features, out_features]` and a copy of `bias`.

    Raises:
      ValueError: kernel is no matrix.
    """
    if kernel.ndim != 2:
        raise ValueError(f"kernel has shape {kernel.shape}: from_dense takes a matrix [in_features, out_features]")
    options = {"param_dtype": kernel.dtype} | options
    layer = cls(*kernel.shape, use_bias=bias is not None, rngs=nnx.Rngs(0), **options)
    if bias is not None:
        layer.bias[...] = bias.astype(layer.param_dtype)
    return layer


class Structured(nnx.Module):
    """A linear layer whose weight is a product of small factors. A structure writes `make`, `multiply` and `fit`.

    Args:
      in_features: width of the input, any size (a structure pads inside).
      out_features: width of the output, any size.
      use_bias: adds a bias, zero at the start.
      dtype: of the computation; None promotes input and factors.
      param_dtype: of the stored factors.
      rngs: source of the initial factors, drawn so that the output's variance is that of a dense layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: jnp.dtype | None = None,
        param_dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if use_bias else None
        for name, (shape, variance) in self.factors().items():
            value = jax.random.normal(rngs.params(), shape, param_dtype) * jnp.sqrt(variance).astype(param_dtype)
            setattr(self, name, nnx.Param(value))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`."""
        names = [*self.factors(), *([] if self.bias is None else ["bias"])]
        dtype = self.dtype or jnp.result_type(x, *(getattr(self, name)[...] for name in names))
        factors = {name: getattr(self, name)[...].astype(dtype) for name in names}
        bias = factors.pop("bias", 0)
        return self.multiply(x.astype(dtype), **factors) + bias

    def factors(self) -> dict[str, tuple[tuple[int, ...], float]]:
        """The factors: name -> (shape, variance of their entries at the start)."""
        raise NotImplementedError

    def multiply(self, x: jax.Array, **factors: jax.Array) -> jax.Array:
        """x · W, without the bias: `[..., in_features]` -> `[..., out_features]`."""
        raise NotImplementedError

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        """The factors whose product is nearest to `kernel` `[in_features, out_features]` in Frobenius norm."""
        raise NotImplementedError

    def to_dense(self) -> jax.Array:
        """The weight as one matrix, `[in_features, out_features]`, in the dtype of the factors."""
        factors = {name: getattr(self, name)[...] for name in self.factors()}
        return self.multiply(jnp.eye(self.in_features, dtype=self.param_dtype), **factors)

    @classmethod
    def from_dense(cls, kernel: jax.Array, bias: jax.Array | None = None, **options) -> Self:
        """The layer nearest to a dense one, deterministic.

        Args:
          kernel: `[in_features, out_features]`, of a floating dtype, which the factors take over unless `param_dtype`
            says otherwise; the fit is float32 at least.
          bias: `[out_features]`, copied; None makes a layer without bias.
          **options: of the structure, as in its constructor.

        Raises:
          ValueError: kernel is no matrix.
        """
        layer = like_dense(cls, kernel, bias, options)
        wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        for name, value in layer.fit(wide).items():
            getattr(layer, name)[...] = value.astype(layer.param_dtype)
        return layer
