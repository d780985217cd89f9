"""The static options of an implementation of flash_attention."""

from typing import NamedTuple

import jax


class Options(NamedTuple):
    """Static and hashable. With s_ij = scale · q_i·k_j + bias, the weight of key j for query i before the mask is

    softmax:  exp(s_ij) / Σ_j exp(s_ij)
    sigmoid:  1 / (1 + exp(−s_ij))
    gaussian: exp(s_ij − scale · (‖q_i‖² + ‖k_j‖²) / 2) = exp(bias − scale · ‖q_i − k_j‖² / 2)
    """

    score: str
    causal: bool
    scale: float
    bias: float
    precision: jax.lax.Precision


SCORES = ("softmax", "sigmoid", "gaussian")
