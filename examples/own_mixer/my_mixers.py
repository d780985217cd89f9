"""Two token mixers of your own: one names its function, the other writes `mix`.

Command:   cd examples/own_mixer
           python -m efficient_tx.train --config=quickstart:my_mixers:SquaredReLU --workdir=runs/relu
           python -m efficient_tx.train --config=quickstart:my_mixers:Shift,softmax --workdir=runs/shift
           python -m efficient_tx.eval --workdir=runs/relu --set attention.SquaredReLU.power=3
Duration:  minutes each on 2 CPU cores; add --config.steps=100 for a first look
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention import Mixer, MultiHead


def squared_relu(q, k, v, *, mask: jax.Array | None = None, power: int = 2):
    """Attention with the weights max(q·k, 0)^power, divided by their sum.

    Args:
      q, k, v: `[batch, length, heads, head_dim]`.
      mask: bool `[batch, length]`, True for real tokens.
      power: of the weights; --config.attention.SquaredReLU.power=3 sets it.
    """
    weights = jnp.maximum(jnp.einsum("bihd,bjhd->bhij", q, k), 0) ** power
    if mask is not None:
        weights = jnp.where(mask[:, None, None, :], weights, 0)  # padding counts nowhere
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
    return jnp.einsum("bhij,bjhd->bihd", weights, v)


class SquaredReLU(MultiHead):
    """Projections, heads, positions and dropout come from MultiHead; the options from the function's signature."""

    function = staticmethod(squared_relu)
    can_be_causal = False  # the function has no argument `causal`


class Shift(Mixer):
    """Half of a token's features come from the token before it: no projections, no heads."""

    has_positions = False  # there are no queries and keys to turn

    def mix(self, x, *, mask, key):
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        half = self.features // 2
        return jnp.concatenate([x[..., :half], before[..., half:]], axis=-1)
