"""MLGRU, the token mixer of the MatMul-free language model (Zhu et al. 2024, arXiv 2406.02528).

    f_t = σ(B_f x_t),    h_t = f_t ⊙ h_{t−1} + (1 − f_t) ⊙ silu(B_v x_t),    y_t = B_o [RMSNorm(h_t) ⊙ silu(B_g x_t)]

HGRN (see there) whose projections are BitLinear layers: an RMSNorm, inputs of 8 bits, weights of −1, 0 and 1 times a
scale. Apart from the norms nothing is multiplied by a matrix of numbers. The output is that of `hgrn`: the state is
normed and the gate passes a SiLU. The authors' code has the norm on the gate, and their paper's formula, g_t = σ(B_g
x_t) and B_o [g_t ⊙ h_t], has none.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.recurrent.hgrn import HGRN, hgrn
from efficient_tx.linear.ternary import Ternary


class BitLinear(nnx.Module):
    """A ternary linear layer behind an RMSNorm of its own (Wang et al. 2023, arXiv 2310.11453).

    Args:
      in_features: width of the input.
      out_features: width of the output.
      use_bias: whether a bias is added.
      dtype: dtype of the computation; None means the promoted dtype of input and parameters.
      rngs: source of the initial parameters.
    """

    def __init__(
        self, in_features: int, out_features: int, *,
        use_bias: bool = True, dtype: jnp.dtype | None = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        self.norm = nnx.RMSNorm(in_features, epsilon=1e-8, dtype=dtype, rngs=rngs)
        self.levels = Ternary(in_features, out_features, use_bias=use_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., in_features]` -> `[..., out_features]`."""
        return self.levels(self.norm(x))


class MLGRU(HGRN):
    """The whole layer; arguments as in `HGRN`, but projections are ternary, with a warning where `linear` is not."""

    paper = "Zhu et al. 2024, arXiv 2406.02528"
    computes = "HGRN with ternary projections; both ways if not causal"
    function = staticmethod(hgrn)

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {}

    def __init__(self, features: int, *, linear: Callable = nnx.Linear, **common: Any):
        made = nnx.eval_shape(lambda: linear(features, features, use_bias=False, rngs=nnx.Rngs(0)))
        if not isinstance(made, nnx.Linear):
            warnings.warn(f"mlgru: its projections are ternary, and not of {type(made).__name__}", stacklevel=2)
        super().__init__(features, linear=BitLinear, **common)
