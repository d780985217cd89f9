"""The static options of an implementation of gated_linear_attention."""

from typing import NamedTuple, Self

import jax

from efficient_tx.kernels.precision import full


class Options(NamedTuple):
    """Static and hashable; see `gated_linear_attention`."""

    scale: float
    reverse: bool
    precision: jax.lax.PrecisionLike

    @classmethod
    def of(cls, q: jax.Array, scale: float | None, reverse: bool, precision: jax.lax.PrecisionLike) -> Self:
        """None is head_dim^-½, and whole float32 products."""
        return cls(
            q.shape[-1] ** -0.5 if scale is None else float(scale),
            bool(reverse),
            full(precision),
        )
