"""A mixer inside Flax Linen's own attention module, and inside NNX's: `as_attention_fn` has the signature they call.

Command:   python examples/reuse_linen.py
Needs:     jax, flax, optax, numpy: what `pip install .` brings
Duration:  seconds on a CPU
"""

import jax
import jax.numpy as jnp
from flax import linen, nnx

from efficient_tx.attention import as_attention_fn


class Block(linen.Module):
    """A sampling mixer draws with the stream "landmarks" of the module around; without that stream it evaluates."""

    @linen.compact
    def __call__(self, x, mask):
        attend = as_attention_fn(
            "skyformer", landmarks=16, key=lambda: self.make_rng("landmarks") if self.has_rng("landmarks") else None
        )
        return linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend)(x, mask=mask)


def main():
    x = jax.random.normal(jax.random.key(0), (2, 64, 32))
    real = jnp.arange(64) < jnp.array([[64], [40]])
    mask = real[:, None, None, :]  # the key mask, [batch, 1, 1, length]

    block = Block()
    parameters = block.init(jax.random.key(1), x, mask)
    print("linen:", block.apply(parameters, x, mask).shape)
    steps = [block.apply(parameters, x, mask, rngs={"landmarks": jax.random.key(step)}) for step in range(2)]
    print("linen, two steps draw the same:", bool((steps[0] == steps[1]).all()))

    rngs = nnx.Rngs(0, features=1)
    attend = as_attention_fn("performer", random_features=32, key=rngs.features)  # the stream is a part of the module
    module = nnx.MultiHeadAttention(4, 32, attention_fn=attend, decode=False, rngs=rngs)
    print("nnx, two steps draw the same:", bool((module(x, mask=mask) == module(x, mask=mask)).all()))
    module.eval()
    print("nnx, two evaluations are the same:", bool((module(x, mask=mask) == module(x, mask=mask)).all()))

    # What a mixer cannot do is an error of one line, never another result.
    causal = jnp.tril(jnp.ones((64, 64), bool))[None, None]
    try:
        block.apply(parameters, x, causal)
    except ValueError as error:
        print("refused:", error)


if __name__ == "__main__":
    main()
