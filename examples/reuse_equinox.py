"""The pure functions inside an Equinox module: they take arrays and give arrays, so any library can hold the weights.

Command:   python examples/reuse_equinox.py
Needs:     `pip install .` and `pip install equinox`; without Equinox it says so and stops
Duration:  seconds on a CPU
"""

import sys

import jax
import jax.numpy as jnp

from efficient_tx.attention import nystromformer

try:
    import equinox as eqx
except ImportError:
    sys.exit("Equinox is not installed: pip install equinox")


class Attention(eqx.Module):
    """Multi-head Nyströmformer attention of one sequence, `[length, features]`; batches come by vmap, as in Equinox."""

    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, features: int, heads: int, *, key):
        first, second = jax.random.split(key)
        self.qkv = eqx.nn.Linear(features, 3 * features, key=first)
        self.out = eqx.nn.Linear(features, features, key=second)
        self.heads = heads

    def __call__(self, x, mask):
        split = (1, x.shape[0], self.heads, -1)  # the functions take [batch, length, heads, head_dim]
        q, k, v = (part.reshape(split) for part in jnp.split(jax.vmap(self.qkv)(x), 3, axis=-1))
        heads = nystromformer(q, k, v, mask=mask[None], landmarks=8)
        return jax.vmap(self.out)(heads.reshape(x.shape))


def main():
    layer = Attention(32, 4, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 64, 32))
    mask = jnp.arange(64) < jnp.array([[64], [40]])

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(layer, x, mask):
        return (jax.vmap(layer)(x, mask) ** 2).mean()

    value, gradients = loss(layer, x, mask)
    finite = all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
    print(f"loss {value:.3f}, gradients finite: {finite}")


if __name__ == "__main__":
    main()
